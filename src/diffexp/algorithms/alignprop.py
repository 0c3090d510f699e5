"""AlignProp and DRaFT: the reward's own gradient, through the image and the last denoising steps, into the LoRA.

Prabhudesai, Goyal, Pathak, Fragkiadaki: "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
arXiv:2310.03739 (random truncation). Clark, Vicol, Swersky, Fleet: "Directly Fine-Tuning Diffusion Models on
Differentiable Rewards", ICLR 2024 (DRaFT-K: fixed truncation; DRaFT-LV: K = 1 with several noised copies).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffexp.algorithms.base import Metrics, Scorer, reward_metrics
from diffexp.learner import Learner
from diffexp.randomness import generator, randn
from diffexp.rollout import Batch, Sampler

Truncation = Literal["random", "fixed", "each-step"]


@dataclass
class AlignProp:
    """Maximises the mean reward by gradient ascent through the last K of the sampler's T steps.

    ``truncation`` "random" draws K ~ U{1 … last_steps} once an iteration; "fixed" is K = ``last_steps`` (DRaFT-K);
    "each-step" is what AlignProp's own code did: step i of T keeps its gradient with probability (i + 1) / (T + 1),
    drawn anew at every step, so that K bounds neither memory nor compute. ``copies`` > 1 is DRaFT-LV: the last step is
    repeated from x_0 noised anew, and each copy is one more reward query. Gradients accumulate over pieces of
    ``update_batch`` samples; that bounds memory and changes nothing else.
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    truncation: Truncation = "random"
    last_steps: int = 1
    copies: int = 1
    update_batch: int = 4

    def step(self, batch: Batch) -> Metrics:
        """One iteration: sample with a graph over the last steps, score, backpropagate, update."""
        learn = self.learned_steps(batch)
        ranks, count, queries = self.learner.ranks, len(batch.prompts), len(batch.prompts) * self.copies
        rewards: list[Tensor] = []
        for piece in map(self.sampler.refreshed, batch.select(ranks.share(count)).chunks(self.update_batch)):
            latents = self.sampler.denoise(piece, learn)[0][-1]
            scored: list[Tensor] = []
            for x_0 in [latents, *self.renoised(piece, latents.detach())]:
                reward = self.reward(self.sampler.model.decode(x_0), piece.prompts)
                self.learner.backward(-reward.sum() / queries)
                scored.append(reward.detach())
            rewards.append(torch.stack(scored, dim=1))
        metrics = reward_metrics(ranks.gather(torch.cat(rewards), count), queries)
        return {**metrics, "backprop_steps": float(sum(learn)), "grad_norm": self.learner.step()}

    def learned_steps(self, batch: Batch) -> list[bool]:
        """For each step, whether a gradient reaches the network there."""
        steps, draw = self.sampler.steps, generator(*batch.keys[0], "truncation")
        if self.truncation == "each-step":
            return [int(torch.randint(steps + 1, (), generator=draw)) <= i for i in range(steps)]
        last = self.last_steps
        if self.truncation == "random":
            last = int(torch.randint(1, last + 1, (), generator=draw))
        return [i >= steps - last for i in range(steps)]

    def renoised(self, piece: Batch, x_0: Tensor) -> list[Tensor]:
        """DRaFT-LV's further copies: x_0 noised to the last timestep and denoised again, with a gradient."""
        noise, last = piece.generators("copies"), self.sampler.steps - 1
        w, copies = self.sampler.scales(piece.guidance)[last], []
        for _ in range(self.copies - 1):
            x_t = self.sampler.schedule.noised(x_0, randn(noise, x_0.shape[1:], x_0.device), last)
            # a graph of its own, also of the text: each copy's backward pass frees what it went through
            step = self.sampler.transition(x_t, last, self.sampler.current(piece.prompts, piece.text), w)
            copies.append(step.sample(randn(noise, x_0.shape[1:], x_0.device)))
        return copies

    def state(self) -> dict[str, Any]:
        """Nothing but parameters and optimiser carries over from one iteration to the next."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned: nothing."""
