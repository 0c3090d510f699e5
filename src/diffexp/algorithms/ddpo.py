"""DDPO: denoising as a multi-step decision problem, improved by the policy gradient.

Black, Janner, Du, Kostrikov, Levine: "Training Diffusion Models with Reinforcement Learning", ICLR 2024, in its
importance-sampling form (DDPO_IS). The gradient is Eq. 6 of the DiffExp paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffexp.algorithms.advantages import PromptAdvantages, batch_advantages
from diffexp.algorithms.base import Metrics, Scorer, reward_metrics
from diffexp.learner import Learner
from diffexp.randomness import generator
from diffexp.rollout import Batch, Sampler, Trajectory


def clipped_policy_loss(
    log_prob: Float[Tensor, " B"], old_log_prob: Float[Tensor, " B"], advantage: Float[Tensor, " B"], clip: float
) -> Float[Tensor, " B"]:
    """max(−A ρ, −A clip(ρ, 1−ξ, 1+ξ)) with the importance ratio ρ = p_θ / p_old and ξ = ``clip``.

    Schulman et al. 2017 (PPO), Eq. 7, for each sample.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


@dataclass
class DDPO:
    """Samples a batch without gradients, scores it, and takes optimiser steps on the recorded transitions.

    ``clip`` is ξ above, ``advantage_clip`` bounds |A|. Each of ``inner_epochs`` passes over the batch takes
    ``minibatches`` optimiser steps. ``rollout_batch`` and ``update_batch`` bound memory and change nothing else.
    ``min_timestep`` leaves the steps at t below it out of the loss (0: none; ours, not the paper's).
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    clip: float = 1e-4
    advantage_clip: float = 5.0
    inner_epochs: int = 1
    minibatches: int = 2
    advantages: PromptAdvantages | None = None
    min_timestep: int = 0
    rollout_batch: int = 8
    update_batch: int = 8

    def step(self, batch: Batch) -> Metrics:
        """One iteration: rollout, reward, update. Costs one reward query a sample."""
        trajectory = self.sampler.rollout(batch, self.rollout_batch)
        rewards = self.reward(trajectory.images, batch.prompts)
        advantages = self.advantage(batch, rewards)
        metrics = reward_metrics(rewards, queries=len(rewards))
        updates = [
            self.update(batch, trajectory, advantages, rows, share)
            for epoch in range(self.inner_epochs)
            for rows, share in self.split(batch, epoch)
        ]
        for key in updates[0]:
            metrics[key] = sum(update[key] for update in updates) / len(updates)
        return metrics

    def advantage(self, batch: Batch, rewards: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Normalised rewards, within ±``advantage_clip``."""
        raw = self.advantages(batch.prompts, rewards) if self.advantages else batch_advantages(rewards)
        return raw.clamp(-self.advantage_clip, self.advantage_clip)

    def split(self, batch: Batch, epoch: int) -> list[tuple[list[int], int]]:
        """The samples in random order, in ``minibatches`` parts; with each part its size."""
        shuffle = generator(*batch.keys[0], "minibatches", epoch)
        order = torch.randperm(len(batch.prompts), generator=shuffle)
        return [(sorted(part.tolist()), len(part)) for part in order.tensor_split(self.minibatches) if len(part)]

    def learned_steps(self) -> list[int]:
        """The steps that the loss looks at: all that have a density."""
        schedule = self.sampler.schedule
        return [
            i
            for i, t in enumerate(schedule.timesteps)
            if t >= self.min_timestep and schedule.std(i, self.sampler.eta) > 0
        ]

    def update(self, batch: Batch, trajectory: Trajectory, advantages: Tensor, rows: list[int], share: int) -> Metrics:
        """One optimiser step on the transitions of some samples. Gradients flow through both halves of the guidance."""
        steps = self.learned_steps()
        total = {"loss": 0.0, "ratio_deviation": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0}
        for start in range(0, len(rows), self.update_batch):
            micro = rows[start : start + self.update_batch]
            text, advantage = trajectory.text.select(micro), advantages[micro]
            for i in steps:
                x_t, x_prev = trajectory.latents[i, micro], trajectory.latents[i + 1, micro]
                log_prob = self.sampler.transition(x_t, i, text, trajectory.scales[i]).log_prob(x_prev)
                old = trajectory.log_probs[i, micro]
                loss = clipped_policy_loss(log_prob, old, advantage, self.clip).sum() / (share * len(steps))
                self.learner.backward(loss)
                with torch.no_grad():
                    deviation = (log_prob - old).exp() - 1
                    weight = 1 / (share * len(steps))
                    total["loss"] += float(loss)
                    total["ratio_deviation"] += float(deviation.abs().sum()) * weight
                    total["clip_fraction"] += float((deviation.abs() > self.clip).sum()) * weight
                    total["approx_kl"] += float(((log_prob - old) ** 2).sum()) * weight / 2
        return {**total, "grad_norm": self.learner.step()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember besides parameters and optimiser."""
        return {"advantages": self.advantages.state() if self.advantages else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned."""
        if self.advantages:
            self.advantages.load_state(state["advantages"])
