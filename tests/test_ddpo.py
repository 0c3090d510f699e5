from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from brightness import brightness
from conftest import caught_gradient
from test_rollout import explored

from diffexp import assembly, models
from diffexp.algorithms import DDPO
from diffexp.algorithms.advantages import PromptAdvantages, batch_advantages
from diffexp.algorithms.ddpo import clipped_policy_loss, minibatches
from diffexp.algorithms.timesteps import sensitivity, step_weights
from diffexp.config import Recipe
from diffexp.diffusion import NoiseSchedule, ddim
from diffexp.errors import UserError
from diffexp.exploration import ConstantGuidance
from diffexp.learner import Learner
from diffexp.memory import MicroBatch
from diffexp.models import TextToImage, lora
from diffexp.processes.parallel import Ranks
from diffexp.rollout import Batch, Sampler


def ddpo(sampler: Sampler, rollouts: int = 4, updates: int = 4, **settings: object) -> DDPO:
    learner = Learner(sampler.model.trainable(), learning_rate=1e-3, max_grad_norm=1e9, batch=MicroBatch(updates))
    return DDPO(sampler, learner, brightness, **{"minibatches": 1, **settings}, rollout_batch=MicroBatch(rollouts))


def parameters(model: TextToImage) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for _, parameter in model.trainable()])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.2),  # gains beyond 1 + ξ count for nothing
        (0.5, 2.0, -1.0),  # losses count in full
        (1.5, -2.0, 3.0),
        (0.5, -2.0, 1.8),
    ],
)
def test_clipped_loss_by_hand(ratio: float, advantage: float, expected: float) -> None:
    new, old = torch.tensor([math.log(ratio) - 1.0]), torch.tensor([-1.0])
    loss = clipped_policy_loss(new, old, torch.tensor([advantage]), clip=0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_batch_advantages_by_hand() -> None:
    assert batch_advantages(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0], rel=1e-4)


def test_prompt_advantages_by_hand() -> None:
    advantages = PromptAdvantages(buffer=3, min_count=2)
    # one reward each: the batch's mean 2 and deviation 1 stand in
    assert advantages(["cat", "dog"], torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0], rel=1e-4)
    # cat: 1, 5 → mean 3, deviation 2; dog: 3, 3 → no spread
    second = advantages(["cat", "dog"], torch.tensor([5.0, 3.0]))
    assert second.tolist() == pytest.approx([1.0, 0.0], abs=1e-4)
    # the buffer holds 3: cat is 5, 9, 9 → mean 23/3, deviation √(32/9)
    third = advantages(["cat", "cat"], torch.tensor([9.0, 9.0]))
    assert third.tolist() == pytest.approx([(9 - 23 / 3) / math.sqrt(32 / 9)] * 2, rel=1e-4)


def test_prompts_remember_at_least_as_many_rewards_as_they_need(sampler: Sampler) -> None:
    recipe = Recipe.parse({"algorithm": {"name": "ddpo", "min_count": 40}, "prompts": "text:x"}, "test")
    advantages = assembly.algorithm(recipe, sampler, ddpo(sampler).learner, brightness).advantages
    assert advantages.buffer == 40
    with pytest.raises(ValueError, match="min_count = 40 is above buffer = 32"):
        PromptAdvantages(min_count=40)


def test_advantages_are_bounded(sampler: Sampler) -> None:
    bounded = ddpo(sampler, advantage_clip=1.5)
    rewards = torch.tensor([0.0] * 15 + [16.0])  # mean 1, variance 15: advantages of -0.2582 and 3.873
    advantages = bounded.advantage(["x"] * 16, rewards)
    torch.testing.assert_close(advantages, torch.tensor([-0.2582] * 15 + [1.5]), rtol=0, atol=1e-4)


def test_nothing_to_learn_from_is_refused(sampler: Sampler) -> None:
    with pytest.raises(UserError, match=r"no step to learn from: .*eta = 0"):
        ddpo(replace(sampler, eta=0.0))
    one = replace(sampler, schedule=sampler.model.schedule(1))
    with pytest.raises(UserError, match=r"no step to learn from: sampler\.steps = 1"):
        ddpo(one, timestep_weights="masked")


def test_prompt_statistics_survive_a_checkpoint() -> None:
    before, after = PromptAdvantages(4, 2), PromptAdvantages(4, 2)
    before(["cat", "cat", "dog"], torch.tensor([1.0, 2.0, 0.1]))
    after.load_state(before.state())
    rewards = torch.tensor([0.3, 0.7])
    assert torch.equal(before(["cat", "dog"], rewards), after(["cat", "dog"], rewards))


