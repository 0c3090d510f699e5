"""What the paper's figures are reproduced on: three models, each with its tasks and the length of its runs.

Quotes are the paper's; "ours" marks what it does not say. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEEDS = 3
"""Runs of each kind, where a scale does not say otherwise (the paper does not say)."""

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

    ``instead`` has the prompts that grids show in the place of the paper's; ``candidates``, by algorithm, what tuning
    tries on this task besides its scale's.
    """

    prompts: str
    reward: str
    unseen: str | None = None
    held_out: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    candidates: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def overrides(self) -> dict[str, Any]:
        """The task as settings of a recipe. Each run evaluates everything that any figure wants of it."""
        rewards = [*self.reward.split("+"), *([self.held_out] if self.held_out else [])]
        prompts = [self.prompts, *([self.unseen] if self.unseen else [])]
        evaluated = {"evaluation.prompts": prompts, "evaluation.rewards": rewards}
        return {"prompts": self.prompts, "reward": self.reward, **evaluated, **self.settings}


@dataclass(frozen=True)
class Scale:
    """A model to reproduce on: the recipe of each algorithm (its twin with exploration ends in -diffexp), the tasks.

    ``budgets`` has, by algorithm, how long its runs are, and how precise; ``candidates``, by algorithm, the settings
    that are tried for it with and without exploration alike, by name; ``seeds`` has the figures with more than
    :data:`SEEDS` of them.
    """

    name: str
    recipes: Mapping[str, str]
    tasks: Mapping[str, Task]
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    candidates: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)

    def tried(self, algorithm: str, task: str) -> dict[str, Mapping[str, Any]]:
        """The settings that tuning tries for an algorithm on a task, by name."""
        return {**self.candidates[algorithm], **self.tasks[task].candidates.get(algorithm, {})}


SCALES = {
    # The study: what it costs is chosen here, to fit about nine hours on two cores. A DDPO run is 768 queries and an
    # AlignProp run 1,024, evaluated five times; 20 steps instead of 50, and few images of each prompt instead of 10.
    "emoji": Scale(
        "emoji",
        {"ddpo": "emoji-ddpo", "alignprop": "emoji-alignprop"},
        {
            # ours: 32 images of the one prompt, as the mean of a few would be noise.
            "dolphin": Task(
                f"text:{DOLPHIN}",
                "emoji-alignment",
                held_out="emoji-judge",
                settings={"evaluation.images": 32, "preview.every": 4},
            ),
            "aesthetic": Task(
                "animals", "emoji-aesthetic", "animals-unseen", "emoji-judge", settings={"evaluation.images": 2}
            ),
            "pickscore": Task(
                "animal-activities",
                "emoji-alignment",
                "animal-activities-unseen",
                "emoji-judge",
                settings={"evaluation.images": 1},
                # of the candidates of all tasks even the lowest may be too fast here
                candidates={"ddpo": {"lr-1e-3": {"optimizer.learning_rate": 1e-3}}},
            ),
            # ours: the small painter in XL's shape, with as many images of the few prompts as of the many.
            "sdxl": Task(
                "animals",
                "emoji-aesthetic",
                "animals-unseen",
                "emoji-judge",
                settings={"model.path": "emoji-xl", "evaluation.images": 2},
            ),
            # ours: the hardest prompts that the emoji world knows, and all its rewards but the judge.
            "drawbench": Task(
                "animal-activities",
                "emoji-alignment+emoji-aesthetic",
                "animal-activities-unseen",
                "emoji-judge",
                settings={"evaluation.images": 1},
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
        budgets={
            "ddpo": {
                "iterations": 12,
                "evaluation.every": 3,
                "model.precision": "bf16",
                "algorithm.minibatches": 4,
            },
            "alignprop": {"iterations": 16, "evaluation.every": 4, "model.precision": "bf16"},
        },
        candidates={
            "ddpo": {
                "lr-3e-3": {"optimizer.learning_rate": 3e-3},
                "lr-1e-2": {"optimizer.learning_rate": 1e-2},
                "lr-3e-3-epochs-2": {"optimizer.learning_rate": 3e-3, "algorithm.inner_epochs": 2},
            },
            "alignprop": {
                "lr-3e-4": {"optimizer.learning_rate": 3e-4},
                "lr-1e-3": {"optimizer.learning_rate": 1e-3},
                "lr-3e-3": {"optimizer.learning_rate": 3e-3},
                "lr-1e-2": {"optimizer.learning_rate": 1e-2},
            },
        },
        seeds=dict.fromkeys(("4", "6", "7", "masked", "masked-50", "masked-135", "sigma"), 5),
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
            # "an ensemble of HPS, Aesthetic, and PickScore"; "150 challenging prompts from Parti". Its weights: ours,
            # and HPS v2.1: the paper cites v2.0, of which no hash is published.
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
