"""What the paper claims by each figure, what of it can be tested here, and the rule of the verdict.

A test is passed where the whole 95 % interval lies on the claimed side, failed where it lies on the other, and open in
between. A claim is reproduced if all of its tests are passed, partly if some are; if none is, not reproduced where one
fails, and open where none does. Tests of a single pair of seeds, which has no interval, of a level that too few runs
reached to bound their median or that nobody gained, and of arms whose runs of a seed differ in precision, are not
determined and do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from diffexp.study.statistics import Estimate, Ratio


class Verdict(Enum):
    """What a test or a claim came to. Only of a claim a part may hold: ``PARTLY``."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    OPEN = "open"
    NOT = "not reproduced"
    UNKNOWN = "not determined"
    MISSING = "not run yet"


class Test(NamedTuple):
    """``better`` needs fewer queries than ``worse`` to its final reward, ends with a higher one, or peaks higher."""

    kind: str  # "fewer queries", "higher reward" or "higher maximum"
    better: str = "diffexp"  # a variant, as the next
    worse: str = "plain"


class Claim(NamedTuple):
    """The paper's sentence, and what it comes to in runs."""

    says: str
    tests: Sequence[Test]


FEWER, HIGHER = Test("fewer queries"), Test("higher reward")

CLAIMS = {
    "1": Claim(
        "“The current method fails to find a good reward signal (i.e., images containing a bicycle)”; “our method "
        "indeed improves its sample efficiency”.",
        (FEWER, HIGHER),
    ),
    "4": Claim(
        "“Our method outperforms the baselines in terms of reward scores, while demonstrating better sample "
        "efficiency. … approximately 20% fewer samples to achieve the same reward score as DDPO and AlignProp.” "
        "(Tested: whether they are fewer, not by how much.)",
        (FEWER, HIGHER),
    ),
    "6": Claim(
        "“A model with DiffExp consistently outperforms the baseline models in terms of rewards and sample efficiency, "
        "confirming its ability to generalize well to unseen prompts.”",
        (FEWER, HIGHER),
    ),
    "7": Claim(
        "“Ours clearly achieves higher ImageReward scores compared to baselines”, “rather than merely increasing the "
        "reward through reward hacking”.",
        (HIGHER,),
    ),
    "9a": Claim(
        "“All our variants generally perform better than our baseline, AlignProp, in terms of rewards and sample "
        "efficiency, while using those modules together provides the best results.”",
        (
            FEWER,
            Test("fewer queries", "guidance"),
            Test("fewer queries", "words"),
            HIGHER,
            Test("higher reward", "guidance"),
            Test("higher reward", "words"),
            Test("higher reward", "diffexp", "guidance"),
            Test("higher reward", "diffexp", "words"),
        ),
    ),
    "9b": Claim(
        "“Higher t_thres generally provides better results in terms of rewards, with the best performance with "
        "t_thres = 900.”",
        (
            Test("higher reward", "diffexp", "threshold-800"),
            Test("higher reward", "threshold-800", "threshold-700"),
        ),
    ),
    "10a": Claim(
        "“… demonstrating the effectiveness of our approach even to the challenging scenarios.”", (FEWER, HIGHER)
    ),
    "10b": Claim(
        "“AlignProp with DiffExp achieves a significantly higher maximum reward value as well as better sample "
        "efficiency compared to AlignProp without DiffExp.”",
        (FEWER, Test("higher maximum")),
    ),
    "17a": Claim(
        "“Our method achieves improved sample efficiency and higher scores compared to the baseline.”", (FEWER, HIGHER)
    ),
    "17b": Claim(
        "“Our method significantly improves the sample efficiency compared to the baseline, confirming its ability to "
        "generalize to unseen prompts even with SDXL.”",
        (FEWER,),
    ),
}


def of_ratio(ratio: Ratio | None) -> Verdict:
    """Whether a method needs fewer queries than its baseline."""
    if ratio is None or ratio.low is None or ratio.high is None:
        return Verdict.UNKNOWN
    if ratio.least == 0 and ratio.most == float("inf"):
        return Verdict.UNKNOWN
    if ratio.high < 1:
        return Verdict.REPRODUCED
    return Verdict.NOT if ratio.low >= 1 else Verdict.OPEN


def of_difference(difference: Estimate) -> Verdict:
    """Whether a difference is above 0."""
    if difference.low is None or difference.high is None:
        return Verdict.UNKNOWN
    if difference.low > 0:
        return Verdict.REPRODUCED
    return Verdict.NOT if difference.high <= 0 else Verdict.OPEN


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """What a claim's tests come to."""
    if not verdicts:
        return Verdict.MISSING
    known = {verdict for verdict in verdicts if verdict is not Verdict.UNKNOWN}
    if not known:
        return Verdict.UNKNOWN
    if Verdict.REPRODUCED in known:
        return Verdict.REPRODUCED if len(known) == 1 else Verdict.PARTLY
    return Verdict.NOT if Verdict.NOT in known else Verdict.OPEN
