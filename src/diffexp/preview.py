"""Previews: the same prompts from the same noise, painted without exploration as training goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from diffexp.exploration import ConstantGuidance
from diffexp.images import grid, save_images, to_images
from diffexp.memory import MicroBatch
from diffexp.pictures import moment_name
from diffexp.processes.parallel import ALONE, Ranks
from diffexp.rollout import Batch, Sampler
from diffexp.runs.names import PROMPTS, SETS
from diffexp.text import TextEmbedding, concatenate


class Preview(NamedTuple):
    """What is painted: a ``batch``, and the prompt set that each of its prompts is from."""

    sampler: Sampler
    batch: Batch
    sets: Sequence[str]

    @classmethod
    def spread(
        cls,
        sampler: Sampler,
        scale: float,
        prompts: Mapping[str, Sequence[str]],
        texts: Mapping[str, TextEmbedding],
        count: int,
    ) -> Preview:
        """``count`` prompts spread over the first set, which trains, and as many over what only the others have."""
        seen, *others = [[(name, row) for row in range(len(prompts[name]))] for name in prompts]
        known = {prompts[name][row] for name, row in seen}
        unseen = [(name, row) for pool in others for name, row in pool if prompts[name][row] not in known]
        picked = [pool[k * len(pool) // count % len(pool)] for pool in (seen, unseen) if pool for k in range(count)]
        batch = Batch(
            [prompts[name][row] for name, row in picked],
            concatenate([texts[name].select([row]) for name, row in picked]),
            ConstantGuidance(scale),
            [(0, "preview", k) for k in range(len(picked))],
        )
        return cls(sampler, batch, [name for name, _ in picked])

    def paint(self, rollouts: MicroBatch, ranks: Ranks = ALONE) -> Float[Tensor, "B 3 h w"]:
        """The images, each painted by one of the ranks, and known to all."""
        count = len(self.batch.prompts)
        own = ranks.share(count)
        # whoever has nothing to paint, among many, paints the first for nothing: its tensors have the right shape
        images = rollouts.fit(partial(self.sampler.rollout, self.batch.select(own or [0]))).images
        return ranks.gather(images[: len(own)], count)

    def write(self, images: Float[Tensor, "B 3 h w"], folder: Path, iteration: int) -> None:
        """Writes the images of one moment, a sheet of them, and what they show.

        Raises:
            OSError: if the disk refuses; nothing of this moment stays then.
        """
        pictures, moment = to_images(images), folder / moment_name(iteration)
        try:
            save_images(pictures, moment)
            for file, content in ((PROMPTS, self.batch.prompts), (SETS, self.sets)):
                (folder / file).write_text(json.dumps(list(content), indent=1), encoding="utf-8")
            grid(pictures).save(moment.with_suffix(".png"))
        except OSError:
            shutil.rmtree(moment, ignore_errors=True)
            raise
