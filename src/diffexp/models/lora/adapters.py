"""Low-rank adapters (Hu et al. 2022) on the denoising network and, if wanted, on the text encoders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffexp.errors import UserError
from diffexp.models.base import TextToImage
from diffexp.models.fast import ADAPTER, quicken_adapter
from diffexp.randomness import generator
from diffexp.settings import ATTENTION, RANK

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
Initialisation = Literal["gaussian", "kaiming"]


class Layer(NamedTuple):
    """The adapter of one layer: y + alpha / rank · up(down(x)), with ``down`` (rank × in) and ``up`` (out × rank)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


Layers = dict[str, Layer]  # by the layer's path in its network


def add(
    model: TextToImage,
    rank: int = RANK,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    seed: int = 0,
    text_targets: Sequence[str] = (),
    init: Initialisation = "gaussian",
) -> None:
    """Adds a LoRA that changes nothing yet: A is random and B = 0, both float32. ``alpha`` defaults to the rank.

    ``targets`` are names of layers of the denoising network, ``text_targets`` of the text encoders (none: they stay
    frozen). A ~ N(0, 1/rank²) with ``init`` "gaussian", as diffusers' scripts do it, or U(−1/√in, 1/√in) with
    "kaiming", as kohya's do.

    Raises:
        UserError: if a target is no layer of its network.
    """
    for folder in model.networks():
        if names := targets if folder == "unet" else text_targets:
            add_to(model, folder, rank, alpha, names, seed, init)


def add_to(
    model: TextToImage,
    folder: str,
    rank: int,
    alpha: float | None,
    targets: Sequence[str],
    seed: int,
    init: Initialisation,
) -> None:
    """``add`` for one of the networks."""
    network = model.networks()[folder]
    check_targets(network, targets, "lora.targets" if folder == "unet" else "lora.text_targets")
    strength: Any = rank if alpha is None else alpha  # peft's annotation says int, its arithmetic takes any number
    attach(model, folder, LoraConfig(r=rank, lora_alpha=strength, target_modules=list(targets)))
    prefix = "" if folder == "unet" else f"{folder}."
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(initial(parameter.shape, init, generator(seed, "lora", prefix + name)))


def initial(shape: Sequence[int], init: Initialisation, noise: torch.Generator) -> Tensor:
    """A new A, of shape (rank, in, ...)."""
    if init == "gaussian":
        return torch.randn(tuple(shape), generator=noise) / shape[0]
    return (2 * torch.rand(tuple(shape), generator=noise) - 1) / math.sqrt(math.prod(shape[1:]))


def attach(model: TextToImage, folder: str, config: LoraConfig) -> None:
    """Puts an adapter into a network, without touching the global random generator that peft initialises it from."""
    network = model.networks()[folder]
    with torch.random.fork_rng(devices=[]):
        # by peft itself: the encoders' own add_adapter refuses versions of peft that do all that is asked for here
        inject_adapter_in_model(config, network, ADAPTER)
    quicken_adapter(network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.learns_text |= folder != "unet"


def attach_layers(model: TextToImage, adapters: Mapping[str, Layers]) -> None:
    """Puts adapters that exist already into the networks: ``adapters`` by the networks' folder names."""
    for folder, layers in adapters.items():
        paths = [path for path, _ in layer_modules(model.networks()[folder])]
        attach(model, folder, config_of(layers, paths))
    own = dict(model.trainable())
    with torch.no_grad():
        for folder, layers in adapters.items():
            prefix = "" if folder == "unet" else f"{folder}."
            for path, layer in layers.items():
                own[f"{prefix}{path}.lora_A.default.weight"].copy_(layer.down)
                own[f"{prefix}{path}.lora_B.default.weight"].copy_(layer.up)


def config_of(layers: Layers, paths: Iterable[str]) -> LoraConfig:
    """The peft configuration of adapters whose ranks and scales may differ; ``paths`` are all layers of the network."""
    ranks, alphas = [layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    return LoraConfig(
        r=rank,
        lora_alpha=cast(Any, alpha),
        target_modules=short_names(layers, paths),
        rank_pattern={path: layer.rank for path, layer in layers.items() if layer.rank != rank},
        alpha_pattern=cast(Any, {path: layer.alpha for path, layer in layers.items() if layer.alpha != alpha}),
    )


def short_names(chosen: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Names such as "to_q" that mean exactly the ``chosen`` among all ``paths``, or else the whole paths."""
    chosen = set(chosen)
    names = {last_name(path) for path in chosen}
    return sorted(names if {path for path in paths if last_name(path) in names} == chosen else chosen)


def last_name(path: str) -> str:
    """The name of a layer without where it is; "to_out.0" where it is one of a list."""
    *_, parent, name = ["", *path.split(".")]
    return f"{parent}.{name}" if name.isdigit() else name


def layer_modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that can have an adapter, by their paths, whether or not they have one."""
    found = []
    for path, module in network.named_modules():
        if path.endswith(".base_layer") or ".lora_" in path:
            continue
        if isinstance(getattr(module, "base_layer", module), nn.Linear | nn.Conv2d):
            found.append((path, module))
    return found


def check_targets(network: nn.Module, targets: Sequence[str], setting: str) -> None:
    """Checks that every target is a layer of the network, or the end of the paths of some.

    Raises:
        UserError: if one is not.
    """
    paths = [path for path, _ in layer_modules(network)]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            known = ", ".join(sorted({last_name(path) for path in paths}))
            raise UserError(f"{setting} = {list(targets)}: this model has no layer {target!r}; it has {known}")


def adapters(model: TextToImage) -> dict[str, Layers]:
    """The adapters of a model as they are now, by the folder names of the networks that have one."""
    found: dict[str, Layers] = {}
    for folder, network in model.networks().items():
        for path, module in layer_modules(network):
            if hasattr(module, "lora_A"):
                adapted: Any = module
                down, up = (side["default"].weight.detach() for side in (adapted.lora_A, adapted.lora_B))
                layer = Layer(down, up, round(adapted.scaling["default"] * adapted.r["default"], 9))
                found.setdefault(folder, {})[path] = layer
    return found
