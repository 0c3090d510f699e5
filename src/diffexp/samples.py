"""The samples of one iteration, over all processes: which are whose, and which were dropped because numbers went bad.

A sample with a NaN or an infinity anywhere on its way leaves its iteration: on every process, for good, and with it
what it would have added to statistics and gradients. What is learned is what the others teach.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffexp.errors import UserError
from diffexp.processes.parallel import ALONE, Ranks

REMEDIES = {
    "latent": "the denoising network overflowed, or the LoRA has diverged; take model.precision = 'bf16' or 'fp32', or "
    "lower optimizer.learning_rate",
    "image": "the VAE overflowed on a sound latent, as SDXL's does in fp16; take model.precision = 'bf16' or 'fp32'",
    "reward": "the image was sound, so the reward is at fault; see what it makes of this prompt",
    "loss": "reward and latents were sound, so the policy has moved too far; lower optimizer.learning_rate",
    "gradient": "the loss was sound, so the backward pass overflowed; take model.precision = 'bf16' or 'fp32', or "
    "lower optimizer.learning_rate",
}
"""What a bad number says, by the stage where a sample first has one; in the order of the stages."""
STAGES = tuple(REMEDIES)


class Fault(NamedTuple):
    """The first stage of a sample with a number that is not finite, and that number."""

    stage: str
    value: float


def faults(**stages: Tensor) -> dict[int, Fault]:
    """The rows that went bad, and how. Tensors are (B, …) and come in the order of the stages."""
    found: dict[int, Fault] = {}
    for stage, tensor in stages.items():
        rows = tensor.detach().reshape(len(tensor), prod(tensor.shape[1:]))
        for row in (~rows.isfinite().all(1)).nonzero().flatten().tolist():
            found.setdefault(row, Fault(stage, float(rows[row][~rows[row].isfinite()][0])))
    return found


class Samples:
    """Who takes part in an iteration. ``own`` are this rank's samples; a row is a place among them.

    Where more than the share ``max_dropped`` of all samples goes bad, dropping them would hide what is wrong.
    """

    def __init__(self, prompts: Sequence[str], ranks: Ranks = ALONE, max_dropped: float = 0.1) -> None:
        self.prompts, self.ranks, self.max_dropped = prompts, ranks, max_dropped
        self.own = ranks.share(len(prompts))
        self.dropped: dict[int, Fault] = {}

    def rows(self, part: Collection[int] | None = None) -> list[int]:
        """This rank's rows that take part, of all samples or of ``part``."""
        among = range(len(self.prompts)) if part is None else part
        return [row for row, sample in enumerate(self.own) if sample in among and sample not in self.dropped]

    def count(self, part: Collection[int] | None = None) -> int:
        """How many samples take part on all ranks together, of all or of ``part``."""
        among = range(len(self.prompts)) if part is None else part
        return len([sample for sample in among if sample not in self.dropped])

    def drop(self, bad: Mapping[int, Fault]) -> None:
        """Takes rows out of the iteration, on every rank. All ranks call it together, also with nothing to drop.

        Raises:
            UserError: on every rank, if more than ``max_dropped`` are bad: which stage went bad first, and the remedy.
        """
        notes = torch.zeros(len(self.own), 2, dtype=torch.float64, device=self.ranks.device)
        for row, fault in bad.items():
            notes[row] = torch.tensor([1 + STAGES.index(fault.stage), fault.value])
        for sample, (stage, value) in enumerate(self.ranks.gather(notes, len(self.prompts)).tolist()):
            if stage:
                self.dropped.setdefault(sample, Fault(STAGES[int(stage) - 1], value))
        if len(self.dropped) > self.max_dropped * len(self.prompts):
            raise UserError(self.diagnosis())

    def gather(self, own: Tensor) -> Tensor:
        """Everyone's rewards (n, …) as (B, …) in the samples' order; NaN for samples that went bad on the way there."""
        whole = self.ranks.gather(own, len(self.prompts))
        rated = STAGES.index("reward")
        whole[[sample for sample, fault in self.dropped.items() if STAGES.index(fault.stage) <= rated]] = torch.nan
        return whole

    def diagnosis(self) -> str:
        """What went wrong with too many samples, by the earliest stage at which one did."""
        sample = min(self.dropped, key=lambda sample: (STAGES.index(self.dropped[sample].stage), sample))
        stage, value = self.dropped[sample]
        return (
            f"{len(self.dropped)} of {len(self.prompts)} samples went bad, and at most {self.max_dropped:.0%} may; "
            f"the earliest stage with a bad number is the {stage}, {value} for the prompt "
            f"{self.prompts[sample]!r}: {REMEDIES[stage]}"
        )


def describe(dropped: Mapping[int, Fault], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The dropped samples as a record has them: which, what prompt, where it went bad, with what number."""
    return [
        {"sample": sample, "prompt": prompts[sample], "stage": fault.stage, "value": str(fault.value)}
        for sample, fault in sorted(dropped.items())
    ]


def summary(bad: Sequence[Mapping[str, Any]]) -> str:
    """One line about dropped samples, as ``describe`` has them: how many, and each prompt with what was wrong."""
    named = dict.fromkeys(f"{one['prompt']!r} ({one['stage']}: {one['value']})" for one in bad)
    shown, more = list(named)[:5], len(named) - 5
    rest = f" and {more} more" if more > 0 else ""
    return f"dropped {len(bad)} sample{'s' * (len(bad) > 1)} whose numbers went bad: {', '.join(shown)}{rest}"
