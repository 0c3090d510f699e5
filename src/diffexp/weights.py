"""Whether saved weights are those of a network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def misfits(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that only one of the two has, or where there are none, of those whose shapes differ."""
    return sorted(own.keys() ^ saved.keys()) or [name for name in own if own[name].shape != saved[name].shape]
