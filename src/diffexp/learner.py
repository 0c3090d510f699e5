"""The optimiser: accumulates gradients, sums them over processes, clips them, refuses numbers that went bad."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffexp.errors import UserError
from diffexp.parallel import ALONE, Ranks


class Learner:
    """AdamW over a LoRA's named parameters. ``max_grad_norm`` bounds the gradient's Euclidean norm.

    Each of the ``ranks`` adds its samples' share of the gradient; all of them take the same step.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        eps: float = 1e-8,
        max_grad_norm: float = 1.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = dict(parameters)
        self.max_grad_norm, self.ranks = max_grad_norm, ranks
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=eps
        )

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's share of the loss."""
        loss.backward()

    def step(self) -> float:
        """Updates the parameters with what was accumulated; returns the gradient's norm before clipping.

        Raises:
            UserError: if the gradient is not finite. The parameters are then as they were.
        """
        self.ranks.sum(self.gradients())
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        if not torch.isfinite(torch.tensor(norm)):
            self.optimizer.zero_grad()
            raise UserError(
                "the gradient is not finite, so no update was made: lower optimizer.learning_rate, or use "
                "model.precision = 'bf16' or 'fp32' instead of 'fp16'"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradients(self) -> list[Tensor]:
        """Every parameter's gradient, zeros where this process had nothing to add."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """The optimiser's tensors, as ``<parameter>.<exp_avg | exp_avg_sq | step>``."""
        return {
            f"{name}.{key}": tensor.detach().cpu().clone()
            for name, parameter in self.parameters.items()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``state`` returned."""
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            parameter = self.parameters[name]
            # AdamW keeps its step counter on the CPU
            value = tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)
            self.optimizer.state[parameter][key] = value
