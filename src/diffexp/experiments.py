"""Every figure of the paper as data: the runs it needs, what is measured on them and how it is drawn.

A run is a task (prompts and reward), an algorithm, a variant of the exploration and a seed; figures share the runs that
they have in common. Quotes are the paper's; "ours" marks what it does not say. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffexp import prompts as prompt_sets
from diffexp.config import Recipe
from diffexp.errors import UserError, unknown

DOLPHIN = "a dolphin riding a bike"
BATMAN = "A magnifying glass over a page of a 1950s batman comic."
STATUE = "Greek statue of a man tripping over a cat."
ATHLETE = "Photo of an athlete cat explaining it's latest scandal at a press conference to journalists."
PIZZA = "A pizza cooking an oven."
OWL = "a horned owl with a graduation cap and diploma"
ALAMO = "a spaceship hovering over The Alamo"


@dataclass(frozen=True)
class Task:
    """What is trained on. ``held_out`` is a reward that is only evaluated, ``unseen`` prompts that are.

    ``instead`` has the prompts that grids show in the place of the paper's.
    """

    prompts: str
    reward: str
    unseen: str | None = None
    held_out: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)

    def overrides(self) -> dict[str, Any]:
        """The task as settings of a recipe. Each run evaluates everything that any figure wants of it."""
        rewards = [*self.reward.split("+"), *([self.held_out] if self.held_out else [])]
        prompts = [self.prompts, *([self.unseen] if self.unseen else [])]
        evaluated = {"evaluation.prompts": prompts, "evaluation.rewards": rewards}
        return {"prompts": self.prompts, "reward": self.reward, **evaluated, **self.settings}


@dataclass(frozen=True)
class Scale:
    """A model to reproduce on: the recipe of each algorithm (its twin with exploration ends in -diffexp), the tasks."""

    name: str
    recipes: Mapping[str, str]
    tasks: Mapping[str, Task]


class Variant(NamedTuple):
    """A way to explore: what a legend calls it ("{}" is the algorithm), and changes to the recipe with DiffExp."""

    label: str
    changes: Mapping[str, Any] | None = None  # None: the recipe without exploration


class Arm(NamedTuple):
    """One line of a figure: an algorithm with a variant of the exploration."""

    algorithm: str
    variant: str


@dataclass(frozen=True)
class Panel:
    """One set of axes: arms on a task, measured by the training reward or a held-out one, on seen or unseen prompts."""

    title: str
    task: str
    arms: Sequence[Arm]
    unseen: bool = False
    held_out: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)  # of variants, where the figure has a name of its own

    def label(self, arm: Arm) -> str:
        """What the legend calls an arm."""
        return self.labels.get(arm.variant, VARIANTS[arm.variant].label).format(TITLES[arm.algorithm])


@dataclass(frozen=True)
class Curves:
    """Reward over queries, panel by panel; with ``progress``, also images over training."""

    title: str
    panels: Sequence[Panel]
    progress: bool = False


@dataclass(frozen=True)
class Bars:
    """The final reward of every arm."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Block:
    """Rows of a grid: the untouched model and the arms of a task, each prompt in turn."""

    task: str
    prompts: Sequence[str]
    arms: Sequence[Arm]


