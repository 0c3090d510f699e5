"""Runs what the figures of the paper need, each run in a process of its own, then draws them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from diffexp import assembly, checkpoint
from diffexp.config import Recipe
from diffexp.drawing import Drawing
from diffexp.errors import UserError
from diffexp.experiments import SCALES, Figure, Job, chosen, jobs
from diffexp.interruption import Interrupted, Interruption
from diffexp.records import CONFIG, EVALUATIONS, METRICS, JsonLines
from diffexp.runs import objects

TIMES = "times.jsonl"
POLL = 0.5  # seconds between two looks at the running processes


@dataclass(frozen=True)
class State:
    """A run that a figure needs, and how far it is."""

    job: Job
    folder: Path
    iteration: int

    @classmethod
    def look(cls, job: Job, folder: Path) -> State:
        """What the run's folder says.

        Raises:
            UserError: if it holds the run of another recipe.
        """
        if (folder / CONFIG).is_file() and Recipe.load(folder / CONFIG) != job.recipe:
            raise UserError(
                f"--out: {folder} holds a run of another recipe: choose another --out, or remove that folder"
            )
        newest = checkpoint.read_newest(folder / "checkpoints")
        return cls(job, folder, 0 if newest is None else int(newest.numbers["iteration"]))

    @property
    def finished(self) -> bool:
        return self.iteration >= self.job.recipe.iterations

    @property
    def left(self) -> int:
        """Images that are still to be painted, for training and for evaluation."""
        share = 1 - min(1.0, self.iteration / self.job.recipe.iterations)
        return round(share * (self.job.queries + self.job.evaluated))

    def __str__(self) -> str:
        if self.finished:
            return "finished"
        return f"at iteration {self.iteration}" if self.iteration else "to do"


class Times:
    """Seconds an image of what ran so far, by model, algorithm and denoising steps; kept in a file."""

    KEYS = frozenset(("kind", "images", "seconds"))

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, [record for record in objects(path) if record.keys() >= self.KEYS]

    @staticmethod
    def kind(recipe: Recipe) -> list[Any]:
        return [recipe.model.path, recipe.algorithm.name, recipe.sampler.steps, recipe.device]

    def add(self, state: State, seconds: float) -> None:
        """Remembers that what was left of a run took so long."""
        record = {"run": state.job.name, "kind": self.kind(state.job.recipe), "images": state.left, "seconds": seconds}
        self.records.append(record)
        JsonLines(self.path).append(record)

    def expected(self, state: State) -> float | None:
        """Seconds that the rest of a run will take; None if nothing like it has run yet."""
        alike = [record for record in self.records if record["kind"] == self.kind(state.job.recipe)]
        images = sum(record["images"] for record in alike)
        return state.left * sum(record["seconds"] for record in alike) / images if images else None

    def total(self, states: Sequence[State], workers: int) -> float | None:
        """Seconds that all unfinished runs will take, ``workers`` at a time."""
        times = [self.expected(state) for state in states if not state.finished]
        known = [seconds for seconds in times if seconds is not None]
        if len(known) < len(times):
            return None
        return max(sum(known) / workers, *known, 0.0) if known else 0.0


@dataclass
class Running:
    """A process that trains a run."""

    state: State
    process: subprocess.Popen[bytes]
    started: float


class Trainer:
    """Trains the unfinished runs, ``workers`` at a time; ``one_thread`` for processes that share a CPU."""

    def __init__(self, states: Sequence[State], times: Times, workers: int, one_thread: bool, console: Console) -> None:
        self.waiting = [state for state in states if not state.finished]
        self.running: list[Running] = []
        self.times, self.workers, self.one_thread, self.console = times, workers, one_thread, console
        self.failed: list[State] = []
        self.count, self.done = len(self.waiting), 0
        self.images = sum(state.left for state in self.waiting)
        self.before = {state.job.name: painted(state.folder) for state in self.waiting}
        self.folders = {state.job.name: state.folder for state in self.waiting}
        self.begun = time.monotonic()

    def run(self) -> None:
        """Trains them all. Ctrl-C or SIGTERM lets every run finish its iteration and save.

        Raises:
            UserError: if runs failed, with each one's last words; the others are finished then.
        """
        columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
        with (
            Interruption(self.say) as interruption,
            Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as progress,
        ):
            task = progress.add_task("", total=max(1, self.images))
            try:
                while self.waiting or self.running:
                    if interruption.requested:
                        self.stop()
                        raise Interrupted(f"stopped with {self.done} of {self.count} runs finished")
                    while self.waiting and len(self.running) < self.workers:
                        self.start(self.waiting.pop(0))
                    time.sleep(POLL)
                    self.collect()
                    progress.update(task, completed=self.progress(), description=self.status())
            finally:
                for running in self.running:
                    running.process.kill()
        if self.failed:
            words = "\n".join(f"run {state.job.name} failed: {last_words(log(state))}" for state in self.failed)
            raise UserError(f"{words}\n{self.done} of {self.count} runs finished; the same command again goes on")

    def start(self, state: State) -> None:
        """Begins a run, or goes on with it."""
        recipes = state.folder.parent / "recipes"
        recipes.mkdir(parents=True, exist_ok=True)
        recipe = recipes / f"{state.job.name}.toml"
        recipe.write_text(state.job.recipe.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "diffexp", "train", str(recipe), "--out", str(state.folder)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self.one_thread else {}
        with log(state).open("ab") as output:
            # A session of its own: Ctrl-C in the terminal is ours to hand on, once.
            process = subprocess.Popen(  # noqa: S603
                command, env={**os.environ, **threads}, stdout=output, stderr=output, start_new_session=True
            )
        self.running.append(Running(state, process, time.monotonic()))

    def collect(self) -> None:
        """Takes note of the processes that have ended."""
        for running in [running for running in self.running if running.process.poll() is not None]:
            self.running.remove(running)
            seconds = time.monotonic() - running.started
            if running.process.returncode:
                self.failed.append(running.state)
                self.say(f"{running.state.job.name}: failed, see {log(running.state)}")
                continue
            self.done += 1
            self.times.add(running.state, seconds)
            self.say(f"{running.state.job.name}: {duration(seconds)}; {self.status()}")

    def stop(self) -> None:
        """Asks every process to finish its iteration and save, and waits for it."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.wait()
        self.running = []

    def progress(self) -> int:
        """Images painted since the beginning."""
        return sum(max(0, painted(folder) - self.before[name]) for name, folder in self.folders.items())

    def status(self) -> str:
        """How many runs are finished, and when all will be."""
        images = self.progress()
        left = (time.monotonic() - self.begun) * max(0, self.images - images) / images if images else None
        return f"{self.done} of {self.count} runs finished, ETA {duration(left)}"

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def reproduce(
    name: str,
    scale: str,
    seeds: int,
    out: Path,
    workers: int | None,
    dry_run: bool,
    overrides: Mapping[str, Any],
    console: Console,
) -> None:
    """Trains what the figure (or "all") needs, except what is finished already, and draws it into ``out``/scale.

    Raises:
        UserError: for a name that is none, settings that make no recipe, a folder of other runs, or a run that failed.
    """
    figures = chosen(name, scale)
    folder = out / scale
    states = [State.look(job, folder / job.name) for job in jobs(figures.values(), SCALES[scale], seeds, overrides)]
    times, on_cpu = Times(folder / TIMES), device(states) == "cpu"
    workers = workers or (os.cpu_count() or 1 if on_cpu else 1)
    describe(figures, states, times, workers, console)
    if dry_run:
        return
    Trainer(states, times, workers, on_cpu, console).run()
    drawing = Drawing(SCALES[scale], folder, folder / "figures", seeds, overrides)
    for key, figure in figures.items():
        console.print(f"figure {key}: {drawing.draw(key, figure)[0]}", highlight=False, soft_wrap=True)


