"""A text-to-image latent diffusion model, as the rest of the project sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffexp.diffusion import NoiseSchedule, rowwise
from diffexp.errors import UserError
from diffexp.models.schedulers import noise_schedule
from diffexp.text import TextEmbedding, Words, concatenate
from diffexp.weights import misfits

LatentShape = tuple[int, int, int]
EMBEDDED = 64
"""Prompts that a text encoder reads at once: a prompt set may have thousands."""


class Source(NamedTuple):
    """Where a model came from: what the user named, and for a hub id the commit that it resolved to."""

    name: str
    commit: str | None = None

    def record(self) -> dict[str, str]:
        """What a run keeps of it, to go on with the same weights; nothing of a folder, which says nothing of them."""
        return {"base_model": self.name, "base_commit": self.commit} if self.commit else {}


class TextToImage(ABC):
    """Encodes prompts, predicts noise with classifier-free guidance, decodes latents.

    Everything is frozen until ``diffexp.models.lora`` adds an adapter, whose parameters then train, or
    ``diffexp.models.full`` lets the denoising network train as a whole. Frozen weights are in the model's precision;
    what trains, latents, predictions and images are float32.
    """

    kohya_text_encoders: ClassVar[Mapping[str, str]]  # folder name → prefix of its keys in kohya files

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: DDIMScheduler, source: Source
    ) -> None:
        self.unet, self.vae, self.source = unet.eval().requires_grad_(False), vae.eval().requires_grad_(False), source
        self.scheduler = scheduler
        self.learns_text = False
        self.autocast: torch.dtype | None = None  # what the network computes in, if not in its weights' precision
        # diffusers types its configurations as plain dictionaries
        self.unet_config: Any = unet.config
        self.vae_config: Any = vae.config

    # diffusers' own answers look through all layers, for hooks that there are none of here: 2.5 ms, five times a pass
    @property
    def device(self) -> torch.device:
        return device_of(self.unet)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """The embedding of the prompts, and of the empty text; with gradients to encoders that learn."""
        with torch.set_grad_enabled(self.learns_text and torch.is_grad_enabled()):
            return concatenate([self.embed(part).to(self.device) for part in in_parts(prompts)])

    @torch.no_grad()
    def encode_set(self, prompts: Sequence[str]) -> TextEmbedding:
        """The embedding of a prompt set, on the CPU: of thousands of prompts it takes gigabytes."""
        return concatenate([self.embed(part).to(torch.device("cpu")) for part in in_parts(prompts)])

    def park_text_encoders(self) -> None:
        """Moves the text encoders into the computer's memory: a run has embedded all its prompts before it begins.

        In bf16 they take 0.2 GiB of a GPU for Stable Diffusion 1.5, and 1.5 for XL. ``encode`` goes on working, on the
        CPU. Encoders that learn stay.
        """
        for encoder in () if self.learns_text else self.text_encoders().values():
            encoder.to("cpu")

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        """What ``encode`` returns, of at most ``EMBEDDED`` prompts, wherever the text encoders are."""

    @abstractmethod
    def spell(self, prompts: Sequence[str], units: Sequence[Words]) -> list[list[str]]:
        """The text of each unit of each prompt: a word, or a token, as the positions of its tokens."""

    @abstractmethod
    def network(
        self,
        x: Float[Tensor, "N C H W"],
        t: int | Sequence[int],
        hidden: Float[Tensor, "N L D"],
        pooled: Float[Tensor, "N P"] | None,
    ) -> Float[Tensor, "N C H W"]:
        """One pass of the denoising network, in the model's precision; out comes the precision of ``x``."""

    @abstractmethod
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """The text encoders by their folder names."""

    def predict(
        self, x_t: Float[Tensor, "B C H W"], t: int | Sequence[int], text: TextEmbedding, w: float | Sequence[float]
    ) -> Float[Tensor, "B C H W"]:
        """Eq. 4: ε̃(x_t, t, c) = ε(x_t, t) + w (ε(x_t, t, c) − ε(x_t, t)), for every w, also below 1.

        ``t`` and ``w`` are the same for all samples, or each sample's own. The only place with this formula. Where w is
        1 or 0 one of the two predictions drops out, and with it half of the work. Ho and Salimans 2022.
        """
        scales = [w] * len(x_t) if isinstance(w, int | float) else w
        if set(scales) == {1}:
            return self.network(x_t, t, text.hidden, text.pooled)
        null = text.unconditional()
        if set(scales) == {0}:
            return self.network(x_t, t, null.hidden, null.pooled)
        both, twice = concatenate([text, null]), t if isinstance(t, int) else [*t, *t]
        conditional, unconditional = self.network(torch.cat([x_t, x_t]), twice, both.hidden, both.pooled).chunk(2)
        return unconditional + rowwise(scales, x_t) * (conditional - unconditional)

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Images in [0, 1], float32, with gradients to the latents where they ask for them."""
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
        """The timesteps of a sampler of ``steps`` steps, and ᾱ at both ends of each.

        Raises:
            UserError: if the model has fewer timesteps than that.
        """
        return noise_schedule(self.scheduler, steps)

    @property
    def prediction_type(self) -> str:
        """What the network predicts: "epsilon", "v_prediction" or "sample"."""
        config: Any = self.scheduler.config
        return config.prediction_type

    def checkpointing(self, parts: Collection[str]) -> None:
        """Trades compute for memory where gradients flow: ``parts`` are computed again, "unet", "attention", "decoder".

        Of the network all residual and transformer blocks, or the latter alone. Those hold 64 % of what a pass of
        Stable Diffusion 1.5 keeps at 512², and 82 % for XL at 1024²; the residual blocks hold 18 % and 10 %, for 48 %
        and 21 % of the work to compute again.

        The decoder's parts are its residual blocks, attentions and upsamplers, one at a time: at the size of the image
        each of them holds about ten tensors for its gradient, and diffusers' own checkpoints span three of them.
        """
        if "unet" in parts:
            self.unet.enable_gradient_checkpointing()
        elif "attention" in parts:
            for transformer in self.unet.modules():
                if isinstance(transformer, Transformer2DModel):
                    transformer.enable_gradient_checkpointing()
        if "decoder" in parts:
            for part in self.vae.decoder.modules():
                if isinstance(part, (Attention, ResnetBlock2D, Upsample2D)):
                    part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]

    def computing(self) -> AbstractContextManager[Any]:
        """The context of a network pass: it computes in ``autocast`` where that is not the weights' precision."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @contextmanager
    def base(self) -> Iterator[None]:
        """A context in which the adapters are off: the model as it was before fine-tuning."""
        layers = [layer for network in self.networks().values() for layer in network.modules()]
        adapted = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
        for layer in adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in adapted:
                layer.enable_adapters(True)

    def networks(self) -> dict[str, nn.Module]:
        """What can be fine-tuned, by folder names: the denoising network, then the text encoders."""
        return {"unet": self.unet, **self.text_encoders()}

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters that fine-tuning changes, in a fixed order."""
        for folder, network in self.networks().items():
            prefix = "" if folder == "unet" else f"{folder}."
            yield from ((prefix + name, p) for name, p in sorted(network.named_parameters()) if p.requires_grad)

    def state(self) -> dict[str, Tensor]:
        """Copies of the tensors that fine-tuning changes; adapters' as ``<layer>.lora_A.weight`` (rank × in)."""
        return {
            key_of(name): parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, parameter in self.trainable()
        }

    def set_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what ``state`` returned.

        Raises:
            UserError: if the tensors are those of another model, or of an adapter of another shape.
        """
        own = {key_of(name): parameter for name, parameter in self.trainable()}
        if wrong := misfits(own, tensors):
            raise UserError(f"what was saved does not fit this model: {len(wrong)} tensors differ, {wrong[0]} for one")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(tensors[key])


def in_parts(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Prompts, at most ``EMBEDDED`` at a time; of none, one part without any."""
    return (prompts[start : start + EMBEDDED] for start in range(0, max(1, len(prompts)), EMBEDDED))


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights are."""
    return next(network.parameters()).device


def key_of(parameter: str) -> str:
    """The name of a parameter in files: without the adapter's own name, which peft puts into it."""
    return parameter.replace(".default.", ".")
