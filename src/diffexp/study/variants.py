"""The ways to train that figures compare, as changes to a recipe. "Ours" marks what is not in the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """A way to train: its name in a legend ("{}" is the algorithm), and changes to the DiffExp or ``plain`` recipe."""

    label: str
    changes: Mapping[str, Any] = {}
    plain: bool = False


CONTROLS = "diffexp.study.controls"
CONTROL = {"exploration.guidance": None, "exploration.words": None}
VARIANTS = {
    "plain": Variant("{}", plain=True),
    "diffexp": Variant("{} + DiffExp"),
    "guidance": Variant("{} + guidance schedule", {"exploration.words": None}),
    "words": Variant("{} + word weighting", {"exploration.guidance": None}),
    # "variants of our models with t_thres = {900, 800, 700}"; 900 is "diffexp".
    "threshold-800": Variant("DiffExp, t_thres = 800", {"exploration.guidance": {"threshold": 800}}),
    "threshold-700": Variant("DiffExp, t_thres = 700", {"exploration.guidance": {"threshold": 700}}),
    # ours, as all that follow: w_l is only "an extremely low value"; 0 is the unconditional prediction.
    "low-0": Variant("DiffExp, w_l = 0", {"exploration.guidance.low": 0.0}),
    "low-2": Variant("DiffExp, w_l = 2", {"exploration.guidance.low": 2.0}),
    "words-1.1": Variant("DiffExp, U(1, 1.1)", {"exploration.words.high": 1.1}),
    "words-1.5": Variant("DiffExp, U(1, 1.5)", {"exploration.words.high": 1.5}),
    "until-0.5": Variant("DiffExp, for 1/2", {"exploration.until": 0.5}),
    "until-1": Variant("DiffExp, to the end", {"exploration.until": 1.0}),
    # As the paper's baseline; the emoji recipes' gradients go through the last 5 steps at most, and never through the
    # first, whose guidance is low.
    "all-steps": Variant("{}, K ≤ all steps", {"algorithm.last_steps": None}, plain=True),
    "all-steps-diffexp": Variant("{} + DiffExp, K ≤ all steps", {"algorithm.last_steps": None}),
    # Controls. The mean of DiffExp's w(t) where a tenth of the steps has w_l = 1, and w_h is 5 or 7.5.
    "mean-4.6": Variant(
        "{} at w = 4.6", {"exploration.words": None, "exploration.guidance": {"low": 4.6, "fraction": 1.0}}
    ),
    "mean-6.85": Variant(
        "{} at w = 6.85", {"exploration.words": None, "exploration.guidance": {"low": 6.85, "fraction": 1.0}}
    ),
    "rollout-only": Variant(
        "{}, explored rollout, plain update", {**CONTROL, "exploration.strategy": f"{CONTROLS}:rollout_only"}
    ),
    "update-only": Variant(
        "{}, plain rollout, low w in the update",
        {**CONTROL, "exploration.strategy": f"{CONTROLS}:update_only"},
    ),
    # Steps that the loss leaves out (docs/concepts.md), at 20 steps and at the paper's 50.
    "masked": Variant("{} without t ≤ 100", {"algorithm.timestep_weights": "masked"}, plain=True),
    "masked-diffexp": Variant("{} + DiffExp without t ≤ 100", {"algorithm.timestep_weights": "masked"}),
    "sigma": Variant("{}, weights σ_t", {"algorithm.timestep_weights": "sigma"}, plain=True),
    "sigma-diffexp": Variant("{} + DiffExp, weights σ_t", {"algorithm.timestep_weights": "sigma"}),
    "50": Variant("{}, 50 steps", {"sampler.steps": 50}, plain=True),
    "50-diffexp": Variant("{} + DiffExp, 50 steps", {"sampler.steps": 50}),
    "50-masked": Variant(
        "{} without t ≤ 100, 50 steps", {"sampler.steps": 50, "algorithm.timestep_weights": "masked"}, plain=True
    ),
    "50-masked-diffexp": Variant(
        "{} + DiffExp without t ≤ 100, 50 steps", {"sampler.steps": 50, "algorithm.timestep_weights": "masked"}
    ),
}
