"""DDPO: denoising as a multi-step decision problem, improved by the policy gradient.

Black, Janner, Du, Kostrikov, Levine: "Training Diffusion Models with Reinforcement Learning", ICLR 2024, in its
importance-sampling form (DDPO_IS). The gradient is Eq. 6 of the DiffExp paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffexp.algorithms.advantages import PromptAdvantages, batch_advantages
from diffexp.algorithms.base import Algorithm, Outcome, Scorer, reward_metrics, scored_rollout
from diffexp.algorithms.timesteps import Scheme, step_weights
from diffexp.devices import numbers
from diffexp.errors import UserError
from diffexp.learner import Learner, Share
from diffexp.memory import MicroBatch
from diffexp.randomness import generator
from diffexp.rollout import Batch, Sampler, Trajectory


def clipped_policy_loss(
    log_prob: Float[Tensor, " B"], old_log_prob: Float[Tensor, " B"], advantage: Float[Tensor, " B"], clip: float
) -> Float[Tensor, " B"]:
    """max(−A ρ, −A clip(ρ, 1−ξ, 1+ξ)) with the importance ratio ρ = p_θ / p_old and ξ = ``clip``.

    Schulman et al. 2017 (PPO), Eq. 7, for each sample. Log-probabilities are means over a latent's elements, so ρ is
    the geometric mean of its elements' ratios: that is why so small a ξ as 1e-4 binds.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def minibatches(samples: int, number: int, shuffle: torch.Generator) -> list[list[int]]:
    """The samples 0 to B − 1 in ``number`` random parts of B // ``number`` samples or one more, none of them empty.

    Rank i mod P has sample i. Samples that lie B // ``number`` apart go to different parts: where P divides that, every
    rank has as many samples in each part as the others, and none waits for them.
    """
    apart, rest = divmod(samples, number)
    columns = [range(first, samples - rest, apart) for first in range(apart)]
    parts: list[list[int]] = [[] for _ in range(number)]
    for column in (*columns, range(samples - rest, samples)):
        order = torch.randperm(number, generator=shuffle).tolist()
        for part, sample in zip(order, column, strict=False):
            parts[part].append(sample)
    return [sorted(part) for part in parts if part]


