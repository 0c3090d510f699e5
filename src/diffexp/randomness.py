"""Noise belongs to the sample: every random number of a run has a name, and no global generator is touched.

A generator is keyed by (seed, iteration, sample index, purpose). Batch sizes, the number of processes and restarts
therefore change no sample, and a baseline and its DiffExp twin start from the same noise (common random numbers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from diffexp.devices import upload


def generator(*key: int | str) -> Generator:
    """The CPU generator that belongs to a key. Equal keys give equal streams, on every machine.

    Torch's CPU generator takes 32 bits of a seed: of n keys, some two share a stream with a chance of n² / 2³³, 2 % for
    13,000 samples. A repeated sample among so many changes no result.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # Generator seeds are signed 64-bit integers
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def randn(generators: Sequence[Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise, (B, *shape) in float32: row b comes from ``generators[b]`` alone."""
    rows = [torch.randn(tuple(shape), generator=one) for one in generators]
    return upload(torch.stack(rows), device)
