"""What a run is: one tree of typed settings, read from a TOML file. Its sections are in :mod:`diffexp.settings`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from diffexp import own, rewards
from diffexp import prompts as prompt_sets
from diffexp.errors import UserError
from diffexp.mistakes import mistakes
from diffexp.rewards.spec import parse
from diffexp.settings import (
    AlgorithmSettings,
    AlignPropSettings,
    CheckpointSettings,
    DDPOSettings,
    EvaluationSettings,
    ExplorationSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    OwnAlgorithmSettings,
    Positive,
    PreviewSettings,
    ReFLSettings,
    RolloutSettings,
    SamplerSettings,
    Settings,
    UpdateSettings,
)
from diffexp.toml import assign, check_depth, inherited, read_toml, toml_lines, written_as_read

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

# The appendix of the paper, where its two algorithms differ: learning rate and guidance scale. The bounds of the norm
# are ours for alignprop: its own code bounds it by 5, but multiplies the loss by 0.01, so that 500 is its bound here.
# sd15-alignprop has that; what was trained on the emoji model had 5.
ALGORITHM_DEFAULTS: dict[str, dict[str, dict[str, float]]] = {
    "ddpo": {"optimizer": {"learning_rate": 3e-4, "max_grad_norm": 1.0}, "sampler": {"guidance": 5.0}},
    "alignprop": {"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 5.0}, "sampler": {"guidance": 7.5}},
    "refl": {"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 5.0}, "sampler": {"guidance": 7.5}},
    "rwr": {"optimizer": {"learning_rate": 3e-4, "max_grad_norm": 1.0}, "sampler": {"guidance": 5.0}},
}


class Recipe(Settings):
    """A whole run. Its sections are the classes of :mod:`diffexp.settings`."""

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
        yield from self.problems_of_training()
        yield from self.problems_of_evaluation()

    def problems_of_training(self) -> Iterable[str]:
        """What does not go together in a training."""
        steps, algorithm, guidance = self.sampler.steps, self.algorithm, self.exploration.guidance
        if isinstance(algorithm, OwnAlgorithmSettings) and not written_as_read(algorithm.model_dump()):
            yield (
                f"algorithm.name = {algorithm.name!r}: its settings can't be kept in a run's config.toml: take finite "
                "numbers, texts, true and false, lists of these, and tables with plain names"
            )
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

    def problems_of_evaluation(self) -> Iterable[str]:
        """What evaluations ask for and can't have."""
        for name in self.evaluation.prompts or ():
            yield from complaint("evaluation.prompts", prompt_sets.check, name)
        for name in self.evaluation.rewards or ():
            yield from complaint("evaluation.rewards", rewards.check_one, name)
        if self.evaluation.held_out is not None:
            yield from complaint("evaluation.held_out", rewards.check_one, self.evaluation.held_out)
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

    @property
    def evaluated_prompts(self) -> tuple[str, ...]:
        """The prompt sets of an evaluation, each once: those that the recipe names, else what it trains on."""
        return tuple(dict.fromkeys(self.evaluation.prompts or (self.prompts,)))

    @property
    def evaluated_rewards(self) -> tuple[str, ...]:
        """The rewards of an evaluation, each once: those named, else the trained sum's members; the held-out one."""
        named = self.evaluation.rewards or [member.name for member in parse(self.reward)]
        return tuple(dict.fromkeys((*named, *filter(None, [self.evaluation.held_out]))))

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
        changes: dict[str, Any] = {}
        for key, value in (overrides or {}).items():
            assign(changes, key, value)
        merged = copy.deepcopy(inherited(data, changes))
        for key, value in (overrides or {}).items():
            assign(merged, key, value)
        try:
            return cls.model_validate(merged)
        except ValidationError:
            raise UserError("\n".join(f"{source}: {line}" for line in mistakes(cls, merged))) from None

    def to_toml(self) -> str:
        """The whole recipe, with every default written out."""
        return "\n".join(toml_lines(self.model_dump(mode="json"))) + "\n"


class PaintingRecipe(Recipe):
    """A recipe that images are painted and evaluated by: what only a training asks of its settings is not asked."""

    def problems(self) -> Iterable[str]:
        return self.problems_of_evaluation()


def complaint(what: str, check: Callable[[str], None], name: str) -> Iterable[str]:
    """What ``check`` says against a name, if anything."""
    try:
        check(name)
    except UserError as error:
        yield f"{what}: {error}"


def times(iterations: int, every: int) -> int:
    """How often something happens that is due before the first iteration, every so many, and after the last."""
    return 1 + iterations // every + bool(iterations % every)
