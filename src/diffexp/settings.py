"""The sections of a recipe, as types: every setting, its range, its default, the paper's where the paper has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from diffexp import own

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Side = Annotated[int, Field(ge=1, le=8192)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]


class Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def lists_are_tuples(cls, data: Any) -> Any:
        """TOML and JSON have lists only, which the exact types would refuse."""
        if not isinstance(data, Mapping):
            return data
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


class ModelSettings(Settings):
    path: str = "emoji"
    """"emoji", "emoji-xl", a diffusers folder, or a hub id of a Stable Diffusion 1.x, 2.x or XL."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Such as "fp16": which weight files of the repository."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the frozen weights; the LoRA, latents and log-probabilities are always float32."""
    train: Literal["lora", "unet"] = "lora"
    """What learns: an adapter, or the whole denoising network, whose weights are then float32 (docs/models.md)."""


RANK = 4
"""Of a LoRA: that of both baselines' code."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of the denoising network that get an adapter, as in both baselines' code."""


class LoraSettings(Settings):
    rank: Annotated[int, Field(ge=1, le=2048)] | None = None
    """Default: 4, the rank of both baselines' code."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale: the adapter acts with alpha / rank. Default: the rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the network's layers that get an adapter. Default: attention, as in both baselines' code."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How the adapter's first matrix begins: as in diffusers' scripts, or as in kohya's."""
    text_encoders: bool = False
    """Whether all text encoders get an adapter, too: in their attention."""
    start: str | None = None
    """A LoRA to go on from: a file of diffusers or kohya. Its rank, alpha and targets are taken over."""

    @model_validator(mode="before")
    @classmethod
    def defaults_without_a_start(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("start") is not None:
            return data
        defaults = {"rank": RANK, "targets": ATTENTION}
        return {**defaults, **{key: value for key, value in data.items() if value is not None}}


class SamplerSettings(Settings):
    steps: Positive = 50
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0)] = 5.0
    """Classifier-free guidance scale of evaluation, of sampling without exploration, and w_h of Eq. 7."""
    eta: Fraction = 1.0
    """1: stochastic DDIM, as DDPO needs; 0: deterministic."""
    size: tuple[Side, Side] | None = None
    """Height and width in pixels; default: the model's own."""


class GuidanceExploration(Settings):
    low: Annotated[float, Field(ge=0)] = 1.0
    """w_l of Eq. 7."""
    threshold: Annotated[float, Field(ge=0, le=1000)] | None = 900
    """t_thres of Eq. 7: the scale is low while t > threshold."""
    fraction: Fraction | None = None
    """Instead of the threshold: the scale is low in this fraction of the steps, the first ones."""

    @model_validator(mode="before")
    @classmethod
    def fraction_replaces_threshold(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("fraction") is not None:
            if data.get("threshold") is not None:
                raise ValueError("threshold and fraction are both set: leave one out")
            return {**data, "threshold": None}
        return data


class WordExploration(Settings):
    low: Annotated[float, Field(ge=0)] = 1.0
    """w_prompt of Eq. 8 is drawn from U(low, high)."""
    high: Annotated[float, Field(ge=0)] = 1.2
    """The other end of that range."""
    unit: Literal["word", "token"] = "word"
    """Weight all tokens of a word, or single tokens."""

    @model_validator(mode="after")
    def ordered(self) -> WordExploration:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}: exchange them")
        return self


class ExplorationSettings(Settings):
    until: Fraction = 0.75
    """The fraction of all iterations that explores."""
    guidance: GuidanceExploration | None = None
    """Dynamic scheduling of the guidance scale (Eq. 7); absent: off."""
    words: WordExploration | None = None
    """Random prompt weighting (Eq. 8); absent: off."""
    strategy: str | None = None
    """Your own, after the two: a function from batch to batch, as "module:function" or "file.py:function"."""

    @field_validator("strategy")
    @classmethod
    def known_strategy(cls, value: str | None) -> str | None:
        if value is not None:
            own.check("exploration strategy", value)
        return value


