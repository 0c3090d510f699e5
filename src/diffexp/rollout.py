"""How images are sampled during training, and everything that an update needs to rebuild the same transitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from diffexp.diffusion import NoiseSchedule, Transition, ddim
from diffexp.exploration import Exploration, GuidanceSchedule
from diffexp.models.base import LatentShape, TextToImage
from diffexp.randomness import generator, randn
from diffexp.text import TextEmbedding


class Batch(NamedTuple):
    """What to sample: B prompts, their (perhaps explored) embedding, w(t), and the key of each sample's noise."""

    prompts: Sequence[str]
    text: TextEmbedding
    guidance: GuidanceSchedule
    keys: Sequence[tuple[int | str, ...]]

    def chunks(self, size: int) -> Iterator[Batch]:
        """The batch in pieces of at most ``size`` samples. No sample depends on how it is cut."""
        count = len(self.prompts)
        for start in range(0, count, size):
            yield self.select(range(start, min(start + size, count)))

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the samples, in the order of ``rows``."""
        return Batch(
            [self.prompts[i] for i in rows], self.text.select(rows), self.guidance, [self.keys[i] for i in rows]
        )

    def explored(self, exploration: Exploration) -> Batch:
        """The batch with one word of each prompt weighted (Eq. 8) and the guidance scheduled (Eq. 7)."""
        text = self.text
        if words := exploration.words:
            text = words.apply(text, words.draw(text, self.generators("words")))
        return self._replace(text=text, guidance=exploration.guidance or self.guidance)

    def generators(self, purpose: str) -> list[Generator]:
        """Each sample's own random stream for one purpose."""
        return [generator(*key, purpose) for key in self.keys]


class Trajectory(NamedTuple):
    """A denoised batch: ``latents[i]`` → ``latents[i + 1]`` under guidance ``scales[i]`` and the conditioning ``text``.

    Updates rebuild each transition from these recorded scales and embeddings. With the constant scale or the plain text
    instead, every importance ratio would leave the clip range, and training would silently stand still.
    """

    prompts: Sequence[str]
    text: TextEmbedding
    scales: tuple[float, ...]
    latents: Float[Tensor, "T1 B C H W"]
    log_probs: Float[Tensor, "T B"]
    images: Float[Tensor, "B 3 h w"]


@dataclass(frozen=True)
class Sampler:
    """DDIM over a model's noise schedule; ``eta`` 1 is stochastic, 0 deterministic.

    Rollout and update share ``transition``, so that they can't disagree.
    """

    model: TextToImage
    schedule: NoiseSchedule
    latent: LatentShape
    eta: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.schedule.timesteps)

    def transition(
        self, x_t: Float[Tensor, "B C H W"], i: int, text: TextEmbedding, w: float, learn: bool = True
    ) -> Transition:
        """p(x_{t-1} | x_t, c) of step i, under guidance scale w; without ``learn`` no gradient reaches the network."""
        with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
            output = self.model.predict(x_t, self.schedule.timesteps[i], text, w)
        return ddim(self.schedule, i, x_t, output, self.eta)

    def scales(self, guidance: GuidanceSchedule) -> tuple[float, ...]:
        """w(t) at each of the sampler's timesteps."""
        return tuple(float(guidance(t)) for t in self.schedule.timesteps)

    def denoise(
        self, batch: Batch, learn: Sequence[bool] | None = None, until: int | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All latents x_T … x_0 (T+1 of them), and each step's log-probabilities (T; NaN where deterministic).

        ``learn[i]`` says whether a gradient reaches the network at step i (default: everywhere that gradients are
        enabled). No graph exists before the first such step. ``until`` stops before the step of that index.
        """
        noise = batch.generators("noise")
        latents, log_probs = [randn(noise, self.latent, self.model.device)], []
        for i, w in enumerate(self.scales(batch.guidance)[:until]):
            step = self.transition(latents[-1], i, batch.text, w, learn is None or learn[i])
            latents.append(step.sample(randn(noise, self.latent, self.model.device)))
            with torch.no_grad():
                unknown = latents[-1].new_full((len(batch.prompts),), torch.nan)
                log_probs.append(step.log_prob(latents[-1]) if step.std > 0 else unknown)
        return latents, log_probs

    @torch.no_grad()
    def rollout(self, batch: Batch, size: int) -> Trajectory:
        """Samples a batch in pieces of ``size``, without gradients."""
        pieces = []
        for chunk in batch.chunks(size):
            latents, log_probs = self.denoise(chunk)
            pieces.append((torch.stack(latents), torch.stack(log_probs), self.model.decode(latents[-1])))
        latents, log_probs, images = zip(*pieces, strict=True)
        return Trajectory(
            batch.prompts,
            batch.text,
            self.scales(batch.guidance),
            torch.cat(latents, dim=1),
            torch.cat(log_probs, dim=1),
            torch.cat(images),
        )
