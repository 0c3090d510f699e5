from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffexp.exploration import ConstantGuidance, Exploration, StepGuidance, WordWeighting
from diffexp.models import TextToImage
from diffexp.rollout import Batch, Sampler

PROMPTS = ["a cat", "bike", "a dolphin riding a bike", "fox"]


def batch(model: TextToImage, guidance: float = 5.0) -> Batch:
    keys = [(0, 1, k) for k in range(len(PROMPTS))]
    return Batch(PROMPTS, model.encode(PROMPTS), ConstantGuidance(guidance), keys)


def explored(model: TextToImage, low: float) -> Batch:
    return batch(model).explored(Exploration(StepGuidance(low, 5.0, threshold=500), WordWeighting(1.0, 1.5)))


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 5.0])
def test_eq4_holds_for_every_scale(model: TextToImage, w: float, monkeypatch: pytest.MonkeyPatch) -> None:
    text = model.encode(PROMPTS)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    uncond = text.uncond_hidden.expand_as(text.hidden)
    pooled = None if text.pooled is None else text.uncond_pooled.expand_as(text.pooled)
    conditional = model.network(x, 700, text.hidden, text.pooled)
    unconditional = model.network(x, 700, uncond, pooled)
    rows: list[int] = []
    network = model.network
    monkeypatch.setattr(model, "network", lambda x, *rest: rows.append(len(x)) or network(x, *rest))
    predicted = model.predict(x, 700, text, w)
    torch.testing.assert_close(predicted, unconditional + w * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert sum(rows) == (4 if w in (0, 1) else 8), "one pass where w is 0 or 1"


def test_each_sample_has_its_own_step_and_scale(sampler: Sampler) -> None:
    path, steps, scales = sampler.rollout(batch(sampler.model), size=4), (3, 0, 2, 0), (5.0, 0.0, 1.0, 2.5)
    together = sampler.transition(path.latents[1], steps, path.text, scales)
    for row, (i, w) in enumerate(zip(steps, scales, strict=True)):
        alone = sampler.transition(path.latents[1, [row]], i, path.text.select([row]), w)
        torch.testing.assert_close(together.mean[row], alone.mean[0], rtol=1e-4, atol=1e-4)
        assert together.std[row] == alone.std[0]


@pytest.mark.parametrize("low", [0.0, 0.5, 1.0, 5.0])
def test_on_policy_ratio_is_exactly_one(sampler: Sampler, low: float) -> None:
    path = sampler.rollout(explored(sampler.model, low), size=4)
    for i, w in enumerate(path.scales):
        log_prob = sampler.transition(path.latents[i], i, path.text, w).log_prob(path.latents[i + 1])
        assert torch.equal((log_prob - path.log_probs[i]).exp(), torch.ones(4))


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_forgetting_the_explored_scale_or_text_would_show(sampler: Sampler) -> None:
    path = sampler.rollout(explored(sampler.model, 2.0), size=4)
    plain = batch(sampler.model)
    wrong = [(plain.text, path.scales[0]), (path.text, 5.0)]
    for text, w in wrong:
        log_prob = sampler.transition(path.latents[0], 0, text, w).log_prob(path.latents[1])
        assert ((log_prob - path.log_probs[0]).abs() > 1e-7).any()


def test_how_a_batch_is_cut_changes_no_sample(sampler: Sampler) -> None:
    whole = sampler.rollout(explored(sampler.model, 1.0), size=4)
    pieces = sampler.rollout(explored(sampler.model, 1.0), size=3)
    torch.testing.assert_close(pieces.latents, whole.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pieces.images, whole.images, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_path_goes_on_from_where_it_was_left(sampler: Sampler) -> None:
    batch = explored(sampler.model, 1.0)
    whole, begun = sampler.denoise(batch)[0], sampler.denoise(batch, until=2)[0]
    rest = sampler.denoise(batch, begun=(2, begun[-1]))[0]
    assert len(begun) == 3 and len(rest) == 3
    assert all(torch.equal(one, other) for one, other in zip(whole, [*begun, *rest[1:]], strict=True))


def test_order_changes_no_sample(sampler: Sampler) -> None:
    whole = explored(sampler.model, 1.0)
    order = [2, 0, 3, 1]
    expected = sampler.rollout(whole, size=4).images[order]
    torch.testing.assert_close(sampler.rollout(whole.select(order), size=4).images, expected, rtol=1e-4, atol=1e-5)


def test_rollouts_repeat_whatever_happens_to_global_generators(sampler: Sampler) -> None:
    first = sampler.rollout(explored(sampler.model, 1.0), size=4)
    torch.rand(7)
    state = torch.random.get_rng_state()
    second = sampler.rollout(explored(sampler.model, 1.0), size=4)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(state, torch.random.get_rng_state())


def test_baseline_and_explorer_start_from_the_same_noise(sampler: Sampler) -> None:
    plain, explorer = (sampler.rollout(b, 4) for b in (batch(sampler.model), explored(sampler.model, 1.0)))
    assert torch.equal(plain.latents[0], explorer.latents[0])
    assert not torch.equal(plain.latents[-1], explorer.latents[-1])


def test_images_are_pictures(sampler: Sampler) -> None:
    images: Tensor = sampler.rollout(batch(sampler.model), size=4).images
    assert images.shape == (4, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_divergence_is_the_kl_of_every_step_to_the_untouched_model(sampler: Sampler) -> None:
    on = batch(sampler.model)
    path, expected = sampler.rollout(on, 4), torch.zeros(4)
    for i, w in enumerate(path.scales):
        step = sampler.transition(path.latents[i], i, path.text, w)
        with sampler.model.base():
            base = sampler.transition(path.latents[i], i, path.text, w)
        expected += ((step.mean - base.mean).square() / (2 * step.std[0] ** 2)).mean((1, 2, 3)) / 4
    found = sampler.divergence(on, size=3)
    assert (found > 0).all()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_divergence_leaves_out_a_step_without_noise(sampler: Sampler) -> None:
    """As where a scheduler has set_alpha_to_one: its last step ends at ᾱ = 1."""
    schedule = sampler.schedule._replace(alpha_bar_prev=(*sampler.schedule.alpha_bar_prev[:-1], 1.0))
    certain = replace(sampler, schedule=schedule)
    assert certain.random_steps == [0, 1, 2]
    on = batch(sampler.model)
    path, expected = certain.rollout(on, 4), torch.zeros(4)
    for i, w in list(enumerate(path.scales))[:3]:
        step = certain.transition(path.latents[i], i, path.text, w)
        with sampler.model.base():
            expected += step.kl(certain.transition(path.latents[i], i, path.text, w)) / 3
    torch.testing.assert_close(certain.divergence(on, size=4), expected.detach(), rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="use eta > 0"):
        replace(certain, eta=0.0).divergence(on, size=4)