def describe(
    figures: Mapping[str, Figure], states: Sequence[State], times: Times, workers: int, console: Console
) -> None:
    """What there is to do: the figures, the runs, and how long they will take."""
    for key, figure in figures.items():
        console.print(f"figure {key}: {figure.title}", highlight=False)
    if states:
        table = Table(box=None, pad_edge=False)
        for column in ("run", "queries", "evaluated", "state", "expected"):
            table.add_column(column, no_wrap=True, justify="right" if column in ("queries", "evaluated") else "left")
        for state in states:
            expected = "" if state.finished else duration(times.expected(state))
            job = state.job
            table.add_row(job.name, f"{job.queries:,}", f"{job.evaluated:,}", str(state), expected)
        console.print(table, soft_wrap=True)
    left = [state for state in states if not state.finished]
    total = duration(times.total(states, workers)) if left else "none"
    queries, evaluated = sum(state.job.queries for state in left), sum(state.job.evaluated for state in left)
    console.print(
        f"{len(states)} runs, {len(states) - len(left)} finished; the others: {queries:,} queries, "
        f"{evaluated:,} evaluated images; expected time, {workers} at a time: {total}",
        highlight=False,
        soft_wrap=True,
    )


def device(states: Sequence[State]) -> str:
    """The kind of device that the runs train on."""
    return assembly.device(states[0].job.recipe.device if states else "auto").type


def painted(folder: Path) -> int:
    """Images that a run has painted so far, as its records say: training and evaluation."""
    metrics, evaluations = objects(folder / METRICS), objects(folder / EVALUATIONS)
    sets = {(entry["iteration"], entry["prompts"]): entry["n"] for entry in evaluations}
    return int(metrics[-1]["queries"] if metrics else 0) + sum(sets.values())


def log(state: State) -> Path:
    """Where a run's output goes."""
    return state.folder.parent / f"{state.folder.name}.log"


def last_words(file: Path) -> str:
    """The last line of a log."""
    said = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1].removeprefix("error: ") if said else f"it said nothing in {file}"


def duration(seconds: float | None) -> str:
    """A time as people say it."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
