"""Opens a diffusers folder, or a repository of the hub, without running anything that it brings.

Concrete classes only, safetensors only, and a hub name is resolved to a commit once: pipelines and ``Auto*`` classes
run code that a repository names (CVE-2026-44513), and an index can change between its check and its download
(CVE-2026-45804).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub import HfApi, snapshot_download
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from diffexp.emoji import model_path
from diffexp.errors import UserError
from diffexp.models.base import Source, TextToImage, ddim_scheduler
from diffexp.models.sdxl import StableDiffusionXL
from diffexp.models.stable_diffusion import StableDiffusion
from diffexp.quiet import no_progress_bars

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
FOREIGN_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipeline")


def load(
    name: str, precision: str = "fp32", device: str = "cpu", revision: str | None = None, variant: str | None = None
) -> TextToImage:
    """The model called ``name``: "emoji" (the one that ships with the package), a diffusers folder, or a hub id.

    ``precision`` ("fp32", "bf16", "fp16") is that of the frozen weights; a VAE is never loaded in fp16, where SDXL's
    overflows. ``revision`` and ``variant`` are the hub's.

    Raises:
        UserError: if there is no such model, or it is of another class than Stable Diffusion 1.x, 2.x or XL.
    """
    folder, source = locate(name, revision)
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"model.path = {name!r} is a {kind}: only {' and '.join(PIPELINES)} are supported")
    dtype = PRECISIONS[precision]
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "variant": variant}

    def part(cls: Any, subfolder: str, dtype: torch.dtype) -> Any:
        reject_foreign_code(folder / subfolder / "config.json")
        dtype_option = "dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype"
        try:
            with no_progress_bars():
                model = cls.from_pretrained(folder, subfolder=subfolder, **{dtype_option: dtype}, **options)
        except OSError as error:
            raise UserError(f"model.path = {name!r}: can't open {subfolder}: {one_line(error)}") from error
        return model.to(device, memory_format=torch.channels_last)  # the layout that convolutions are fastest in

    common = (
        part(UNet2DConditionModel, "unet", dtype),
        part(AutoencoderKL, "vae", torch.float32 if dtype == torch.float16 else dtype),
        ddim_scheduler(read_json(folder / "scheduler" / "scheduler_config.json")),
        source,
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    text_encoder = part(CLIPTextModel, "text_encoder", dtype)
    if kind == "StableDiffusionPipeline":
        return StableDiffusion(*common, tokenizer, text_encoder)
    tokenizer_2 = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2", local_files_only=True)
    text_encoder_2 = part(CLIPTextModelWithProjection, "text_encoder_2", dtype)
    zero_uncond = bool(index.get("force_zeros_for_empty_prompt", True))
    return StableDiffusionXL(*common, (tokenizer, tokenizer_2), (text_encoder, text_encoder_2), zero_uncond)


def locate(name: str, revision: str | None) -> tuple[Path, Source]:
    """The folder that holds the model; a hub repository is downloaded at one commit, without pickles or code."""
    if name == "emoji":
        return model_path(), Source(name)
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise UserError(f"model.path = {name!r}: no model_index.json in it, so it is no diffusers folder")
        return Path(name), Source(name)
    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except Exception:  # offline, or unreachable: whatever the cache holds of that revision
        commit = revision
    try:
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:
        raise UserError(
            f"model.path = {name!r}: neither a folder nor a model that the hub or its cache has ({one_line(error)})"
        ) from error
    return folder, Source(name, folder.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: if the file is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"can't read {path}: a JSON object was expected")
    return content


def reject_foreign_code(config: Path) -> None:
    """Refuses a config that asks for code of its own (CVE-2026-4372, CVE-2026-5241)."""
    for key in read_json(config):
        if key in FOREIGN_CODE_KEYS or key.startswith("_attn_implementation"):
            raise UserError(f"{config} asks for code of its own ({key}): remove that key if you trust the model")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
