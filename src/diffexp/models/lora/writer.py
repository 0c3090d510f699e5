"""Writes the two LoRA files that the world's tools read.

``pytorch_lora_weights.safetensors`` has diffusers' keys and, in its header, the scale; diffusers reads alpha = rank
without it. The ``.kohya.safetensors`` beside it is for ComfyUI and A1111, which load none of today's diffusers keys; it
carries the true alpha, which diffusers' own converter replaces by the rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from diffexp.models.base import TextToImage
from diffexp.models.header import put_in_order
from diffexp.models.lora.adapters import Layers, adapters, config_of
from diffexp.models.lora.keys import Place, diffusers_stem, kohya_stem, places
from diffexp.runs import durable
from diffexp.sharing.lora_header import DIFFUSERS_FILE, METADATA_KEY, without_paths
from diffexp.version import __version__

Tensors = dict[str, Tensor]
HASHED_FROM, HASHED = 0x100000, 0x10000  # what A1111's first hash of a file looks at


def save(model: TextToImage, folder: Path, name: str, metadata: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Writes both files of a model's adapters into ``folder`` and returns their paths.

    ``name`` is the stem of the kohya file, in place of any other there; ``metadata`` are further strings for both
    headers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = adapters(model)
    header = {"format": "pt", **tool_header(model, found, name), "diffexp.version": __version__, **(metadata or {})}
    diffusers_file, kohya_file = folder / DIFFUSERS_FILE, folder / f"{name}.kohya.safetensors"
    configs = json.dumps(diffusers_config(model, found), indent=2, sort_keys=True)
    write(diffusers_file, to_diffusers(found), {METADATA_KEY: configs, **header})
    write(kohya_file, to_kohya(found, model.kohya_text_encoders), header)
    for earlier in set(folder.glob("*.kohya.safetensors")) - {kohya_file}:
        earlier.unlink()  # the folder was renamed since
    return diffusers_file, kohya_file


def write(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes a safetensors file with hashes of its tensors in the header; it is never seen half written."""
    plain = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    content = BytesIO(to_bytes(plain, {**header, **hashes(plain, header)}))
    put_in_order(content)
    durable.replace(file, content.getvalue())


def hashes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """kohya's and ModelSpec's fingerprints, which stay the same when notes in the header are edited."""
    data = to_bytes(dict(tensors), {key: value for key, value in header.items() if key.startswith("ss_")})
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(data[HASHED_FROM : HASHED_FROM + HASHED]).hexdigest()[:8]
    return {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}


def to_diffusers(found: Mapping[str, Layers]) -> Tensors:
    """Adapters under diffusers' keys, float32."""
    tensors: Tensors = {}
    for folder, layers in found.items():
        for path, layer in layers.items():
            stem = diffusers_stem(Place(folder, path))
            tensors |= {f"{stem}.lora_A.weight": layer.down, f"{stem}.lora_B.weight": layer.up}
    return tensors


def to_kohya(found: Mapping[str, Layers], text_encoders: Mapping[str, str]) -> Tensors:
    """Adapters under kohya's keys, float16; ``text_encoders`` are their prefixes by folder name."""
    tensors: Tensors = {}
    for folder, layers in found.items():
        for path, layer in layers.items():
            stem = kohya_stem(Place(folder, path), text_encoders)
            tensors |= {f"{stem}.lora_down.weight": layer.down.half(), f"{stem}.lora_up.weight": layer.up.half()}
            tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def diffusers_config(model: TextToImage, found: Mapping[str, Layers]) -> dict[str, Any]:
    """What diffusers wants to know of the adapters: ranks, scales and layers, for each network."""
    known, config = places(model), {}
    for folder, layers in found.items():
        settings = config_of(layers, (place.path for place in known if place.folder == folder))
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"):
            value = getattr(settings, key)
            config[f"{folder}.{key}"] = sorted(value) if isinstance(value, set) else value
    return config


def tool_header(model: TextToImage, found: Mapping[str, Layers], name: str) -> dict[str, str]:
    """What A1111, ComfyUI and others show of a LoRA, and by what they tell which models it is for."""
    version, architecture = family(model)
    layers = [layer for of_network in found.values() for layer in of_network.values()]
    ranks, alphas = ({getattr(layer, key) for layer in layers} for key in ("rank", "alpha"))
    height, width = (side * model.pixels for side in model.latent_shape()[1:])
    prediction = "v" if model.prediction_type == "v_prediction" else model.prediction_type
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(max(alphas))) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_output_name": name,
        "ss_sd_model_name": without_paths(model.source.name),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": prediction,
    }


def family(model: TextToImage) -> tuple[str, str]:
    """kohya's and ModelSpec's names for the kind of base model."""
    if "text_encoder_2" in model.text_encoders():
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if model.unet_config.cross_attention_dim != 1024:
        return "sd_v1", "stable-diffusion-v1"
    if model.prediction_type == "v_prediction":
        return "sd_v2_v", "stable-diffusion-v2-768-v"
    return "sd_v2", "stable-diffusion-v2-512"
