"""Trains the runs that a study needs, each in a process of its own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from diffexp.config import Recipe
from diffexp.durations import duration
from diffexp.errors import UserError
from diffexp.processes.interruption import Interrupted, Interruption
from diffexp.processes.launch import program
from diffexp.runs import checkpoint
from diffexp.runs.names import CHECKPOINTS, CONFIG, EVALUATIONS, METRICS
from diffexp.runs.reading import objects
from diffexp.runs.runfolder import finished
from diffexp.study import archive
from diffexp.study.archive import Folders
from diffexp.study.experiments import Job
from diffexp.study.pace import Spent, Times, Work, surroundings
from diffexp.terminal.console import say
from diffexp.toml import flat

MACHINE = ("device", "model.precision", "rollout.batch", "update.batch", "update.checkpoint")
"""What a machine may force on a run: where a store's run was trained otherwise, it is the same run to a study."""
POLL = 0.5  # seconds between two looks at the running processes


@dataclass(frozen=True)
class State:
    """A run that a figure needs, and how far it is."""

    job: Job
    folder: Path
    iteration: int

    @classmethod
    def look(cls, job: Job, runs: Folders, images: bool = False) -> State:
        """What the run's folder says, or a store's numbers, unless ``images`` of the run are wanted.

        A run goes on with the batch sizes and the precision that it began with.

        Raises:
            UserError: if it holds the run of another recipe.
        """
        folder, numbers = runs.trained / job.name, runs.kept / job.name if runs.kept else None
        if differs(folder, job, MACHINE):
            raise UserError(f"{folder} holds a run of another recipe: choose another folder, or remove that one")
        if numbers and differs(numbers, job, MACHINE):
            raise UserError(
                f"the store has a run {job.name} of another recipe: choose another --store, or the --scale and --set "
                "that it was made with"
            )
        if (folder / CONFIG).is_file():
            job = replace(job, recipe=Recipe.load(folder / CONFIG))
        if finished(folder, job.recipe) or (numbers and not images and archive.complete(numbers)):
            return cls(job, folder, job.recipe.iterations)
        newest = checkpoint.read_newest(folder / CHECKPOINTS)
        done = 0 if newest is None else int(newest.numbers["iteration"])
        return cls(job, folder, min(done, job.recipe.iterations - 1))

    @property
    def finished(self) -> bool:
        return self.iteration >= self.job.recipe.iterations

    @property
    def work(self) -> Work:
        """What is still to be done."""
        share = 1 - min(1.0, self.iteration / self.job.recipe.iterations)
        return Work(share * self.job.queries, share * self.job.evaluated)

    @property
    def left(self) -> int:
        """Images that are still to be painted, for training and for evaluation."""
        return round(sum(self.work))

    def __str__(self) -> str:
        if self.finished:
            return "finished"
        return f"at iteration {self.iteration}" if self.iteration else "to do"


@dataclass
class Running:
    """A process that trains a run, which had painted so many images ``before`` it ``started``."""

    state: State
    process: subprocess.Popen[bytes]
    started: float
    before: int
    worker: int

    @property
    def painted(self) -> int:
        """Images painted since. What a killed run had painted after its checkpoint, it paints again."""
        return max(0, painted(self.state.folder) - self.before)


class Trainer:
    """Trains the unfinished runs, ``workers`` at a time, on the device or the devices that ``where`` is one of."""

    def __init__(
        self, states: Sequence[State], times: Times, workers: int, where: torch.device, console: Console
    ) -> None:
        self.waiting = [state for state in states if not state.finished]
        self.running: list[Running] = []
        self.times, self.workers, self.where, self.console = times, workers, where, console
        self.failed: list[State] = []
        self.count, self.done = len(self.waiting), 0
        self.ended = 0  # images of the processes that have ended: nothing of theirs is read again
        self.images = sum(state.left for state in self.waiting)
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
                    images = self.progress()
                    progress.update(task, completed=images, description=self.status(images))
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
        command = [*program(), "train", str(recipe), "--out", str(state.folder)]
        worker = min(set(range(self.workers)) - {running.worker for running in self.running})
        before = painted(state.folder)
        with log(state).open("ab") as output:
            # A session of its own: Ctrl-C in the terminal is ours to hand on, once.
            process = subprocess.Popen(  # noqa: S603
                command, env=surroundings(worker, self.where), stdout=output, stderr=output, start_new_session=True
            )
        self.running.append(Running(state, process, time.monotonic(), before, worker))

    def collect(self) -> None:
        """Takes note of the processes that have ended."""
        for running in [running for running in self.running if running.process.poll() is not None]:
            self.running.remove(running)
            self.ended += running.painted
            seconds = time.monotonic() - running.started
            if running.process.returncode:
                self.failed.append(running.state)
                self.say(f"{running.state.job.name}: failed, see {log(running.state)}")
                continue
            self.done += 1
            self.times.add(running.state.job.recipe, running.state.work, spent(running.state, seconds))
            self.say(f"{running.state.job.name}: {duration(seconds)}; {self.status(self.progress())}")

    def stop(self) -> None:
        """Asks every process to finish its iteration and save, and waits for it."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.wait()
        self.running = []

    def progress(self) -> int:
        """Images painted since the beginning."""
        return self.ended + sum(running.painted for running in self.running)

    def status(self, images: int) -> str:
        """How many runs are finished, and when all will be, after so many ``images``."""
        left = (time.monotonic() - self.begun) * max(0, self.images - images) / images if images else None
        return f"{self.done} of {self.count} runs finished, ETA {duration(left)}"

    def say(self, text: str) -> None:
        say(self.console, text)


def differs(folder: Path, job: Job, free: Collection[str]) -> bool:
    """Whether a folder holds another run than the job's, whatever settings are ``free``."""
    if not (folder / CONFIG).is_file():
        return False
    there, here = (flat(recipe.model_dump()) for recipe in (Recipe.load(folder / CONFIG), job.recipe))
    return any(there.get(key) != here.get(key) for key in (there.keys() | here.keys()) - set(free))


def spent(state: State, seconds: float) -> Spent:
    """What the iterations that were left of a run took, by its records, and the rest of its ``seconds``."""
    metrics = {entry["iteration"]: entry["seconds"] for entry in objects(state.folder / METRICS)}
    training = sum(took for iteration, took in metrics.items() if iteration > state.iteration)
    return Spent(training, max(0.0, seconds - training))


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
