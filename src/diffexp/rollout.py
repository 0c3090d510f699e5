"""How images are sampled during training, and everything that an update needs to rebuild the same transitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from diffexp.devices import numbers
from diffexp.diffusion import NoiseSchedule, Transition, ddim
from diffexp.errors import UserError
from diffexp.exploration import Exploration, GuidanceSchedule, weighted
from diffexp.models.base import LatentShape, TextToImage
from diffexp.processes import interruption
from diffexp.randomness import generator, randn
from diffexp.text import TextEmbedding, concatenate

Steps = int | Sequence[int]
"""One step of the sampler for all samples, or each sample's own."""

Scales = float | Sequence[float]
"""One guidance scale for all samples, or each sample's own."""


class Conditioning(NamedTuple):
    """The embedding of B prompts, and w(t)."""

    text: TextEmbedding
    guidance: GuidanceSchedule


class Batch(NamedTuple):
    """What to sample: B prompts, their (perhaps explored) embedding, w(t), and the key of each sample's noise.

    ``learned`` is the policy that a policy gradient is of, where that is not the sampling one: a control, and nothing
    for gradients through the sampling itself.
    """

    prompts: Sequence[str]
    text: TextEmbedding
    guidance: GuidanceSchedule
    keys: Sequence[tuple[int | str, ...]]
    learned: Conditioning | None = None

    def chunks(self, size: int) -> Iterator[Batch]:
        """The batch in pieces of at most ``size`` samples. No sample depends on how it is cut."""
        count = len(self.prompts)
        for start in range(0, count, size):
            yield self.select(range(start, min(start + size, count)))

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the samples, in the order of ``rows``."""
        learned = self.learned and self.learned._replace(text=self.learned.text.select(rows))
        prompts, keys = [self.prompts[i] for i in rows], [self.keys[i] for i in rows]
        return Batch(prompts, self.text.select(rows), self.guidance, keys, learned)

    def explored(self, exploration: Exploration) -> Batch:
        """The batch with one word of each prompt weighted (Eq. 8) and the guidance scheduled (Eq. 7), or as it wants.

        Raises:
            UserError: if a strategy of the user's own makes something else of it than a batch of as many samples.
        """
        text = self.text
        if words := exploration.words:
            text = words.apply(text, words.draw(text, self.generators("words")))
        explored = self._replace(text=text, guidance=exploration.guidance or self.guidance)
        if not exploration.strategy:
            return explored
        changed = exploration.strategy(explored)
        if not isinstance(changed, Batch) or len(changed.prompts) != len(self.prompts):
            raise UserError(
                f"exploration.strategy must return a Batch of {len(self.prompts)} samples: it returned "
                f"{type(changed).__name__}; change the batch that it gets with batch._replace(...)"
            )
        return changed

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


class Denoised(NamedTuple):
    """The latents (B, C, H, W) that a batch went through, with their graph, and each step's log-probabilities (B,)."""

    latents: list[Tensor]
    log_probs: list[Tensor]

    @property
    def last(self) -> Float[Tensor, "B C H W"]:
        """The latents that denoising ended at."""
        return self.latents[-1]


