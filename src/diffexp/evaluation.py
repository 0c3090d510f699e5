"""Reward curves: what the model as it stands earns, on fixed prompts and noise, without exploration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from diffexp.diversity import mean_diversity
from diffexp.exploration import ConstantGuidance
from diffexp.parallel import ALONE, Ranks
from diffexp.rewards.base import Reward, score
from diffexp.rewards.features import Encoder
from diffexp.rollout import Batch, Sampler
from diffexp.text import TextEmbedding

EVALUATION_SEED = 0  # the same for all runs, so that their curves are paired


class Score(NamedTuple):
    """The rewards of one evaluated prompt set: their mean and standard deviation over n images.

    ``diversity`` is how different the images are (:func:`diffexp.diversity.mean_diversity`), by an ``encoder``.
    """

    prompts: str
    reward: str
    mean: float
    std: float
    n: int
    diversity: float | None = None
    encoder: str | None = None


class Evaluator(NamedTuple):
    """Samples ``images`` images of every prompt at a constant guidance ``scale``, the same noise every time."""

    sampler: Sampler
    scale: float
    prompts: Mapping[str, Sequence[str]]  # set name → prompts
    texts: Mapping[str, TextEmbedding]
    rewards: Mapping[str, Reward]
    images: int = 10
    batch: int = 8
    ranks: Ranks = ALONE
    encoder: Encoder | None = None  # what diversity is measured with
    watch: Callable[[list[Batch]], Iterable[Batch]] = iter  # sees every batch go by: for a progress bar

    def __call__(self) -> list[Score]:
        """One score for each prompt set and reward."""
        return [score for name in self.prompts for score in self.scores(name)]

    def scores(self, name: str) -> Iterator[Score]:
        """The scores of one prompt set, under every reward."""
        values: dict[str, list[torch.Tensor]] = {reward: [] for reward in self.rewards}
        features: list[torch.Tensor] = []
        task = self.task(name)
        count = len(task.prompts)
        for chunk in self.watch(list(task.select(self.ranks.share(count)).chunks(self.batch))):
            images = self.sampler.rollout(chunk, self.batch).images
            for reward, function in self.rewards.items():
                with torch.no_grad():
                    values[reward].append(score(function, images, chunk.prompts))
            if self.encoder:
                features.append(self.encoder(images))
        diversity = self.diversity(features, count)
        for reward, chunks in values.items():
            rewards = self.ranks.gather(torch.cat(chunks), count).double()
            figures = float(rewards.mean()), float(rewards.std(correction=0)), len(rewards)
            yield Score(name, reward, *figures, diversity, self.encoder.name if self.encoder else None)

    def diversity(self, features: Sequence[torch.Tensor], count: int) -> float | None:
        """How different the ``count`` images are, out of this process's features of them."""
        if not self.encoder:
            return None
        rows = self.ranks.gather(torch.cat(list(features)), count).cpu()
        try:
            return mean_diversity(rows.numpy(), self.images) if rows.isfinite().all() else None
        except ValueError:  # an encoder without direction, of a reward of one's own: no reason to end a training
            return None

    def task(self, name: str) -> Batch:
        """All images of a prompt set, in one batch."""
        rows = [row for row in range(len(self.prompts[name])) for _ in range(self.images)]
        return Batch(
            [self.prompts[name][row] for row in rows],
            self.texts[name].select(rows),
            ConstantGuidance(self.scale),
            [(EVALUATION_SEED, "evaluation", row, k % self.images) for k, row in enumerate(rows)],
        )
