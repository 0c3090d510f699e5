"""What a recipe would cost: the arithmetic by hand, and one real measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import Command
from torch import nn

from diffexp import assembly, bench
from diffexp.bench import Meter, architecture_of, fetched
from diffexp.config import Recipe, times
from diffexp.errors import UserError
from diffexp.models import TextToImage, blank, lora
from diffexp.models.stable_diffusion import StableDiffusion
from diffexp.rollout import Sampler


class Priced(Meter):
    """A meter of known prices, seconds an image.

    A pass costs 1 s, with a gradient 10 s; decoding 90 s and each reward 10 s, with a gradient 1000 s together.
    """

    def __init__(self, recipe: Recipe, model: TextToImage) -> None:
        self.recipe, self.model, self.counts = recipe, model, list[int]()
        self.plain = assembly.sampler(recipe, model)
        learner = assembly.learner(recipe, model)
        self.algorithm: Any = assembly.algorithm(recipe, self.plain, learner, lambda images, prompts: images)

    def step(self, sampler: Sampler, count: int, w: float, learn: bool = False) -> float:
        self.counts.append(count)
        return (10.0 if learn else 1.0) * (1 if w in (0, 1) else 2)

    def picture(self, count: int, rewards: Sequence[str] = (), learn: bool = False) -> float:
        return 1000.0 if learn else 90.0 + 10.0 * len(rewards)


@pytest.fixture
def adapted(model: TextToImage) -> TextToImage:
    lora.add(model, rank=2)
    return model


SCALES = [1.0, 5.0, 5.0, 5.0]  # passes: 1 + 2 + 2 + 2 = 7


@pytest.mark.parametrize("model", ["sd"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 7 + 100 + 70),
        ({"algorithm.inner_epochs": 3}, 7 + 100 + 3 * 70),
        ({"algorithm.kl": 0.1}, 7 + 100 + 70 + 7),
        (
            {"algorithm.name": "alignprop", "algorithm.truncation": "fixed", "algorithm.last_steps": 1},
            1 + 4 + 20 + 1000,
        ),
        # K is 1 or 2: the third step learns half of the time
        ({"algorithm.name": "alignprop", "algorithm.last_steps": 2}, 1 + 2 + (2 + 20) / 2 + 20 + 1000),
        # step i of 0 … 3 learns with probability (i + 1) / 5
        (
            {"algorithm.name": "alignprop", "algorithm.truncation": "each-step"},
            (0.2 * 10 + 0.8) + (0.4 * 20 + 0.6 * 2) + (0.6 * 20 + 0.4 * 2) + (0.8 * 20 + 0.2 * 2) + 1000,
        ),
        # the third or the fourth step learns: 3 or 5 passes before it
        ({"algorithm.name": "refl", "algorithm.last_steps": 2}, 4 + 20 + 1000),
        ({"algorithm.name": "rwr"}, 7 + 100 + 4 * 10),
    ],
)
def test_an_iteration_by_hand(adapted: TextToImage, changes: dict[str, Any], expected: float) -> None:
    recipe = Recipe.parse({"samples": 4, "sampler": {"steps": 4}}, "test", changes)
    assert Priced(recipe, adapted).iteration(SCALES) == pytest.approx(4 * expected)


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_an_evaluation_by_hand(adapted: TextToImage) -> None:
    changes = {"evaluation.prompts": ["text:a cat", "text:a dog"], "evaluation.images": 10, "preview.images": 3}
    recipe = Recipe.parse({"prompts": "text:a cat", "sampler": {"steps": 4}}, "test", changes)
    meter = Priced(recipe, adapted)
    # a set: 10 images of 4 steps of 2 passes; the divergence on 8 of them, by two models
    assert meter.evaluation() == 2 * (10 * (8 + 100) + 8 * 16)
    assert meter.preview() == 6 * (8 + 90), "nobody scores a preview"
    named = {"evaluation.rewards": ["jpeg-compressibility", "emoji-judge"], "evaluation.held_out": "emoji-aesthetic"}
    recipe = Recipe.parse({"prompts": "text:a cat", "sampler": {"steps": 4}}, "test", changes | named)
    assert Priced(recipe, adapted).evaluation() == 2 * (10 * (8 + 90 + 3 * 10) + 8 * 16), "three rewards, decoded once"


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_an_evaluation_paints_no_more_at_once_than_a_rollout(adapted: TextToImage) -> None:
    """Its divergence is of 8 images, which would need more memory than training has."""
    recipe = Recipe.parse({"prompts": "text:a cat", "rollout": {"batch": 3}, "sampler": {"steps": 4}}, "test")
    meter = Priced(recipe, adapted)
    assert meter.evaluation() == 10 * (8 + 100) + 8 * 16
    assert meter.counts == [3, 3]


def test_rewards_are_built_once_and_images_decoded_once(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, done = [], []

    def stand_in(name: str, device: torch.device) -> Callable[..., torch.Tensor]:
        built.append(name)
        return lambda images, texts: done.append(name) or images.new_zeros(len(images))

    monkeypatch.setattr(bench, "stand_in", stand_in)
    settings = {"prompts": ["text:a cat", "text:a dog"], "images": 1, "held_out": "emoji-judge"}
    recipe = Recipe.parse({"device": "cpu", "sampler": {"steps": 1}, "evaluation": settings}, "test")
    meter = Meter(recipe, str(sd_folder))
    decode = meter.model.decode
    monkeypatch.setattr(meter.model, "decode", lambda x: done.append("decode") or decode(x))
    meter.evaluation()
    assert built == ["emoji-alignment", "emoji-judge"]
    assert done[:3] * (len(done) // 3) == done
    assert done[:3] == ["decode", "emoji-alignment", "emoji-judge"]


@pytest.mark.parametrize("model", ["sd"], indirect=True)
@pytest.mark.parametrize(
    ("precision", "train", "weights", "computes"),
    [
        ("bf16", "unet", torch.float32, torch.bfloat16),
        ("bf16", "lora", torch.bfloat16, None),
        ("fp32", "unet", torch.float32, None),
    ],
)
def test_a_network_without_weights_has_the_real_ones_precisions(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    train: str,
    weights: torch.dtype,
    computes: torch.dtype | None,
) -> None:
    def with_tokenizer(*parts: Any) -> StableDiffusion:
        return StableDiffusion(*parts[:4], model.tokenizer, parts[5])  # tests check types, and a blank model has none

    monkeypatch.setattr(blank, "StableDiffusion", with_tokenizer)
    monkeypatch.setattr(bench, "device", torch.device)
    recipe = Recipe.parse({"model": {"precision": precision, "train": train}}, "test")
    opened = bench.opened(recipe.model_copy(update={"device": "meta"}), "sd15")
    assert (opened.dtype, opened.autocast) == (weights, computes)
    (encoder,) = opened.text_encoders().values()
    assert next(encoder.parameters()).dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    embedded = blank.text(opened, 2).hidden
    assert embedded.shape == (2, 77, 768) and embedded.device.type == "meta"


@pytest.mark.parametrize(("iterations", "every"), [(1, 10), (10, 10), (11, 10), (30, 5), (7, 3)])
def test_how_often_something_is_due(iterations: int, every: int) -> None:
    assert times(iterations, every) == sum(k % every == 0 or k == iterations for k in range(iterations + 1))


def test_architectures_by_name(sd_folder: Path) -> None:
    models = {
        "emoji": "emoji",
        "emoji-xl": "emoji-xl",
        "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
        "me/sd2-portraits": "sd21",
        "a/b": "sd15",
    }
    for path, expected in models.items():
        assert architecture_of(Recipe.parse({"model": {"path": path}}, "test")) == expected
    assert architecture_of(Recipe.parse({"model": {"path": str(sd_folder)}}, "test")) == str(sd_folder)
    with pytest.raises(UserError, match="--arch = 'flux'"):
        bench.bench(Recipe.load("demo"), "demo", "flux")


def test_what_would_be_downloaded() -> None:
    assert [fetched(name) for name in ("emoji-judge", "jpeg-compressibility", "mine.py:f", "hpsv2")] == [False] * 3 + [
        True
    ]
    assert fetched("http://127.0.0.1:8420")


def test_rewards_that_would_be_downloaded_have_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Tower(nn.Module):
        def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(pooler_output=pixels.flatten(1))

    def tower(size: str, device: torch.device) -> Tower:
        asked.append(size)
        return Tower()

    monkeypatch.setattr(bench, "vision_tower", tower)
    monkeypatch.setattr(bench, "tower", cache(bench.tower.__wrapped__))
    score = bench.stand_in("2*hpsv2+aesthetic+emoji-aesthetic", torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    scores = score(images, ["a", "b"])
    bench.stand_in("hpsv2", torch.device("cpu"))
    assert asked == ["H", "L"], "members that are evaluated are there already"
    assert scores.shape == (2,)
    assert torch.autograd.grad(scores.sum(), images)[0].abs().sum() > 0


def test_the_command(diffexp: Command) -> None:
    settings = ["samples=2", "sampler.steps=2", "algorithm.last_steps=1", 'evaluation.prompts=["text:a cat"]']
    changes = [part for setting in settings for part in ("--set", setting)]
    found = json.loads(diffexp("bench", "demo", "--json", *changes).out)
    assert found["recipe"] == "demo" and found["architecture"] == "emoji"
    assert found["images_per_second"] * found["seconds_per_iteration"] == pytest.approx(2)
    assert (
        found["total_seconds"]
        >= Recipe.load("demo").iterations * found["seconds_per_iteration"] + found["evaluation_seconds"]
    )
    assert found["memory_gib"] > 0.1
