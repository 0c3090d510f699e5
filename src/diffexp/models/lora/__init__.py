"""Low-rank adapters: on a model (``add``), in the files that the world's tools read (``save``, ``load``, ``start``)."""

from diffexp.models.lora.adapters import ATTENTION, RANK, TEXT_ATTENTION, add
from diffexp.models.lora.reader import load, start
from diffexp.models.lora.writer import save

__all__ = ["ATTENTION", "RANK", "TEXT_ATTENTION", "add", "load", "save", "start"]
