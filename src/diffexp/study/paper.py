"""Every figure of the paper as data: what it shows of which arms on which tasks, and what it is drawn as.

Quotes are the paper's; "ours" marks what it does not say. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffexp.errors import UserError, unknown
from diffexp.runs.names import TITLES
from diffexp.study.scales import ALAMO, ATHLETE, BATMAN, DOLPHIN, OWL, PIZZA, SCALES, STATUE, Scale
from diffexp.study.variants import VARIANTS

COLUMNS = 4
"""Images in a row of a grid."""
STRATEGIES = 3
"""Rows of Figure 3: guidance that is high, low, scheduled. Each has twice as many images as a grid's."""


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
    """Reward over queries, panel by panel; with ``progress``, also images over training.

    ``only`` is the scale whose recipes differ from the arms, where there is just one.
    """

    title: str
    panels: Sequence[Panel]
    progress: bool = False
    only: str | None = None


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


@dataclass(frozen=True)
class Tuning:
    """The settings tried for each arm, on other seeds than the figures', in runs of half the length.

    ``tasks`` has, by algorithm, the tasks that it is tuned on, and for each those that take what was chosen there.
    """

    title: str
    tasks: Mapping[str, Mapping[str, Sequence[str]]]
    arms: Sequence[Arm]

    @property
    def tried(self) -> list[tuple[str, Arm]]:
        """Each arm on each task that it is tuned on."""
        return [(task, arm) for arm in self.arms for task in self.tasks[arm.algorithm]]


Figure = Curves | Bars | Grid | Strategies | Tuning


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


def truncation(title: str) -> Curves:
    """AlignProp's gradient through up to all steps, as in Stable Diffusion's recipes, and through 5, as in emoji's."""
    tried = [Arm("alignprop", name) for name in ("all-steps", "all-steps-diffexp", "plain", "diffexp")]
    labels = {"plain": "{}, K ≤ 5", "diffexp": "{} + DiffExp, K ≤ 5"}
    panels = [Panel("PickScore", "pickscore", tried, unseen, labels=labels) for unseen in (False, True)]
    return Curves(title, panels, only="emoji")


def masking(title: str, *variants: str, prompts: str = DOLPHIN, task: str = "dolphin") -> Curves:
    """DDPO without the late steps in its loss against DDPO, then the last two arms, with and without DiffExp, alone."""
    tried = [Arm("ddpo", name) for name in variants]
    return Curves(title, [Panel(prompts, task, tried), Panel("Exploration alone", task, tried[-2:])])


