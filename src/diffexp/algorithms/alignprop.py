"""AlignProp and DRaFT: the reward's own gradient, through the image and the last denoising steps, into the LoRA.

Prabhudesai, Goyal, Pathak, Fragkiadaki: "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
arXiv:2310.03739 (random truncation). Clark, Vicol, Swersky, Fleet: "Directly Fine-Tuning Diffusion Models on
Differentiable Rewards", ICLR 2024 (DRaFT-K: fixed truncation; DRaFT-LV: K = 1 with several noised copies).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from diffexp.algorithms.base import Algorithm, Outcome, Scorer, reward_metrics
from diffexp.learner import Learner, Share
from diffexp.memory import MicroBatch
from diffexp.randomness import generator, randn
from diffexp.rollout import Batch, Sampler

Truncation = Literal["random", "fixed", "each-step"]


@dataclass
class AlignProp(Algorithm):
    """Maximises the mean reward by gradient ascent through the last K of the sampler's T steps.

    ``truncation`` "random" draws K ~ U{1 … last_steps} once an iteration; "fixed" is K = ``last_steps`` (DRaFT-K);
    "each-step" is what AlignProp's own code did: step i of T keeps its gradient with probability (i + 1) / (T + 1),
    drawn anew at every step, so that K bounds neither memory nor compute. ``copies`` > 1 is DRaFT-LV: the last step is
    repeated from x_0 noised anew, and each copy is one more reward query. The steps before the first that learns are
    sampled in batches of ``rollout_batch``, which bounds memory and changes nothing else.
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    truncation: Truncation = "random"
    last_steps: int = 1
    copies: int = 1
    rollout_batch: MicroBatch = field(default_factory=lambda: MicroBatch(8, "rollout.batch"))

    def step(self, batch: Batch) -> Outcome:
        """One iteration: sample with a graph over the last steps, score, backpropagate, update."""
        learn, samples = self.learned_steps(batch), self.learner.samples(batch.prompts)
        mine = batch.select(samples.own)
        first = [*learn, True].index(True)
        noisy = self.rollout_batch.fit(partial(self.denoised, mine, first))
        own = torch.full((len(mine.prompts), self.copies), torch.nan, device=self.sampler.model.device)

        def losses(rows: list[int], count: int) -> Iterator[Share]:
            piece = self.sampler.refreshed(mine.select(rows))
            latents = self.sampler.denoise(piece, learn, begun=(first, noisy[rows])).last
            for copy, x_0 in enumerate([latents, *self.renoised(piece, latents.detach())]):
                images = self.sampler.model.decode(x_0)
                reward = self.reward(images, piece.prompts)
                own[rows, copy] = reward.detach().float()
                stages = {"latent": x_0, "image": images, "reward": reward}
                yield Share(-reward.sum() / (count * self.copies), stages=stages)

        update = self.learner.update(samples, losses)
        rewards = samples.gather(own)
        metrics = reward_metrics(rewards, queries=rewards.numel())
        return Outcome({**metrics, "backprop_steps": float(sum(learn)), **update}, rewards.mean(1), samples.dropped)

    @torch.no_grad()
    def denoised(self, batch: Batch, until: int, size: int) -> Tensor:
        """The latents before the step of that index, sampled in pieces of ``size``."""
        chunks = map(self.sampler.refreshed, batch.chunks(size))
        return torch.cat([self.sampler.denoise(chunk, until=until).last for chunk in chunks])

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
