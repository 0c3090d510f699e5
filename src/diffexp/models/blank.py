"""Models of a published architecture with random weights: as slow and as large as the real ones, without a download."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, TypeVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from diffexp.models.base import Source, TextToImage
from diffexp.models.fast import quicken
from diffexp.models.loading import PRECISIONS
from diffexp.models.schedulers import ddim_scheduler
from diffexp.models.sdxl import StableDiffusionXL
from diffexp.models.stable_diffusion import StableDiffusion
from diffexp.text import TextEmbedding

N = TypeVar("N", bound=nn.Module)

ARCHITECTURES = ("sd15", "sd21", "sdxl")
TOWERS = {"L": (1024, 24, 16, 14), "H": (1280, 32, 16, 14)}
"""Width, layers, heads and patch size of CLIP's vision transformers, Radford et al. 2021 and OpenCLIP."""


def blank(architecture: str, precision: str, device: torch.device, master_weights: bool = False) -> TextToImage:
    """A frozen model that can predict and decode, with weights ~ N(0, 0.02²); it has no tokenizer to read prompts.

    Its precisions are those of :func:`diffexp.models.load`. On torch's "meta" device it has shapes and no contents.
    """
    dtype = PRECISIONS[precision]
    published = files("diffexp") / "models" / "configs" / architecture

    def config(part: str, name: str = "config.json") -> dict[str, Any]:
        return json.loads((published / part / name).read_text(encoding="utf-8"))

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config("unet"))
        vae: Any = AutoencoderKL.from_config(config("vae"))
        encoders: list[nn.Module] = [CLIPTextModel(CLIPTextConfig(**config("text_encoder")))]
        if architecture == "sdxl":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))))
    unet = filled(unet, device, torch.float32 if master_weights else dtype)
    encoders = [filled(encoder, device, dtype) for encoder in encoders]
    vae = filled(vae, device, torch.float32 if dtype == torch.float16 else dtype)
    quicken(unet), quicken(vae)
    common: tuple[Any, Any, Any, Any] = (
        unet,
        vae,
        ddim_scheduler(config("scheduler", "scheduler_config.json")),
        Source(architecture),
    )
    if architecture == "sdxl":
        model: TextToImage = StableDiffusionXL(*common, cast(Any, (None, None)), cast(Any, tuple(encoders)))
    else:
        model = StableDiffusion(*common, cast(Any, None), cast(Any, encoders[0]))
    model.autocast = dtype if model.dtype != dtype else None
    return model


def filled(network: N, device: torch.device, dtype: torch.dtype = torch.float32) -> N:
    """A frozen network of the meta device with random weights, on ``device``; without any if that is meta too."""
    typed: Any = nn.Module.to(network, dtype)  # diffusers' own ``to`` warns of modules that these networks don't have
    network = typed.eval().requires_grad_(False)
    if device.type == "meta":
        return network
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    network = typed.to_empty(device=device).to(memory_format=layout)
    noise = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02, generator=noise)
    return network


def text(model: TextToImage, count: int) -> TextEmbedding:
    """``count`` embedded prompts of the shapes that the model takes, out of nothing."""
    noise = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(model.device)

    pooled = numbers(count, 1280) if isinstance(model, StableDiffusionXL) else None
    null = numbers(77, model.unet_config.cross_attention_dim)
    hidden = numbers(count, *null.shape)
    return TextEmbedding(hidden, [[]] * count, null, null, pooled, None if pooled is None else pooled[0])


def vision_tower(size: str, device: torch.device) -> nn.Module:
    """CLIP's vision transformer ViT-L/14 or ViT-H/14, float32: what most rewards spend their time in."""
    width, layers, heads, patch = TOWERS[size]
    settings = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
    )
    with torch.device("meta"):
        tower = CLIPVisionModel(settings)
    tower = filled(tower, device)
    for name, buffer in tower.named_buffers():  # positions, which to_empty has left without contents
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return tower