@dataclass(frozen=True)
class Sampler:
    """DDIM over a model's noise schedule; ``eta`` 1 is stochastic, 0 deterministic.

    Rollout and update share ``transition``, so that they can't disagree. Where ``rows`` is given, every call of the
    network has ``rows()`` samples: larger batches are cut, smaller ones filled up. A kernel that computes in bf16, fp16
    or TF32 rounds by the shape of its input; with one shape the on-policy ratio is 1 in every precision.
    """

    model: TextToImage
    schedule: NoiseSchedule
    latent: LatentShape
    eta: float = 1.0
    rows: Callable[[], int] | None = None

    @property
    def steps(self) -> int:
        return len(self.schedule.timesteps)

    @property
    def random_steps(self) -> list[int]:
        """The steps with σ_t > 0, which have a density. A schedule that ends at ᾱ = 1 ends with one that has none."""
        return [i for i in range(self.steps) if self.schedule.std(i, self.eta) > 0]

    def transition(
        self, x_t: Float[Tensor, "B C H W"], i: Steps, text: TextEmbedding, w: Scales, learn: bool = True
    ) -> Transition:
        """p(x_{t-1} | x_t, c) of step i, under guidance scale w; without ``learn`` no gradient reaches the network."""
        interruption.check()
        return self.step(x_t, i, text, w, learn)

    def step(self, x_t: Float[Tensor, "B C H W"], i: Steps, text: TextEmbedding, w: Scales, learn: bool) -> Transition:
        """A ``transition`` that no signal can end: the run is not saved where its adapters are off."""
        steps = list(i) if isinstance(i, Sequence) else [int(i)] * len(x_t)
        scales, outputs = list(w) if isinstance(w, Sequence) else [float(w)] * len(x_t), []
        with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
            for rows, count in self.calls(len(x_t)):
                t, own = [self.schedule.timesteps[steps[row]] for row in rows], [scales[row] for row in rows]
                x = x_t[numbers(rows, torch.long, x_t.device)]
                outputs.append(self.model.predict(x, t, text.select(rows), own)[:count])
        return ddim(self.schedule, steps, x_t, torch.cat(outputs), self.eta)

    def base_transition(
        self, x_t: Float[Tensor, "B C H W"], i: Steps, prompts: Sequence[str], text: TextEmbedding, w: Scales
    ) -> Transition:
        """What the untouched model would make of step i; without a gradient. Needs that an adapter is what learns."""
        with torch.no_grad(), self.model.base():
            return self.step(x_t, i, self.current(prompts, text), w, learn=False)

    def calls(self, count: int) -> Iterator[tuple[list[int], int]]:
        """The samples of each network call for ``count`` samples, and how many of them are not there to fill it up."""
        size = self.rows() if self.rows else count
        for start in range(0, count, size):
            own = list(range(start, min(start + size, count)))
            yield own + own[-1:] * (size - len(own)), len(own)

    def current(self, prompts: Sequence[str], text: TextEmbedding) -> TextEmbedding:
        """The text as its encoders embed it now, with a gradient to them and the words weighted as they were.

        ``text`` itself, where the model is, if the encoders are frozen.
        """
        if not self.model.learns_text:
            return text.to(self.model.device)
        parts = [
            self.model.encode([prompts[i] for i in rows]).select(range(count))
            for rows, count in self.calls(len(prompts))
        ]
        return concatenate(parts) if text.weights is None else weighted(concatenate(parts), text.weights)

    def refreshed(self, batch: Batch) -> Batch:
        """The batch with its text as the encoders embed it now."""
        return batch._replace(text=self.current(batch.prompts, batch.text))

    def scales(self, guidance: GuidanceSchedule) -> tuple[float, ...]:
        """w(t) at each of the sampler's timesteps."""
        return tuple(float(guidance(t)) for t in self.schedule.timesteps)

    def denoise(
        self,
        batch: Batch,
        learn: Sequence[bool] | None = None,
        until: int | None = None,
        begun: tuple[int, Tensor] | None = None,
    ) -> Denoised:
        """All latents x_T … x_0 (T+1 of them), and each step's log-probabilities (T; NaN where deterministic).

        ``learn[i]`` says whether a gradient reaches the network at step i (default: everywhere that gradients are
        enabled). No graph exists before the first such step. ``until`` stops before the step of that index, and
        ``begun`` goes on at one, from the latents that ``until`` it were the last.

        Raises:
            UserError: if another policy than the sampling one is to be learned.
        """
        if batch.learned:
            raise UserError("exploration.strategy learns another policy than it samples: that takes algorithm ddpo")
        noise = batch.generators("noise")
        latents, log_probs = [randn(noise, self.latent, self.model.device)], []
        start, scales = 0, self.scales(batch.guidance)
        if begun:
            start, latents[0] = begun
            for _ in range(start):  # what the first steps drew
                randn(noise, self.latent, torch.device("cpu"))
        for i, w in list(enumerate(scales))[start:until]:
            step = self.transition(latents[-1], i, batch.text, w, learn is None or learn[i])
            latents.append(step.sample(randn(noise, self.latent, self.model.device)))
            log_probs.append(recorded(step, latents[-1]))
        return Denoised(latents, log_probs)

    @torch.no_grad()
    def rollout(
        self, batch: Batch, size: int, painted: Callable[[Tensor, Sequence[str]], None] | None = None
    ) -> Trajectory:
        """Samples a batch in pieces of ``size``, without gradients; ``painted`` gets the images and prompts of each."""
        pieces = []
        for chunk in map(self.refreshed, batch.chunks(size)):
            latents, log_probs = self.denoise(chunk._replace(learned=None))
            text = chunk.text
            if chunk.learned:
                text, log_probs = chunk.learned.text, self.log_probs(latents, chunk.learned)
            images = self.model.decode(latents[-1])
            if painted:
                painted(images, chunk.prompts)
            pieces.append((text, torch.stack(latents), torch.stack(log_probs), images))
        texts, latents, log_probs, images = zip(*pieces, strict=True)
        return Trajectory(
            batch.prompts,
            concatenate(texts),
            self.scales((batch.learned or batch).guidance),
            torch.cat(latents, dim=1),
            torch.cat(log_probs, dim=1),
            torch.cat(images),
        )

    def log_probs(self, latents: Sequence[Tensor], policy: Conditioning) -> list[Tensor]:
        """What ``policy`` makes of each transition of a trajectory: T times (B,), without a gradient."""
        found = []
        for i, w in enumerate(self.scales(policy.guidance)):
            step = self.transition(latents[i], i, policy.text, w, learn=False)
            found.append(recorded(step, latents[i + 1]))
        return found

    @torch.no_grad()
    def divergence(self, batch: Batch, size: int) -> Float[Tensor, " B"]:
        """KL(p_θ ‖ p_base) of the transitions on each sample's own path: the mean over random steps and C·H·W; in nats.

        Exact for each path, the two being normal distributions of the same deviation. It samples in pieces of ``size``
        with one more pass of the network a step, the untouched one's, so it costs as much as two rollouts.

        Raises:
            ValueError: if the sampler is deterministic.
        """
        if not self.random_steps:
            raise ValueError("a deterministic sampler has no KL divergence: use eta > 0")
        pieces = []
        for chunk in map(self.refreshed, batch.chunks(size)):
            noise = chunk.generators("noise")
            x_t, total = randn(noise, self.latent, self.model.device), torch.zeros(())
            for i, w in enumerate(self.scales(batch.guidance)):
                step = self.transition(x_t, i, chunk.text, w)
                if i in self.random_steps:
                    total = total + step.kl(self.base_transition(x_t, i, chunk.prompts, chunk.text, w))
                x_t = step.sample(randn(noise, self.latent, self.model.device))
            pieces.append(total / len(self.random_steps))
        return torch.cat(pieces)


@torch.no_grad()
def recorded(step: Transition, x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """log p(x | x_t, c) as a trajectory keeps it: without a gradient, and NaN where the step is deterministic."""
    return step.log_prob(x) if all(step.std) else x.new_full((len(x),), torch.nan)
