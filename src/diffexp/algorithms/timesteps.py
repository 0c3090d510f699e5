"""How much each denoising step counts in a policy gradient. Ours, not the paper's.

The score of a step grows with how far the network's prediction moves the transition's mean, in its own deviations: w_t
= (√(ᾱ_prev (1−ᾱ_t)/ᾱ_t) − √(1−ᾱ_prev−σ_t²)) / σ_t for noise prediction (PCPO, arXiv:2509.25774, Proposition 1). On
Stable Diffusion's schedule that is by far largest where hardly any noise is left, so that without weights DDPO mostly
listens to one late step, which changes little in the image.
"""

from __future__ import annotations

from typing import Literal

from diffexp.diffusion import NoiseSchedule

Scheme = Literal["none", "masked", "sigma", "uniform"]

MASKED = 100
"""Where ``masked``, ``sigma`` and ``uniform`` leave steps out: at t up to this."""


def sensitivity(schedule: NoiseSchedule, i: int, eta: float) -> float:
    """w_t of step i: how many σ_t the transition's mean moves by where the network's output moves by 1.

    The derivative of DDIM's mean by ε̂, by v or by x̂_0, whichever is predicted.

    Raises:
        ZeroDivisionError: if the step is deterministic.
    """
    return abs(schedule.mean(i, 0.0, 1.0, eta)) / schedule.std(i, eta)


def step_weights(scheme: Scheme, schedule: NoiseSchedule, eta: float) -> tuple[float, ...]:
    """ω_t of every step: 0 for steps that the loss leaves out, 1 in the mean over the others.

    - ``none``: every step that has a density counts alike.
    - ``masked``: the same without t ≤ 100.
    - ``sigma``: without t ≤ 100, ω_t ∝ σ_t, for DDIM what TempFlow-GRPO (arXiv:2508.04324) weights flows by.
    - ``uniform``: without t ≤ 100, ω_t ∝ 1 / w_t, so that a prediction that moves by 1 counts alike at every step.
    """
    raw = []
    for i, t in enumerate(schedule.timesteps):
        std = schedule.std(i, eta)
        if std == 0 or (scheme != "none" and t <= MASKED):
            raw.append(0.0)
        else:
            raw.append(std if scheme == "sigma" else 1 / sensitivity(schedule, i, eta) if scheme == "uniform" else 1.0)
    learned = [weight for weight in raw if weight]
    mean = sum(learned) / len(learned) if learned else 1.0
    return tuple(weight / mean for weight in raw)
