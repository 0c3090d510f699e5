"""What part of DiffExp does it? Controls that explore in the rollout only, or in the update only. Ours.

DiffExp samples and learns under the same scheduled guidance. Where t > t_thres, with w_l = 1, its update trains the
conditional prediction alone, and at the deployed w_h the same change of it acts w_h times: the schedule changes how
far a step goes, besides what is sampled. These strategies, named ``diffexp.study.controls:rollout_only`` in a recipe,
tell the two apart. They need DDPO, whose update rebuilds transitions: its ratios are then of the transition that
learns, 1 before the first update. AlignProp with ``algorithm.last_steps`` below the low steps never learns there, and
needs no such control.
"""

from __future__ import annotations

from diffexp.exploration import Exploration, StepGuidance, WordWeighting
from diffexp.rollout import Batch, Conditioning

LOW, THRESHOLD = 1.0, 900
"""w_l and t_thres of the recipes with DiffExp, at 20 steps and at 50."""


def rollout_only(batch: Batch) -> Batch:
    """Samples as DiffExp does, weighted words and scheduled guidance; learns the deployed policy from it."""
    explored = batch.explored(Exploration(schedule(batch), WordWeighting()))
    return explored._replace(learned=Conditioning(batch.text, batch.guidance))


def update_only(batch: Batch) -> Batch:
    """Samples plainly; learns under the scheduled guidance."""
    return batch._replace(learned=Conditioning(batch.text, schedule(batch)))


def schedule(batch: Batch) -> StepGuidance:
    """Eq. 7 with the recipe's own guidance scale as w_h."""
    return StepGuidance(LOW, batch.guidance(0), THRESHOLD)
