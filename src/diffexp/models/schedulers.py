"""The noise schedule of a checkpoint, whichever scheduler it ships: DDIM takes its betas and what its network predicts.

Solvers differ in where they step and how, which is the sampler's own affair here; what belongs to the model is kept,
and what would make DDIM's transition another one than the model's is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from diffexp.diffusion import NoiseSchedule
from diffexp.errors import UserError, cut

SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Those that solve the discrete-time diffusion of Stable Diffusion. Others are of distilled, flow or pixel models."""

KNOWN: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "clip_sample": (False, None),
    "thresholding": (False, None),
    "use_flow_sigmas": (False, None),
    "timestep_type": ("discrete", None),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
}
"""The values of each setting under which DDIM's transition is the model's."""

MOST_TIMESTEPS = 10_000
KEPT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "steps_offset",
    "set_alpha_to_one",
    "timestep_spacing",
    "rescale_betas_zero_snr",
)


def ddim_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM with the betas, the prediction type and the spacing of whatever scheduler a checkpoint ships.

    Raises:
        UserError: for a scheduler of another kind of model, and for settings under which DDIM's transition would not be
            the model's, such as clipped or thresholded samples.
    """
    name = config.get("_class_name", "DDIMScheduler")
    if name not in SCHEDULERS:
        raise UserError(
            f"the model's scheduler is a {cut(str(name))}, which is not supported: {', '.join(SCHEDULERS)} are"
        )
    for key, values in KNOWN.items():
        if config.get(key, values[0]) not in values:
            allowed = " or ".join(repr(value) for value in values if value is not None)
            raise UserError(f"the model's scheduler has {key} = {config[key]!r}, not supported: only {allowed} is")
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise UserError(
            f"the model's scheduler has num_train_timesteps = {cut(repr(steps))}: 1…{MOST_TIMESTEPS} are read"
        )
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            "the model's scheduler has rescale_betas_zero_snr = true and prediction_type = 'epsilon': where there is "
            "no signal, the noise says nothing; set the first to false, or the second to what the model predicts"
        )
    kept = {key: config[key] for key in KEPT if config.get(key) is not None}
    # DDIMScheduler's own defaults would clip, and would end at ᾱ = 1, where the last step has no density
    return DDIMScheduler(**{"set_alpha_to_one": False, "steps_offset": 1, **kept}, clip_sample=False)


def noise_schedule(scheduler: DDIMScheduler, steps: int) -> NoiseSchedule:
    """The timesteps of a sampler of ``steps`` steps, and ᾱ at both ends of each: a step ends where the next begins.

    Raises:
        UserError: if the model has fewer timesteps than that.
    """
    config = cast(Any, scheduler.config)
    most = config.num_train_timesteps - config.steps_offset
    if not 1 <= steps <= most:
        raise UserError(f"sampler.steps = {steps}: this model takes 1…{most}")
    scheduler.set_timesteps(steps)
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    alpha_bar = tuple(float(scheduler.alphas_cumprod[t]) for t in timesteps)
    final = float(scheduler.final_alpha_cumprod)
    return NoiseSchedule(timesteps, alpha_bar, (*alpha_bar[1:], final), config.prediction_type)
