"""Progress in the terminal: a live line with ETA where there is one, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffexp.config import Recipe
from diffexp.reporter import Reporter


def reporter(quiet: bool = False) -> Reporter:
    """The reporter that fits where the output goes."""
    if quiet:
        return Reporter()
    console = Console()
    return LiveReporter(console) if console.is_terminal else PlainReporter(console)


def headline(recipe: Recipe, folder: Path) -> str:
    """One line about a run."""
    exploration = recipe.exploration
    parts = [name for name, part in (("Eq. 7", exploration.guidance), ("Eq. 8", exploration.words)) if part]
    explores = f"DiffExp ({' + '.join(parts)})" if parts else "no exploration"
    return f"{recipe.algorithm.name} on {recipe.reward}, prompts {recipe.prompts}, {explores} → {folder}"


def summary(record: Mapping[str, Any], samples: int) -> str:
    """One iteration's figures."""
    speed = samples / max(record["seconds"], 1e-9)
    reward = f"reward {record['reward_mean']:.3f} ± {record['reward_std']:.3f}"
    return f"{reward}, {record['queries']} queries, {speed:.1f} images/s"


class PlainReporter(Reporter):
    """A line for everything that happens, with the time that remains."""

    def __init__(self, console: Console) -> None:
        self.console, self.seconds = console, 0.0

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, recipe: Recipe, folder: Path, iteration: int) -> None:
        self.recipe, self.first = recipe, iteration
        self.say(headline(recipe, folder) + (f" (going on after iteration {iteration})" if iteration else ""))

    def stepped(self, record: Mapping[str, Any]) -> None:
        iteration, total = record["iteration"], self.recipe.iterations
        self.seconds += record["seconds"]
        left = self.seconds / (iteration - self.first) * (total - iteration)
        self.say(f"{iteration}/{total}  {summary(record, self.recipe.samples)}, {left / 60:.1f} min of training left")

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.say(f"  evaluation: {record['reward']} on {record['prompts']}: {record['mean']:.4f} (n = {record['n']})")

    def warned(self, message: str) -> None:
        self.say(f"warning: {message}")

    def finished(self, folder: Path) -> None:
        self.say(f"done: {folder}")


class LiveReporter(PlainReporter):
    """A progress bar with ETA, reward, queries and images a second."""

    def started(self, recipe: Recipe, folder: Path, iteration: int) -> None:
        super().started(recipe, folder, iteration)
        columns = (
            SpinnerColumn(),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.progress = Progress(*columns, console=self.console, speed_estimate_period=600)
        self.task = self.progress.add_task("", total=recipe.iterations, completed=iteration)
        self.progress.start()

    def stepped(self, record: Mapping[str, Any]) -> None:
        self.progress.update(self.task, advance=1, description=summary(record, self.recipe.samples))

    def evaluating(self, iteration: int) -> None:
        self.progress.update(self.task, description="evaluating …")

    def closed(self) -> None:
        self.progress.stop()
