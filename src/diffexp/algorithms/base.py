"""What a training loop asks of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from diffexp.memory import MicroBatch
from diffexp.rewards import ahead
from diffexp.rollout import Batch, Sampler, Trajectory
from diffexp.samples import Fault, Samples, faults

Metrics = dict[str, float]
Scorer = Callable[[Tensor, Sequence[str]], Tensor]  # (images (B, 3, H, W) in [0, 1], prompts) → rewards (B,)


class Outcome(NamedTuple):
    """What an iteration came to: its figures, every sample's reward, and the samples that were dropped.

    ``metrics`` has ``queries``, ``reward_mean``, ``reward_std``, ``reward_max`` and the algorithm's own. ``rewards``
    are the means over a sample's copies where it has several, and NaN where it was dropped before it had one.
    """

    metrics: Metrics
    rewards: Float[Tensor, " B"]
    dropped: Mapping[int, Fault]


class Algorithm(Protocol):
    """Improves what trains of the model with one batch of online samples at a time."""

    def step(self, batch: Batch) -> Outcome:
        """One iteration; a sample whose numbers go bad is left out of it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember besides parameters and optimiser, as JSON: nothing, unless overridden."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned."""
        return


def scored_rollout(
    mine: Batch, samples: Samples, sampler: Sampler, reward: Scorer, memory: MicroBatch
) -> tuple[Trajectory, Float[Tensor, " B"]]:
    """This process's share of an iteration, sampled without gradients, and the rewards of all samples.

    Samples of which a latent, the image or the reward is not finite are dropped; their rewards are NaN. A reward that
    can scores a piece of the batch while the next one is painted.
    """

    def paint(size: int) -> Trajectory:
        ahead.forget(reward)  # a piece that was painted before memory ran out is painted again
        return sampler.rollout(mine, size, partial(ahead.begin, reward))

    trajectory = memory.fit(paint)
    own = reward(trajectory.images, mine.prompts)
    samples.drop(faults(latent=trajectory.latents[-1], image=trajectory.images, reward=own))
    return trajectory, samples.gather(own)


def reward_metrics(rewards: Tensor, queries: int) -> Metrics:
    """What every algorithm reports: mean, spread and best of the rewards that are numbers, and how many were due."""
    rewards = rewards[rewards.isfinite()]
    return {
        "queries": queries,
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "reward_max": float(rewards.max()),
    }
