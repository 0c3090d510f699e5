"""How long runs take: seconds an image, by what ran so far or by a measurement of single steps on this machine."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from diffexp.config import Recipe
from diffexp.devices import device
from diffexp.emoji import MODELS
from diffexp.errors import UserError
from diffexp.processes.launch import program
from diffexp.runs.reading import objects
from diffexp.runs.records import JsonLines
from diffexp.settings import DDPOSettings
from diffexp.study.experiments import Job

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""What a process is told that shares the CPU with others."""


def surroundings(worker: int, where: torch.device) -> dict[str, str]:
    """The environment of one of several processes at a time: one thread on a CPU, a GPU of its own if there are enough.

    ``worker`` counts from 0, and ``where`` is the device that their recipes ask for.
    """
    if where.type == "cuda":
        return {**os.environ, "LOCAL_RANK": str(worker % torch.cuda.device_count())}
    return {**os.environ, **(ONE_THREAD if where.type == "cpu" else {})}


class Work(NamedTuple):
    """Images to train on, and images to paint for evaluations."""

    queries: float
    evaluated: float


class Spent(NamedTuple):
    """Seconds of training, and of everything else: evaluations, mostly."""

    training: float
    rest: float


class Times:
    """What was measured so far, by model, algorithm and denoising steps; kept in a file."""

    KEYS = frozenset(("kind", "queries", "training", "evaluated", "rest"))

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, [record for record in objects(path) if record.keys() >= self.KEYS]

    @staticmethod
    def kind(recipe: Recipe) -> list[Any]:
        """What runs of equal speed have in common."""
        passes = recipe.algorithm.inner_epochs if isinstance(recipe.algorithm, DDPOSettings) else 1
        model = recipe.model
        return [model.path, model.precision, recipe.algorithm.name, passes, recipe.sampler.steps, recipe.device]

    def add(self, recipe: Recipe, work: Work, spent: Spent) -> None:
        """Remembers what some work took."""
        record = {"kind": self.kind(recipe), **work._asdict(), **spent._asdict()}
        self.records.append(record)
        JsonLines(self.path).append(record)

    def expected(self, recipe: Recipe, work: Work) -> float | None:
        """Seconds that some work will take; None if nothing like it has been measured yet."""
        alike = [record for record in self.records if record["kind"] == self.kind(recipe)]
        if not alike:
            return None

        def pace(images: str, seconds: str) -> float:
            return sum(record[seconds] for record in alike) / max(1, sum(record[images] for record in alike))

        return work.queries * pace("queries", "training") + work.evaluated * pace("evaluated", "rest")

    def try_out(self, recipes: Iterable[Recipe], workers: int, say: Callable[[str], None]) -> None:
        """Measures what is not known yet, without keeping it: ``workers`` at a time, as runs will share a CPU.

        What a CPU is too slow for is left out, and what does not fit into memory stays unknown.
        """
        able = {json.dumps(self.kind(recipe)): recipe for recipe in recipes if not impractical(recipe)}
        unknown = [recipe for recipe in able.values() if self.expected(recipe, Work(1, 1)) is None]
        if unknown:
            say("timing single steps of every kind of run; that takes minutes")
        for recipe in unknown:
            try:
                found = measurements(recipe, workers)
            except UserError as error:
                say(str(error))
            else:
                self.records += [{"kind": self.kind(recipe), **measured} for measured in found]


def impractical(recipe: Recipe) -> bool:
    """Whether a recipe would take days: a model of the hub, full-size as a rule, on a CPU."""
    model = recipe.model.path
    return model not in MODELS and not Path(model).is_dir() and device(recipe.device).type == "cpu"


def measurements(recipe: Recipe, workers: int) -> list[dict[str, float]]:
    """The images of a run and their seconds, as several ``diffexp bench`` at the same time say."""
    where = device(recipe.device)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(recipe.to_toml(), encoding="utf-8")
        command = [*program(), "bench", str(file), "--json"]
        started = [
            subprocess.Popen(command, env=surroundings(worker, where), stdout=subprocess.PIPE)  # noqa: S603
            for worker in range(workers)
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError(f"{recipe.model.path} with {recipe.algorithm.name} could not be timed: its message is above")
    job = Job("", recipe)
    return [
        {
            "queries": job.queries,
            "training": cost["seconds_per_iteration"] * recipe.iterations,
            "evaluated": job.evaluated,
            "rest": cost["evaluation_seconds"],
        }
        for cost in map(json.loads, said)
    ]
