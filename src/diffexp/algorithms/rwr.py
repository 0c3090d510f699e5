"""Reward-weighted regression: ordinary denoising training on the model's own images, the better ones weighing more.

Lee, Liu, Ryu, Watkins, Du, Boutilier, Abbeel, Ghavamzadeh, Gu: "Aligning Text-to-Image Models using Human Feedback",
arXiv:2302.12192; as the baseline RWR of Black et al. 2024, section 4.1, with its exponential weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from diffexp.algorithms.base import Algorithm, Outcome, Scorer, reward_metrics, scored_rollout
from diffexp.learner import Learner, Share
from diffexp.memory import MicroBatch
from diffexp.randomness import generator, randn
from diffexp.rollout import Batch, Sampler


def regression_weights(rewards: Float[Tensor, " B"], temperature: float) -> Float[Tensor, " B"]:
    """softmax(r / (τ · std r)) · B: positive, with mean 1. The reward's own spread sets its scale."""
    return torch.softmax(rewards / (temperature * rewards.std(correction=0).clamp(min=1e-6)), dim=0) * len(rewards)


@dataclass
class RewardWeightedRegression(Algorithm):
    """min E[weight(r) ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t, c)‖²] over the samples of each iteration.

    Each sample is noised to ``draws`` random timesteps of the sampler, and the conditional prediction alone learns.
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    temperature: float = 1.0
    draws: int = 4
    rollout_batch: MicroBatch = field(default_factory=lambda: MicroBatch(8, "rollout.batch"))

    def step(self, batch: Batch) -> Outcome:
        """One iteration: rollout, reward, one regression step. Costs one reward query a sample."""
        samples = self.learner.samples(batch.prompts)
        mine = batch.select(samples.own)
        trajectory, rewards = scored_rollout(mine, samples, self.sampler, self.reward, self.rollout_batch)
        weights = torch.zeros_like(rewards)
        weights[rewards.isfinite()] = regression_weights(rewards[rewards.isfinite()], self.temperature)
        weights = weights[samples.own]

        def losses(rows: list[int], count: int) -> Iterator[Share]:
            piece, x_0 = mine.select(rows), trajectory.latents[-1, rows]
            for k in range(self.draws):
                errors = self.errors(piece, x_0, self.drawn_step(batch, k), k)
                yield Share((weights[rows] * errors).sum() / (count * self.draws))

        update = self.learner.update(samples, losses)
        metrics = reward_metrics(rewards, queries=len(rewards))
        return Outcome({**metrics, **update}, rewards, samples.dropped)

    def errors(self, piece: Batch, x_0: Tensor, i: int, k: int) -> Float[Tensor, " B"]:
        """Each sample's denoising error at step i, with fresh noise."""
        noise = randn(piece.generators(f"regression {k}"), x_0.shape[1:], x_0.device)
        schedule = self.sampler.schedule
        x_t = schedule.noised(x_0, noise, i)
        text = self.sampler.current(piece.prompts, piece.text)
        output = self.sampler.model.predict(x_t, schedule.timesteps[i], text, 1.0)
        return (output - schedule.target(x_0, noise, i)).square().flatten(1).mean(1)

    def drawn_step(self, batch: Batch, k: int) -> int:
        """The k-th timestep of an iteration, one from each of ``draws`` equal parts of the schedule."""
        draw = float(torch.rand((), generator=generator(*batch.keys[0], "regression step", k)))
        return int((k + draw) / self.draws * self.sampler.steps)
