"""Reward curves: what the model as it stands earns, on fixed prompts and noise, without exploration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from diffexp.diversity import mean_diversity
from diffexp.exploration import ConstantGuidance
from diffexp.memory import MicroBatch
from diffexp.processes.parallel import ALONE, Ranks
from diffexp.rewards import ahead
from diffexp.rewards.base import Reward, score_or_nan
from diffexp.rewards.features import Encoder
from diffexp.rollout import Batch, Sampler
from diffexp.samples import Samples, faults
from diffexp.text import TextEmbedding

EVALUATION_SEED = 0  # the same for all runs, so that their curves are paired


class Score(NamedTuple):
    """The rewards of one evaluated prompt set: mean and standard deviation over the n images that could be scored.

    ``diversity`` is how different the images are (:func:`diffexp.diversity.mean_diversity`), by an ``encoder``;
    ``kl_to_base`` how far the model is from the untouched one (:meth:`diffexp.rollout.Sampler.divergence`).
    """

    prompts: str
    reward: str
    mean: float
    std: float
    n: int
    diversity: float | None = None
    encoder: str | None = None
    kl_to_base: float | None = None


class Evaluator(NamedTuple):
    """Samples ``images`` images of every prompt at a constant guidance ``scale``, the same noise every time."""

    sampler: Sampler
    scale: float
    prompts: Mapping[str, Sequence[str]]  # set name → prompts
    texts: Mapping[str, TextEmbedding]
    rewards: Mapping[str, Reward]
    batch: MicroBatch
    images: int = 10
    ranks: Ranks = ALONE
    encoder: Encoder | None = None  # what diversity is measured with
    watch: Callable[[list[Batch]], Iterable[Batch]] = iter  # sees every batch go by: for a progress bar
    max_dropped: float = 0.1  # the share of images without a finite score that an evaluation may have
    kl_images: int = 0  # images of each set, on which the KL divergence to the untouched model is measured

    def __call__(self) -> list[Score]:
        """One score for each prompt set and reward."""
        return [score for name in self.prompts for score in self.scores(name)]

    def scores(self, name: str) -> Iterator[Score]:
        """The scores of one prompt set, under every reward."""
        values: dict[str, list[torch.Tensor]] = {reward: [] for reward in self.rewards}
        features: list[torch.Tensor] = []
        brightness: list[torch.Tensor] = []
        task = self.task(name)
        count = len(task.prompts)
        mine = self.ranks.share(count)
        # a rank without a share, among many, samples the first for nothing: its tensors have the right shape
        # a piece is scored once the next is painted: by then a reward that could begin may be done
        for chunk, images in ahead.one_behind(self.painted(task.select(mine or [0]))):
            brightness.append(images.mean((1, 2, 3)))  # not finite where an image is not
            for reward, function in self.rewards.items():
                with torch.no_grad():
                    values[reward].append(score_or_nan(function, images, chunk.prompts))
            if self.encoder:
                features.append(self.encoder(images))
        diversity, kl = self.diversity(features, count), self.divergence(task)
        for reward, chunks in values.items():
            samples, own = Samples(task.prompts, self.ranks, self.max_dropped), torch.cat(chunks)[: len(mine)]
            samples.drop(faults(image=torch.cat(brightness)[: len(mine)], reward=own))
            rewards = samples.gather(own).cpu().double()  # MPS has no float64
            rewards = rewards[rewards.isfinite()]
            figures = float(rewards.mean()), float(rewards.std(correction=0)), len(rewards)
            yield Score(name, reward, *figures, diversity, self.encoder.name if self.encoder else None, kl)

    def painted(self, task: Batch) -> Iterator[tuple[Batch, torch.Tensor]]:
        """A batch and its images (B, 3, H, W), piece by piece; rewards that can begin do."""
        for chunk in self.watch(list(task.chunks(self.batch.size))):
            images = self.batch.fit(partial(self.sampler.rollout, chunk)).images
            for reward in self.rewards.values():
                ahead.begin(reward, images, chunk.prompts)
            yield chunk, images

    def diversity(self, features: Sequence[torch.Tensor], count: int) -> float | None:
        """How different the ``count`` images are, out of this process's features of them."""
        if not self.encoder:
            return None
        rows = self.ranks.gather(torch.cat(list(features))[: len(self.ranks.share(count))], count).cpu()
        try:
            return mean_diversity(rows.numpy(), self.images) if rows.isfinite().all() else None
        except ValueError:  # an encoder without direction, of a reward of one's own: no reason to end a training
            return None

    def divergence(self, task: Batch) -> float | None:
        """KL to the untouched model, the mean over ``kl_images`` of the task's, spread over it; None without any.

        Sampled anew, for it needs the latents: as much work as an evaluation of twice as many images.
        """
        count = min(self.kl_images, len(task.prompts))
        if not count:
            return None
        picked = task.select([k * len(task.prompts) // count for k in range(count)])
        mine = self.ranks.share(count)
        own = self.batch.fit(partial(self.sampler.divergence, picked.select(mine or [0])))
        values = self.ranks.gather(own[: len(mine)], count)
        values = values[values.isfinite()]
        return float(values.mean()) if len(values) else None

    def task(self, name: str) -> Batch:
        """All images of a prompt set, in one batch."""
        rows = [row for row in range(len(self.prompts[name])) for _ in range(self.images)]
        return Batch(
            [self.prompts[name][row] for row in rows],
            self.texts[name].select(rows),
            ConstantGuidance(self.scale),
            [(EVALUATION_SEED, "evaluation", row, k % self.images) for k, row in enumerate(rows)],
        )
