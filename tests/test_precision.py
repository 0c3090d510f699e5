"""In bf16 the on-policy ratio is 1 before the first update, at every timestep and guidance scale.

A kernel that computes in bf16 rounds by the shape of its input. Where rollout and update differ in it, many ratios are
outside DDPO's clip range of 1e-4, are clipped, and teach nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import disturb
from safetensors.torch import load_file
from test_real_layouts import metrics, recipe

from diffexp import assembly, models, train
from diffexp.algorithms.ddpo import DDPO
from diffexp.devices import slow
from diffexp.exploration import Exploration, WordWeighting
from diffexp.models import TextToImage, lora
from diffexp.rollout import Batch, Sampler
from diffexp.terminal.reporter import Reporter

PROMPTS = ["a cat", "a bike", "a red dog"]
SCALES = (0.0, 0.5, 1.0, 5.0)


@pytest.fixture(scope="module", params=["emoji", "sdxl"])
def bf16(request: pytest.FixtureRequest) -> TextToImage:
    name = "emoji" if request.param == "emoji" else str(request.getfixturevalue("xl_folder"))
    model = models.load(name, "bf16")
    lora.add(model, rank=2, seed=1, text_targets=lora.TEXT_ATTENTION if request.param == "sdxl" else ())
    disturb(model)
    return model


@pytest.mark.parametrize("w", SCALES)
def test_the_on_policy_ratio_is_one_in_bf16(bf16: TextToImage, w: float) -> None:
    """Rolled out in batches of 3, updated in batches of 2 in another order: at all timesteps of the sampler."""
    sampler = Sampler(bf16, bf16.schedule(3), bf16.latent_shape(), rows=lambda: 2)
    batch = Batch(PROMPTS, bf16.encode(PROMPTS), lambda t: w, [(0, k) for k in range(3)])
    path = sampler.rollout(batch.explored(Exploration(words=WordWeighting(1.1, 1.5))), size=3)
    for i in range(sampler.steps):
        for rows in ([2, 0], [1]):
            text = sampler.current([PROMPTS[row] for row in rows], path.text.select(rows))
            density = sampler.transition(path.latents[i, rows], i, text, w).log_prob(path.latents[i + 1, rows])
            assert ((density - path.log_probs[i, rows]).exp() - 1).abs().max() <= 1e-4


@pytest.mark.parametrize("w", SCALES)
def test_steps_that_share_a_call_are_on_policy_in_bf16(bf16: TextToImage, w: float) -> None:
    """Rolled out a step at a time; updated with each sample at a step of its own."""
    sampler = Sampler(bf16, bf16.schedule(3), bf16.latent_shape(), rows=lambda: 2)
    path = sampler.rollout(Batch(PROMPTS, bf16.encode(PROMPTS), lambda t: w, [(0, k) for k in range(3)]), size=3)
    steps, rows = [2, 0, 1, 2, 0], [0, 1, 1, 2, 2]
    text = sampler.current([PROMPTS[row] for row in rows], path.text.select(rows))
    density = sampler.transition(path.latents[steps, rows], steps, text, w).log_prob(path.latents[1:][steps, rows])
    assert ((density - path.log_probs[steps, rows]).exp() - 1).abs().max() <= 1e-4


def test_what_is_float32_in_bf16(bf16: TextToImage) -> None:
    """The adapter, stored latents, log-probabilities and images; the frozen weights are not."""
    sampler = Sampler(bf16, bf16.schedule(1), bf16.latent_shape())
    path = sampler.rollout(Batch(["a cat"], bf16.encode(["a cat"]), lambda t: 1.0, [(0,)]), 1)
    tensors = (path.latents, path.log_probs, path.images, *(p for _, p in bf16.trainable()))
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert bf16.dtype == torch.bfloat16


def test_a_recipe_in_bf16_starts_on_policy(xl_folder: Path, tmp_path: Path) -> None:
    """Through the whole training, with batches that differ and don't divide the samples."""
    changes = {"model.precision": "bf16", "samples": 5, "rollout.batch": 4, "update.batch": 3, "iterations": 1}
    line = metrics(train(recipe(str(xl_folder), "ddpo", **changes), tmp_path / "run"))[0]
    assert (line["ratio_deviation"], line["clip_fraction"]) == (0, 0)
    assert line["grad_norm"] > 0


@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_that_only_pretends_says_so(
    able: bool, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", lambda: able)
    words = "model.precision = 'bf16': this CPU is several times faster in 'fp32'"
    assert slow("bf16", torch.device("cpu")) == (None if able else words)
    assert (slow("fp16", torch.device("cpu")) is None) == able
    assert slow("fp32", torch.device("cpu")) is None
    told = list[str]()
    reporter = Reporter()
    monkeypatch.setattr(reporter, "warned", told.append)
    train(recipe(str(sd_folder), "ddpo", iterations=1, **{"model.precision": "bf16"}), tmp_path / "run", reporter)
    assert told == ([] if able else [words])


@pytest.mark.parametrize(("capability", "able"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_before_ampere_has_no_bf16(
    capability: tuple[int, int], able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda:0")
    assert (slow("bf16", gpu) is None) == able
    assert slow("fp16", gpu) is slow("fp32", gpu) is None


@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
def test_a_recipe_in_fp16_learns(algorithm: str, xl_folder: Path, tmp_path: Path) -> None:
    """On a network without extremes no loss scaling is needed: every matrix of the adapter gets its gradient."""
    changes = {"model.precision": "fp16", "iterations": 1, "lora.rank": 2}
    run = train(recipe(str(xl_folder), algorithm, **changes), tmp_path / "run")
    line = metrics(run)[0]
    assert line["grad_norm"] > 0
    assert line["dropped"] == 0
    assert line.get("ratio_deviation", 0) == 0
    tensors = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name), "B was zero before"


@pytest.mark.parametrize(
    ("precision", "batch", "updates", "rows"),
    [
        ("fp32", 3, 2, None),
        ("bf16", 3, 2, 3),
        ("bf16", 64, 2, 4),  # each update has 4 of the 7 samples: two steps of it would be more than a rollout
        ("bf16", 64, 4, 6),  # three steps of its 2
    ],
)
def test_only_rounding_precisions_fix_the_shape(
    xl_folder: Path, precision: str, batch: int, updates: int, rows: int | None
) -> None:
    changes = {"model.precision": precision, "update.batch": batch, "samples": 7, "algorithm.minibatches": updates}
    settings = recipe(str(xl_folder), "ddpo", **changes)
    model = assembly.model(settings)
    assembly.make_trainable(settings, model)
    sampler = assembly.sampler(settings, model)
    ddpo = assembly.algorithm(settings, sampler, assembly.learner(settings, model), lambda images, prompts: images)
    assert isinstance(ddpo, DDPO)
    assert (ddpo.sampler.rows and ddpo.sampler.rows()) == rows
    assert sampler.rows is None, "evaluation keeps its own batches"


def test_filling_up_changes_no_result(xl_folder: Path) -> None:
    """Five samples in calls of 3 are what they are in one call, and carry the same gradient."""
    model = models.load(str(xl_folder))
    lora.add(model, rank=2, seed=1)
    disturb(model)
    plain = Sampler(model, model.schedule(2), model.latent_shape())
    text, x = model.encode([*PROMPTS, "a", "b"]), torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for sampler in (plain, replace(plain, rows=lambda: 3)):
        mean = sampler.transition(x, 0, text, 5.0).mean
        gradients.append(torch.autograd.grad(mean.square().sum(), [p for _, p in model.trainable()]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
