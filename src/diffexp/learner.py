"""The optimiser: accumulates gradients, sums them over processes, clips them, and lets no bad number through."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffexp.errors import UserError
from diffexp.memory import MicroBatch
from diffexp.processes.parallel import ALONE, Ranks
from diffexp.samples import Fault, Samples, faults

Figures = dict[str, float]


class Share(NamedTuple):
    """What some samples add to the loss, with its graph; to other ``figures``; and what their loss was computed from.

    ``stages`` are tensors (B, …), in the order of ``diffexp.samples.STAGES``: they tell where a sample went bad.
    """

    loss: Tensor
    figures: Mapping[str, Tensor] = {}
    stages: Mapping[str, Tensor] = {}


Losses = Callable[[list[int], int], Iterator[Share]]
"""(rows, count) → the shares of these rows of this process, as parts of a mean over ``count`` samples."""


class Learner:
    """AdamW over what trains, by name: a LoRA, or a whole network.

    ``max_grad_norm`` bounds the gradient's Euclidean norm.
    Each of the ``ranks`` adds its samples' share of the gradient; all of them take the same step. ``batch`` bounds how
    many samples go through one backward pass. ``max_dropped`` is the share of samples that may go bad. Losses are
    multiplied by ``loss_scale``, a power of two, on their way back, and gradients divided by it, so that small ones get
    through a network in fp16 (Micikevicius et al., ICLR 2018). Where that overflows, the scale is lowered.
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
        batch: MicroBatch | None = None,
        max_dropped: float = 0.1,
        loss_scale: float = 1.0,
    ) -> None:
        self.parameters = dict(parameters)
        self.max_grad_norm, self.ranks = max_grad_norm, ranks
        self.batch, self.max_dropped = batch or MicroBatch(4, "update.batch"), max_dropped
        self.loss_scale = loss_scale
        # an attempt that is done over takes back what it added to the journals since the update began: their marks
        self.journals: list[list[Any]] = []
        self.marks: list[int] = []
        self.witnesses: list[tuple[list[int], dict[str, Tensor]]] = []  # the attempt's rows, and a number of each stage
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            eps=eps,
            foreach=False,  # all tensors at once would take as much memory again as a whole network's weights
        )

    def samples(self, prompts: Sequence[str]) -> Samples:
        """The samples of a new iteration, all of them still good."""
        return Samples(prompts, self.ranks, self.max_dropped)

    def update(
        self, samples: Samples, losses: Losses, part: Collection[int] | None = None, figures: Iterable[str] = ()
    ) -> Figures:
        """One optimiser step on the mean loss over all samples, or ``part`` of them; all ranks call it together.

        Samples with a loss or a gradient that is not finite are found and dropped, and the step is taken without them:
        nothing of theirs reaches a parameter. With none of them, that costs nothing. Returns the loss, the shares'
        ``figures`` by name, all summed, and the gradient's norm before clipping.

        Raises:
            UserError: if too many samples are bad, or only their sum is. Then no parameter is touched.
        """
        names = ("loss", *figures)
        self.marks = [len(journal) for journal in self.journals]
        scale = self.loss_scale
        means = self.gradient(samples, losses, part, names)
        for find in (self.seen, self.searched):
            if not finite(means):
                samples.drop(find(samples.rows(part), samples.count(part), losses))
                self.loss_scale = scale  # that it was lowered did not help
                means = self.gradient(samples, losses, part, names)
        if not finite(means):
            self.optimizer.zero_grad()
            raise UserError(
                "the gradient is not finite, though every sample's own is, so no update was made: lower "
                "optimizer.learning_rate, or take model.precision = 'bf16' or 'fp32' instead of 'fp16'"
            )
        if samples.count(part):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return means

    def gradient(self, samples: Samples, losses: Losses, part: Collection[int] | None, names: Iterable[str]) -> Figures:
        """Leaves all ranks' gradient, clipped, in the parameters; returns figures and norm, which may not be finite."""
        means = self.ranks.total(self.accumulate(samples.rows(part), samples.count(part), losses, names))
        self.ranks.sum(self.gradients())
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        if self.loss_scale > 1 and finite(means) and not math.isfinite(norm):
            self.loss_scale = max(1.0, self.loss_scale / 16)
            return self.gradient(samples, losses, part, names)
        return {**means, "grad_norm": norm}

    def accumulate(self, rows: list[int], count: int, losses: Losses, names: Iterable[str] = ("loss",)) -> Figures:
        """This rank's gradient and figures, from scratch, in as many rows at once as fit into memory."""

        def attempt(size: int) -> Figures:
            self.optimizer.zero_grad()
            self.witnesses.clear()
            for journal, mark in zip(self.journals, self.marks, strict=True):
                del journal[mark:]
            parts: dict[str, list[Tensor]] = {name: [] for name in names}
            for start in range(0, len(rows), size):
                micro = rows[start : start + size]
                for share in losses(micro, count):
                    (share.loss * self.loss_scale).backward()
                    for name, figure in {"loss": share.loss, **share.figures}.items():
                        parts.setdefault(name, []).append(figure.detach())
                    self.witnesses.append((micro, {stage: total(tensor) for stage, tensor in share.stages.items()}))
            if self.loss_scale != 1:
                for gradient in self.gradients():
                    gradient /= self.loss_scale
            # read only now: the host waits for the device once, not after every share
            return {name: sum(torch.stack(part).tolist()) if part else 0.0 for name, part in parts.items()}

        return self.batch.fit(attempt)

    def seen(self, rows: list[int], count: int, losses: Losses) -> dict[int, Fault]:
        """The rows that went bad before their loss in the last attempt, and how."""
        found: dict[int, Fault] = {}
        for micro, stages in self.witnesses:
            found = {micro[row]: fault for row, fault in faults(**stages).items()} | found
        return found

    def searched(self, rows: list[int], count: int, losses: Losses) -> dict[int, Fault]:
        """The bad ones among this rank's rows, and how they are, by bisection."""
        fault = self.fault(rows, count, losses)
        if not fault or len(rows) == 1:
            return dict.fromkeys(rows, fault) if fault else {}
        half = len(rows) // 2
        return self.searched(rows[:half], count, losses) | self.searched(rows[half:], count, losses)

    def fault(self, rows: list[int], count: int, losses: Losses) -> Fault | None:
        """The first bad number that these rows lead to, if any."""
        figures = self.accumulate(rows, count, losses)
        norm = float(nn.utils.get_total_norm(self.gradients()))
        numbers = [("loss", value) for value in figures.values()] + [("gradient", norm)]
        late = [Fault(stage, value) for stage, value in numbers if not math.isfinite(value)]
        return next(iter([*self.seen(rows, count, losses).values(), *late]), None)

    def gradients(self) -> list[Tensor]:
        """Every parameter's gradient, zeros where this process had nothing to add."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """The optimiser's tensors, as ``<parameter>.<exp_avg | exp_avg_sq | step>``."""
        return {
            f"{name}.{key}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
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


def finite(figures: Figures) -> bool:
    """Whether all of them are numbers to go on with."""
    return all(math.isfinite(value) for value in figures.values())


def total(tensor: Tensor) -> Tensor:
    """The sum of each row, (B,): not finite where one of its numbers is not, small to keep, and nothing to wait for."""
    return tensor.detach().reshape(len(tensor), -1).sum(1, dtype=torch.float32)
