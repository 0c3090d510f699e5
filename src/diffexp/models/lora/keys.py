"""What the world's tools call the layers of a model in LoRA files.

diffusers: ``unet.<path>.lora_A.weight``. kohya, ComfyUI and A1111: ``lora_unet_<path>.lora_down.weight``, the path with
underscores; ``lora_te`` (SDXL: ``lora_te1``, ``lora_te2``) stands before the text encoders' layers. kohya's own files
for SDXL name the layers as Stability's code does (``input_blocks``); those are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from diffexp.models.base import TextToImage
from diffexp.models.lora.adapters import layer_modules

TEXT_ROOT = "text_model."
"""Stands before all paths in files; in newer versions of transformers not in every encoder itself."""

RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class Place(NamedTuple):
    """A layer: the folder name of its network, and its path in it."""

    folder: str
    path: str


def diffusers_stem(place: Place) -> str:
    """A layer's key in diffusers files, without the ending."""
    return f"{place.folder}.{filed_path(place)}"


def kohya_stem(place: Place, text_encoders: Mapping[str, str]) -> str:
    """A layer's key in kohya files, without the ending; ``text_encoders`` are their prefixes by folder name."""
    return f"{({'unet': 'lora_unet'} | dict(text_encoders))[place.folder]}_{filed_path(place).replace('.', '_')}"


def filed_path(place: Place) -> str:
    """The path of a layer as files have it."""
    rooted = place.folder == "unet" or place.path.startswith((TEXT_ROOT, "text_projection"))
    return place.path if rooted else TEXT_ROOT + place.path


def places(model: TextToImage) -> dict[Place, tuple[int, ...]]:
    """All layers of a model that can have an adapter, with the shapes of their weights."""
    return {
        Place(folder, path): tuple(cast(Any, getattr(module, "base_layer", module)).weight.shape)
        for folder, network in model.networks().items()
        for path, module in layer_modules(network)
    }


def stems(model: TextToImage) -> dict[str, Place]:
    """The layers of a model under every name that files have for them."""
    known: dict[str, Place] = {}
    prefixes = dict(model.kohya_text_encoders)
    for place in places(model):
        known[diffusers_stem(place)] = known[f"{place.folder}.{place.path}"] = place
        known[kohya_stem(place, prefixes)] = place
        if place.folder == "unet":
            known["lora_unet_" + stability_path(place.path, model.unet_config).replace(".", "_")] = place
        elif place.folder == "text_encoder":  # some tools write lora_te1 for a model with one encoder
            known[kohya_stem(place, {"text_encoder": "lora_te1"})] = place
    return known


def stability_path(path: str, config: Any) -> str:
    """The path in Stability's code, which numbers the blocks in a row, of a layer of a network with that ``config``."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        kind, index, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{RESNET.get(rest, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if not match:
        return path
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    rows = config.layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * rows}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(block + 1) * rows - 1}.{2 if 'Attn' in config.up_block_types[block] else 1}.{rest}"
    number = f"input_blocks.{1 + block * rows + index}" if side == "down" else f"output_blocks.{block * rows + index}"
    return f"{number}.0.{RESNET.get(rest, rest)}" if kind == "resnets" else f"{number}.1.{rest}"
