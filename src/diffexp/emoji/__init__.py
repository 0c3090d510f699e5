"""The emoji world: a miniature Stable Diffusion and its rewards, shipped with the package.

``model/`` opens with ``StableDiffusionPipeline.from_pretrained``, ``model-xl/`` with ``StableDiffusionXLPipeline``'s,
``alignment/`` with ``CLIPModel``'s and ``judge/`` with ``VisionTextDualEncoderModel``'s; no code of ours is needed.
``docs/emoji_world.md`` is the model card, ``tools/emoji`` builds everything from scratch.
"""

from __future__ import annotations

from pathlib import Path

from diffexp.errors import UserError, unknown

MODELS = {"emoji": "model", "emoji-xl": "model-xl"}
"""The painters by the names that recipes know them by, and the folders that hold them."""
STEPS = 20
"""Denoising steps of the world's recipes, and of every figure in its model card."""
PARTS = (*MODELS.values(), "alignment", "aesthetic", "judge")


def weights_path(part: str) -> Path:
    """Where the weights of one part of the world lie, such as ``model`` or ``judge``.

    Raises:
        UserError: an unknown part, or an installation without its package data.
    """
    if part not in PARTS:
        raise unknown("part of the emoji world", part, PARTS)
    path = Path(__file__).parent / "weights" / part
    if not path.is_dir():
        raise UserError(f"the emoji world's {part!r} is not in {path}: reinstall, or run python -m tools.emoji build")
    return path


def model_path(name: str = "emoji") -> Path:
    """The folder of the miniature Stable Diffusion, or of the one in XL's shape: a plain diffusers pipeline folder."""
    return weights_path(MODELS[name])
