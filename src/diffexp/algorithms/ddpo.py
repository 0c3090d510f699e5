"""DDPO: denoising as a multi-step decision problem, improved by the policy gradient.

Black, Janner, Du, Kostrikov, Levine: "Training Diffusion Models with Reinforcement Learning", ICLR 2024, in its
importance-sampling form (DDPO_IS). The gradient is Eq. 6 of the DiffExp paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffexp.algorithms.advantages import PromptAdvantages, batch_advantages
from diffexp.algorithms.base import Metrics, Scorer, reward_metrics
from diffexp.diffusion import Transition
from diffexp.learner import Learner
from diffexp.randomness import generator
from diffexp.rollout import Batch, Sampler, Trajectory
from diffexp.text import TextEmbedding


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
    ``min_timestep`` leaves the steps at t below it out of the loss (0: none; ours, not the paper's). ``kl`` > 0 adds
    that many times KL(p_θ ‖ p_base) of every transition: DPOK (Fan et al. 2023), at the cost of one more forward pass.
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
    kl: float = 0.0
    rollout_batch: int = 8
    update_batch: int = 8

    def step(self, batch: Batch) -> Metrics:
        """One iteration: rollout, reward, update. Costs one reward query a sample."""
        count = len(batch.prompts)
        own = self.learner.ranks.share(count)
        mine = batch.select(own)
        trajectory = self.sampler.rollout(mine, self.rollout_batch)
        rewards = self.learner.ranks.gather(self.reward(trajectory.images, mine.prompts), count)
        advantages = self.advantage(batch, rewards)[own]
        metrics = reward_metrics(rewards, queries=count)
        updates = []
        for epoch in range(self.inner_epochs):
            for part in self.split(batch, epoch):
                rows = [row for row, sample in enumerate(own) if sample in part]
                updates.append(self.update(trajectory, advantages, rows, len(part)))
        for key in updates[0]:
            metrics[key] = sum(update[key] for update in updates) / len(updates)
        return metrics

    def advantage(self, batch: Batch, rewards: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Normalised rewards, within ±``advantage_clip``."""
        raw = self.advantages(batch.prompts, rewards) if self.advantages else batch_advantages(rewards)
        return raw.clamp(-self.advantage_clip, self.advantage_clip)

    def split(self, batch: Batch, epoch: int) -> list[list[int]]:
        """The samples in ``minibatches`` random parts."""
        shuffle = generator(*batch.keys[0], "minibatches", epoch)
        order = torch.randperm(len(batch.prompts), generator=shuffle)
        return [sorted(part.tolist()) for part in order.tensor_split(self.minibatches) if len(part)]

    def divergence(
        self, step: Transition, x_t: Tensor, i: int, prompts: Sequence[str], text: TextEmbedding, w: float
    ) -> Tensor:
        """KL of a transition to the one that the untouched model would make, (B,)."""
        with torch.no_grad(), self.sampler.model.base():
            base = self.sampler.transition(x_t, i, self.sampler.current(prompts, text), w)
        return step.kl(base)

    def learned_steps(self) -> list[int]:
        """The steps that the loss looks at: all that have a density."""
        schedule = self.sampler.schedule
        return [
            i
            for i, t in enumerate(schedule.timesteps)
            if t >= self.min_timestep and schedule.std(i, self.sampler.eta) > 0
        ]

    def update(self, trajectory: Trajectory, advantages: Tensor, rows: list[int], count: int) -> Metrics:
        """One optimiser step on the transitions of ``count`` samples, of which ``rows`` are this process's.

        Gradients flow through both halves of the guidance.
        """
        steps = self.learned_steps()
        means = dict.fromkeys(("loss", "ratio_deviation", "clip_fraction", "approx_kl", "kl_to_base"), 0.0)
        for start in range(0, len(rows), self.update_batch):
            micro = rows[start : start + self.update_batch]
            for i in steps:
                figures = self.figures(trajectory, i, micro, advantages[micro])
                shares = {key: figure.sum() / (count * len(steps)) for key, figure in figures.items()}
                self.learner.backward(shares["loss"])
                for key, share in shares.items():
                    means[key] += share.item()
        if not self.kl:
            del means["kl_to_base"]
        return {**self.learner.ranks.total(means), "grad_norm": self.learner.step()}

    def figures(self, trajectory: Trajectory, i: int, rows: list[int], advantage: Tensor) -> dict[str, Tensor]:
        """The loss of step i for some samples, with a graph, and what tells how far the policy has moved: each (B,)."""
        x_t, x_prev, old = trajectory.latents[i, rows], trajectory.latents[i + 1, rows], trajectory.log_probs[i, rows]
        prompts, w = [trajectory.prompts[row] for row in rows], trajectory.scales[i]
        text = self.sampler.current(prompts, trajectory.text.select(rows))
        step = self.sampler.transition(x_t, i, text, w)
        log_prob = step.log_prob(x_prev)
        loss = clipped_policy_loss(log_prob, old, advantage, self.clip)
        drift = (log_prob - old).detach()
        figures = {
            "loss": loss,
            "ratio_deviation": drift.exp().sub(1).abs(),
            "clip_fraction": (drift.exp().sub(1).abs() > self.clip).float(),
            "approx_kl": drift.square() / 2,
        }
        if self.kl:
            kl = self.divergence(step, x_t, i, prompts, text, w)
            figures |= {"loss": loss + self.kl * kl, "kl_to_base": kl.detach()}
        return figures

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember besides parameters and optimiser."""
        return {"advantages": self.advantages.state() if self.advantages else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned."""
        if self.advantages:
            self.advantages.load_state(state["advantages"])
