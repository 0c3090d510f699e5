"""What a run is: one tree of typed settings, read from a TOML file. The defaults are the paper's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from diffexp import own, rewards
from diffexp import prompts as prompt_sets
from diffexp.errors import UserError
from diffexp.mistakes import mistakes
from diffexp.toml import assign, check_depth, read_toml, toml_lines

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Side = Annotated[int, Field(ge=1, le=8192)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

# The appendix of the paper, where its two algorithms differ: learning rate and guidance scale. AlignProp's gradient
# norm is bounded by 5 in its own code.
ALGORITHM_DEFAULTS: dict[str, dict[str, dict[str, float]]] = {
    "ddpo": {"optimizer": {"learning_rate": 3e-4, "max_grad_norm": 1.0}, "sampler": {"guidance": 5.0}},
    "alignprop": {"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 5.0}, "sampler": {"guidance": 7.5}},
    "refl": {"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 5.0}, "sampler": {"guidance": 7.5}},
    "rwr": {"optimizer": {"learning_rate": 3e-4, "max_grad_norm": 1.0}, "sampler": {"guidance": 5.0}},
}


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
        defaults = {"rank": 4, "targets": ("to_q", "to_k", "to_v", "to_out.0")}
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
    """Images in one backward pass: memory only."""
    checkpoint: tuple[Literal["unet", "decoder"], ...] = ()
    """What the backward pass computes again, the network's blocks or the VAE's decoder: less memory, more time."""


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


class Recipe(Settings):
    """A whole run. Its sections are the classes above."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """All noise, and the choice of prompts and words, hangs on it."""
    iterations: Positive = 100
    """Each samples, scores and learns once."""
    samples: Positive = 64
    """Images an iteration."""
    prompts: str = "animals"
    """A prompt set, a .txt or .jsonl file, a table's column as "file.csv#column" or "hub:org/name#column" (needs
    diffexp[datasets]), or "text:one prompt"."""
    reward: str = "emoji-alignment"
    """A name, "module:function", "file.py:function", "http://host:port", or a sum such as "2*hpsv2+aesthetic"."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "mps"; "auto" takes an accelerator where there is one."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl; tensorboard only where it is installed."""
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    sampler: SamplerSettings = SamplerSettings()
    exploration: ExplorationSettings = ExplorationSettings()
    algorithm: AlgorithmSettings = DDPOSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    rollout: RolloutSettings = RolloutSettings()
    update: UpdateSettings = UpdateSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    preview: PreviewSettings = PreviewSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="before")
    @classmethod
    def algorithm_defaults(cls, data: Any) -> Any:
        """Fills in what depends on the algorithm, and its name where only its settings are given."""
        if not isinstance(data, dict):
            return data
        algorithm = data.get("algorithm", {})
        if not isinstance(algorithm, Mapping):
            return data
        algorithm = {"name": "ddpo", **algorithm}
        filled = {**data, "algorithm": algorithm}
        for section, values in ALGORITHM_DEFAULTS.get(str(algorithm["name"]), {}).items():
            given = data.get(section, {})
            if isinstance(given, Mapping):
                filled[section] = {**values, **given}
        return filled

    @field_validator("reward")
    @classmethod
    def known_reward(cls, value: str) -> str:
        rewards.check_name(value)
        return value

    @field_validator("prompts")
    @classmethod
    def known_prompts(cls, value: str) -> str:
        prompt_sets.check(value)
        return value

    @model_validator(mode="after")
    def consistent(self) -> Recipe:
        problems = list(self.problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def problems(self) -> Iterable[str]:
        """What no single setting shows."""
        steps, algorithm, guidance = self.sampler.steps, self.algorithm, self.exploration.guidance
        if guidance and guidance.low > self.sampler.guidance:
            yield (
                f"exploration.guidance.low = {guidance.low} is above sampler.guidance = {self.sampler.guidance}: "
                "exploration starts low (Eq. 7)"
            )
        if isinstance(algorithm, AlignPropSettings | ReFLSettings):
            if (algorithm.last_steps or 1) > steps:
                yield f"algorithm.last_steps = {algorithm.last_steps} is above sampler.steps = {steps}: at most {steps}"
            if rewards.is_differentiable(self.reward) is False:
                yield f"reward = {self.reward!r} has no gradient, which {algorithm.name} needs: take another, or ddpo"
        elif isinstance(algorithm, DDPOSettings) and self.sampler.eta == 0:
            yield "sampler.eta = 0 is deterministic, and ddpo needs a density: take eta = 1"
        elif isinstance(algorithm, OwnAlgorithmSettings):
            yield from complaint("algorithm.name", partial(own.check, "algorithm"), algorithm.name)
        if self.exploration.strategy and self.lora.text_encoders:
            yield (
                f"exploration.strategy = {self.exploration.strategy!r} may change the text, which lora.text_encoders = "
                "true embeds anew in every update: leave one of them out"
            )
        if self.model.train == "unet":
            yield from self.problems_of_the_whole_network()
        if self.samples % self.rollout.images_per_prompt:
            yield (
                f"samples = {self.samples} is no multiple of rollout.images_per_prompt = "
                f"{self.rollout.images_per_prompt}"
            )
        for name in self.evaluation.prompts or ():
            yield from complaint("evaluation.prompts", prompt_sets.check, name)
        for name in self.evaluation.rewards or ():
            yield from complaint("evaluation.rewards", rewards.check_name, name)
        if self.evaluation.held_out is not None:
            yield from complaint("evaluation.held_out", rewards.check_name, self.evaluation.held_out)
        elif self.evaluation.patience is not None:
            yield f"evaluation.patience = {self.evaluation.patience} needs a reward to look at: set evaluation.held_out"

    def problems_of_the_whole_network(self) -> Iterable[str]:
        """What does not go together with fine-tuning the whole denoising network."""
        if self.model.precision == "fp16":
            yield "model.precision = 'fp16' can't train the whole network (model.train = 'unet'): take 'bf16' or 'fp32'"
        if self.lora.start or self.lora.text_encoders:
            given = "start" if self.lora.start else "text_encoders"
            yield f"lora.{given} is set, but model.train = 'unet' trains no LoRA: leave one of them out"
        if isinstance(self.algorithm, DDPOSettings) and self.algorithm.kl:
            yield (
                f"algorithm.kl = {self.algorithm.kl} needs the untouched network, which model.train = 'unet' changes: "
                "set it to 0, or train a LoRA"
            )

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe in a TOML file, or the shipped one of that name, with ``{"section.key": value}`` overrides.

        Raises:
            UserError: with a line for every mistake in it.
        """
        return cls.parse(read_toml(source), str(source), overrides)

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from nested tables; ``source`` is what error messages call it."""
        try:
            check_depth([data, dict(overrides or {})])
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
        merged = copy.deepcopy(dict(data))
        for key, value in (overrides or {}).items():
            assign(merged, key, value)
        try:
            return cls.model_validate(merged)
        except ValidationError:
            raise UserError("\n".join(f"{source}: {line}" for line in mistakes(cls, merged))) from None

    def to_toml(self) -> str:
        """The whole recipe, with every default written out."""
        return "\n".join(toml_lines(self.model_dump(mode="json"))) + "\n"


def complaint(what: str, check: Callable[[str], None], name: str) -> Iterable[str]:
    """What ``check`` says against a name, if anything."""
    try:
        check(name)
    except UserError as error:
        yield f"{what}: {error}"
