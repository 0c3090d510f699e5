"""DiffExp: efficient exploration in reward fine-tuning of text-to-image diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffexp.version import __version__

if TYPE_CHECKING:
    from diffexp.config import Recipe
    from diffexp.training import train

__all__ = ["Recipe", "__version__", "train"]


def __getattr__(name: str) -> Any:
    """Loads ``Recipe`` and ``train`` when they are first asked for: torch takes seconds to import."""
    if name == "Recipe":
        from diffexp.config import Recipe

        return Recipe
    if name == "train":
        from diffexp.training import train

        return train
    raise AttributeError(f"module 'diffexp' has no attribute {name!r}")
