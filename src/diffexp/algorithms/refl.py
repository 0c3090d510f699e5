"""ReFL: the reward's gradient through one late denoising step, from the image that the network foresees there.

Xu, Liu, Wu, Tong, Li, Ding, Tang, Dong: "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation", NeurIPS 2023, Algorithm 1; without its pre-training loss, which needs images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffexp.algorithms.base import Algorithm, Outcome, Scorer, reward_metrics
from diffexp.diffusion import denoised
from diffexp.learner import Learner, Share
from diffexp.randomness import generator
from diffexp.rollout import Batch, Sampler


@dataclass
class ReFL(Algorithm):
    """Denoises to one step of the last ``last_steps``, drawn once an iteration, and scores x̂_0 as predicted there.

    The gradient passes the decoder and a single network call.
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    last_steps: int = 10

    def step(self, batch: Batch) -> Outcome:
        """One iteration; costs one reward query a sample."""
        schedule, i, samples = self.sampler.schedule, self.chosen_step(batch), self.learner.samples(batch.prompts)
        w, t = self.sampler.scales(batch.guidance)[i], schedule.timesteps[i]
        mine = batch.select(samples.own)
        own = torch.full((len(mine.prompts),), torch.nan, device=self.sampler.model.device)

        def losses(rows: list[int], count: int) -> Iterator[Share]:
            piece = self.sampler.refreshed(mine.select(rows))
            with torch.no_grad():
                x_t = self.sampler.denoise(piece, until=i).last
            output = self.sampler.model.predict(x_t, t, piece.text, w)
            x_0, _ = denoised(schedule.prediction_type, schedule.alpha_bar[i], x_t, output)
            images = self.sampler.model.decode(x_0)
            reward = self.reward(images, piece.prompts)
            own[rows] = reward.detach().float()
            yield Share(-reward.sum() / count, stages={"latent": x_0, "image": images, "reward": reward})

        update = self.learner.update(samples, losses)
        rewards = samples.gather(own)
        metrics = reward_metrics(rewards, queries=len(rewards))
        return Outcome({**metrics, "step": float(i), **update}, rewards, samples.dropped)

    def chosen_step(self, batch: Batch) -> int:
        """The index of the step that learns, uniform over the last ``last_steps``."""
        draw = torch.randint(self.last_steps, (), generator=generator(*batch.keys[0], "refl"))
        return self.sampler.steps - 1 - int(draw)