@dataclass
class DDPO(Algorithm):
    """Samples a batch without gradients, scores it, and takes optimiser steps on the recorded transitions.

    ``clip`` is ξ above, ``advantage_clip`` bounds |A|. Each of ``inner_epochs`` passes over the batch takes
    ``minibatches`` optimiser steps. ``rollout_batch`` bounds memory and changes nothing else.
    ``timestep_weights`` is how much each step counts in the loss (:func:`diffexp.algorithms.timesteps.step_weights`;
    ours, not the paper's). ``kl`` > 0 adds that many times KL(p_θ ‖ p_base) of every transition: DPOK (Fan et al.
    2023), at the cost of one more forward pass.

    Raises:
        UserError: if no step is left to learn from.
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    clip: float = 1e-4
    advantage_clip: float = 5.0
    inner_epochs: int = 1
    minibatches: int = 2
    advantages: PromptAdvantages | None = None
    timestep_weights: Scheme = "none"
    kl: float = 0.0
    rollout_batch: MicroBatch = field(default_factory=lambda: MicroBatch(8, "rollout.batch"))

    def __post_init__(self) -> None:
        if not self.learned_steps():
            raise UserError(
                f"ddpo has no step to learn from: sampler.steps = {self.sampler.steps}, sampler.eta = "
                f"{self.sampler.eta}, algorithm.timestep_weights = {self.timestep_weights!r}; raise eta above 0, or "
                "take more steps"
            )

    def step(self, batch: Batch) -> Outcome:
        """One iteration: rollout, reward, update. Costs one reward query a sample."""
        samples = self.learner.samples(batch.prompts)
        mine = batch.select(samples.own)
        trajectory, rewards = scored_rollout(mine, samples, self.sampler, self.reward, self.rollout_batch)
        advantages = self.advantage(batch.prompts, rewards)[samples.own]
        losses = partial(self.losses, trajectory, advantages)
        names = ("ratio_deviation", "clip_fraction", "approx_kl", *["kl_to_base"] * bool(self.kl))
        updates = [
            self.learner.update(samples, losses, part, names)
            for epoch in range(self.inner_epochs)
            for part in minibatches(
                len(batch.prompts), self.minibatches, generator(*batch.keys[0], "minibatches", epoch)
            )
        ]
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        metrics = reward_metrics(rewards, queries=len(batch.prompts))
        return Outcome({**metrics, **means}, rewards, samples.dropped)

    def advantage(self, prompts: Sequence[str], rewards: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Normalised rewards, within ±``advantage_clip``; 0 for samples without a reward, which count for nothing."""
        sound, advantages = rewards.isfinite(), torch.zeros_like(rewards)
        known = [prompts[sample] for sample in sound.nonzero().flatten().tolist()]
        raw = self.advantages(known, rewards[sound]) if self.advantages else batch_advantages(rewards[sound])
        advantages[sound] = raw.clamp(-self.advantage_clip, self.advantage_clip)
        return advantages

    @cached_property
    def credit(self) -> tuple[float, ...]:
        """ω_t of each step: 0 where the loss does not look."""
        return step_weights(self.timestep_weights, self.sampler.schedule, self.sampler.eta)

    def learned_steps(self) -> list[int]:
        """The steps that the loss looks at: all that have a density, and are not left out."""
        return [i for i, weight in enumerate(self.credit) if weight > 0]

    def losses(self, trajectory: Trajectory, advantages: Tensor, rows: list[int], count: int) -> Iterator[Share]:
        """What each transition of this process's ``rows`` adds to a mean over the transitions of ``count`` samples.

        Gradients flow through both halves of the guidance.
        """
        transitions = count * len(self.learned_steps())
        for steps in self.passes(trajectory.scales, len(rows)):
            figures = self.figures(trajectory, steps, rows, advantages)
            shares = {name: figure.sum() / transitions for name, figure in figures.items()}
            yield Share(shares.pop("loss"), shares)

    def passes(self, scales: Sequence[float], rows: int) -> Iterator[list[int]]:
        """The learned steps, those together that go through the network together: few samples don't make a full batch.

        Steps that take one prediction, the conditional or the unconditional, are not mixed with those that take both.
        """
        room, call = self.learner.batch.size, self.sampler.rows() if self.sampler.rows else 1
        size = max(1, (room - room % call) // rows)  # nothing is filled up but a last call
        kinds = [scale if scale in (0, 1) else None for scale in scales]
        for kind in dict.fromkeys(kinds):
            steps = [i for i in self.learned_steps() if kinds[i] == kind]
            yield from (steps[start : start + size] for start in range(0, len(steps), size))

    def figures(
        self, trajectory: Trajectory, steps: Sequence[int], rows: list[int], advantages: Tensor
    ) -> dict[str, Tensor]:
        """The loss of some steps of some samples, and what tells how far the policy has moved: each (steps · rows,)."""
        i, samples = [index for index in steps for _ in rows], rows * len(steps)
        on = trajectory.latents.device
        at = numbers(i, torch.long, on), numbers(samples, torch.long, on)
        x_t, x_prev, old = trajectory.latents[at], trajectory.latents[1:][at], trajectory.log_probs[at]
        w = [trajectory.scales[index] for index in i]
        prompts = [trajectory.prompts[row] for row in rows]
        text = self.sampler.current(prompts, trajectory.text.select(rows)).select(list(range(len(rows))) * len(steps))
        step = self.sampler.transition(x_t, i, text, w)
        log_prob = step.log_prob(x_prev)
        credit = numbers([self.credit[index] for index in i], log_prob.dtype, on)
        loss = credit * clipped_policy_loss(log_prob, old, advantages[at[1]], self.clip)
        drift = (log_prob - old).detach()
        figures = {
            "loss": loss,
            "ratio_deviation": drift.exp().sub(1).abs(),
            "clip_fraction": (drift.exp().sub(1).abs() > self.clip).float(),
            "approx_kl": drift.square() / 2,
        }
        if self.kl:
            kl = step.kl(self.sampler.base_transition(x_t, i, prompts * len(steps), text, w))
            figures |= {"loss": loss + self.kl * kl, "kl_to_base": kl.detach()}
        return figures

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember besides parameters and optimiser."""
        return {"advantages": self.advantages.state() if self.advantages else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned."""
        if self.advantages:
            self.advantages.load_state(state["advantages"])
