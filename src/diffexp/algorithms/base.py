"""What a training loop asks of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from diffexp.rollout import Batch

Metrics = dict[str, float]
Scorer = Callable[[Tensor, Sequence[str]], Tensor]  # (images (B, 3, H, W) in [0, 1], prompts) → rewards (B,)


class Algorithm(Protocol):
    """Improves the model's LoRA with one batch of online samples at a time."""

    def step(self, batch: Batch) -> Metrics:
        """One iteration; returns ``queries``, ``reward_mean``, ``reward_std`` and the algorithm's own figures."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember besides parameters and optimiser, as JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned."""


def reward_metrics(rewards: Tensor, queries: int) -> Metrics:
    """The figures that every algorithm reports: mean, spread and best of the rewards, and how many were asked for."""
    return {
        "queries": queries,
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "reward_max": float(rewards.max()),
    }
