"""Metrics to TensorBoard or W&B, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from diffexp.config import Recipe
from diffexp.errors import UserError


class Trackers:
    """A context in which ``log`` reaches every tracker of the recipe. TensorBoard is left out where not installed.

    Only the ``main`` process of a run sends anything.
    """

    def __init__(self, recipe: Recipe, folder: Path, main: bool = True) -> None:
        names: list[Any] = [name for name in recipe.trackers if name != "tensorboard" or find_spec("tensorboard")]
        if "wandb" in names and not find_spec("wandb"):
            raise UserError("trackers = [\"wandb\"]: wandb is not installed; pip install 'diffexp[wandb]'")
        self.accelerator: Any = None
        if names and main:
            from accelerate import Accelerator

            self.accelerator = Accelerator(log_with=names, project_dir=folder / "logs", cpu=True)
            self.accelerator.init_trackers(folder.resolve().name)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Sends figures of one iteration."""
        if self.accelerator:
            self.accelerator.log(dict(values), step=iteration)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.accelerator:
            self.accelerator.end_training()
