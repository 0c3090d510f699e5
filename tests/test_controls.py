"""Controls learn another policy than they sample: what each samples, what it learns, and that its ratios begin at 1."""

from __future__ import annotations

import pytest
import torch
from brightness import brightness
from test_ddpo import ddpo
from test_rollout import batch

from diffexp.algorithms import AlignProp
from diffexp.errors import UserError
from diffexp.exploration import Exploration, StepGuidance, WordWeighting
from diffexp.learner import Learner
from diffexp.models import TextToImage, lora
from diffexp.rollout import Sampler
from diffexp.study.controls import rollout_only, update_only

pytestmark = pytest.mark.parametrize("model", ["sd"], indirect=True)
SCHEDULED = (1.0, *[5.0] * 9)  # of ten steps, 901 alone is above 900


@pytest.fixture
def ten_steps(model: TextToImage) -> Sampler:
    lora.add(model, rank=2, alpha=4, seed=1)
    return Sampler(model, model.schedule(10), model.latent_shape())


def test_rollout_only(ten_steps: Sampler) -> None:
    plain = batch(ten_steps.model)
    diffexp = plain.explored(Exploration(StepGuidance(1.0, 5.0, 900), WordWeighting(1.0, 1.2)))
    path, expected = (ten_steps.rollout(on, 3) for on in (rollout_only(plain), diffexp))
    assert torch.equal(path.latents, expected.latents), "it samples as DiffExp does"
    assert torch.equal(path.text.hidden, plain.text.hidden), "and learns from the plain text"
    assert (path.scales, expected.scales) == ((5.0,) * 10, SCHEDULED)
    assert not torch.equal(path.log_probs[0], expected.log_probs[0]), "another policy, other probabilities"


def test_update_only(ten_steps: Sampler) -> None:
    plain = batch(ten_steps.model)
    path, expected = (ten_steps.rollout(on, 3) for on in (update_only(plain), plain))
    assert torch.equal(path.latents, expected.latents)
    assert path.scales == SCHEDULED
    assert not torch.equal(path.log_probs[0], expected.log_probs[0])
    torch.testing.assert_close(path.log_probs[1:], expected.log_probs[1:])


@pytest.mark.parametrize("control", [rollout_only, update_only])
def test_controls_begin_on_policy(ten_steps: Sampler, control: object) -> None:
    found = ddpo(ten_steps).step(control(batch(ten_steps.model))).metrics
    assert found["ratio_deviation"] == pytest.approx(0, abs=1e-6)
    assert found["clip_fraction"] == 0
    assert found["grad_norm"] > 0


def test_gradients_through_sampling_have_no_such_control(ten_steps: Sampler) -> None:
    algorithm = AlignProp(ten_steps, Learner(ten_steps.model.trainable(), 1e-3), brightness, "fixed", 1)
    with pytest.raises(UserError, match="learns another policy than it samples: that takes algorithm ddpo"):
        algorithm.step(update_only(batch(ten_steps.model)))
