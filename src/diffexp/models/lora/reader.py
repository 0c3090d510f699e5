"""Reads LoRA files of others: diffusers' (of today and before) and kohya's, with their ranks and scales."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffexp.errors import UserError, one_line
from diffexp.models.base import TextToImage
from diffexp.models.lora.adapters import Initialisation, Layer, Layers, add_to, attach_layers, layer_modules
from diffexp.models.lora.keys import Place, places, stems
from diffexp.sharing.lora_header import METADATA_KEY, check_header_size

DOWN, UP, ALPHA = "down", "up", "alpha"
ENDINGS = (
    (r"(.+)\.lora_A\.weight", DOWN),  # peft's, which diffusers writes today
    (r"(.+)\.lora_B\.weight", UP),
    (r"(.+)\.lora_down\.weight", DOWN),  # kohya's
    (r"(.+)\.lora_up\.weight", UP),
    (r"(.+)\.(?:lora|lora_linear_layer)\.down\.weight", DOWN),  # diffusers' of 2023
    (r"(.+)\.(?:lora|lora_linear_layer)\.up\.weight", UP),
    (r"(.+_lora)\.down\.weight", DOWN),  # diffusers' first, such as attn1.processor.to_q_lora
    (r"(.+_lora)\.up\.weight", UP),
    (r"(.+)\.alpha", ALPHA),
)
FIRST_FORM = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of text encoders

Parts = dict[str, dict[str, Tensor]]  # by a layer's name in the file: its matrices


def load(model: TextToImage, file: Path) -> None:
    """Adds the LoRA in a file, with the ranks, scales and layers that it has there.

    Raises:
        UserError: if the file is no LoRA, or one of another model.
    """
    attach_layers(model, read(model, file))


def start(
    model: TextToImage,
    file: Path,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    text_targets: Sequence[str] = (),
    seed: int = 0,
    init: Initialisation = "gaussian",
) -> None:
    """Adds the LoRA in a file, to train it further. What is None is taken as it is in the file.

    Text encoders that the file says nothing about get a new adapter where ``text_targets`` asks for one.

    Raises:
        UserError: if the file is no LoRA, one of another model, or another one than the settings ask for.
    """
    adapters = read(model, file)
    layers = [layer for found in adapters.values() for layer in found.values()]
    for setting, wanted, has in (
        ("rank", rank, sorted({layer.rank for layer in layers})),
        ("alpha", alpha, sorted({layer.alpha for layer in layers})),
    ):
        if wanted is not None and has != [wanted]:
            stated = ", ".join(f"{value:g}" for value in has)
            raise UserError(f"lora.{setting} = {wanted:g}: the LoRA {file} has {stated}; leave lora.{setting} out")
    if targets is not None:
        check_same_layers(model, adapters.get("unet", {}), targets, file)
    if not text_targets and set(adapters) - {"unet"}:
        raise UserError(f"lora.text_encoders = false: the LoRA {file} is one of the text encoders too; set it to true")
    for folder in model.text_encoders():
        if text_targets and folder not in adapters:
            add_to(model, folder, layers[0].rank, layers[0].alpha, text_targets, seed, init)
    attach_layers(model, adapters)


def check_same_layers(model: TextToImage, layers: Layers, targets: Sequence[str], file: Path) -> None:
    """Checks that a file's layers in the denoising network are those that ``targets`` name.

    Raises:
        UserError: if they are not.
    """
    paths = [path for path, _ in layer_modules(model.unet)]
    wanted = {path for path in paths if any(path == name or path.endswith(f".{name}") for name in targets)}
    if different := sorted(wanted ^ layers.keys()):
        has = "has" if different[0] in layers else "lacks"
        raise UserError(f"lora.targets = {list(targets)}: the LoRA {file} {has} {different[0]}; leave lora.targets out")


def read(model: TextToImage, file: Path) -> dict[str, Layers]:
    """The adapters in a diffusers or kohya file, by the folder names of the networks that they are for.

    Raises:
        UserError: if it can't be read, holds anything but plain LoRA matrices, or does not fit the model.
    """
    try:
        check_header_size(file)
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"can't read the LoRA {file}: {one_line(error)}") from error
    known, found = stems(model), grouped(tensors, file)
    foreign = sorted(name for name in found if name not in known)
    if foreign:
        raise UserError(
            f"the LoRA {file} does not fit this model: {len(foreign)} of its {len(found)} layers are not in it, "
            f"{foreign[0]} for one"
        )
    scales, shapes = stated_scales(header, file), places(model)
    adapters: dict[str, Layers] = {}
    for name, parts in sorted(found.items()):
        place = known[name]
        layer = layer_of(parts, lambda rank, place=place: scales(place, rank), f"{file}: {name}")
        adapters.setdefault(place.folder, {})[place.path] = shaped(layer, shapes[place], f"{file}: {name}")
    return adapters


def grouped(tensors: Mapping[str, Tensor], file: Path) -> Parts:
    """The matrices of each layer under one name for each layer.

    Raises:
        UserError: if there are other tensors, none at all, or a layer without one of its two matrices.
    """
    found: Parts = {}
    foreign = []
    for key, tensor in tensors.items():
        match = next(((m[1], part) for pattern, part in ENDINGS if (m := re.fullmatch(pattern, key))), None)
        if match:
            found.setdefault(today(match[0]), {})[match[1]] = tensor
        else:
            foreign.append(key)
    halves = [name for name, parts in found.items() if DOWN not in parts or UP not in parts]
    if foreign or halves or not found:
        what = sorted(foreign or halves) or ["no tensors at all"]
        raise UserError(f"{file} is no LoRA that can be read here (LoHa, LoKr and DoRA are not): it has {what[0]}")
    return found


def today(name: str) -> str:
    """A layer's name with what diffusers' first form has in another way."""
    match = re.fullmatch(r"(.+?)(\.processor)?\.(to_[qkv]|to_out)_lora", name)
    if not match:
        return name
    if name.startswith("text_encoder"):
        return f"{match[1]}.{FIRST_FORM[match[3]]}"
    return f"{match[1]}.{'to_out.0' if match[3] == 'to_out' else match[3]}"


class Scales:
    """Each layer's alpha as a diffusers header states it; the rank where it states none."""

    def __init__(self, stated: Mapping[str, Any]) -> None:
        self.stated = stated

    def __call__(self, place: Place, rank: int) -> float:
        alpha = self.stated.get(f"{place.folder}.lora_alpha", rank)
        for pattern, value in (self.stated.get(f"{place.folder}.alpha_pattern") or {}).items():
            # peft takes it for a regular expression, but a stranger's may take for ever
            path = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if place.path == path or place.path.endswith(f".{path}"):
                alpha = value
        return float(alpha) * (math.sqrt(rank) if self.stated.get(f"{place.folder}.use_rslora") else 1)