@pytest.mark.parametrize("low", [0.0, 0.5, 1.0, 5.0])
def test_first_update_is_on_policy(sampler: Sampler, low: float) -> None:
    metrics = ddpo(sampler).step(explored(sampler.model, low)).metrics
    assert metrics["ratio_deviation"] == 0.0
    assert metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("updates", [2, 4, 12], ids="{} in a pass".format)
def test_policy_gradient_is_the_advantage_weighted_score(double: Sampler, updates: int) -> None:
    """At ratio 1 the gradient is −mean A ∇ log p: rebuilt here by hand, sample by sample and step by step."""
    batch = explored(double.model, 1.0)
    path = double.rollout(batch, 4)
    advantages = batch_advantages(brightness(path.images, batch.prompts))
    objective = torch.zeros(())
    for i, w in enumerate(path.scales):
        for k in range(4):
            text = path.text.select([k])
            density = double.transition(path.latents[i, k : k + 1], i, text, w).log_prob(path.latents[i + 1, k : k + 1])
            objective = objective - advantages[k] * density.sum() / (4 * double.steps)
    named = dict(double.model.trainable())
    expected = dict(zip(named, torch.autograd.grad(objective, list(named.values())), strict=True))
    algorithm = ddpo(double, updates=updates)
    caught = caught_gradient(algorithm.learner)
    algorithm.step(batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(caught[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("model", ["sd"], indirect=True)
@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (3, 2)])
def test_memory_settings_change_no_update(double: Sampler, sizes: tuple[int, int]) -> None:
    start, results = double.model.state(), []
    for rollouts, updates in ((4, 4), sizes):
        double.model.set_state(start)
        ddpo(double, rollouts, updates).step(explored(double.model, 1.0))
        results.append(parameters(double.model))
    # AdamW's first step is lr · sign(gradient), 1e-3: compare at a thousandth of it
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("samples", "number"), [(4, 3), (64, 2), (64, 1), (10, 4), (3, 8)])
def test_minibatches_use_every_sample_once(samples: int, number: int) -> None:
    parts = minibatches(samples, number, torch.Generator().manual_seed(0))
    assert sorted(sample for part in parts for sample in part) == list(range(samples))
    assert len(parts) == min(samples, number)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("samples", "number", "processes"), [(64, 2, 8), (64, 4, 2), (48, 4, 4), (24, 3, 8)])
