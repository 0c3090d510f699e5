from __future__ import annotations

import inspect
import json
import math
import warnings
from importlib.resources import files
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import SCHEDULER, write_pipeline

from diffexp import models
from diffexp.diffusion import Transition, ddim
from diffexp.errors import UserError
from diffexp.models.schedulers import SCHEDULERS, ddim_scheduler, noise_schedule


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_is_diffusers(sd_folder: Path, eta: float, prediction_type: str) -> None:
    model = models.load(str(sd_folder))
    model.scheduler.register_to_config(prediction_type=prediction_type)
    reference = DDIMScheduler(**SCHEDULER, prediction_type=prediction_type)
    reference.set_timesteps(10)
    schedule = model.schedule(10)
    assert schedule.timesteps == tuple(reference.timesteps.tolist())
    random = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 2, 4, 8, 8, generator=random).unbind()
    for i, t in enumerate(reference.timesteps):
        step = ddim(schedule, [i, i], x, output, eta)
        # diffusers accepts no variance noise at eta = 0, where it would be multiplied by 0
        expected = reference.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(step.sample(noise), expected, rtol=1e-4, atol=5e-5)


def test_each_sample_has_its_own_step(sd_folder: Path) -> None:
    schedule, random = models.load(str(sd_folder)).schedule(10), torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 3, 4, 8, 8, generator=random).unbind()
    together, steps = ddim(schedule, [0, 9, 4], x, output, 1.0), (0, 9, 4)
    for row, i in enumerate(steps):
        alone = ddim(schedule, [i], x[row : row + 1], output[row : row + 1], 1.0)
        assert torch.equal(together.mean[row], alone.mean[0])
        assert torch.equal(together.sample(noise)[row], alone.sample(noise[row : row + 1])[0])
        assert torch.equal(together.log_prob(noise)[row], alone.log_prob(noise[row : row + 1])[0])


def test_log_prob_is_the_mean_gaussian_log_density() -> None:
    mean, x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(Transition(mean, (0.3,) * 3).log_prob(x), expected)


def test_a_deterministic_step_has_no_density() -> None:
    with pytest.raises(ValueError, match="eta > 0"):
        Transition(torch.zeros(1, 1, 1, 1), (0.0,)).log_prob(torch.zeros(1, 1, 1, 1))


def test_every_step_of_stable_diffusion_has_noise_at_eta_1(sd_folder: Path) -> None:
    schedule = models.load(str(sd_folder)).schedule(20)
    # the last step goes from t = 1 to ᾱ_0, not to 1: σ² = (1−ᾱ_0)/(1−ᾱ_1) · (1 − ᾱ_1/ᾱ_0), with β as trained
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a0, a1 = float(1 - betas[0]), float((1 - betas[0]) * (1 - betas[1]))
    assert schedule.std(19, 1.0) == pytest.approx(math.sqrt((1 - a0) / (1 - a1) * (1 - a1 / a0)), rel=1e-4)
    assert all(schedule.std(i, 1.0) > 0 for i in range(20))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 30])
def test_every_spacing_steps_to_where_the_next_step_begins(spacing: str, steps: int) -> None:
    schedule = noise_schedule(ddim_scheduler({**SCHEDULER, "timestep_spacing": spacing}), steps)
    reference = DDIMScheduler(**SCHEDULER, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    assert schedule.timesteps == tuple(reference.timesteps.tolist())
    alphas = reference.alphas_cumprod.double()
    assert schedule.alpha_bar_prev[:-1] == tuple(float(alphas[t]) for t in schedule.timesteps[1:])
    assert schedule.alpha_bar_prev[-1] == pytest.approx(float(alphas[0])), "the last step must not end at ᾱ = 1"


def test_zero_terminal_snr_with_v_prediction_is_diffusers() -> None:
    """At t = 999 there is no signal at all; "trailing" starts there."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    schedule = noise_schedule(ddim_scheduler({**SCHEDULER, **config}), 5)
    reference = DDIMScheduler(**SCHEDULER, **config)
    reference.set_timesteps(5)
    assert (schedule.timesteps[0], schedule.alpha_bar[0]) == (999, 0.0)
    random = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 2, 4, 8, 8, generator=random).unbind()
    for i, t in enumerate(reference.timesteps):
        step = ddim(schedule, [i, i], x, output, 1.0)
        expected = reference.step(output, t, x, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(step.sample(noise), expected, rtol=1e-4, atol=5e-5)
        assert step.log_prob(expected).isfinite().all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip_sample", True),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),  # with the prediction of noise, as SCHEDULER has it
        ("use_flow_sigmas", True),
        ("timestep_type", "continuous"),
        ("variance_type", "learned_range"),
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("timestep_spacing", "sideways"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_settings_that_change_the_transition_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=str(value) if key == "_class_name" else key):
        ddim_scheduler({**SCHEDULER, key: value})


SOLVERS = {
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 3,
    "final_sigmas_type": "sigma_min",
    "interpolation_type": "log_linear",
    "skip_prk_steps": True,
    "euler_at_final": True,
}


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
def test_every_scheduler_of_diffusers_is_taken_over_or_refused(name: str) -> None:
    """Betas, prediction type and spacing are the model's; how a solver picks its steps is no matter of the model."""
    kind = getattr(diffusers, name)
    betas = {"beta_start": 0.0007, "beta_end": 0.015, "beta_schedule": "scaled_linear"}
    config = {"_class_name": name, **betas, **SOLVERS, "clip_sample": False, "prediction_type": "v_prediction"}
    if name not in SCHEDULERS:
        with pytest.raises(UserError, match=f"scheduler is a {name}, which is not supported"):
            ddim_scheduler(config)
        return
    ours = ddim_scheduler(config)
    assert (ours.config.prediction_type, ours.config.clip_sample) == ("v_prediction", False)
    if kind.__module__.startswith("diffusers.schedulers"):  # else a placeholder: it needs a package that is not here
        takes = {*betas, "prediction_type"} & set(inspect.signature(kind.__init__).parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of them use numpy in a way that it will drop
            theirs = kind(**{key: value for key, value in config.items() if key in takes})
        assert theirs.alphas_cumprod.tolist() == pytest.approx(ours.alphas_cumprod.tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_the_originals_schedulers(kind: str) -> None:
    """What PNDM, DDIM and Euler say of the same betas; the sampler's 50 steps are 981, 961 … 1 for all of them."""
    file = files("diffexp.models") / "configs" / kind / "scheduler" / "scheduler_config.json"
    schedule = noise_schedule(ddim_scheduler(json.loads(file.read_text())), 50)
    assert schedule.timesteps == tuple(range(981, 0, -20))
    assert schedule.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert schedule.alpha_bar[0] == pytest.approx(float((1 - betas).cumprod(0)[981]), rel=1e-5)
    assert all(schedule.std(i, 1.0) > 0 for i in range(50))


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
    assert not model.scheduler.config.clip_sample
