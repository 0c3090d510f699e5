"""Writes what is trained so far into the package, as ordinary diffusers and transformers folders in fp16."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from tools.emoji import clip, scenes, tokenizer, unet, vae
from tools.emoji.common import WEIGHTS, WORK, save

CARD = """\
# Weights of the emoji world

Trained from scratch by `python -m tools.emoji build` on scenes made of emoji; `docs/emoji_world.md` is the model card.

The weights are licensed under Apache-2.0 like the rest of the project. The pictures they learnt from, and what the
painter paints, derive from these emoji sets, taken from npm:

| set | package | authors | licence |
| --- | --- | --- | --- |
| Fluent Emoji Flat | `@iconify-json/fluent-emoji-flat` | Microsoft | MIT |
| Twemoji | `@iconify-json/twemoji` | Twitter and contributors | [CC BY 4.0][cc] |

[cc]: https://creativecommons.org/licenses/by/4.0/

Changes: the emoji were rendered, scaled and composed into scenes; the networks redraw them.
"""


def export(target: Path = WEIGHTS) -> int:
    """Write all parts into ``target``, replacing each folder as a whole, and return their size in bytes."""
    staging = WORK / "export"
    shutil.rmtree(staging, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=vae.load(),
        text_encoder=unet.text_tower(),
        tokenizer=tokenizer.load(),
        unet=unet.load(),
        scheduler=unet.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(staging / "model", safe_serialization=True)
    name_as_originals(staging / "model" / "text_encoder")
    for name in ("alignment", "judge"):
        clip.load(name).half().save_pretrained(staging / name)
        tokenizer.load().save_pretrained(staging / name)
        _preprocessor().save_pretrained(staging / name)
        open_in_float32(staging / name)
    for folder in (staging / "model" / "tokenizer", staging / "alignment", staging / "judge"):
        tokenizer.save_classic_files(folder)
    head = {name: tensor.half() for name, tensor in load_file(WORK / "aesthetic.safetensors").items()}
    save(head, staging / "aesthetic" / "head.safetensors")
    (staging / "README.md").write_text(CARD)
    for part in ("model", "alignment", "judge", "aesthetic"):
        shutil.rmtree(target / part, ignore_errors=True)
    shutil.copytree(staging, target, dirs_exist_ok=True)
    shutil.rmtree(staging)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"export: {size / 1e6:.1f} MB in {target}", flush=True)
    return size


def name_as_originals(text_encoder: Path) -> None:
    """Names a ``CLIPTextModel``'s tensors as Stable Diffusion's files do, which every version of transformers reads."""
    file, root = text_encoder / "model.safetensors", "text_model."
    tensors = {key if key.startswith(root) else root + key: tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    open_in_float32(text_encoder)


def open_in_float32(folder: Path) -> None:
    """Has transformers open fp16 weights in float32, as diffusers does: otherwise a plain pipeline's parts differ."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def _preprocessor() -> CLIPImageProcessor:
    """What the image towers expect: 64×64 pixels mapped from [0, 1] to [-1, 1]."""
    half, size = [0.5, 0.5, 0.5], {"height": scenes.SIZE, "width": scenes.SIZE}
    return CLIPImageProcessor(do_center_crop=False, size=size, image_mean=half, image_std=half)
