"""ReFL: the reward's gradient through one late denoising step, from the image that the network foresees there.

Xu, Liu, Wu, Tong, Li, Ding, Tang, Dong: "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation", NeurIPS 2023, Algorithm 1; without its pre-training loss, which needs images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffexp.algorithms.base import Metrics, Scorer, reward_metrics
from diffexp.diffusion import denoised
from diffexp.learner import Learner
from diffexp.randomness import generator
from diffexp.rollout import Batch, Sampler


@dataclass
class ReFL:
    """Denoises to one step of the last ``last_steps``, drawn once an iteration, and scores x̂_0 as predicted there.

    The gradient passes the decoder and a single network call. ``update_batch`` bounds memory and changes nothing else.
    """

    sampler: Sampler
    learner: Learner
    reward: Scorer
    last_steps: int = 10
    update_batch: int = 4

    def step(self, batch: Batch) -> Metrics:
        """One iteration; costs one reward query a sample."""
        schedule, ranks, count, rewards = self.sampler.schedule, self.learner.ranks, len(batch.prompts), []
        i = self.chosen_step(batch)
        w, t = self.sampler.scales(batch.guidance)[i], schedule.timesteps[i]
        for piece in map(self.sampler.refreshed, batch.select(ranks.share(count)).chunks(self.update_batch)):
            with torch.no_grad():
                x_t = self.sampler.denoise(piece, until=i)[0][-1]
            output = self.sampler.model.predict(x_t, t, piece.text, w)
            x_0, _ = denoised(schedule.prediction_type, schedule.alpha_bar[i], x_t, output)
            reward = self.reward(self.sampler.model.decode(x_0), piece.prompts)
            self.learner.backward(-reward.sum() / count)
            rewards.append(reward.detach())
        metrics = reward_metrics(ranks.gather(torch.cat(rewards), count), queries=count)
        return {**metrics, "step": float(i), "grad_norm": self.learner.step()}

    def chosen_step(self, batch: Batch) -> int:
        """The index of the step that learns, uniform over the last ``last_steps``."""
        draw = torch.randint(self.last_steps, (), generator=generator(*batch.keys[0], "refl"))
        return self.sampler.steps - 1 - int(draw)

    def state(self) -> dict[str, Any]:
        """Nothing but parameters and optimiser carries over from one iteration to the next."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned: nothing."""
