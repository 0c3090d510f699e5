"""What a recipe would cost: the arithmetic by hand, and one real measurement."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import Command

from diffexp import assembly, bench
from diffexp.bench import Meter, architecture_of, fetched, times
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.models import TextToImage, lora
from diffexp.rollout import Sampler


class Priced(Meter):
    """A meter of known prices: 1 s an image for a pass without a gradient, 10 s with one; 100 s for a picture."""

    def __init__(self, recipe: Recipe, model: TextToImage) -> None:
        self.recipe, self.model = recipe, model
        self.plain = assembly.sampler(recipe, model)
        learner = assembly.learner(recipe, model)
        self.algorithm: Any = assembly.algorithm(recipe, self.plain, learner, lambda images, prompts: images)

    def step(self, sampler: Sampler, count: int, w: float, learn: bool = False) -> float:
        return (10.0 if learn else 1.0) * (1 if w in (0, 1) else 2)

    def picture(self, count: int, learn: bool = False, reward: str | None = None) -> float:
        return 1000.0 if learn else 100.0


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
    assert meter.preview() == 6 * (8 + 100)


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

    def tower(size: str, device: torch.device) -> Any:
        asked.append(size)
        return lambda pixels: SimpleNamespace(pooler_output=pixels.flatten(1))

    monkeypatch.setattr(bench, "vision_tower", tower)
    score = bench.stand_in("2*hpsv2+aesthetic+emoji-aesthetic", torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    scores = score(images, ["a", "b"])
    assert asked == ["H", "L"]
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
