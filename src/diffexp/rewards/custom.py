"""Your own reward: any function of (images, prompts), named ``module:function`` or ``path/file.py:function``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffexp import own
from diffexp.errors import UserError
from diffexp.rewards.base import shaped


class CustomReward:
    """A user's function as a ``Reward``.

    The function gets images (B, 3, H, W) in [0, 1] and a list of B prompts, and returns B numbers: a tensor, an array
    or a list. With the attribute ``differentiable = True`` it is differentiated, so it must use torch on the images;
    without it, it gets detached images and runs without gradients.

    Raises:
        UserError: if the function cannot be imported, or is not callable.
    """

    def __init__(self, name: str, function: Callable[[Tensor, list[str]], Any] | None = None) -> None:
        self.name = name
        self.function = own.find("reward", name) if function is None else function
        self.differentiable = bool(getattr(self.function, "differentiable", False))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), float32, on the images' device.

        Raises:
            UserError: if the function fails, or what it returned is not B numbers.
        """
        with contextlib.nullcontext() if self.differentiable else torch.no_grad():
            try:
                scores = self.function(images if self.differentiable else images.detach(), list(prompts))
            except (UserError, MemoryError, torch.OutOfMemoryError):  # the last two: a smaller batch may do
                raise
            except (Exception, SystemExit) as error:
                raise UserError(f"reward {self.name!r} failed with {own.described(error)}: mend it") from error
        return shaped(self.name, self._tensor(scores, images.device), prompts)

    def _tensor(self, scores: Any, device: torch.device) -> Tensor:
        try:
            if isinstance(scores, (list, tuple)) and scores and all(isinstance(score, Tensor) for score in scores):
                scores = torch.stack(list(scores))
            return torch.as_tensor(scores).to(device=device, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"reward {self.name!r} must return one number an image: it returned {type(scores).__name__} ({error})"
            ) from error
