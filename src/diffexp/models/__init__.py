"""Text-to-image models: the only part of the project that knows diffusers and peft."""

from diffexp.models.base import TextToImage
from diffexp.models.loading import load

__all__ = ["TextToImage", "load"]
