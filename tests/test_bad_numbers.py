"""Numbers that go bad reach no parameter: what is learned is what the sound samples alone would have taught."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brightness import brightness
from test_memory import Warned
from test_training import recipe
from torch import Tensor

from diffexp.algorithms import DDPO, Algorithm, AlignProp, ReFL, RewardWeightedRegression
from diffexp.errors import UserError
from diffexp.exploration import ConstantGuidance
from diffexp.learner import Learner
from diffexp.memory import MicroBatch
from diffexp.rewards.base import Scoring, score, score_or_nan
from diffexp.rewards.custom import CustomReward
from diffexp.rewards.ensemble import Ensemble
from diffexp.rollout import Batch, Sampler
from diffexp.runs import checkpoint
from diffexp.samples import Fault, Samples
from diffexp.training import Training

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
        (DDPO, (*EARLY, *LATE), 6),
        (AlignProp, (*EARLY, "gradient"), 6),
        (ReFL, (*EARLY, "gradient"), 7),
        (RewardWeightedRegression, (*EARLY, *LATE), 6),
    ],
)
def test_a_hundred_faults_poison_nothing(
    kind: type, stages: Sequence[str], iterations: int, double: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four faults an iteration, a hundred in all of this test, against runs in which those samples do not exist."""
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


@only_sd
@pytest.mark.parametrize("kind", [AlignProp, ReFL])
@pytest.mark.parametrize("stage", ["image", "latent"])
def test_pieces_of_nothing_but_bad_images(
    kind: type, stage: str, double: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample at a time, so that a bad one has a backward pass of its own; then no good one at all."""
    model = double.model
    double = replace(double, schedule=model.schedule(2))
    everyone = Batch(PROMPTS, model.encode(PROMPTS), ConstantGuidance(3.0), [(0, 1, k) for k in range(8)])
    saboteur = Saboteur(double, everyone, monkeypatch)
    reward = Scoring(CustomReward("brightness", brightness))
    saboteur.plan, saboteur.algorithm = {PROMPTS[3]: (stage, math.nan)}, algorithm(kind, double, reward)
    saboteur.algorithm.learner.batch = MicroBatch(1)
    assert {PROMPTS[k]: fault.stage for k, fault in saboteur.algorithm.step(everyone).dropped.items()} == {
        PROMPTS[3]: stage
    }
    saboteur.plan = dict.fromkeys(PROMPTS, (stage, math.nan))
    with pytest.raises(UserError, match=f"8 of 8 samples went bad.* stage with a bad number is the {stage}"):
        saboteur.algorithm.step(everyone)


def test_a_reward_is_never_shown_an_image_with_a_bad_number() -> None:
    shown: list[list[str]] = []

    class Watching:
        name, differentiable = "watching", False

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            assert images.isfinite().all()
            shown.append(list(prompts))
            return torch.tensor([math.inf if prompt == "fox" else 1.0 for prompt in prompts])

    images = torch.ones(4, 3, 2, 2)
    images[1, 0, 0, 0] = math.nan
    assert score_or_nan(Watching(), images, PROMPTS[:4]).tolist() == pytest.approx(
        [1, math.nan, math.inf, 1], nan_ok=True
    )
    assert shown == [["cat", "fox", "dolphin"]]
    with pytest.raises(UserError, match="nan for the prompt 'bike'"):
        score(Watching(), images, PROMPTS[:4])
    assert score_or_nan(Watching(), images * math.nan, PROMPTS[:4]).isnan().all()


def test_a_member_that_fails_on_an_image_moves_no_statistics_of_an_ensemble() -> None:
    class Member:
        differentiable = False

        def __init__(self, name: str, scores: list[float]) -> None:
            self.name, self.scores = name, torch.tensor(scores)

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.scores

    ensemble = Ensemble([Member("a", [1.0, 3.0, 100.0]), Member("b", [2.0, 6.0, math.nan])])
    with ensemble.observing():
        assert ensemble(torch.ones(3, 3, 2, 2), PROMPTS[:3]).isfinite().tolist() == [True, True, False]
    assert [(s.count, s.mean) for s in ensemble.statistics.values()] == [(2, 2), (2, 4)]


def test_the_diagnosis_names_the_earliest_stage() -> None:
    samples = Samples(PROMPTS[:4], max_dropped=0.25)
    samples.drop({1: Fault("gradient", math.nan)})
    with pytest.raises(UserError, match=r"3 of 4 .*at most 25% may.*image, inf for the prompt 'dolphin': the VAE"):
        samples.drop({0: Fault("reward", math.nan), 3: Fault("image", math.inf)})


def test_a_run_counts_and_names_what_it_drops_until_it_is_too_much(sd_folder: Path, tmp_path: Path) -> None:
    code, prompts = tmp_path / "mine.py", tmp_path / "prompts.txt"
    # the third iteration drops one sample of ten, which is allowed, the fourth two; the first call evaluates
    code.write_text(
        "calls = []\n"
        "def reward(images, prompts):\n"
        "    calls.append(1)\n"
        "    rewards = images.mean((1, 2, 3))\n"
        "    rewards[{4: slice(0, 1), 5: slice(3, 5)}.get(len(calls), slice(0))] = float('nan')\n"
        "    return rewards\n"
    )
    prompts.write_text("cat\nbike\n")
    more = {"evaluation.every": 9, "evaluation.images": 1, "preview.images": 0, "samples": 10}
    settings = recipe(sd_folder, prompts=str(prompts), reward=f"{code}:reward", **more)
    training = Training(settings, tmp_path / "run", warned := Warned())
    with pytest.raises(UserError, match=r"iteration 4: 2 of 10 samples went bad.* reward, nan for the prompt"):
        training.run()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["dropped"] for record in records] == [0, 0, 1]
    named = {"sample": 0, "prompt": training.batch(3).prompts[0], "stage": "reward", "value": "nan"}
    assert records[2]["bad"] == [named]
    assert warned.warnings[0].startswith(f"iteration 3: dropped 1 sample whose numbers went bad: {named['prompt']!r}")
    state = checkpoint.read_newest(tmp_path / "run" / "checkpoints")
    assert state.numbers["iteration"] == 3
    assert all(tensor.isfinite().all() for tensor in state.tensors.values())
