"""What a run says in the terminal: a live panel, plain lines where there is none, or JSON, or next to nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from diffexp.config import Recipe
from diffexp.durations import clock
from diffexp.errors import printable
from diffexp.terminal.panel import Panel
from diffexp.terminal.progress import Progress, headline
from diffexp.terminal.reporter import Reporter


def reporter(quiet: bool = False, as_json: bool = False) -> Reporter:
    """The reporter that was asked for, or else the one that fits where the output goes."""
    if as_json:
        return JsonReporter()
    if quiet:
        return QuietReporter(Console(stderr=True))
    console = Console()
    # FORCE_COLOR makes a pipe a terminal to rich: for colours, but not for a panel that is drawn over itself
    live = console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty()
    return LiveReporter(console) if live else PlainReporter(console)


def say(console: Console, text: str) -> None:
    """Prints text as it is: names of files and prompts are no markup, and no line is broken."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


class QuietReporter(Reporter):
    """Only warnings."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        say(self.console, text)

    def warned(self, message: str) -> None:
        self.say(f"warning: {message}")


class PlainReporter(QuietReporter):
    """A line for everything that happens, with the time that remains."""

    def started(self, recipe: Recipe, folder: Path, iteration: int) -> None:
        self.progress = Progress(recipe, folder, iteration)
        self.say(headline(recipe, folder) + (f" (going on after iteration {iteration})" if iteration else ""))

    def stepped(self, record: Mapping[str, Any]) -> None:
        progress = self.progress
        progress.stepped(record)
        left = f"{clock(progress.seconds_left)} left" if progress.left else "the last one"
        self.say(f"{progress.iteration}/{progress.total}  reward {progress.reward}, {progress.effort}, {left}")

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.progress.evaluated(record)
        self.say(f"  evaluation: {record['reward']} on {record['prompts']}: {record['mean']:.4f} (n = {record['n']})")

    def finished(self, folder: Path) -> None:
        self.say(f"done: {folder}")


class LiveReporter(PlainReporter):
    """A panel that stays in its place; warnings appear above it."""

    def started(self, recipe: Recipe, folder: Path, iteration: int) -> None:
        self.progress = Progress(recipe, folder, iteration)
        self.panel = Panel(self.progress, self.console)
        self.panel.start()

    def stepped(self, record: Mapping[str, Any]) -> None:
        self.progress.stepped(record)
        self.panel.show("")

    def evaluating(self, iteration: int) -> None:
        self.panel.show("evaluating")

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.progress.evaluated(record)
        self.panel.show("")

    def saved(self, iteration: int) -> None:
        self.progress.saved = iteration
        self.panel.show("")

    def closed(self) -> None:
        self.panel.stop()


class JsonReporter(Reporter):
    """One JSON object a line on standard output, each with the ``event`` that it tells of."""

    def __init__(self) -> None:
        self.out = sys.stdout  # libraries may be sent elsewhere from here on: what they print is no JSON

    def tell(self, event: str, **values: Any) -> None:
        # JSON has no NaN: null, as in metrics that were not measured
        clean = json.loads(json.dumps(values, default=str), parse_constant=lambda _: None)
        print(json.dumps({"event": event, **clean}, ensure_ascii=False), file=self.out, flush=True)

    def started(self, recipe: Recipe, folder: Path, iteration: int) -> None:
        self.progress = Progress(recipe, folder, iteration)
        self.tell("start", folder=folder, iteration=iteration, recipe=recipe.model_dump(mode="json"))

    def stepped(self, record: Mapping[str, Any]) -> None:
        self.progress.stepped(record)
        self.tell("iteration", **record, seconds_left=round(self.progress.seconds_left, 1))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.tell("evaluation", **record)

    def saved(self, iteration: int) -> None:
        self.tell("checkpoint", iteration=iteration)

    def warned(self, message: str) -> None:
        self.tell("warning", message=message)

    def finished(self, folder: Path) -> None:
        self.tell("end", folder=folder)
