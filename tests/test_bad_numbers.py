"""Numbers that go bad reach no parameter: what is learned is what the sound samples alone would have taught."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from brightness import brightness
from torch import Tensor

from diffexp.algorithms import DDPO, Algorithm, AlignProp, ReFL, RewardWeightedRegression
from diffexp.exploration import ConstantGuidance
from diffexp.learner import Learner
from diffexp.memory import MicroBatch
from diffexp.rollout import Batch, Sampler
from diffexp.samples import Fault, Samples

PROMPTS = ["cat", "bike", "fox", "dolphin", "owl", "bear", "cow", "hen"]
BAD = [math.nan, math.inf, -math.inf]
EARLY, LATE = ("latent", "image", "reward"), ("loss", "gradient")

only_sd = pytest.mark.parametrize("model", ["sd"], indirect=True)


class Poison(torch.autograd.Function):
    """The identity, whose gradient is ``value`` in the marked rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marked: Tensor, value: float) -> Tensor:
        ctx.marked, ctx.value = marked, value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.where(ctx.marked, ctx.value, gradient), None, None


class Saboteur:
    """Puts a bad number into a stage of chosen samples: ``plan`` is {prompt: (stage, value)}."""

    def __init__(self, sampler: Sampler, batch: Batch, patch: pytest.MonkeyPatch) -> None:
        self.sampler, self.batch, self.plan, self.painted = sampler, batch, {}, []
        for owner, name in ((sampler.model, "network"), (sampler.model, "decode"), (Sampler, "denoise")):
            patch.setattr(owner, name, self.wrapped(name, getattr(owner, name)))

    def wrapped(self, name: str, original: Any) -> Any:
        return lambda *args, **more: getattr(self, name)(original, *args, **more)

    def mark(self, stage: str, prompts: Sequence[str], like: Tensor) -> list[tuple[Tensor, float]]:
        """Which rows, of the shape of ``like``, get which value."""
        found = []
        for value in BAD:
            rows = [repr(self.plan.get(prompt)) == repr((stage, value)) for prompt in prompts]
            rows += [False] * (len(like) - len(rows))
            found.append((torch.tensor(rows).view(-1, *[1] * (like.dim() - 1)), value))
        return found

    def network(self, original: Any, x: Tensor, t: int, hidden: Tensor, pooled: Tensor | None) -> Tensor:
        output = original(x, t, hidden, pooled)
        texts = self.batch.text.hidden
        prompts = [next((p for p, h in zip(PROMPTS, texts, strict=True) if torch.equal(h, row)), "") for row in hidden]
        updating = torch.is_grad_enabled() and not isinstance(self.algorithm, AlignProp | ReFL)
        for stage in ("loss",) if updating else ("latent",):
            for rows, value in self.mark(stage, prompts, output):
                output = torch.where(rows, value, output)
        for rows, value in self.mark("gradient", prompts, output):
            if torch.is_grad_enabled() and rows.any():
                output = Poison.apply(output, rows, value)
        return output

    def denoise(self, original: Any, sampler: Sampler, batch: Batch, *args: Any, **more: Any) -> Any:
        self.painted = batch.prompts
        return original(sampler, batch, *args, **more)

    def decode(self, original: Any, latents: Tensor) -> Tensor:
        images = original(latents)
        for rows, value in self.mark("image", self.painted, images):
            images = torch.where(rows, value, images)
        return images

    def reward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rewards = brightness(images, prompts)
        for rows, value in self.mark("reward", prompts, rewards):
            rewards = torch.where(rows, value, rewards)
        return rewards


def algorithm(kind: type, sampler: Sampler, reward: Any) -> Algorithm:
    learner = Learner(sampler.model.trainable(), 1e-3, batch=MicroBatch(8), max_dropped=0.5)
    if kind is AlignProp:
        return AlignProp(sampler, learner, reward, "fixed", last_steps=2)
    if kind is ReFL:
        return ReFL(sampler, learner, reward, last_steps=2)
    if kind is RewardWeightedRegression:
        return RewardWeightedRegression(sampler, learner, reward, draws=2)
    return DDPO(sampler, learner, reward, minibatches=1)


def without(subject: Algorithm, late: Sequence[str]) -> Algorithm:
    """The algorithm with some samples out of it from the update on, whose rewards have counted."""
    update = subject.learner.update

    def drop_and_update(samples: Samples, *args: Any) -> dict[str, float]:
        fault = Fault("gradient", math.nan)
        samples.dropped.update({k: fault for k, prompt in enumerate(samples.prompts) if prompt in late})
        return update(samples, *args)

    subject.learner.update = drop_and_update
    return subject


@only_sd
@pytest.mark.parametrize(
    ("kind", "stages", "iterations"),
    [
        (DDPO, (*EARLY, *LATE), 10),
        (AlignProp, (*EARLY, "gradient"), 10),
        (ReFL, (*EARLY, "gradient"), 3),
        (RewardWeightedRegression, (*EARLY, *LATE), 3),
    ],
)
def test_a_hundred_faults_poison_nothing(
    kind: type, stages: Sequence[str], iterations: int, double: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four faults an iteration, 104 in all four runs of this test, against runs in which those samples do not exist."""
    model, start = double.model, double.model.state()
    double = replace(double, schedule=model.schedule(2))
    everyone = Batch(PROMPTS, model.encode(PROMPTS), ConstantGuidance(3.0), [(0, 1, k) for k in range(8)])
    saboteur = Saboteur(double, everyone, monkeypatch)
    random = torch.Generator().manual_seed(0)
    for _ in range(iterations):
        # the first sample stays: it is what an iteration's own draws hang on
        bad = (1 + torch.randperm(7, generator=random)[:4]).tolist()
        drawn = torch.randint(len(stages), (4,), generator=random).tolist()
        values = [BAD[k] for k in torch.randint(3, (4,), generator=random).tolist()]
        plan = {PROMPTS[k]: (stages[s], value) for k, s, value in zip(bad, drawn, values, strict=True)}

        model.set_state(start)
        saboteur.plan, saboteur.algorithm = plan, algorithm(kind, double, saboteur.reward)
        outcome = saboteur.algorithm.step(everyone)
        learned = model.state()
        assert {PROMPTS[k]: fault.stage for k, fault in outcome.dropped.items()} == {p: s for p, (s, _) in plan.items()}
        assert outcome.rewards.isfinite().tolist() == [k not in bad or plan[PROMPTS[k]][0] in LATE for k in range(8)]
        assert all(math.isfinite(figure) for figure in outcome.metrics.values())

        model.set_state(start)
        late = [prompt for prompt, (stage, _) in plan.items() if stage in LATE]
        early = [prompt for prompt, (stage, _) in plan.items() if stage in EARLY]
        saboteur.plan, saboteur.algorithm = {}, without(algorithm(kind, double, brightness), late)
        saboteur.algorithm.step(everyone.select([k for k, prompt in enumerate(PROMPTS) if prompt not in early]))
        expected = model.state()
        assert any(not torch.equal(expected[key], start[key]) for key in start)
        for key, tensor in expected.items():
            torch.testing.assert_close(learned[key], tensor, rtol=0, atol=1e-9)
