"""Your own reward: any function of (images, prompts), named ``module:function`` or ``path/file.py:function``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffexp.errors import UserError, unknown
from diffexp.rewards.base import shaped
from diffexp.rewards.spec import split_custom


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
        self.function = import_function(name) if function is None else function
        self.differentiable = bool(getattr(self.function, "differentiable", False))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), float32, on the images' device.

        Raises:
            UserError: if what the function returned is not B numbers.
        """
        with contextlib.nullcontext() if self.differentiable else torch.no_grad():
            scores = self.function(images if self.differentiable else images.detach(), list(prompts))
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


def import_function(name: str) -> Callable[..., Any]:
    """Import the function that ``module:function`` or ``path/file.py:function`` names.

    Raises:
        UserError: if the file or module is missing, fails on import, or has no such callable.
    """
    where, attribute = split_custom(name)
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        # Whatever a user's file raises on import is theirs to mend; the cause stays attached for the traceback.
        raise UserError(f"reward {name!r}: importing {where!r} failed with {type(error).__name__}: {error}") from error
    try:
        function = attrgetter(attribute)(module)
    except AttributeError:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown("reward function", name, [f"{where}:{known}" for known in names]) from None
    if not callable(function):
        raise UserError(f"reward {name!r}: {attribute!r} is a {type(function).__name__}, not a function")
    return function


def _from_file(path: Path) -> ModuleType:
    path = path.resolve(strict=True)
    # A name of its own, so that the file shadows no installed module and two files of one name do not meet.
    name = f"diffexp_custom_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
