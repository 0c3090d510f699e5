"""Opens a diffusers folder, or a repository of the hub, without running anything that it brings.

Concrete classes only, safetensors only: pipelines and ``Auto*`` classes run code that a repository names
(CVE-2026-44513).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from diffexp.errors import UserError, one_line
from diffexp.models.base import TextToImage
from diffexp.models.fast import quicken
from diffexp.models.foreign import check_index, check_part, read_json
from diffexp.models.hub import locate
from diffexp.models.schedulers import ddim_scheduler
from diffexp.models.sdxl import StableDiffusionXL
from diffexp.models.stable_diffusion import StableDiffusion
from diffexp.quiet import no_progress_bars

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def load(
    name: str,
    precision: str = "fp32",
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    master_weights: bool = False,
) -> TextToImage:
    """The model called ``name``: "emoji" or "emoji-xl" (which ship with the package), a folder, or a hub id.

    ``precision`` ("fp32", "bf16", "fp16") is that of the frozen weights; a VAE is never loaded in fp16, where SDXL's
    overflows. With ``master_weights`` the denoising network keeps float32 weights and only computes in ``precision``,
    as it must to be fine-tuned as a whole. ``revision`` and ``variant`` are the hub's.

    Raises:
        UserError: if there is no such model, or it is of another class than Stable Diffusion 1.x, 2.x or XL.
    """
    folder, source = locate(name, revision, variant)
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"model.path = {name!r} is a {kind}: only {' and '.join(PIPELINES)} are supported")
    check_index(index, folder / "model_index.json")
    dtype = PRECISIONS[precision]
    # what convolutions are fastest in; on MPS some backward passes fail with it (pytorch issues 140902 and 188371)
    layout = torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last

    def part(cls: Any, subfolder: str, dtype: torch.dtype = dtype) -> Any:
        with opening(name, subfolder):
            network = open_part(cls, folder, subfolder, dtype, variant).to(device, memory_format=layout)
        if subfolder in ("unet", "vae"):
            quicken(network)
        return network

    def words(subfolder: str) -> CLIPTokenizer:
        with opening(name, subfolder):
            check_part(folder / subfolder)
            return CLIPTokenizer.from_pretrained(folder, subfolder=subfolder, local_files_only=True)

    with opening(name, "scheduler"):
        scheduler = ddim_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"))
    common = (
        part(UNet2DConditionModel, "unet", torch.float32 if master_weights else dtype),
        part(AutoencoderKL, "vae", torch.float32 if dtype == torch.float16 else dtype),
        scheduler,
        source,
    )
    tokenizer, text_encoder = words("tokenizer"), part(CLIPTextModel, "text_encoder")
    if kind == "StableDiffusionPipeline":
        model: TextToImage = StableDiffusion(*common, tokenizer, text_encoder)
    else:
        encoders = text_encoder, part(CLIPTextModelWithProjection, "text_encoder_2")
        zero_uncond = bool(index.get("force_zeros_for_empty_prompt", True))
        model = StableDiffusionXL(*common, (tokenizer, words("tokenizer_2")), encoders, zero_uncond)
    model.autocast = dtype if model.dtype != dtype else None
    check_network(model, name)
    return model


@contextmanager
def opening(name: str, part: str) -> Iterator[None]:
    """A context in which the libraries open a part of the model called ``name``.

    Raises:
        UserError: whatever they raise: a damaged or hostile folder fails in many ways, each with an error of its own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = one_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"model.path = {name!r}: can't open {part}: {what}") from error


def open_part(cls: Any, folder: Path, subfolder: str, dtype: torch.dtype, variant: str | None) -> Any:
    """A network of a concrete class from its subfolder.

    Raises:
        OSError: if there is none.
        UserError: if its weights are not those of the class, or the folder asks for what it must not.
    """
    check_part(folder / subfolder)
    precision = {"dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype": dtype}
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "variant": variant}
    with no_progress_bars():
        network, report = cls.from_pretrained(
            folder, subfolder=subfolder, output_loading_info=True, **precision, **options
        )
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
    if missing:
        # the libraries would go on with random numbers in their place
        raise UserError(f"{folder / subfolder} is no whole {cls.__name__}: {len(missing)} weights lack: {missing[0]} …")
    return network


def check_network(model: TextToImage, name: str) -> None:
    """Checks that the denoising network takes what Stable Diffusion's does: latents, a timestep, a text.

    Raises:
        UserError: if it is one for inpainting, a distilled one, or SDXL's refiner.
    """
    config = model.unet_config
    xl = isinstance(model, StableDiffusionXL)
    problems = {
        f"its network takes {config.in_channels} channels (inpainting?)": config.in_channels != config.out_channels,
        "its network takes the guidance scale as an input (a distilled model)": bool(config.time_cond_proj_dim),
        f"its network takes {config.addition_embed_type!r} besides the text": config.addition_embed_type
        != ("text_time" if xl else None),
    }
    if xl and not any(problems.values()):
        width = model.encoders[1].config.projection_dim + 6 * config.addition_time_embed_dim
        takes = config.projection_class_embeddings_input_dim
        problems[f"its network takes {takes} numbers besides the text, not {width} (a refiner?)"] = takes != width
    for problem in (text for text, wrong in problems.items() if wrong):
        raise UserError(f"model.path = {name!r}: {problem}, which is not supported")