class DDPOSettings(Settings):
    name: Literal["ddpo"] = "ddpo"
    """Policy gradient: takes any reward."""
    clip: Annotated[float, Field(gt=0)] = 1e-4
    """Clip range of the importance ratio."""
    inner_epochs: Positive = 1
    """Passes over each iteration's samples."""
    minibatches: Positive = 2
    """Optimiser steps in each pass."""
    advantages: Literal["prompt", "batch"] = "prompt"
    """Normalise rewards by the prompt's own past rewards, or within the iteration."""
    min_count: Positive = 16
    """Rewards a prompt needs before its own statistics count."""
    timestep_weights: Literal["none", "masked", "sigma", "uniform"] = "none"
    """Not in the paper: leave t ≤ 100 out of the loss, and weight the other steps alike, by σ_t, or by 1/w_t."""
    kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence to the untouched model (DPOK); costs one more forward pass."""

    @model_validator(mode="before")
    @classmethod
    def without_min_timestep(cls, data: Any) -> Any:
        """Recipes of before ``timestep_weights`` have a setting less: 0 left no step out."""
        if isinstance(data, Mapping) and data.get("min_timestep") == 0:
            return {key: value for key, value in data.items() if key != "min_timestep"}
        return data


class AlignPropSettings(Settings):
    name: Literal["alignprop"] = "alignprop"
    """The reward's gradient, through the last K steps: needs a reward that has one."""
    truncation: Literal["random", "fixed", "each-step"] = "random"
    """K drawn once an iteration, K fixed (DRaFT), or the original code's draw at every step."""
    last_steps: Positive | None = None
    """K of the fixed truncation, and the largest K of the random one; default: all steps."""
    copies: Positive = 1
    """DRaFT-LV: repeat the last step from this many noised copies (needs last_steps = 1)."""

    @model_validator(mode="after")
    def low_variance(self) -> AlignPropSettings:
        if self.copies > 1 and not (self.truncation == "fixed" and self.last_steps == 1):
            raise ValueError("copies > 1 (DRaFT-LV) needs truncation = 'fixed' and last_steps = 1")
        return self


class ReFLSettings(Settings):
    name: Literal["refl"] = "refl"
    """The reward's gradient, through one late step."""
    last_steps: Positive = 10
    """The one step that learns is drawn from the last so many (ReFL: 10 of 40)."""


class RWRSettings(Settings):
    name: Literal["rwr"] = "rwr"
    """Denoising of the model's own samples, weighted by reward: takes any reward."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Weights are exp(reward / temperature), in units of the rewards' own spread."""


class OwnAlgorithmSettings(Settings, extra="allow"):
    name: Annotated[str, Field(pattern=":")]
    """Your own: a class, as "module:Class" or "file.py:Class". Every other key goes to its constructor."""


def algorithm_kind(settings: Any) -> str:
    """Which of the algorithms' settings these are, given as a table or read already."""
    name = str(settings.get("name") if isinstance(settings, Mapping) else getattr(settings, "name", None))
    return "own" if ":" in name else name


AlgorithmSettings = Annotated[
    Annotated[DDPOSettings, Tag("ddpo")]
    | Annotated[AlignPropSettings, Tag("alignprop")]
    | Annotated[ReFLSettings, Tag("refl")]
    | Annotated[RWRSettings, Tag("rwr")]
    | Annotated[OwnAlgorithmSettings, Tag("own")],
    Discriminator(
        algorithm_kind,
        custom_error_type="algorithm",
        custom_error_message="give a table with a name: 'ddpo', 'alignprop', 'refl', 'rwr', or 'file.py:Class'",
    ),
]


class OptimizerSettings(Settings):
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Of AdamW; 3e-4 for ddpo and rwr, 1e-3 for alignprop and refl."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    """How slowly AdamW forgets a gradient, and its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """A longer gradient is scaled down to this norm; 1 for ddpo and rwr, 5 for alignprop and refl."""


class RolloutSettings(Settings):
    batch: Positive = 8
    """Images sampled at once: memory only."""
    images_per_prompt: Positive = 1
    """Images of one iteration that share a prompt."""


class UpdateSettings(Settings):
    batch: Positive = 4
    """Images in one backward pass, of ddpo also an image's timesteps: memory and speed only."""
    checkpoint: tuple[Literal["unet", "attention", "decoder"], ...] = ()
    """What the backward pass computes again: the network, only its attention (most of the memory for less of the time),
    the VAE's decoder."""


class EvaluationSettings(Settings):
    every: Positive = 10
    """Iterations from one evaluation to the next; the first is before training, the last after it."""
    prompts: tuple[str, ...] | None = None
    """Prompt sets; default: the training prompts."""
    rewards: tuple[str, ...] | None = None
    """Rewards; default: the training reward."""
    images: Positive = 10
    """Images of each prompt, from the same noise every time."""
    held_out: str | None = None
    """A reward that training never sees: the LoRA that earned most of it is kept in best/."""
    patience: Positive | None = None
    """Stop after so many evaluations in a row without more of the held-out reward; default: never."""


class PreviewSettings(Settings):
    every: Positive = 10
    """Iterations from one preview to the next; the first is before training, the last after it."""
    images: Annotated[int, Field(ge=0)] = 8
    """Images painted from fixed noise, of prompts spread over the training set; as many of unseen ones it evaluates."""


class CheckpointSettings(Settings):
    every: Positive = 10
    """Iterations from one checkpoint to the next; a run that is stopped leaves one as well."""
    keep_last: Positive = 2
    """Checkpoints that stay."""
