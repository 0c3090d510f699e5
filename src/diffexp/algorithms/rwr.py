"""Reward-weighted regression: ordinary denoising training on the model's own images, the better ones weighing more.

Lee, Liu, Ryu, Watkins, Du, Boutilier, Abbeel, Ghavamzadeh, Gu: "Aligning Text-to-Image Models using Human Feedback",
arXiv:2302.12192; as the baseline RWR of Black et al. 2024, section 4.1, with its exponential weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffexp.algorithms.base import Metrics, Scorer, reward_metrics
from diffexp.learner import Learner
from diffexp.randomness import generator, randn
from diffexp.rollout import Batch, Sampler


def regression_weights(rewards: Float[Tensor, " B"], temperature: float) -> Float[Tensor, " B"]:
    """softmax(r / (τ · std r)) · B: positive, with mean 1. The reward's own spread sets its scale."""
    return torch.softmax(rewards / (temperature * rewards.std(correction=0).clamp(min=1e-6)), dim=0) * len(rewards)


@dataclass
class RewardWeightedRegression:
    """min E[weight(r) ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t, c)‖²] over the samples of each iteration.

    Each sample is noised to ``draws`` random timesteps of the sampler, and the conditional prediction alone learns.
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    temperature: float = 1.0
    draws: int = 4
    rollout_batch: int = 8
    update_batch: int = 8

    def step(self, batch: Batch) -> Metrics:
        """One iteration: rollout, reward, one regression step. Costs one reward query a sample."""
        ranks, count, loss = self.learner.ranks, len(batch.prompts), 0.0
        own = ranks.share(count)
        mine = batch.select(own)
        trajectory = self.sampler.rollout(mine, self.rollout_batch)
        rewards = ranks.gather(self.reward(trajectory.images, mine.prompts), count)
        weights = regression_weights(rewards, self.temperature)[own]
        for start in range(0, len(own), self.update_batch):
            rows = range(start, min(start + self.update_batch, len(own)))
            piece, x_0 = mine.select(rows), trajectory.latents[-1, list(rows)]
            for k in range(self.draws):
                i = self.drawn_step(batch, k)
                share = (weights[list(rows)] * self.errors(piece, x_0, i, k)).sum() / (count * self.draws)
                self.learner.backward(share)
                loss += share.item()
        metrics = reward_metrics(rewards, queries=count)
        return {**metrics, **ranks.total({"loss": loss}), "grad_norm": self.learner.step()}

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

    def state(self) -> dict[str, Any]:
        """Nothing but parameters and optimiser carries over from one iteration to the next."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned: nothing."""
