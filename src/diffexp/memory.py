"""Out of memory: fewer images at once, and the run goes on with the same result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from diffexp.errors import UserError, first_line
from diffexp.processes.parallel import Ranks

T = TypeVar("T")

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "unable to find an engine to execute",
    "unable to find a valid cudnn algorithm",
)
"""What CUDA and MPS, the CPU's allocator, cuBLAS, and cuDNN's convolutions say, which try one way after the other."""


class MicroBatch:
    """How many images go through the model at once. No result depends on it, so it halves when memory runs out.

    ``setting`` is what the user calls it. It stays halved: what did not fit once would not fit the next time either.
    """

    def __init__(self, size: int, setting: str = "batch") -> None:
        self.size, self.setting = size, setting
        self.told = size  # what the user knows

    def fit(self, work: Callable[[int], T]) -> T:
        """``work(size)``, from its start again with half the size whenever memory runs out.

        Raises:
            UserError: if not even one image fits.
        """
        while True:
            try:
                return work(self.size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.size == 1:
                    raise UserError(
                        f"out of memory with {self.setting} = 1 ({first_line(error)}): set "
                        "update.checkpoint = ['unet', 'decoder'], take model.precision = 'bf16', or lower "
                        "sampler.size"
                    ) from None
            # only out here has the failed attempt's traceback let go of its tensors
            self.size //= 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(sign in str(error).lower() for sign in SIGNS)


def agree(batches: Sequence[MicroBatch], ranks: Ranks) -> Iterator[str]:
    """Gives all ranks the smallest size that any of them found to fit; says what has changed since the last time."""
    for batch in batches:
        batch.size = -ranks.greatest(-batch.size)
        if batch.size < batch.told:
            change = f"{batch.setting} = {batch.told} is now {batch.size}"
            yield f"out of memory: {change}; the result is the same, but for rounding"
        batch.told = batch.size
