"""Metrics to TensorBoard, W&B, MLflow or Trackio, through accelerate's trackers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from diffexp.config import Recipe
from diffexp.errors import UserError, one_line
from diffexp.sharing.lora_header import without_paths
from diffexp.toml import flat

PROJECT = "diffexp"
RUN_NAME = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}
"""What each tracker calls the name of a run; TensorBoard has none, its files lie in the run's folder."""


class Trackers:
    """A context in which ``log`` reaches every tracker of the recipe. TensorBoard is left out where not installed.

    Only the ``main`` process of a run sends anything. A tracker that fails in the midst of a run ends tracking, not the
    run: ``warn`` is told.

    Raises:
        UserError: if a package is missing, or a tracker does not start.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, main: bool = True, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self.names: list[Any] = trackers_of(recipe)
        self.warn = warn
        self.accelerator: Any = self.started(recipe, folder) if self.names and main else None

    def started(self, recipe: Recipe, folder: Path) -> Any:
        """accelerate's trackers, ready to log."""
        from accelerate import Accelerator

        name, settings = folder.resolve().name, plain(without_paths(recipe.model_dump(mode="json")))
        try:
            accelerator = Accelerator(log_with=self.names, project_dir=folder / "logs", cpu=True)
            accelerator.init_trackers(
                PROJECT,
                # TensorBoard would show the settings as a run of their own
                config=None if self.names == ["tensorboard"] else settings,
                init_kwargs={each: {RUN_NAME[each]: name} for each in self.names if each in RUN_NAME},
            )
        except Exception as error:  # each tracker has error types of its own
            raise UserError(f"trackers = {json.dumps(self.names)}: can't start ({one_line(error)})") from error
        return accelerator

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Sends figures of one iteration."""
        if self.accelerator:
            # MLflow takes no other characters
            tidy = {re.sub(r"[^\w\-./: ]", "_", key) if "mlflow" in self.names else key: values[key] for key in values}
            self.attempt(lambda: self.accelerator.log(tidy, step=iteration))

    def attempt(self, action: Callable[[], object]) -> None:
        """Does something with the trackers; when they fail, does without them."""
        try:
            action()
        except Exception as error:
            self.accelerator = None
            self.warn(f"trackers = {json.dumps(self.names)} failed and are off from here on: {one_line(error)}")

    def finish(self) -> None:
        """Ends every tracker. accelerate's own ``end_training`` would end the run's process group, too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.accelerator:
            self.attempt(self.finish)


def trackers_of(recipe: Recipe) -> list[str]:
    """The recipe's trackers, without TensorBoard where it is not installed.

    Raises:
        UserError: for any other that is not installed.
    """
    names: list[str] = [name for name in recipe.trackers if name != "tensorboard" or find_spec("tensorboard")]
    for name in names:
        if not find_spec(name):
            raise UserError(f"trackers = [{json.dumps(name)}]: {name} is not installed; pip install 'diffexp[{name}]'")
    return names


def plain(settings: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What every tracker can keep of nested settings: dotted keys; lists as JSON."""
    found = {key: value for key, value in flat(settings).items() if value is not None}
    return {key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in found.items()}
