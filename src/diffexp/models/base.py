"""A text-to-image latent diffusion model, as the rest of the project sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffexp.diffusion import NoiseSchedule
from diffexp.errors import UserError
from diffexp.text import TextEmbedding, concatenate

LatentShape = tuple[int, int, int]


class Source(NamedTuple):
    """Where a model came from: what the user named, and for a hub id the commit that it resolved to."""

    name: str
    commit: str | None = None


class TextToImage(ABC):
    """Encodes prompts, predicts noise with classifier-free guidance, decodes latents. Everything is frozen.

    The frozen weights are in ``dtype``; latents, predictions and images are float32. A LoRA is added by
    ``diffexp.models.lora``; its parameters are the only ones that train.
    """

    kohya_text_encoders: ClassVar[Mapping[str, str]]  # folder name → prefix of its keys in kohya files

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, noise_schedule: DDIMScheduler, source: Source
    ) -> None:
        self.unet, self.vae, self.source = unet.eval().requires_grad_(False), vae.eval().requires_grad_(False), source
        self.noise_schedule = noise_schedule
        self.checkpoint_decoder = False
        # diffusers types its configurations as plain dictionaries
        self.unet_config: Any = unet.config
        self.vae_config: Any = vae.config

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """The embedding of the prompts, and of the empty text."""

    @abstractmethod
    def network(
        self,
        x: Float[Tensor, "N C H W"],
        t: int,
        hidden: Float[Tensor, "N L D"],
        pooled: Float[Tensor, "N P"] | None,
    ) -> Float[Tensor, "N C H W"]:
        """One pass of the denoising network, in the frozen weights' precision; out comes the precision of ``x``."""

    @abstractmethod
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """The text encoders by their folder names."""

    def predict(self, x_t: Float[Tensor, "B C H W"], t: int, text: TextEmbedding, w: float) -> Float[Tensor, "B C H W"]:
        """Eq. 4: ε̃(x_t, t, c) = ε(x_t, t) + w (ε(x_t, t, c) − ε(x_t, t)), for every w, also below 1.

        The only place with this formula. Where w is 1 or 0 one of the two predictions drops out, and with it half of
        the work. Ho and Salimans 2022.
        """
        if w == 1:
            return self.network(x_t, t, text.hidden, text.pooled)
        null = text.unconditional()
        if w == 0:
            return self.network(x_t, t, null.hidden, null.pooled)
        both = concatenate([text, null])
        conditional, unconditional = self.network(torch.cat([x_t, x_t]), t, both.hidden, both.pooled).chunk(2)
        return unconditional + w * (conditional - unconditional)

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Images in [0, 1], float32, with gradients to the latents where they ask for them."""
        if self.checkpoint_decoder and torch.is_grad_enabled() and latents.requires_grad:
            return checkpoint(self._decode, latents, use_reentrant=False)
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        shift = getattr(self.vae_config, "shift_factor", None) or 0.0
        latents = latents / self.vae_config.scaling_factor + shift
        (images,) = self.vae.decode(cast(Any, latents.to(self.vae.dtype)), return_dict=False)
        return (images.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    @property
    def pixels(self) -> int:
        """The edge of the square of pixels that one latent cell stands for."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    def latent_shape(self, size: tuple[int, int] | None = None) -> LatentShape:
        """(C, H, W) of a latent, for images of ``size`` (height, width) in pixels; the model's own size by default.

        Raises:
            UserError: if the size is no multiple of what VAE and network halve it by.
        """
        side = self.unet_config.sample_size * self.pixels
        height, width = size or (side, side)
        multiple = self.pixels * 2 ** (len(self.unet_config.block_out_channels) - 1)
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise UserError(f"sampler.size = {[height, width]}: this model needs multiples of {multiple} pixels")
        return self.unet_config.in_channels, height // self.pixels, width // self.pixels

    def schedule(self, steps: int) -> NoiseSchedule:
        """The timesteps of a sampler of ``steps`` steps, and ᾱ at both ends of each."""
        scheduler, config = self.noise_schedule, cast(Any, self.noise_schedule.config)
        total = config.num_train_timesteps
        most = total - config.steps_offset
        if not 1 <= steps <= most:
            raise UserError(f"sampler.steps = {steps}: this model takes 1…{most}")
        scheduler.set_timesteps(steps)
        timesteps = [int(t) for t in scheduler.timesteps]
        alpha_bar = scheduler.alphas_cumprod.double()
        previous = [t - total // steps for t in timesteps]
        final = float(scheduler.final_alpha_cumprod)
        return NoiseSchedule(
            timesteps=tuple(timesteps),
            alpha_bar=tuple(float(alpha_bar[t]) for t in timesteps),
            alpha_bar_prev=tuple(float(alpha_bar[t]) if t >= 0 else final for t in previous),
            prediction_type=config.prediction_type,
        )

    def checkpointing(self, unet: bool, decoder: bool) -> None:
        """Trades compute for memory where gradients flow: recompute the UNet's blocks, or the VAE's decoder."""
        if unet:
            self.unet.enable_gradient_checkpointing()
        self.checkpoint_decoder = decoder

    @contextmanager
    def base(self) -> Iterator[None]:
        """A context in which the adapter is off: the model as it was before fine-tuning."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters that fine-tuning changes, in a fixed order."""
        return ((name, p) for name, p in sorted(self.unet.named_parameters()) if p.requires_grad)


def ddim_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM with the betas and the prediction type of whatever scheduler a checkpoint ships.

    Raises:
        UserError: for settings under which DDIM's transition would not be the model's: clipped or thresholded samples,
            and zero terminal SNR.
    """
    for key in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if config.get(key):
            raise UserError(f"the model's scheduler has {key} = true, which is not supported: set it to false")
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    kept = {key: config[key] for key in (*keep, "steps_offset", "set_alpha_to_one") if key in config}
    # DDIMScheduler's own defaults would clip, and would end at ᾱ = 1, where the last step has no density
    return DDIMScheduler(**{"set_alpha_to_one": False, "steps_offset": 1, **kept}, clip_sample=False)
