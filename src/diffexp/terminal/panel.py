"""The live panel of a run: where it is, how long it takes, what it earns."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diffexp.durations import clock
from diffexp.errors import printable
from diffexp.terminal.progress import Progress, headline

EVALUATIONS = 6  # the most that are shown


class Panel:
    """Draws a run's progress over itself, twice a second, until it is stopped."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.doing = progress, ""
        self.live = Live(self, console=console, refresh_per_second=2)

    def start(self) -> None:
        self.live.start()

    def show(self, doing: str) -> None:
        """Draws the newest figures; ``doing`` is what goes on besides training."""
        self.doing = doing

    def stop(self) -> None:
        """Leaves the last figures where they are."""
        self.doing = ""
        self.live.stop()

    def __rich__(self) -> Frame:
        """The panel as it is now."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True, min_width=len("evaluation"))
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_row("iteration", self.bar())
        for name, text in self.rows():
            table.add_row(name, Text(printable(text)))
        return Frame(
            table,
            box=box.ROUNDED,
            title=Text(
                printable(headline(self.progress.recipe, self.progress.folder)), overflow="ellipsis", no_wrap=True
            ),
            title_align="left",
            padding=(0, 1),
        )

    def bar(self) -> RenderableType:
        """How far the run is, and how long it takes."""
        progress = self.progress
        spent = progress.clock() - progress.begun
        left = max(progress.seconds_left - (progress.clock() - progress.stepped_at), 0)
        times = f"{clock(spent)} so far" + (f", about {clock(left)} left" if progress.left and left else "")
        row = Table.grid(padding=(0, 1))
        count = f"{progress.iteration}/{progress.total}"
        row.add_column(no_wrap=True, min_width=len(count))
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(progress.total, progress.iteration, width=14)
        row.add_row(count, bar, f"{times}, {self.doing}" if self.doing else times)
        return row

    def rows(self) -> Iterator[tuple[str, str]]:
        """What is said below the bar."""
        progress = self.progress
        if progress.record:
            best = progress.best
            yield "reward", f"{progress.reward}, best {best['reward_mean']:.3f} after iteration {best['iteration']}"
            yield "effort", progress.effort
        # held-out rewards first: they show whether the others are worth having
        evaluations = sorted(tuple(progress.evaluations.values()), key=lambda each: not progress.is_held_out(each))
        for each in evaluations[:EVALUATIONS]:
            name = "held-out" if progress.is_held_out(each) else "evaluation"
            before = f", {each.first:.3f} before training" if progress.iteration else ""
            yield name, f"{each.last:.3f}{before}: {each.reward} on {each.prompts}"
        if progress.saved:
            yield "checkpoint", f"after iteration {progress.saved}"
