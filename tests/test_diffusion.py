from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import SCHEDULER, write_pipeline

from diffexp import models
from diffexp.diffusion import Transition, ddim
from diffexp.errors import UserError
from diffexp.models.schedulers import ddim_scheduler


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_is_diffusers(sd_folder: Path, eta: float, prediction_type: str) -> None:
    model = models.load(str(sd_folder))
    model.noise_schedule.register_to_config(prediction_type=prediction_type)
    reference = DDIMScheduler(**SCHEDULER, prediction_type=prediction_type)
    reference.set_timesteps(10)
    schedule = model.schedule(10)
    assert schedule.timesteps == tuple(reference.timesteps.tolist())
    random = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 2, 4, 8, 8, generator=random).unbind()
    for i, t in enumerate(reference.timesteps):
        step = ddim(schedule, i, x, output, eta)
        # diffusers accepts no variance noise at eta = 0, where it would be multiplied by 0
        expected = reference.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(step.sample(noise), expected, rtol=1e-4, atol=5e-5)


def test_log_prob_is_the_mean_gaussian_log_density() -> None:
    mean, x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(Transition(mean, 0.3).log_prob(x), expected)


def test_a_deterministic_step_has_no_density() -> None:
    with pytest.raises(ValueError, match="eta > 0"):
        Transition(torch.zeros(1, 1, 1, 1), 0.0).log_prob(torch.zeros(1, 1, 1, 1))


def test_every_step_of_stable_diffusion_has_noise_at_eta_1(sd_folder: Path) -> None:
    schedule = models.load(str(sd_folder)).schedule(20)
    # the last step goes from t = 1 to ᾱ_0, not to 1: σ² = (1−ᾱ_0)/(1−ᾱ_1) · (1 − ᾱ_1/ᾱ_0), with β as trained
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a0, a1 = float(1 - betas[0]), float((1 - betas[0]) * (1 - betas[1]))
    assert schedule.std(19, 1.0) == pytest.approx(math.sqrt((1 - a0) / (1 - a1) * (1 - a1 / a0)), rel=1e-4)
    assert all(schedule.std(i, 1.0) > 0 for i in range(20))


@pytest.mark.parametrize("key", ["clip_sample", "thresholding", "rescale_betas_zero_snr"])
def test_schedulers_that_change_the_transition_are_refused_by_name(key: str) -> None:
    with pytest.raises(UserError, match=key):
        ddim_scheduler({**SCHEDULER, key: True})


def test_another_schedulers_config_keeps_its_betas_and_prediction_type(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "v", prediction_type="v_prediction", beta_end=0.02)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "PNDMScheduler", "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear",'
        ' "prediction_type": "v_prediction", "skip_prk_steps": true, "steps_offset": 1, "num_train_timesteps": 1000}'
    )
    model = models.load(str(folder))
    schedule = model.schedule(500)
    assert schedule.prediction_type == "v_prediction"
    assert schedule.alpha_bar_prev[-1] == pytest.approx(0.999), "the last step must not end at ᾱ = 1"
    assert not model.noise_schedule.config.clip_sample
