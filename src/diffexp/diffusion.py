"""The denoising transition p(x_{t-1} | x_t, c) of DDIM, with its log-probability. Tensors only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor

from diffexp.devices import numbers

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Number = TypeVar("Number", float, Tensor)


class Transition(NamedTuple):
    """p(x_{t-1} | x_t, c) = N(mean, std² I), Eq. 3. ``std`` is each sample's, 0 where its step is deterministic."""

    mean: Float[Tensor, "B C H W"]
    std: tuple[float, ...]

    def sample(self, noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """x_{t-1}, from standard normal ``noise``."""
        return self.mean + rowwise(self.std, noise) * noise

    def log_prob(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        """log p(x | x_t, c) averaged over C·H·W, float32.

        The average, not the sum, as in the original DDPO code: the clip range of 1e-4 is meant for it.

        Raises:
            ValueError: if a step is deterministic (``std`` = 0) and has no density.
        """
        if 0 in self.std:
            raise ValueError("a deterministic step has no log-probability: use eta > 0")
        std = rowwise(self.std, self.mean).float()
        z = (x.float() - self.mean.float()) / std
        return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    def kl(self, other: Transition) -> Float[Tensor, " B"]:
        """KL(this ‖ other) of two transitions with the same deviations, averaged over C·H·W like ``log_prob``.

        Raises:
            ValueError: if a step is deterministic.
        """
        if 0 in self.std:
            raise ValueError("a deterministic step has no KL divergence: use eta > 0")
        std = rowwise(self.std, self.mean).float()
        return ((self.mean.float() - other.mean.float()) ** 2 / (2 * std**2)).flatten(1).mean(1)


class NoiseSchedule(NamedTuple):
    """The steps of a sampler: step i goes from timestep t[i], with signal ᾱ_t = alpha_bar[i], to alpha_bar_prev[i]."""

    timesteps: tuple[int, ...]
    alpha_bar: tuple[float, ...]
    alpha_bar_prev: tuple[float, ...]
    prediction_type: PredictionType = "epsilon"

    def std(self, i: int, eta: float) -> float:
        """σ_t of step i: η √((1−ᾱ_prev)/(1−ᾱ_t)) √(1 − ᾱ_t/ᾱ_prev). Song et al. 2021 (DDIM), Eq. 16."""
        a, a_prev = self.alpha_bar[i], self.alpha_bar_prev[i]
        return eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(max(1 - a / a_prev, 0.0))

    def mean(self, i: int, x_t: Number, output: Number, eta: float) -> Number:
        """√ᾱ_prev x̂_0 + √(1 − ᾱ_prev − σ_t²) ε̂ of step i, where the network says ``output`` of ``x_t``."""
        a_prev, std = self.alpha_bar_prev[i], self.std(i, eta)
        x_0, noise = denoised(self.prediction_type, self.alpha_bar[i], x_t, output)
        return math.sqrt(a_prev) * x_0 + math.sqrt(max(1 - a_prev - std**2, 0.0)) * noise

    def noised(
        self, x_0: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"], i: int
    ) -> Float[Tensor, "B C H W"]:
        """x_t of step i from a clean latent: the forward process √ᾱ_t x_0 + √(1−ᾱ_t) ε."""
        a = self.alpha_bar[i]
        return math.sqrt(a) * x_0 + math.sqrt(1 - a) * noise

    def target(
        self, x_0: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"], i: int
    ) -> Float[Tensor, "B C H W"]:
        """What the network should say of ``noised(x_0, noise, i)``: ε, v = √ᾱ_t ε − √(1−ᾱ_t) x_0, or x_0."""
        a = self.alpha_bar[i]
        if self.prediction_type == "epsilon":
            return noise
        return math.sqrt(a) * noise - math.sqrt(1 - a) * x_0 if self.prediction_type == "v_prediction" else x_0


def ddim(
    schedule: NoiseSchedule,
    steps: Sequence[int],
    x_t: Float[Tensor, "B C H W"],
    output: Float[Tensor, "B C H W"],
    eta: float,
) -> Transition:
    """The transition of each sample's own step of ``steps`` (B), given the network's ``output`` at ``x_t``.

    x_{t-1} = √ᾱ_prev x̂_0 + √(1 − ᾱ_prev − σ_t²) ε̂ + σ_t z (Song et al. 2021, Eq. 12); η = 1 is the stochastic sampler
    that DDPO needs, η = 0 the deterministic one. The mean is linear in x_t and the output, so that its two coefficients
    are what it makes of (1, 0) and of (0, 1).
    """
    of_x = rowwise([schedule.mean(i, 1.0, 0.0, eta) for i in steps], x_t)
    of_output = rowwise([schedule.mean(i, 0.0, 1.0, eta) for i in steps], x_t)
    return Transition(of_x * x_t + of_output * output, tuple(schedule.std(i, eta) for i in steps))


def rowwise(values: Sequence[float], x: Tensor) -> Float[Tensor, "B 1 1 1"]:
    """One number a sample, to multiply samples like ``x`` with."""
    return numbers(values, x.dtype, x.device).view(-1, 1, 1, 1)


def denoised(prediction_type: PredictionType, a: float, x_t: Number, output: Number) -> tuple[Number, Number]:
    """(x̂_0, ε̂) out of what the network predicts, with a = ᾱ_t. v-prediction: Salimans and Ho 2022, appendix D."""
    s, n = math.sqrt(a), math.sqrt(1 - a)
    if prediction_type == "epsilon":
        return (x_t - n * output) / s, output
    if prediction_type == "v_prediction":
        return s * x_t - n * output, s * output + n * x_t
    return output, (x_t - s * output) / n
