"""Text encoders that learn: embedded anew at every update, recorded as the rollout used them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers.loaders.peft
import pytest
import torch
import transformers.integrations.peft
from brightness import brightness
from conftest import caught_gradient, disturb
from safetensors.torch import load_file
from test_ddpo import ddpo
from test_real_layouts import metrics, recipe
from test_rollout import PROMPTS, explored

from diffexp import models, train
from diffexp.algorithms import ReFL, RewardWeightedRegression
from diffexp.algorithms.advantages import batch_advantages
from diffexp.errors import UserError
from diffexp.exploration import weighted
from diffexp.learner import Learner
from diffexp.models import TextToImage, lora
from diffexp.rollout import Sampler
from diffexp.sharing.lora_header import METADATA_KEY, LoraHeader


@pytest.fixture
def learner(model: TextToImage) -> Sampler:
    """Two stochastic steps of a tiny model whose networks all have an adapter that does something."""
    lora.add(model, rank=2, alpha=4, seed=1, text_targets=lora.TEXT_ATTENTION)
    disturb(model)
    return Sampler(model, model.schedule(2), model.latent_shape())


def encoders_of(model: TextToImage) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.trainable() if name.startswith("text_encoder")}


def test_every_encoder_has_an_adapter_and_gets_a_gradient(learner: Sampler) -> None:
    model = learner.model
    found = {name.partition(".")[0] for name in encoders_of(model)}
    assert found == set(model.text_encoders())
    text = model.encode(["a cat"])
    for folder, part in zip(model.text_encoders(), text.hidden.chunk(len(found), dim=-1), strict=True):
        named = {name: p for name, p in encoders_of(model).items() if name.startswith(f"{folder}.")}
        gradient = torch.autograd.grad(part.square().sum(), list(named.values()), retain_graph=True, allow_unused=True)
        # SDXL takes the states before the last layer, which then only the pooled embedding sees
        assert sum(g is not None and bool(g.any()) for g in gradient) >= len(named) / 2
    with torch.no_grad():
        assert not model.encode(["a cat"]).hidden.requires_grad


@pytest.mark.parametrize("library", [transformers.integrations.peft, diffusers.loaders.peft])
def test_adapters_ask_for_no_version_of_peft_that_they_do_not_need(
    model: TextToImage, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "MIN_PEFT_VERSION", "999")
    lora.add(model, rank=2, text_targets=lora.TEXT_ATTENTION)
    with model.base():
        model.encode(["a cat"])


def test_the_untouched_model_has_untouched_encoders(learner: Sampler, request: pytest.FixtureRequest) -> None:
    model = learner.model
    kind = "xl" if len(model.text_encoders()) == 2 else "sd"
    plain = models.load(str(request.getfixturevalue(f"{kind}_folder"))).encode(["a cat"])
    assert not torch.equal(model.encode(["a cat"]).hidden, plain.hidden)
    with model.base():
        assert torch.equal(model.encode(["a cat"]).hidden, plain.hidden)


def test_the_first_update_is_on_policy_and_weights_the_same_words(learner: Sampler) -> None:
    metrics = ddpo(learner).step(explored(learner.model, 0.5)).metrics
    assert (metrics["ratio_deviation"], metrics["clip_fraction"]) == (0, 0)


def test_a_trajectory_records_the_text_of_its_rollout(learner: Sampler) -> None:
    batch = explored(learner.model, 1.0)
    before = learner.rollout(batch, size=4)
    with torch.no_grad():
        for parameter in encoders_of(learner.model).values():
            parameter.add_(0.1)
    after = learner.rollout(batch, size=4)
    assert torch.equal(before.text.hidden, explored(learner.model, 1.0).text.hidden) is False
    assert torch.equal(after.text.hidden, explored(learner.model, 1.0).text.hidden)
    assert torch.equal(before.text.weights, after.text.weights)
    assert before.text.weights.ne(1).any(), "Eq. 8 must have weighted something"


def test_the_policy_gradient_reaches_the_encoders(learner: Sampler) -> None:
    """At ratio 1 the gradient is −mean A ∇ log p, where the text is a function of the parameters: rebuilt by hand."""
    model, batch = learner.model, explored(learner.model, 1.0)
    path = learner.rollout(batch, 4)
    advantages = batch_advantages(brightness(path.images, batch.prompts))
    text = weighted(model.encode(PROMPTS), path.text.weights)
    objective = torch.zeros(())
    for i, w in enumerate(path.scales):
        density = learner.transition(path.latents[i], i, text, w).log_prob(path.latents[i + 1])
        objective = objective - (advantages * density).sum() / (4 * learner.steps)
    named = encoders_of(model)
    expected = torch.autograd.grad(objective, list(named.values()), allow_unused=True)
    algorithm = ddpo(learner)
    caught = caught_gradient(algorithm.learner)
    algorithm.step(batch)
    for name, gradient in zip(named, expected, strict=True):
        torch.testing.assert_close(
            caught[name], gradient if gradient is not None else 0 * caught[name], rtol=1e-3, atol=1e-7
        )
    assert any(g is not None and g.any() for g in expected)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "ddpo", "kl": 0.1},
        {"name": "alignprop", "truncation": "fixed", "last_steps": 1, "copies": 2},
    ],
    ids=lambda algorithm: algorithm["name"],
)
def test_training_moves_the_encoders_and_saves_them_in_both_files(
    algorithm: dict[str, object], xl_folder: Path, tmp_path: Path
) -> None:
    changes = {"lora.text_encoders": True, "lora.rank": 2, "iterations": 1}
    run = train(recipe(str(xl_folder), algorithm, **changes), tmp_path / "run")
    assert all(line["grad_norm"] > 0 for line in metrics(run))
    tensors = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    for encoder in ("text_encoder", "text_encoder_2"):
        ups = [t for key, t in tensors.items() if key.startswith(f"{encoder}.text_model.") and ".lora_B." in key]
        assert any(up.any() for up in ups), f"{encoder} must have learned"
    header = LoraHeader.read(run)
    stated = json.loads(header.metadata[METADATA_KEY])
    assert {stated[f"{part}.lora_alpha"] for part in ("unet", "text_encoder", "text_encoder_2")} == {2}
    assert header.adapted == ["the network", "text encoder 1", "text encoder 2"]
    kohya = load_file(run / "lora" / "run.kohya.safetensors")
    assert {key.split("_")[1] for key in kohya} == {"unet", "te1", "te2"}


@pytest.mark.parametrize("algorithm", [partial(ReFL, last_steps=1), RewardWeightedRegression], ids=["refl", "rwr"])
def test_the_papers_other_algorithms_reach_the_encoders_too(algorithm: Callable[..., Any], learner: Sampler) -> None:
    optimiser = Learner(learner.model.trainable(), 1e-3)
    caught = caught_gradient(optimiser)
    algorithm(learner, optimiser, brightness).step(explored(learner.model, 1.0))
    for part in learner.model.text_encoders():
        assert any(gradient.any() for name, gradient in caught.items() if name.startswith(f"{part}."))


def test_targets_that_are_none(sd_folder: Path) -> None:
    with pytest.raises(UserError, match=r"lora.text_targets = \['to_q'\]: this model has no layer 'to_q'; it has fc1,"):
        lora.add(models.load(str(sd_folder)), text_targets=["to_q"])
    with pytest.raises(UserError, match=r"lora.targets = \['to_z'\]: this model has no layer 'to_z'; it has conv,"):
        lora.add(models.load(str(sd_folder)), targets=["to_z"])


@pytest.mark.parametrize(("init", "bound"), [("gaussian", None), ("kaiming", 16**-0.5)])
def test_initialisations(sd_folder: Path, init: str, bound: float | None) -> None:
    model = models.load(str(sd_folder))
    lora.add(model, rank=8, targets=["attn2.to_k", "attn2.to_v"], init=init)
    down = torch.cat([p.detach().flatten() for name, p in model.trainable() if ".lora_A." in name])
    if bound:  # U(−1/√in, 1/√in), for the 16 numbers of the text
        assert down.abs().max() <= bound
        assert down.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    else:
        assert down.std() == pytest.approx(1 / 8, rel=0.1)
