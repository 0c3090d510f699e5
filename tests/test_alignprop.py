from __future__ import annotations

from collections import Counter

import pytest
import torch
from brightness import brightness
from conftest import caught_gradient
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from test_rollout import batch
from torch import nn

from diffexp import rollout
from diffexp.algorithms import AlignProp
from diffexp.exploration import ConstantGuidance
from diffexp.learner import Learner
from diffexp.memory import MicroBatch
from diffexp.models import TextToImage, lora
from diffexp.rollout import Batch, Sampler


def align(sampler: Sampler, batch: int = 4, **settings: object) -> AlignProp:
    learner = Learner(sampler.model.trainable(), learning_rate=1e-3, max_grad_norm=1e9, batch=MicroBatch(batch))
    return AlignProp(sampler, learner, brightness, **{"truncation": "fixed", "last_steps": 2, **settings})


def gradient_of(algorithm: AlignProp, on: Batch) -> dict[str, torch.Tensor]:
    """The gradient of one iteration, before the optimiser uses it."""
    caught = caught_gradient(algorithm.learner)
    algorithm.step(on)
    return caught


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_gradient_is_a_finite_difference(double: Sampler) -> None:
    """Through all four steps, both halves of the guidance and the decoder, in float64."""
    sampler, model = double, double.model
    on = batch(model, guidance=3.0)
    random = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=random).double() for n, p in model.trainable()}
    start = {n: p.detach().clone() for n, p in model.trainable()}
    gradient = gradient_of(align(sampler, last_steps=4), on)

    def reward(step: float) -> float:
        with torch.no_grad():
            for name, parameter in model.trainable():
                parameter.copy_(start[name] + step * direction[name])
            return float(brightness(model.decode(sampler.denoise(on)[0][-1]), []).mean())

    numeric = (reward(1e-5) - reward(-1e-5)) / 2e-5
    analytic = -sum(float((gradient[name] * direction[name]).sum()) for name in gradient)
    assert analytic == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize("last", [1, 3])
def test_no_gradient_before_the_last_steps(double: Sampler, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to a graph that is cut by hand before step T − K, and no network call before it records one."""
    sampler = double
    on = batch(sampler.model)
    with torch.no_grad():
        prefix = sampler.denoise(on)[0]
    noise = on.generators("noise")
    draws = [rollout.randn(noise, sampler.latent, sampler.model.device) for _ in range(sampler.steps + 1)]
    x = prefix[sampler.steps - last]
    for i in range(sampler.steps - last, sampler.steps):
        x = sampler.transition(x, i, on.text, 5.0).sample(draws[i + 1])
    loss = -brightness(sampler.model.decode(x), []).mean()
    named = dict(sampler.model.trainable())
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    recorded: list[bool] = []
    network = sampler.model.network
    monkeypatch.setattr(sampler.model, "network", lambda *a: recorded.append(torch.is_grad_enabled()) or network(*a))
    gradient = gradient_of(align(sampler, last_steps=last), on)
    assert recorded == [False] * (sampler.steps - last) + [True] * last
    for name in named:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("model", ["sd"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"last_steps": 1, "copies": 2}])
def test_micro_batches_change_no_gradient(double: Sampler, settings: dict[str, int]) -> None:
    sampler = double
    on = batch(sampler.model)
    start = sampler.model.state()
    whole = gradient_of(align(sampler, batch=4, **settings), on)
    sampler.model.set_state(start)
    pieces = gradient_of(align(sampler, batch=3, **settings), on)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("model", ["sd"], indirect=True)
@pytest.mark.parametrize("parts", [("unet", "decoder"), ("attention",)])
def test_recomputing_activations_changes_no_gradient(double: Sampler, parts: tuple[str, ...]) -> None:
    sampler = double
    on = batch(sampler.model)
    start = sampler.model.state()
    plain = gradient_of(align(sampler), on)
    sampler.model.set_state(start)
    sampler.model.checkpointing(parts)
    recomputed = gradient_of(align(sampler), on)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("parts", "again"), [((), (1, 1)), (("attention",), (1, 2)), (("unet",), (2, 2))])
def test_only_what_is_asked_for_is_computed_again(
    model: TextToImage, parts: tuple[str, ...], again: tuple[int, int]
) -> None:
    model.checkpointing(parts)
    calls: Counter[nn.Module] = Counter()
    for block in model.unet.modules():
        block.register_forward_pre_hook(lambda block, _: calls.update([block]))
    x = torch.randn(1, *model.latent_shape()).requires_grad_()
    model.predict(x, 500, model.encode(["a cat"]), 3.0).sum().backward()
    kinds = ResnetBlock2D, BasicTransformerBlock
    assert tuple(max(n for block, n in calls.items() if isinstance(block, kind)) for kind in kinds) == again


def test_random_truncation_draws_once_an_iteration_and_stays_in_range(sampler: Sampler) -> None:
    algorithm = align(sampler, truncation="random", last_steps=3)
    text = sampler.model.encode(["cat"])
    masks = [
        algorithm.learned_steps(Batch(["cat"], text, ConstantGuidance(1.0), [(0, iteration, 0)]))
        for iteration in range(300)
    ]
    depths = torch.tensor([sum(mask) for mask in masks])
    assert all(mask == sorted(mask) for mask in masks), "the last K steps, without gaps"
    assert torch.bincount(depths).tolist()[0] == 0
    assert (torch.bincount(depths, minlength=4)[1:] - 100).abs().max() < 5 * (300 * 2 / 9) ** 0.5
    assert depths.max() == 3


def test_redrawing_at_each_step_keeps_step_i_with_probability_i_plus_1_over_t_plus_1(sampler: Sampler) -> None:
    algorithm = align(sampler, truncation="each-step")
    text = sampler.model.encode(["cat"])
    masks = torch.tensor(
        [
            algorithm.learned_steps(Batch(["cat"], text, ConstantGuidance(1.0), [(0, iteration, 0)]))
            for iteration in range(500)
        ]
    ).float()
    expected = torch.tensor([1, 2, 3, 4]) / 5
    assert (masks.mean(0) - expected).abs().max() < 5 * 0.5 / 500**0.5


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_draft_lv_counts_every_copy_as_a_query(sampler: Sampler) -> None:
    metrics = align(sampler, last_steps=1, copies=3).step(batch(sampler.model)).metrics
    assert metrics["queries"] == 12
    assert metrics["backprop_steps"] == 1


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_alignprop_learns_brightness(model: TextToImage) -> None:
    lora.add(model, rank=4, targets=("to_v", "conv_out"), seed=0)
    sampler = Sampler(model, model.schedule(4), model.latent_shape())
    learner = Learner(model.trainable(), learning_rate=3e-2, batch=MicroBatch(8))
    algorithm = AlignProp(sampler, learner, brightness, "fixed", last_steps=2)
    on = Batch(["cat"] * 8, model.encode(["cat"] * 8), ConstantGuidance(2.0), [(0, 0, k) for k in range(8)])
    steps = [algorithm.step(on).metrics for _ in range(6)]
    rewards = [step["reward_mean"] for step in steps]
    assert rewards == sorted(rewards), "the same noise every time: each step of ascent must help"
    assert rewards[-1] > rewards[0] + 2 * steps[0]["reward_std"]
