"""Low-rank adapters on the denoising network, and the two files that the world's tools read them from.

Hu et al. 2022. ``pytorch_lora_weights.safetensors`` has diffusers' keys and, in its header, the scale; diffusers reads
alpha = rank without it. The ``.kohya.safetensors`` beside it is for ComfyUI and A1111, which load none of today's
diffusers keys; it carries the true alpha, which diffusers' own converter replaces by the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffexp.errors import UserError
from diffexp.lora_header import DIFFUSERS_FILE, METADATA_KEY, without_paths
from diffexp.models.base import TextToImage
from diffexp.randomness import generator
from diffexp.version import __version__

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

State = dict[str, Tensor]


def add(
    model: TextToImage, rank: int = 4, alpha: float | None = None, targets: tuple[str, ...] = ATTENTION, seed: int = 0
) -> None:
    """Adds a LoRA that changes nothing yet: A ~ N(0, 1/rank²), B = 0, float32. ``alpha`` defaults to the rank."""
    strength: Any = rank if alpha is None else alpha  # peft's annotation says int, its arithmetic takes any number
    attach(model, LoraConfig(r=rank, lora_alpha=strength, target_modules=list(targets), init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in model.trainable():
            if ".lora_A." in name:
                noise = torch.randn(parameter.shape, generator=generator(seed, "lora", name))
                parameter.copy_(noise / rank)


def attach(model: TextToImage, config: LoraConfig) -> None:
    """Puts an adapter into the network, without touching the global random generator that peft initialises it from."""
    with torch.random.fork_rng(devices=[]):
        model.unet.add_adapter(config)
    for _, parameter in model.trainable():
        parameter.data = parameter.data.float()


def state(model: TextToImage) -> State:
    """The adapter's tensors under peft's names: ``<module>.lora_A.weight`` (rank × in), ``.lora_B.weight``."""
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model.unet).items()}


def set_state(model: TextToImage, tensors: Mapping[str, Tensor]) -> None:
    """Fills the adapter that the network already has.

    Raises:
        UserError: if the tensors belong to an adapter of another shape.
    """
    expected = state(model)
    wrong = [k for k in {*expected, *tensors} if k not in expected or k not in tensors]
    wrong = wrong or [k for k in expected if expected[k].shape != tensors[k].shape]
    if wrong:
        raise UserError(f"the LoRA does not fit this model: {len(wrong)} tensors differ, {min(wrong)} for one")
    set_peft_model_state_dict(model.unet, dict(tensors))


def load(model: TextToImage, file: Path) -> None:
    """Adds the LoRA in a diffusers file, with the rank, alpha and targets of its header.

    Raises:
        UserError: if the file is no safetensors file, or has no such header.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read the LoRA {file}: {error}") from error
    if METADATA_KEY not in header or not all(key.startswith("unet.") for key in tensors):
        raise UserError(f"{file} is no LoRA of the diffusers format with its {METADATA_KEY}: was it made by diffexp?")
    settings = json.loads(header[METADATA_KEY])
    settings = {key.removeprefix("unet."): value for key, value in settings.items()}
    known = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
    attach(model, LoraConfig(**{key: settings[key] for key in known if key in settings}))
    set_state(model, {key.removeprefix("unet."): tensor for key, tensor in tensors.items()})


def save(model: TextToImage, folder: Path, name: str, metadata: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Writes both files of the adapter into ``folder`` and returns their paths.

    ``name`` is the stem of the kohya file; ``metadata`` are further strings for both headers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = model.unet.peft_config["default"], state(model)
    settings = {f"unet.{key}": value for key, value in config.to_dict().items()}
    settings_json = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
    header = {"format": "pt", "diffexp.version": __version__, **(metadata or {})}
    diffusers_file, kohya_file = folder / DIFFUSERS_FILE, folder / f"{name}.kohya.safetensors"
    save_file({f"unet.{k}": v for k, v in tensors.items()}, diffusers_file, {METADATA_KEY: settings_json, **header})
    save_file(to_kohya(tensors, config.lora_alpha), kohya_file, {**kohya_header(model, config, name), **header})
    return diffusers_file, kohya_file


def to_kohya(tensors: Mapping[str, Tensor], alpha: float) -> State:
    """The same adapter under kohya's keys, float16: ``lora_unet_<module path with underscores>.lora_down.weight``."""
    converted: State = {}
    for key, tensor in tensors.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        stem = "lora_unet_" + module.replace(".", "_")
        converted[f"{stem}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor.half().contiguous()
        converted[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return converted


def kohya_header(model: TextToImage, config: LoraConfig, name: str) -> dict[str, str]:
    """What A1111 and ComfyUI read of a LoRA besides its tensors."""
    xl = "text_encoder_2" in model.text_encoders()
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(float(config.lora_alpha)),
        "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v1",
        "ss_v2": str(not xl and model.unet_config.cross_attention_dim == 1024),
        "ss_output_name": name,
        "ss_sd_model_name": without_paths(model.source.name),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if xl else 'v1'}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
    }