# Those with the most seeds first: what a study that is cut short has is then worth most.
FIGURES: dict[str, Figure] = {
    # ours: each reward has a scale of its own, so what is right for one may be far from right for the other. And what
    # is right for DDPO on one prompt is too fast for 135.
    "tuning": Tuning(
        "Settings tried",
        {
            "alignprop": {"pickscore": ("pickscore", "drawbench"), "aesthetic": ("aesthetic", "sdxl")},
            "ddpo": {"dolphin": ("dolphin",), "pickscore": ("pickscore",), "aesthetic": ("aesthetic",)},
        },
        ALIGNPROP + DDPO,
    ),
    "4": Curves("Reward on training prompts", main_panels()),
    "6": Curves("Reward on unseen prompts", main_panels(unseen=True)),
    "7": Bars("A reward that was not trained on", main_panels(held_out=True)),
    "1": Curves("DDPO on one hard prompt", [Panel(DOLPHIN, "dolphin", DDPO)], progress=True),
    # ours: the guidance of DDPO, Figure 1's prompt.
    "3": Strategies("Guidance strategies", "ddpo", "pickscore", DOLPHIN),
    # "A butterfly playing chess" is the paper's; the other prompts are ours.
    "5": Grid(
        "Samples",
        [
            Block("aesthetic", ["cat", "horse"], DDPO + ALIGNPROP),
            Block("pickscore", ["a butterfly playing chess", "a monkey washing the dishes"], DDPO + ALIGNPROP),
        ],
    ),
    "8": Grid("DrawBench samples", [Block("drawbench", [BATMAN, STATUE], ALIGNPROP)]),
    "9a": Curves(
        "Each module alone",
        [Panel("Aesthetic", "aesthetic", ABLATION), Panel("PickScore", "pickscore", ABLATION)],
    ),
    "9b": ablation("How long the guidance stays low", "t_thres = 900", "threshold-800", "threshold-700"),
    "controls": Curves(
        "Controls (not in the paper)",
        [
            # on the one prompt, as DDPO's controls say nothing where it learns nothing
            Panel(DOLPHIN, "dolphin", arms("ddpo", "diffexp", "mean-4.6", "rollout-only", "update-only")),
            Panel("AlignProp, PickScore", "pickscore", arms("alignprop", "diffexp", "mean-6.85")),
        ],
    ),
    "9c": ablation("How low the guidance is (not in the paper)", "w_l = 1", "low-0", "low-2"),
    "9d": ablation("How much a word weighs (not in the paper)", "U(1, 1.2)", "words-1.1", "words-1.5"),
    "9e": ablation("How long training explores (not in the paper)", "for 3/4", "until-0.5", "until-1"),
    "9f": truncation("How far back the gradient may go (not in the paper)"),
    "10a": Curves("Hard prompts, an ensemble of rewards", [Panel("DrawBench", "drawbench", ALIGNPROP)]),
    "10b": Curves("Stable Diffusion XL", [Panel("Aesthetic", "sdxl", ALIGNPROP)]),
    "11": Grid(
        "Seen prompts, DDPO",
        [
            Block("aesthetic", ["dog"], DDPO),  # ours
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
            Block("aesthetic", ["octopus"], DDPO),  # ours
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
    "masked": masking("Late steps left out (not in the paper)", "plain", "diffexp", "masked", "masked-diffexp"),
    "masked-50": masking(
        "Late steps left out, 50 steps (not in the paper)", "50", "50-diffexp", "50-masked", "50-masked-diffexp"
    ),
    "masked-135": masking(
        "Late steps left out, 135 prompts (not in the paper)",
        "plain",
        "diffexp",
        "masked",
        "masked-diffexp",
        prompts="PickScore",
        task="pickscore",
    ),
    "sigma": masking(
        "Late steps left out, the others weighted by σ_t (not in the paper)",
        "plain",
        "masked",
        "masked-diffexp",
        "sigma",
        "sigma-diffexp",
    ),
}
OURS = ("9c", "9d", "9e", "9f", "masked", "masked-50", "masked-135", "sigma")
"""Figures that are not the paper's, and no part of "all", which has tuning and controls besides the paper's."""


def wanted(figure: Figure) -> list[tuple[str, Arm]]:
    """The tasks and arms that a figure trains."""
    if isinstance(figure, Strategies):
        return []
    if isinstance(figure, Tuning):
        return figure.tried
    parts = figure.blocks if isinstance(figure, Grid) else figure.panels
    return [(part.task, arm) for part in parts for arm in part.arms]


def chosen(name: str, scale: str) -> dict[str, Figure]:
    """The figure of that name, or with "all" every one that the scale has but "ours": the paper's, tuning and controls.

    Raises:
        UserError: for an unknown scale or figure, or a figure that the scale has no counterpart of.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if name in ("all", "ours"):
        found = {key: figure for key, figure in FIGURES.items() if (key in OURS) == (name == "ours")}
        return {key: figure for key, figure in found.items() if has(SCALES[scale], figure)}
    if name == "2":
        raise UserError("figure 2 is a drawing of the method: there is nothing to train or to draw")
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES, f"known: {', '.join(FIGURES)}, all and ours")
    if not has(SCALES[scale], FIGURES[name]):
        others = " or ".join(f"--scale {key}" for key in SCALES if has(SCALES[key], FIGURES[name]))
        raise UserError(f"figure {name!r} has no counterpart at --scale {scale}: take {others}")
    return {name: FIGURES[name]}


def has(scale: Scale, figure: Figure) -> bool:
    """Whether the scale has the figure's tasks and algorithms, and for tuning, something to try."""
    if isinstance(figure, Tuning) and not scale.candidates:
        return False
    if isinstance(figure, Curves) and figure.only not in (None, scale.name):
        return False
    if isinstance(figure, Strategies):
        return figure.task in scale.tasks and figure.algorithm in scale.recipes
    return all(task in scale.tasks and arm.algorithm in scale.recipes for task, arm in wanted(figure))
