"""Several rewards as one: each z-scored by its running mean and spread, then averaged by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffexp.errors import UserError
from diffexp.rewards import ahead
from diffexp.rewards.base import Reward, score_or_nan


@dataclass(frozen=True)
class Statistics:
    """Count, mean and sum of squared deviations of all scores seen so far; float64."""

    count: float = 0.0
    mean: float = 0.0
    deviations: float = 0.0

    @property
    def std(self) -> float:
        """The population standard deviation; 1 where there is no spread, so that a constant scores 0."""
        std = math.sqrt(self.deviations / self.count) if self.count else 0.0
        return std if std > 1e-6 else 1.0

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of scores together (Chan et al. 1979); exact, whatever the order."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        deviations = self.deviations + other.deviations + delta**2 * self.count * other.count / count
        return Statistics(count, mean, deviations)

    @classmethod
    def of(cls, scores: Tensor) -> Statistics:
        """The statistics of those of the scores (B,) that are finite."""
        values = scores.detach().cpu().double()  # in this order: MPS has no float64
        values = values[values.isfinite()]
        if not len(values):
            return cls()
        mean = values.mean()
        return cls(float(len(values)), float(mean), float((values - mean).square().sum()))


class Ensemble:
    """The weighted mean of z-scored rewards: sum(w z) / sum(|w|), z = (score - running mean) / running std.

    Calling it never moves the statistics. They move when a ``with ensemble.observing():`` block ends, by every score
    made inside it: once a training iteration, so that chunks and their order do not matter, and never in evaluation.
    ``calibrate`` gives them a start; without one, a batch before the first such block is z-scored by itself, so its
    mean says nothing. Differentiable if every member is; the statistics count as constants.

    Raises:
        UserError: for no rewards, another number of weights, a weight of zero or not finite, or a name used twice.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None, name: str = "") -> None:
        weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        names = [reward.name for reward in rewards]
        if not rewards or len(weights) != len(rewards):
            raise UserError(f"an ensemble needs a weight for each reward: got {len(rewards)} and {len(weights)}")
        if not all(math.isfinite(weight) and weight != 0 for weight in weights):
            raise UserError(f"an ensemble's weights are finite numbers other than 0: got {weights}")
        if len(set(names)) != len(names):
            raise UserError(f"an ensemble names each reward once: got {', '.join(names)}")
        self.rewards = tuple(rewards)
        self.weights = tuple(weights)
        self.name = name or "+".join(names)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.statistics = {name: Statistics() for name in names}
        self.observed: list[Tensor] = []  # the members' scores (B, R) inside an ``observing`` block
        self._observing = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to scores (B,)."""
        scores = self.scores(images, prompts)
        if self._observing:
            self.observed.append(scores.detach())
        return self.combine(scores)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Every member's own scores, (B, R), in the members' order; not finite where a member's is not."""
        return torch.stack([score_or_nan(reward, images, prompts) for reward in self.rewards], dim=1)

    def begin(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Lets those members begin that can: the next call begins with these images."""
        for reward in self.rewards:
            ahead.begin(reward, images, prompts)

    def forget(self) -> None:
        """There will be no such call."""
        for reward in self.rewards:
            ahead.forget(reward)

    def combine(self, scores: Tensor) -> Tensor:
        """The members' scores (B, R) to the ensemble's (B,), by the statistics as they are."""
        total = torch.zeros(len(scores), device=scores.device)
        for column, weight, statistics in zip(scores.T, self.weights, self.statistics.values(), strict=True):
            known = statistics if statistics.count else Statistics.of(column)
            total = total + weight * (column - known.mean) / known.std
        return total / sum(abs(weight) for weight in self.weights)

    def observe(self, scores: Tensor) -> None:
        """Move the statistics by the members' scores (B, R).

        An image that one member can't score counts for none: it takes no part in training.
        """
        scores = scores[scores.isfinite().all(1)]
        for column, name in zip(scores.T, self.statistics, strict=True):
            self.statistics[name] = self.statistics[name].merge(Statistics.of(column))

    @torch.no_grad()
    def calibrate(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Start the statistics from images (B, 3, H, W) of the untouched model, unless they have started."""
        if not any(statistics.count for statistics in self.statistics.values()):
            self.observe(self.scores(images, prompts))

    @contextmanager
    def observing(self, everyones: Callable[[Tensor], Tensor] = lambda scores: scores) -> Iterator[None]:
        """Collect every score made inside the block, and move the statistics by them when it ends without error.

        ``everyones`` turns this process's scores (n, R) into those of all processes, where there are several.
        """
        self._observing = True
        try:
            yield
            # a process that has none left asks the others all the same: they wait for it
            scores = everyones(torch.cat([torch.zeros(0, len(self.rewards)), *(one.cpu() for one in self.observed)]))
            if len(scores):
                self.observe(scores)
        finally:
            self._observing = False
            self.observed.clear()

    def state_dict(self) -> dict[str, float]:
        """The statistics as plain numbers, for a checkpoint."""
        state = {}
        for name, statistics in self.statistics.items():
            state[f"{name}.count"] = statistics.count
            state[f"{name}.mean"] = statistics.mean
            state[f"{name}.deviations"] = statistics.deviations
        return state

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what ``state_dict`` gave.

        Raises:
            UserError: if the state is that of another ensemble.
        """
        if state.keys() - {"frozen"} != self.state_dict().keys():  # 0.1.0 kept that, too
            raise UserError(f"the saved statistics are not those of the reward {self.name!r}: {', '.join(state)}")
        for name in self.statistics:
            fields = (state[f"{name}.{field}"] for field in ("count", "mean", "deviations"))
            self.statistics[name] = Statistics(*fields)