def stated_scales(header: Mapping[str, str], file: Path) -> Scales:
    """What a header says about scales.

    Raises:
        UserError: if it is damaged, or is that of another kind of adapter.
    """
    try:
        stated = dict(json.loads(header.get(METADATA_KEY, "{}")))
        kinds = [key for key in stated if key.endswith((".use_dora", ".lora_bias")) and stated[key]]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"can't read the LoRA {file}: its {METADATA_KEY} is damaged") from error
    if kinds:
        raise UserError(f"{file} is no plain LoRA: {kinds[0].partition('.')[2]} is set, which can't be read here")
    return Scales(stated)


def layer_of(parts: Mapping[str, Tensor], stated: Callable[[int], float], what: str) -> Layer:
    """A layer of finite matrices and scale; ``stated`` is the alpha for a rank, where no tensor says it.

    Raises:
        UserError: if they are none.
    """
    down, up = parts[DOWN], parts[UP]
    if min(down.dim(), up.dim()) < 2 or not len(down):
        raise UserError(f"{what} is no LoRA: its matrices are {tuple(down.shape)} and {tuple(up.shape)}")
    try:
        alpha = float(parts[ALPHA] if ALPHA in parts else stated(len(down)))
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{what} is no LoRA: its alpha is no number") from error
    if not (math.isfinite(alpha) and down.isfinite().all() and up.isfinite().all()):
        raise UserError(f"{what} has numbers that are not finite: take an earlier file of that training")
    return Layer(down, up, alpha)


def shaped(layer: Layer, weight: Sequence[int], what: str) -> Layer:
    """The matrices in the shapes that an adapter of a layer with that weight has.

    Raises:
        UserError: if they are those of another layer.
    """
    down, up = (layer.rank, *weight[1:]), (weight[0], layer.rank, *(1 for _ in weight[2:]))
    if layer.down.numel() != math.prod(down) or layer.up.numel() != math.prod(up) or len(layer.up) != weight[0]:
        theirs, own = f"{len(layer.up)}×{math.prod(layer.down.shape[1:])}", f"{weight[0]}×{math.prod(weight[1:])}"
        raise UserError(f"{what} does not fit this model: it is for a layer of {theirs}, this one is {own}")
    return Layer(layer.down.reshape(down).float(), layer.up.reshape(up).float(), layer.alpha)
