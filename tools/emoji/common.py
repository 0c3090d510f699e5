"""What every stage shares: where things lie, a resumable training loop's state, and its learning-rate schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "work" / "emoji"
WEIGHTS = ROOT / "src" / "diffexp" / "emoji" / "weights"


@dataclass(frozen=True)
class Budget:
    """How long a stage trains in all, over every resumption: by steps, or by minutes of its own training time."""

    minutes: float | None = None
    steps: int | None = None

    def spent(self, step: int, seconds: float) -> float:
        """The part of the budget that is used up, 0 … 1."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * (self.minutes or 1)))


def learning_rate(peak: float, spent: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to a hundredth of ``peak``."""
    if spent < warmup:
        return peak * (spent + 1e-4) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (spent - warmup) / (1 - warmup))))


def save(tensors: dict[str, torch.Tensor], path: Path, **metadata: Any) -> None:
    """Write a safetensors file so that a reader or a crash never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={key: str(value) for key, value in metadata.items()})
    partial.replace(path)


def rank() -> int:
    """The number of this process in a run under ``torchrun``, 0 otherwise."""
    return dist.get_rank() if dist.is_initialized() else 0


class Training:
    """A training that stops when its budget is spent and goes on where it stopped.

    ``for step in training:`` yields step numbers; the loop body calls :meth:`update` with the loss. The model's and the
    optimiser's state are written to ``path`` every two minutes and at the end, together with the time spent so far.
    ``average`` keeps an exponential moving average of the weights, as used for the shipped UNet.
    """

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        budget: Budget,
        peak: float,
        *,
        weight_decay: float = 0.01,
        average: float | None = None,
    ) -> None:
        self.name, self.model, self.budget, self.peak = name, model, budget, peak
        self.path = WORK / f"{name}.train.safetensors"
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=peak, betas=(0.9, 0.99), fused=True)
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        self.average = average
        self.averaged = {n: p.detach().clone() for n, p in self.parameters.items()} if average else {}
        self.step, self.seconds, self.smooth = 0, 0.0, float("nan")
        if self.path.exists():
            self._load()
        self.agreed = self.seconds  # the time that all processes of a run know: they must stop at the same step

    def __iter__(self) -> Iterator[int]:
        started = saved = time.monotonic()
        while (spent := self.budget.spent(self.step, self.agreed)) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.peak, spent)
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.seconds, started = self.seconds + now - started, now
            if not dist.is_initialized():
                self.agreed = self.seconds
            if self.step % 50 == 0 and rank() == 0:
                print(f"{self.name}: step {self.step}, {self.seconds / 60:.1f} min, loss {self.smooth:.4f}", flush=True)
            if time.monotonic() - saved > 120:
                self.save()
                saved = time.monotonic()
        self.save()

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step on ``loss``."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if dist.is_initialized():
            self._share()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        value = loss.item()
        self.smooth = value if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * value
        if self.average:
            decay = min(self.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(
                list(self.averaged.values()), [p.detach() for p in self.parameters.values()], 1 - decay
            )

    def _share(self) -> None:
        """Average the gradients, and the time spent, over the processes of a run under ``torchrun``."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients] + [gradients[0].new_tensor([self.seconds])])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        self.seconds = self.agreed = flat[-1].item()
        for gradient, share in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(share.view_as(gradient))

    def save(self) -> None:
        """Write model, averages and optimiser in one file."""
        if rank() != 0:
            return
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.averaged.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        save(tensors, self.path, step=self.step, seconds=self.seconds)

    def _load(self) -> None:
        tensors, (self.step, self.seconds) = load_file(self.path), progress(self.path)
        part = lambda key: {n[len(key) + 1 :]: t for n, t in tensors.items() if n.startswith(key + ".")}  # noqa: E731
        self.model.load_state_dict(part("model"))
        for name, tensor in part("average").items():
            if name in self.averaged:
                self.averaged[name].copy_(tensor)
        first, second = part("exp_avg"), part("exp_avg_sq")
        for name, parameter in self.parameters.items():
            if name in first:
                moments = {"exp_avg": first[name].to(parameter), "exp_avg_sq": second[name].to(parameter)}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


def progress(path: Path) -> tuple[int, float]:
    """Steps and seconds of training behind a file that :class:`Training` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return int(metadata["step"]), float(metadata["seconds"])


def trained(path: Path, model: torch.nn.Module, *, average: bool = False) -> torch.nn.Module:
    """Fill ``model`` with the weights (or their moving average) of a training's file, ready for use."""
    tensors = load_file(path)
    model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    if average:
        model.load_state_dict({n[8:]: t for n, t in tensors.items() if n.startswith("average.")}, strict=False)
    return model.eval().requires_grad_(False)
