"""Which device a run, or a reward server, computes on, and how numbers get there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from diffexp.errors import UserError, cut


def device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: if this machine has no such device, or not one for each of its processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if 1 < count <= local:
            raise UserError(f"process {local + 1} of this machine finds {count} GPUs: start as many as there are GPUs")
        name = f"cuda:{local % count}"  # a launcher may show each process its own GPU alone
    absent = UserError(f"device = {cut(repr(name))}: not on this machine; take 'cpu' or 'auto'")
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise absent from error
    if found.type == "meta":  # torch knows it everywhere, but it computes nothing
        raise absent
    if found.type == "cuda":
        torch.cuda.set_device(found)  # what a reward of the user's own calls "cuda"
        # cuDNN's attention computes otherwise where a gradient is wanted: rollout and update would not agree
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def upload(tensor: Tensor, to: torch.device) -> Tensor:
    """The tensor on another device. From pinned memory to a GPU, so that nobody waits for what the GPU still does."""
    if to.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(to, non_blocking=True)
    return tensor.to(to)


def numbers(values: Sequence[float], dtype: torch.dtype, on: torch.device) -> Tensor:
    """Numbers (N,) on a device: timesteps, coefficients, indices. They are kept there, and must not be changed."""
    return kept(tuple(values), dtype, on)


@lru_cache(maxsize=1024)
def kept(values: tuple[float, ...], dtype: torch.dtype, on: torch.device) -> Tensor:
    """What ``numbers`` returns."""
    with torch.inference_mode(False):  # else no later training could use what was first asked for in there
        return upload(torch.tensor(values, dtype=dtype), on)


def slow(precision: str, on: torch.device) -> str | None:
    """Why a precision is slow on a device, or fails there; None where it is not.

    A processor that can't multiply narrow numbers makes wide ones of them and rounds again: on one with AVX2 alone,
    bf16 took 5 to 8 times as long as fp32. On GPUs before Ampere neither cuDNN's convolutions nor fused attention take
    bf16, and what torch does in their place needs far more memory.
    """
    if on.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(on) < (8, 0):
        return "model.precision = 'bf16': this GPU has no products in it and may fail: take 'fp16'"
    if on.type != "cpu" or precision == "fp32" or not torch.backends.mkldnn.is_available():
        return None
    kernels = torch.ops.mkldnn
    able = kernels._is_mkldnn_bf16_supported if precision == "bf16" else kernels._is_mkldnn_fp16_supported
    return None if able() else f"model.precision = {precision!r}: this CPU is several times faster in 'fp32'"
