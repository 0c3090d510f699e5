"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffexp.config import Recipe


class Reporter:
    """Says nothing. The command line's reporters (``diffexp.terminal.console``) write to the terminal."""

    def started(self, recipe: Recipe, folder: Path, iteration: int) -> None:
        """Training begins, or goes on after ``iteration``."""

    def stepped(self, record: Mapping[str, Any]) -> None:
        """An iteration is done; ``record`` is its line in ``metrics.jsonl``."""

    def evaluating(self, iteration: int) -> None:
        """An evaluation begins."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """A prompt set was scored; ``record`` is its line in ``evaluations.jsonl``."""

    def saved(self, iteration: int) -> None:
        """A checkpoint is safe."""

    def warned(self, message: str) -> None:
        """Something the user should know."""

    def finished(self, folder: Path) -> None:
        """The run is complete."""

    def closed(self) -> None:
        """Training is over for now, complete or not; nothing more will be told."""
