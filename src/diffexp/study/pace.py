"""How long runs take: seconds an image, by what ran so far or by a short trial on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from diffexp import assembly, prompts, rewards
from diffexp.config import Recipe
from diffexp.devices import device
from diffexp.emoji import MODELS
from diffexp.errors import UserError
from diffexp.exploration import ConstantGuidance
from diffexp.models.hub import cached
from diffexp.processes.launch import program
from diffexp.rewards.base import score
from diffexp.rewards.spec import parse
from diffexp.rollout import Batch
from diffexp.runs.reading import objects
from diffexp.runs.records import JsonLines
from diffexp.settings import AlignPropSettings, DDPOSettings, ModelSettings

TRIAL = 4
"""Images of a trial."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The environment of a process that shares the CPU with others."""


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

    def try_out(self, recipes: Iterable[Recipe], workers: int) -> None:
        """Measures what is not known yet, without keeping it: ``workers`` trials at a time, as runs will share a CPU.

        What would have to be downloaded is left out, and what a CPU is too slow for.
        """
        able = [recipe for recipe in recipes if not (impractical(recipe) or lacking(recipe))]
        kinds = {json.dumps(self.kind(recipe)): recipe for recipe in able}
        for recipe in kinds.values():
            if self.expected(recipe, Work(1, 1)) is None:
                work = Work(TRIAL, TRIAL)._asdict()
                self.records += [
                    {"kind": self.kind(recipe), **work, **spent._asdict()} for spent in trials(recipe, workers)
                ]


def of_the_hub(model: ModelSettings) -> bool:
    """Whether a model is the hub's: full-size, as a rule."""
    return model.path not in MODELS and not Path(model.path).is_dir()


def impractical(recipe: Recipe) -> bool:
    """Whether a recipe would take days: a full-size model on a CPU."""
    return of_the_hub(recipe.model) and device(recipe.device).type == "cpu"


def lacking(recipe: Recipe) -> str | None:
    """What a trial of the recipe would have to download: its model, or its reward. Asks the caches alone."""
    model = recipe.model
    if of_the_hub(model) and not cached(model.path, model.revision, model.variant):
        return f"model {model.path}"
    reward = parse(recipe.reward)[0].name
    return None if all(need.present for need in rewards.check(reward)) else f"reward {reward}"


def why_unknown(recipe: Recipe, name: str) -> str | None:
    """Why no trial here can time a recipe, and what to do; ``name`` is the shipped recipe that it stands on."""
    if impractical(recipe):
        return f"{recipe.model.path} needs a GPU to be practical; on this CPU nothing is timed"
    lacks, shipped = lacking(recipe), Recipe.load(name)
    if not lacks:
        return None
    own = {"model.path": recipe.model.path} if recipe.model.path != shipped.model.path else {}
    own |= {"reward": recipe.reward} if recipe.reward != shipped.reward else {}
    arguments = " ".join([name, *(f"--set {key}={value}" for key, value in own.items())])
    return (
        f"the {lacks} is not on this machine: diffexp download {arguments} fetches it, "
        f"diffexp bench {arguments} measures without it"
    )


def trials(recipe: Recipe, workers: int) -> list[Spent]:
    """What each of several trials at the same time took, each with one thread."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(recipe.to_toml(), encoding="utf-8")
        command = [*program("diffexp.study.pace"), str(file)]
        # all is here: nobody waits for the hub, or for a newer commit of the model
        environment = {**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1"}
        started = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)  # noqa: S603
            for _ in range(workers)
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError("the trial that measures this machine's speed failed: its message is above")
    return [Spent(*json.loads(one.splitlines()[-1])) for one in said]


def trial(recipe: Recipe) -> Spent:
    """Times one iteration, and painting, of :data:`TRIAL` images."""
    changes: dict[str, Any] = {"reward": parse(recipe.reward)[0].name}
    if isinstance(recipe.algorithm, AlignPropSettings) and recipe.algorithm.truncation == "random":
        most = recipe.algorithm.last_steps or recipe.sampler.steps
        changes |= {"algorithm.truncation": "fixed", "algorithm.last_steps": (1 + most) // 2}  # the mean
    recipe = Recipe.parse(recipe.model_dump(), "trial", changes)
    model = assembly.model(recipe)
    reward, names = rewards.load(recipe.reward, model.device), prompts.load(recipe.prompts)
    texts = [names[k % len(names)] for k in range(TRIAL)]
    assembly.make_trainable(recipe, model)
    sampler = assembly.sampler(recipe, model)
    algorithm = assembly.algorithm(recipe, sampler, assembly.learner(recipe, model), partial(score, reward))
    batch = Batch(
        texts, model.encode(texts), ConstantGuidance(recipe.sampler.guidance), [(0, "trial", k) for k in range(TRIAL)]
    )
    moments = [time.perf_counter()]
    for work in (partial(algorithm.step, batch), partial(sampler.rollout, batch, TRIAL)):
        work()
        moments.append(time.perf_counter())
    return Spent(moments[1] - moments[0], moments[2] - moments[1])


def main(arguments: Sequence[str]) -> None:
    print(json.dumps(trial(Recipe.load(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