@dataclass(frozen=True)
class Grid:
    """Images of seed 0's models, "the same random seed" in a column."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Strategies:
    """Constant high, constant low and scheduled guidance on the untouched model."""

    title: str
    algorithm: str
    task: str
    prompt: str


Figure = Curves | Bars | Grid | Strategies

SCALES = {
    "emoji": Scale(
        "emoji",
        {"ddpo": "emoji-ddpo", "alignprop": "emoji-alignprop"},
        {
            # ours: 32 images of the one prompt, as the mean of a few would be noise.
            "dolphin": Task(
                f"text:{DOLPHIN}",
                "emoji-alignment",
                held_out="emoji-judge",
                settings={"evaluation.images": 32, "preview.every": 5},
            ),
            "aesthetic": Task("animals", "emoji-aesthetic", "animals-unseen", "emoji-judge"),
            "pickscore": Task("animal-activities", "emoji-alignment", "animal-activities-unseen", "emoji-judge"),
            # ours: the hardest prompts that the emoji world knows, and all its rewards but the judge.
            "drawbench": Task(
                "animal-activities",
                "emoji-alignment+emoji-aesthetic",
                "animal-activities-unseen",
                "emoji-judge",
                instead={
                    BATMAN: "a dolphin riding a bike",
                    STATUE: "a cat riding a bike",
                    ATHLETE: "a whale playing chess",
                    PIZZA: "a bat washing the dishes",
                    OWL: "an octopus driving a car",
                    ALAMO: "a lobster playing soccer",
                },
            ),
        },
    ),
    "sd15": Scale(
        "sd15",
        {"ddpo": "sd15-ddpo", "alignprop": "sd15-alignprop"},
        {
            # "to maximize image-text alignment based on ImageReward"
            "dolphin": Task(f"text:{DOLPHIN}", "imagereward", settings={"evaluation.images": 32}),
            # "we use 45 animal names"; "a novel test set of animal names"; "an unseen reward function ... ImageReward"
            "aesthetic": Task("animals", "aesthetic", "animals-unseen", "imagereward"),
            # "combining 45 different animal names with 3 different activities"; unseen: Table 2
            "pickscore": Task("animal-activities", "pickscore", "animal-activities-unseen", "imagereward"),
            # "an ensemble of HPS, Aesthetic, and PickScore"; "150 challenging prompts from Parti". Its weights: ours.
            "drawbench": Task("drawbench-58", "hpsv2+aesthetic+pickscore", "parti-150"),
        },
    ),
    "sdxl": Scale(
        "sdxl",
        {"alignprop": "sdxl-alignprop"},
        # "we fine-tune SDXL to maximize Aesthetic Score on animal prompts"; "unseen animal names"
        {"sdxl": Task("animals", "aesthetic", "animals-unseen")},
    ),
}

VARIANTS = {
    "plain": Variant("{}"),
    "diffexp": Variant("{} + DiffExp", {}),
    "guidance": Variant("{} + guidance schedule", {"exploration.words": None}),
    "words": Variant("{} + word weighting", {"exploration.guidance": None}),
    # "variants of our models with t_thres = {900, 800, 700}"; 900 is "diffexp".
    "threshold-800": Variant("DiffExp, t_thres = 800", {"exploration.guidance": {"threshold": 800}}),
    "threshold-700": Variant("DiffExp, t_thres = 700", {"exploration.guidance": {"threshold": 700}}),
    # ours, as the next two: w_l is only "an extremely low value"; 0 is the unconditional prediction.
    "low-0": Variant("DiffExp, w_l = 0", {"exploration.guidance.low": 0.0}),
    "low-2": Variant("DiffExp, w_l = 2", {"exploration.guidance.low": 2.0}),
    "words-1.1": Variant("DiffExp, U(1, 1.1)", {"exploration.words.high": 1.1}),
    "words-1.5": Variant("DiffExp, U(1, 1.5)", {"exploration.words.high": 1.5}),
    "until-0.5": Variant("DiffExp, for 1/2", {"exploration.until": 0.5}),
    "until-1": Variant("DiffExp, to the end", {"exploration.until": 1.0}),
}
TITLES = {"ddpo": "DDPO", "alignprop": "AlignProp"}


def arms(algorithm: str, *variants: str) -> tuple[Arm, ...]:
    """Arms of one algorithm, after its baseline."""
    return tuple(Arm(algorithm, variant) for variant in ("plain", *variants))


DDPO, ALIGNPROP = arms("ddpo", "diffexp"), arms("alignprop", "diffexp")
ABLATION = arms("alignprop", "guidance", "words", "diffexp")  # "better than our baseline, AlignProp"


def main_panels(unseen: bool = False, held_out: bool = False) -> tuple[Panel, ...]:
    """The four experiments of Figures 4, 6 and 7."""
    methods, tasks = (
        (("DDPO", DDPO), ("AlignProp", ALIGNPROP)),
        (("Aesthetic", "aesthetic"), ("PickScore", "pickscore")),
    )
    return tuple(
        Panel(f"{name}, {reward}", task, arms, unseen, held_out) for name, arms in methods for reward, task in tasks
    )


def ablation(title: str, setting: str, *variants: str) -> Curves:
    """AlignProp's arms on PickScore (ours: the paper does not say on which reward t_thres was varied).

    ``setting`` is the value that DiffExp itself has.
    """
    labels = {"diffexp": f"DiffExp, {setting}"}
    return Curves(title, [Panel("PickScore", "pickscore", arms("alignprop", "diffexp", *variants), labels=labels)])


FIGURES: dict[str, Figure] = {
    "1": Curves("DDPO on one hard prompt", [Panel(DOLPHIN, "dolphin", DDPO)], progress=True),
    # ours: the guidance of DDPO, Figure 1's prompt.
    "3": Strategies("Guidance strategies", "ddpo", "pickscore", DOLPHIN),
    "4": Curves("Reward on training prompts", main_panels()),
    # "A butterfly playing chess" is the paper's; the other prompts are ours.
    "5": Grid(
        "Samples",
        [
            Block("aesthetic", ["cat", "horse"], DDPO + ALIGNPROP),
            Block("pickscore", ["a butterfly playing chess", "a monkey washing the dishes"], DDPO + ALIGNPROP),
        ],
    ),
    "6": Curves("Reward on unseen prompts", main_panels(unseen=True)),
    "7": Bars("A reward that was not trained on", main_panels(held_out=True)),
    "8": Grid("DrawBench samples", [Block("drawbench", [BATMAN, STATUE], ALIGNPROP)]),
    "9a": Curves(
        "Each module alone",
        [Panel("Aesthetic", "aesthetic", ABLATION), Panel("PickScore", "pickscore", ABLATION)],
    ),
    "9b": ablation("How long the guidance stays low", "t_thres = 900", "threshold-800", "threshold-700"),
    "9c": ablation("How low the guidance is (not in the paper)", "w_l = 1", "low-0", "low-2"),
    "9d": ablation("How much a word weighs (not in the paper)", "U(1, 1.2)", "words-1.1", "words-1.5"),
    "9e": ablation("How long training explores (not in the paper)", "for 3/4", "until-0.5", "until-1"),
    "10a": Curves("Hard prompts, an ensemble of rewards", [Panel("DrawBench", "drawbench", ALIGNPROP)]),
    "10b": Curves("Stable Diffusion XL", [Panel("Aesthetic", "sdxl", ALIGNPROP)]),
    "11": Grid(
        "Seen prompts, DDPO",
        [
            Block("aesthetic", ["dog"], DDPO),
            Block("pickscore", ["a fish playing chess", "a wolf washing the dishes"], DDPO),
        ],
    ),
    "12": Grid(
        "Seen prompts, AlignProp",
        [
            Block("aesthetic", ["lion"], ALIGNPROP),
            Block("pickscore", ["a deer riding a bike", "a dog washing the dishes"], ALIGNPROP),
        ],
    ),
    "13": Grid(
        "Unseen prompts, DDPO",
        [
            Block("aesthetic", ["octopus"], DDPO),
            Block(
                "pickscore",
                ["a cheetah doing laundry", "a hippopotamus driving a car", "a lobster playing soccer"],
                DDPO,
            ),
        ],
    ),
    "14": Grid(
        "Unseen prompts, AlignProp",
        [
            Block("aesthetic", ["hippopotamus"], ALIGNPROP),
            Block(
                "pickscore",
                ["an octopus doing laundry", "a crocodile driving a car", "a snail playing soccer"],
                ALIGNPROP,
            ),
        ],
    ),
    # the second prompt is ours
    "15": Grid("DrawBench, seen prompts", [Block("drawbench", [ATHLETE, PIZZA], ALIGNPROP)]),
    "16": Grid("Stable Diffusion XL, seen prompts", [Block("sdxl", ["bee", "lizard", "duck"], ALIGNPROP)]),
    "17a": Curves("Unseen hard prompts", [Panel("Parti", "drawbench", ALIGNPROP, unseen=True)]),
    "17b": Curves("Stable Diffusion XL, unseen prompts", [Panel("Aesthetic", "sdxl", ALIGNPROP, unseen=True)]),
    "18": Grid("DrawBench, unseen prompts", [Block("drawbench", [OWL, ALAMO], ALIGNPROP)]),
    "19": Grid("Stable Diffusion XL, unseen prompts", [Block("sdxl", ["hippopotamus"], ALIGNPROP)]),
}


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
        settings, last = self.recipe.evaluation, self.recipe.iterations
        times = 1 + last // settings.every + bool(last % settings.every)
        sets = settings.prompts or (self.recipe.prompts,)
        return times * settings.images * sum(len(prompt_sets.load(name)) for name in sets)


def job(scale: Scale, task: str, arm: Arm, seed: int, overrides: Mapping[str, Any]) -> Job:
    """The run of an arm; ``overrides`` are the user's and win over everything.

    Raises:
        UserError: if they make no valid recipe.
    """
    changes, recipe = VARIANTS[arm.variant].changes, scale.recipes[arm.algorithm]
    settings = {**scale.tasks[task].overrides(), **(changes or {}), "seed": seed, **overrides}
    variant = "" if changes is None else f"-{arm.variant}"
    name = recipe if changes is None else f"{recipe}-diffexp"
    return Job(f"{task}-{arm.algorithm}{variant}-s{seed}", Recipe.load(name, settings))


def jobs(figures: Iterable[Figure], scale: Scale, seeds: int, overrides: Mapping[str, Any]) -> list[Job]:
    """Every run that the figures need, once; grids need seed 0 only."""
    found = {}
    for figure in figures:
        for task, arm in wanted(figure):
            for seed in range(1 if isinstance(figure, Grid) else seeds):
                made = job(scale, task, arm, seed, overrides)
                found[made.name] = made
    return list(found.values())


def wanted(figure: Figure) -> list[tuple[str, Arm]]:
    """The tasks and arms that a figure trains."""
    if isinstance(figure, Strategies):
        return []
    parts = figure.blocks if isinstance(figure, Grid) else figure.panels
    return [(part.task, arm) for part in parts for arm in part.arms]


def chosen(name: str, scale: str) -> dict[str, Figure]:
    """The figure of that name, or with "all" every figure that the scale has.

    Raises:
        UserError: for an unknown scale or figure, or a figure that the scale has no counterpart of.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if name == "all":
        return {key: figure for key, figure in FIGURES.items() if has(SCALES[scale], figure)}
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES, f"known: {', '.join(FIGURES)} and all; 2 is a drawing of the method")
    if not has(SCALES[scale], FIGURES[name]):
        others = " or ".join(f"--scale {key}" for key in SCALES if has(SCALES[key], FIGURES[name]))
        raise UserError(f"figure {name!r} has no counterpart at --scale {scale} yet: take {others}")
    return {name: FIGURES[name]}


def has(scale: Scale, figure: Figure) -> bool:
    """Whether the scale has the figure's tasks and algorithms."""
    if isinstance(figure, Strategies):
        return figure.task in scale.tasks and figure.algorithm in scale.recipes
    return all(task in scale.tasks and arm.algorithm in scale.recipes for task, arm in wanted(figure))
