"""How much memory of a GPU the recipes for Stable Diffusion take, computed without one.

    python -m tools.memory                    # a line for every recipe
    python -m tools.memory sd15-8gb --write   # put the figures into the recipes' comments

The networks are built from their published configurations on torch's "meta" device, where tensors have shapes but no
contents, and the passes that a recipe makes are run on them: a rollout, decoding, an update. What is alive at once is
counted, with attention as fused kernels do it. An estimate: 10 % for fragmentation and what libraries take are added,
and nothing was measured on a GPU.
"""

from __future__ import annotations

import argparse
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from diffexp import assembly
from diffexp.bench import LARGE, architecture_of
from diffexp.config import Recipe
from diffexp.models import TextToImage
from diffexp.models.blank import blank, text, vision_tower
from diffexp.rewards.spec import parse
from diffexp.settings import AlignPropSettings, DDPOSettings
from diffexp.toml import shipped

META = torch.device("meta")
GIB = 2**30
FRAGMENTATION = 1.1
LIBRARIES = 0.7  # GiB: the CUDA context, cuDNN's and cuBLAS's workspaces
PARAMETERS = {"aesthetic": 428e6, "clipscore": 428e6, "imagereward": 447e6, **dict.fromkeys(LARGE, 986e6)}
"""Of the rewards that are networks of CLIP's size, whole."""


class FusedAttention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: inputs, output and one number a query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, for as long as each lives.

    Views of the parameters of ``modules`` are nothing new.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.watch, out)
        return out

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = storage.nbytes()
            self.known[storage] = True
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size


def peak(work: Callable[[], object], modules: Sequence[nn.Module]) -> int:
    """The most bytes that ``work`` has alive at once, besides the parameters of the modules that it calls."""
    attention = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: FusedAttention.apply(q, k, v)
    try:
        with META, Meter(modules) as meter:
            work()
    finally:
        functional.scaled_dot_product_attention = attention
    return meter.peak


def size(*modules: nn.Module) -> int:
    """The bytes of the parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def model_of(recipe: Recipe) -> TextToImage:
    """The recipe's model with what it trains, without contents."""
    model = blank(architecture_of(recipe), recipe.model.precision, META, recipe.model.train == "unet")
    with META:
        assembly.make_trainable(recipe, model)
    model.computing = nullcontext  # type: ignore[method-assign]  # meta knows no autocast
    model.checkpointing(recipe.update.checkpoint)
    return model


def phases(recipe: Recipe) -> Mapping[str, float]:
    """GiB of each phase of an iteration, and of what is always there."""
    model = model_of(recipe)
    shape, w = model.latent_shape(recipe.sampler.size), recipe.sampler.guidance
    names = [member.name for member in parse(recipe.reward) if member.name in PARAMETERS]
    towers = [vision_tower("H" if name in LARGE else "L", META) for name in names]
    rewards = sum(4 * PARAMETERS[name] for name in names)
    modules = [model.unet, model.vae, *towers]
    adapter = sum(p.numel() for _, p in model.trainable())
    encoders = model.text_encoders().values() if model.learns_text else ()  # else they are parked
    always = size(model.unet, model.vae, *encoders) + rewards + 3 * 4 * adapter
    algorithm, rollout, update = recipe.algorithm, recipe.rollout.batch, recipe.update.batch

    def score(images: Tensor) -> Tensor:
        pixels = functional.interpolate(images, (224, 224), mode="bilinear")
        return sum((tower(pixels).pooler_output.sum() for tower in towers), images.sum())

    def denoise(count: int, steps: int) -> Tensor:
        embedded, x = text(model, count), torch.empty(count, *shape)
        for _ in range(steps):
            x = x - model.predict(x, 500, embedded, w)
        return x

    @torch.no_grad()
    def paint(count: int) -> None:
        score(model.decode(denoise(count, 1)))

    def backpropagate(steps: int) -> int:
        return peak(lambda: score(model.decode(denoise(update, steps))).backward(), modules)

    def policy_gradient() -> None:
        denoise(update, 1).square().mean().backward()

    found = {"always": always, "rollout": peak(lambda: paint(rollout), modules)}
    if isinstance(algorithm, DDPOSettings):
        pixels = shape[1] * shape[2] * model.pixels**2
        latents = shape[0] * shape[1] * shape[2]
        kept = 4 * recipe.samples * ((recipe.sampler.steps + 1) * latents + 3 * pixels)
        found = {**found, "always": always + kept, "update": peak(policy_gradient, modules)}
    else:
        # each further step that learns takes as much more as the second one
        one, two = backpropagate(1), backpropagate(2)
        last = algorithm.last_steps if isinstance(algorithm, AlignPropSettings) else None
        found["update"] = one + ((last or recipe.sampler.steps) - 1) * (two - one)
    return {name: count / GIB for name, count in found.items()}


def estimate(found: Mapping[str, float]) -> float:
    """GiB of the GPU's memory that a run of these phases takes."""
    return (found["always"] + max(found["rollout"], found["update"])) * FRAGMENTATION + LIBRARIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="default: all for Stable Diffusion")
    parser.add_argument("--write", action="store_true", help="write the figures into the recipes")
    options = parser.parse_args()
    for name in options.recipes or [name for name in shipped() if name.startswith("sd")]:
        found = phases(Recipe.load(name))
        total = estimate(found)
        print(
            f"{name:24} {total:5.1f} GiB: " + ", ".join(f"{part} {value:.1f}" for part, value in found.items()),
            flush=True,
        )
        if options.write:
            file = Path(str(files("diffexp") / "recipes" / f"{name}.toml"))
            head = file.read_text(encoding="utf-8")
            file.write_text(
                re.sub(r"(?<=^# Memory: about )[\d.]+", f"{total:.1f}", head, flags=re.MULTILINE), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
