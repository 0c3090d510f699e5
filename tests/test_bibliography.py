"""The algorithms of the paper's bibliography: DPOK's KL term, ReFL, reward-weighted regression."""

from __future__ import annotations

import pytest
import torch
from brightness import brightness
from conftest import caught_gradient
from test_ddpo import ddpo
from test_rollout import batch, explored

from diffexp import rollout
from diffexp.algorithms import ReFL, RewardWeightedRegression
from diffexp.algorithms.rwr import regression_weights
from diffexp.diffusion import Transition, denoised
from diffexp.exploration import ConstantGuidance
from diffexp.learner import Learner
from diffexp.memory import MicroBatch
from diffexp.models import TextToImage, lora
from diffexp.rollout import Batch, Sampler

only_sd = pytest.mark.parametrize("model", ["sd"], indirect=True)


def fresh(model: TextToImage) -> Sampler:
    """A new adapter that reaches the output layer, so that a tiny random network can learn something."""
    lora.add(model, rank=4, targets=("to_v", "conv_out"), seed=0)
    return Sampler(model, model.schedule(4), model.latent_shape())


def task(model: TextToImage, iteration: int, count: int = 32) -> Batch:
    keys = [(0, iteration, k) for k in range(count)]
    return Batch(["cat"] * count, model.encode(["cat"] * count), ConstantGuidance(2.0), keys)


def test_kl_is_that_of_gaussians() -> None:
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, 0.3), normal(b, 0.3)).mean((1, 2, 3))
    torch.testing.assert_close(Transition(a, (0.3,) * 3).kl(Transition(b, (0.3,) * 3)), expected)


@only_sd
def test_kl_to_the_base_is_zero_until_something_is_learned(model: TextToImage) -> None:
    sampler = fresh(model)
    assert ddpo(sampler, kl=0.1).step(task(model, 0, 4)).metrics["kl_to_base"] == 0.0
    assert ddpo(sampler, kl=0.1).step(task(model, 1, 4)).metrics["kl_to_base"] > 0.0


@only_sd
def test_a_strong_kl_term_pulls_back_to_the_base(sampler: Sampler) -> None:
    on = explored(sampler.model, 1.0)
    algorithm = ddpo(sampler, kl=1e6)
    algorithm.learner.optimizer.param_groups[0]["lr"] = 1e-2
    distances = [algorithm.step(on).metrics["kl_to_base"] for _ in range(6)]
    assert distances[-1] < 0.8 * distances[0]


@only_sd
def test_refl_is_the_gradient_of_the_foreseen_image(double: Sampler) -> None:
    on, named = batch(double.model), dict(double.model.trainable())
    algorithm = ReFL(
        double, Learner(named.items(), 1e-3, max_grad_norm=1e9, batch=MicroBatch(3)), brightness, last_steps=3
    )
    i = algorithm.chosen_step(on)
    assert 1 <= i <= 3
    with torch.no_grad():
        x_t = double.denoise(on)[0][i]
    output = double.model.predict(x_t, double.schedule.timesteps[i], on.text, 5.0)
    x_0, _ = denoised("epsilon", double.schedule.alpha_bar[i], x_t, output)
    expected = torch.autograd.grad(-brightness(double.model.decode(x_0), []).mean(), list(named.values()))
    caught = caught_gradient(algorithm.learner)
    assert algorithm.step(on).metrics["queries"] == 4
    for one, other in zip(caught.values(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


@only_sd
def test_refl_learns_brightness(model: TextToImage) -> None:
    sampler = fresh(model)
    algorithm = ReFL(sampler, Learner(model.trainable(), 3e-2, batch=MicroBatch(8)), brightness, last_steps=1)
    steps = [algorithm.step(task(model, 0, 8)).metrics for _ in range(6)]
    assert steps[-1]["reward_mean"] > steps[0]["reward_mean"] + steps[0]["reward_std"]


def test_regression_weights_by_hand() -> None:
    # spread 1, so the weights are e^r / Σ e^r · 2 with r = ∓1
    weights = regression_weights(torch.tensor([-1.0, 1.0]), temperature=1.0)
    assert weights.tolist() == pytest.approx([2 / (1 + 2.718281828**2), 2 / (1 + 2.718281828**-2)], rel=1e-5)
    assert regression_weights(torch.ones(3), 1.0).tolist() == pytest.approx([1.0] * 3)


@only_sd
def test_regression_does_not_depend_on_memory_settings(double: Sampler) -> None:
    start, losses = double.model.state(), []
    for sizes in ((4, 4), (3, 1)):
        double.model.set_state(start)
        rollouts, updates = map(MicroBatch, sizes)
        learner = Learner(double.model.trainable(), 1e-3, batch=updates)
        algorithm = RewardWeightedRegression(double, learner, brightness, 1.0, 2, rollouts)
        losses.append(algorithm.step(batch(double.model)).metrics["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@only_sd
def test_regression_is_denoising_training_weighted_by_reward(double: Sampler) -> None:
    """Rebuilt sample by sample: √ᾱ x_0 + √(1−ᾱ) ε, the conditional prediction, and each sample's weight."""
    on, named = batch(double.model), dict(double.model.trainable())
    learner = Learner(named.items(), 1e-3, max_grad_norm=1e9)
    algorithm = RewardWeightedRegression(double, learner, brightness, 0.5, draws=1)
    path = double.rollout(on, 4)
    weights = regression_weights(brightness(path.images, []), 0.5)
    i, loss = algorithm.drawn_step(on, 0), torch.zeros(())
    a = double.schedule.alpha_bar[i]
    for k in range(4):
        noise = rollout.randn(on.select([k]).generators("regression 0"), double.latent, double.model.device)
        x_t = a**0.5 * path.latents[-1, [k]] + (1 - a) ** 0.5 * noise
        output = double.model.predict(x_t, double.schedule.timesteps[i], on.text.select([k]), 1.0)
        loss = loss + weights[k] * (output - noise).square().mean() / 4
    expected = torch.autograd.grad(loss, list(named.values()))
    caught = caught_gradient(learner)
    assert algorithm.step(on).metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    for one, other in zip(caught.values(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