def test_no_process_waits_for_another_in_a_minibatch(samples: int, number: int, processes: int) -> None:
    for part in minibatches(samples, number, torch.Generator().manual_seed(1)):
        shares = [len(set(part) & set(Ranks(rank, processes).share(samples))) for rank in range(processes)]
        assert shares == [samples // number // processes] * processes


def test_minibatches_are_random() -> None:
    """In two parts of 8 samples, 0 has any other beside it in about half of the draws, but never 4."""
    draws = [minibatches(8, 2, torch.Generator().manual_seed(seed)) for seed in range(100)]
    together = [sum(sample in next(part for part in draw if 0 in part) for draw in draws) for sample in range(8)]
    assert together[0] == 100
    assert together[4] == 0
    assert all(30 <= together[sample] <= 70 for sample in (1, 2, 3, 5, 6, 7)), together


def test_several_steps_fill_up_a_pass(sampler: Sampler) -> None:
    """At most ``update.batch`` transitions go through the network together, of one prediction each or of two."""
    twelve, scales = ddpo(sampler, updates=12), (1.0, 5.0, 3.0, 2.0)
    assert [list(twelve.passes(scales, rows)) for rows in (12, 7, 6, 1)] == [
        [[0], [1], [2], [3]],
        [[0], [1], [2], [3]],
        [[0], [1, 2], [3]],
        [[0], [1, 2, 3]],
    ]
    assert list(ddpo(sampler, updates=12, timestep_weights="masked").passes(scales, 6)) == [[0], [1, 2]]
    assert list(twelve.passes((0.0, 1.0, 0.0, 1.0), 6)) == [[0, 2], [1, 3]]
    whole_calls = ddpo(replace(sampler, rows=lambda: 8), updates=12)
    assert list(whole_calls.passes(scales, 4)) == [[0], [1, 2], [3]], "three steps would be a call and a half"


def test_late_timesteps_are_left_out(sampler: Sampler) -> None:
    assert sampler.schedule.timesteps == (751, 501, 251, 1)
    assert ddpo(sampler).learned_steps() == [0, 1, 2, 3]
    assert ddpo(sampler, timestep_weights="masked").learned_steps() == [0, 1, 2]


def test_weights_scale_each_steps_gradient(sampler: Sampler) -> None:
    """On-policy, the weighted loss is the mean over learned steps of omega_t times the plain loss of step t."""
    batch = explored(sampler.model, 1.0)
    plain, weighted = ddpo(sampler), ddpo(sampler, timestep_weights="sigma")
    trajectory, advantages = sampler.rollout(batch, 4), torch.tensor([1.0, -2.0, 0.5, 3.0])
    rows = [0, 1, 2, 3]
    sigmas = [sampler.schedule.std(i, 1.0) for i in range(3)]
    for i, sigma in enumerate(sigmas):
        torch.testing.assert_close(
            weighted.figures(trajectory, [i], rows, advantages)["loss"],
            plain.figures(trajectory, [i], rows, advantages)["loss"] * sigma / (sum(sigmas) / 3),
        )
    assert len(list(weighted.losses(trajectory, advantages, rows, 4))) == 3


# t, sigma_t and w_t of 20 steps with eta = 1, from the variances of diffusers' DDIMScheduler
STEPS = {951: (0.6444, 0.853), 501: (0.4293, 0.6261), 101: (0.1673, 1.1413), 51: (0.0406, 5.4309), 1: (0.0206, 1.0032)}


def test_step_weights_by_independent_numbers() -> None:
    schedule = models.load("emoji").schedule(20)
    place = {t: schedule.timesteps.index(t) for t in STEPS}
    for t, (sigma, w) in STEPS.items():
        assert schedule.std(place[t], 1.0) == pytest.approx(sigma, abs=1e-4)
        assert sensitivity(schedule, place[t], 1.0) == pytest.approx(w, abs=2e-4)
    found = {scheme: step_weights(scheme, schedule, 1.0) for scheme in ("none", "masked", "sigma", "uniform")}
    assert found["none"] == (1.0,) * 20
    assert found["masked"] == (1.0,) * 18 + (0.0, 0.0)
    for scheme in ("sigma", "uniform"):
        assert found[scheme][18:] == (0.0, 0.0)
        assert sum(found[scheme]) == pytest.approx(18)
    assert found["sigma"][0] / found["sigma"][place[101]] == pytest.approx(0.6444 / 0.1673, rel=1e-3)
    assert found["uniform"][0] / found["uniform"][place[101]] == pytest.approx(1.1413 / 0.853, rel=1e-3)
    # the page of this measure: one step holds 73 % of the squared scores at 20 steps
    squares = [sensitivity(schedule, i, 1.0) ** 2 for i in range(20)]
    assert squares[place[51]] / sum(squares) == pytest.approx(0.73, abs=0.005)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_sensitivity_is_the_derivative_of_the_mean(kind: str) -> None:
    schedule = models.load("emoji").schedule(20)._replace(prediction_type=kind)
    x, output = torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    for i in (0, 9, 18):
        moved = ddim(schedule, [i], x, output + 1, 1.0).mean - ddim(schedule, [i], x, output, 1.0).mean
        assert sensitivity(schedule, i, 1.0) == pytest.approx(abs(moved.item()) / schedule.std(i, 1.0))


@pytest.mark.parametrize("scheme", ["none", "masked", "sigma", "uniform"])
def test_weights_of_a_schedule_that_begins_without_signal(scheme: str) -> None:
    """ᾱ = 0 at the first step: zero terminal SNR, with v-prediction."""
    schedule = NoiseSchedule((999, 500, 1), (0.0, 0.3, 0.99), (0.3, 0.99, 0.999), "v_prediction")
    weights = step_weights(scheme, schedule, 1.0)
    assert all(math.isfinite(weight) for weight in weights)
    assert weights[0] > 0


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_ddpo_learns_brightness(model: TextToImage) -> None:
    """The policy gradient must find, in seconds, that brighter is better."""
    lora.add(model, rank=4, targets=("to_v", "conv_out"), seed=0)
    sampler = Sampler(model, model.schedule(4), model.latent_shape())
    learner = Learner(model.trainable(), 0.1)
    algorithm = DDPO(sampler, learner, brightness, clip=1e-2, minibatches=1, timestep_weights="masked")
    text, steps = model.encode(["cat"] * 32), []
    for iteration in range(6):
        on = Batch(["cat"] * 32, text, ConstantGuidance(1.0), [(0, iteration, k) for k in range(32)])
        steps.append(algorithm.step(on).metrics)
    assert steps[-1]["reward_mean"] > steps[0]["reward_mean"] + 3 * steps[0]["reward_std"]
