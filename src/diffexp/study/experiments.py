"""The runs that a figure needs.

A run is a task (prompts and reward), an algorithm, a variant of the exploration and a seed; figures share the runs that
they have in common. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffexp import prompts as prompt_sets
from diffexp.config import Recipe, times
from diffexp.study.paper import COLUMNS, FIGURES, STRATEGIES, Arm, Figure, Grid, Strategies, Tuning, wanted
from diffexp.study.scales import SEEDS, Scale
from diffexp.study.variants import VARIANTS

TUNING_SEEDS = (100, 101)
"""Of the runs that settings are chosen by: no figure has them."""


@dataclass(frozen=True)
class Job:
    """One run that a figure needs."""

    name: str
    recipe: Recipe

    @property
    def queries(self) -> int:
        """Images that training asks the reward about."""
        return self.recipe.iterations * self.recipe.samples

    @property
    def evaluated(self) -> int:
        """Images that its evaluations paint."""
        settings = self.recipe.evaluation
        images = settings.images * sum(len(prompt_sets.load(name)) for name in self.recipe.evaluated_prompts)
        return times(self.recipe.iterations, settings.every) * images


class Painting(NamedTuple):
    """Images that are painted to draw a figure, by the model that a recipe begins with or trains."""

    recipe: Recipe
    images: int


Choice = Mapping[tuple[str, str], Mapping[str, Any]]
"""What tuning chose: settings by algorithm and task."""


def job(
    scale: Scale, task: str, arm: Arm, seed: int, overrides: Mapping[str, Any], chosen: Choice | None = None
) -> Job:
    """The run of an arm; ``overrides`` are the user's and win over everything.

    Raises:
        UserError: if they make no valid recipe.
    """
    variant, recipe = VARIANTS[arm.variant], scale.recipes[arm.algorithm]
    tuned = (chosen or {}).get((arm.algorithm, task), {})
    budget = scale.budgets.get(arm.algorithm, {})
    settings = {**scale.tasks[task].overrides(), **budget, **tuned, **variant.changes, "seed": seed, **overrides}
    name = recipe if variant.plain else f"{recipe}-diffexp"
    return Job(run_name(task, arm, seed), Recipe.load(name, settings))


def run_name(task: str, arm: Arm, seed: int) -> str:
    """What the run of an arm is called."""
    return f"{task}-{arm.algorithm}{'' if arm.variant == 'plain' else f'-{arm.variant}'}-s{seed}"


def trial_name(task: str, arm: Arm, candidate: str, seed: int) -> str:
    """What the run of a candidate is called."""
    run = run_name(task, arm, seed)
    return f"tuning-{run.removesuffix(f'-s{seed}')}-{candidate}-s{seed}"


def trials(scale: Scale, task: str, arm: Arm, candidate: str, overrides: Mapping[str, Any]) -> list[Job]:
    """The runs of one candidate for an arm: half as long as the figures', evaluated at both ends."""
    found = []
    for seed in TUNING_SEEDS:
        settings = {**scale.tried(arm.algorithm, task)[candidate], **overrides}
        whole = job(scale, task, arm, seed, settings).recipe
        half = max(1, whole.iterations // 2)
        short = {"iterations": half, "evaluation.every": half, "evaluation.prompts": [whole.prompts]}
        recipe = Recipe.parse(whole.model_dump(), "tuning", short)
        found.append(Job(trial_name(task, arm, candidate, seed), recipe))
    return found


def seeds_of(name: str, scale: Scale, seeds: int | None) -> int:
    """How many runs of each kind a figure has; ``seeds`` are the user's. Grids need one."""
    return 1 if isinstance(FIGURES.get(name), Grid) else seeds or scale.seeds.get(name, SEEDS)


def jobs(
    names: Iterable[str],
    scale: Scale,
    seeds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    chosen: Choice | None = None,
) -> list[Job]:
    """Every run that the figures need, once, seed by seed: then what there is of them is always balanced."""
    found = {}
    for name in names:
        figure = FIGURES[name]
        if isinstance(figure, Tuning):
            tried = [(task, arm, key) for task, arm in figure.tried for key in scale.tried(arm.algorithm, task)]
            made = [one for trial in tried for one in trials(scale, *trial, overrides or {})]
        else:
            each = [(seed, *one) for seed in range(seeds_of(name, scale, seeds)) for one in wanted(figure)]
            made = [job(scale, task, arm, seed, overrides or {}, chosen) for seed, task, arm in each]
        found |= {one.name: one for one in made}
    return list(found.values())


def paintings(
    figure: Figure, scale: Scale, overrides: Mapping[str, Any] | None = None, chosen: Choice | None = None
) -> list[Painting]:
    """What drawing a figure paints, besides the images of its runs."""

    def recipe(task: str, arm: Arm) -> Recipe:
        return job(scale, task, arm, 0, overrides or {}, chosen).recipe

    if isinstance(figure, Strategies):
        return [Painting(recipe(figure.task, Arm(figure.algorithm, "diffexp")), 2 * COLUMNS)] * STRATEGIES
    if isinstance(figure, Grid):
        # the first row of every prompt is the untouched model's
        rows = [(block, arm) for block in figure.blocks for arm in (block.arms[0], *block.arms)]
        return [Painting(recipe(block.task, arm), len(block.prompts) * COLUMNS) for block, arm in rows]
    return []


def shown(figures: Iterable[Figure]) -> set[str]:
    """The runs whose images figures have: of these, numbers alone don't do."""
    pictures = [figure for figure in figures if isinstance(figure, Grid) or getattr(figure, "progress", False)]
    return {run_name(task, arm, 0) for figure in pictures for task, arm in wanted(figure)}
