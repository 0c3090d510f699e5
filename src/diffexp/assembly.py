"""Builds the objects of a run from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from diffexp import models, own, prompts, rewards
from diffexp.algorithms import DDPO, Algorithm, AlignProp, ReFL, RewardWeightedRegression
from diffexp.algorithms.advantages import PromptAdvantages
from diffexp.algorithms.base import Scorer
from diffexp.config import Recipe
from diffexp.devices import device
from diffexp.errors import UserError
from diffexp.evaluation import Evaluator
from diffexp.exploration import Exploration, StepGuidance, WordWeighting
from diffexp.learner import Learner
from diffexp.memory import MicroBatch
from diffexp.models import TextToImage, full, lora
from diffexp.processes.parallel import ALONE, Ranks
from diffexp.rewards import features
from diffexp.rewards.base import Reward
from diffexp.rewards.spec import parse
from diffexp.rollout import Sampler
from diffexp.settings import AlignPropSettings, DDPOSettings, OwnAlgorithmSettings, ReFLSettings, RWRSettings
from diffexp.sharing.lora_header import DIFFUSERS_FILE

FP16_SCALE = 2.0**14
"""What losses are multiplied by where the network is in fp16."""


def model(recipe: Recipe, commit: str | None = None) -> TextToImage:
    """The frozen model, without an adapter; the hub's at a ``commit`` rather than at what its revision is now."""
    settings = recipe.model
    where, whole = str(device(recipe.device)), settings.train == "unet"
    return models.load(settings.path, settings.precision, where, commit or settings.revision, settings.variant, whole)


def make_trainable(recipe: Recipe, of: TextToImage) -> None:
    """What the recipe trains: an adapter that changes nothing yet, one that goes on, or the whole network."""
    settings = recipe.lora
    text_targets = lora.TEXT_ATTENTION if settings.text_encoders else ()
    more = {"text_targets": text_targets, "seed": recipe.seed, "init": settings.init}
    if recipe.model.train == "unet":
        full.unfreeze(of)
    elif settings.start:
        lora.start(of, Path(settings.start), settings.rank, settings.alpha, settings.targets, **more)
    else:
        lora.add(of, settings.rank or lora.RANK, settings.alpha, settings.targets or lora.ATTENTION, **more)


def save_trained(recipe: Recipe, of: TextToImage, run: Path, metadata: Mapping[str, str]) -> None:
    """Writes what was trained into a run's folder: both LoRA files into ``lora``, or the network into ``unet``."""
    if recipe.model.train == "unet":
        full.save(of, run / "unet", metadata)
    else:
        lora.save(of, run / "lora", run.resolve().name, metadata)


def load_trained(recipe: Recipe, into: TextToImage, run: Path) -> None:
    """Takes up what ``save_trained`` wrote.

    Raises:
        UserError: if it is not there, or belongs to another model.
    """
    if recipe.model.train == "unet":
        full.load(into, run / "unet")
    else:
        lora.load(into, run / "lora" / DIFFUSERS_FILE)


def sampler(recipe: Recipe, of: TextToImage) -> Sampler:
    """DDIM with the recipe's steps, image size and eta."""
    settings = recipe.sampler
    return Sampler(of, of.schedule(settings.steps), of.latent_shape(settings.size), settings.eta)


def exploration(recipe: Recipe, on: Sampler) -> Exploration:
    """What the recipe explores with; a threshold given as a fraction becomes a timestep of the sampler."""
    settings, high = recipe.exploration, recipe.sampler.guidance
    schedule = None
    if guidance := settings.guidance:
        if guidance.fraction is not None:
            schedule = StepGuidance.over_first(guidance.fraction, on.schedule.timesteps, guidance.low, high)
        else:
            schedule = StepGuidance(guidance.low, high, 900 if guidance.threshold is None else guidance.threshold)
    words = WordWeighting(**settings.words.model_dump()) if settings.words else None
    strategy = own.find("exploration strategy", settings.strategy) if settings.strategy else None
    return Exploration(schedule, words, settings.until, strategy)


def rollouts(recipe: Recipe) -> MicroBatch:
    """How many images are sampled at once; one object for all that sample, so that all learn what fits."""
    return MicroBatch(recipe.rollout.batch, "rollout.batch")


def learner(recipe: Recipe, of: TextToImage, ranks: Ranks = ALONE) -> Learner:
    """AdamW on the model's trainable parameters."""
    batch = MicroBatch(recipe.update.batch, "update.batch")
    scale = FP16_SCALE if recipe.model.precision == "fp16" else 1.0
    return Learner(of.trainable(), **recipe.optimizer.model_dump(), ranks=ranks, batch=batch, loss_scale=scale)


class Parts(NamedTuple):
    """What an algorithm is made of, besides its own settings."""

    recipe: Recipe
    sampler: Sampler
    learner: Learner
    reward: Scorer
    rollout_batch: MicroBatch


def one_shape(parts: Parts) -> Sampler:
    """The sampler as policy gradients need it: rollout and update call the network with equally many samples.

    Only float32 on a CPU needs no such care: there the shape of a batch moves no log-probability by as much as the clip
    range. CUDA computes convolutions of float32 in TF32.
    """
    recipe, sampler, learner = parts.recipe, parts.sampler, parts.learner
    careless = recipe.model.precision == "fp32" and sampler.model.device.type == "cpu"
    updates = recipe.algorithm.minibatches if isinstance(recipe.algorithm, DDPOSettings) else 1
    sampled, updated = (-(-recipe.samples // (pieces * learner.ranks.size)) for pieces in (1, updates))

    def rows() -> int:
        # filling up a call costs as much as samples do: no more rows than a rollout has, and whole steps of an update
        most = min(sampled, learner.batch.size, parts.rollout_batch.size)
        return most - most % updated if most > updated else most

    return sampler if careless else replace(sampler, rows=rows)


def ddpo(settings: DDPOSettings, parts: Parts) -> Algorithm:
    least = settings.min_count
    statistics = PromptAdvantages(max(32, least), least) if settings.advantages == "prompt" else None
    return DDPO(
        sampler=one_shape(parts),
        learner=parts.learner,
        reward=parts.reward,
        clip=settings.clip,
        inner_epochs=settings.inner_epochs,
        minibatches=settings.minibatches,
        advantages=statistics,
        timestep_weights=settings.timestep_weights,
        kl=settings.kl,
        rollout_batch=parts.rollout_batch,
    )


def alignprop(settings: AlignPropSettings, parts: Parts) -> Algorithm:
    return AlignProp(
        sampler=parts.sampler,
        learner=parts.learner,
        reward=parts.reward,
        truncation=settings.truncation,
        last_steps=settings.last_steps or parts.sampler.steps,
        copies=settings.copies,
        rollout_batch=parts.rollout_batch,
    )


def refl(settings: ReFLSettings, parts: Parts) -> Algorithm:
    return ReFL(parts.sampler, parts.learner, parts.reward, settings.last_steps)


def rwr(settings: RWRSettings, parts: Parts) -> Algorithm:
    return RewardWeightedRegression(
        parts.sampler, parts.learner, parts.reward, settings.temperature, rollout_batch=parts.rollout_batch
    )


def users(settings: OwnAlgorithmSettings, parts: Parts) -> Algorithm:
    make, options = own.find("algorithm", settings.name), settings.model_extra or {}
    try:
        signature(make).bind(parts.sampler, parts.learner, parts.reward, **options)
    except TypeError as error:
        raise UserError(f"algorithm {settings.name!r} can't be made with {sorted(options)}: {error}") from error
    return make(one_shape(parts), parts.learner, parts.reward, **options)


ALGORITHMS: dict[type, Callable[[Any, Parts], Algorithm]] = {
    DDPOSettings: ddpo,
    AlignPropSettings: alignprop,
    ReFLSettings: refl,
    RWRSettings: rwr,
    OwnAlgorithmSettings: users,
}


def algorithm(
    recipe: Recipe, on: Sampler, optimiser: Learner, scorer: Scorer, batch: MicroBatch | None = None
) -> Algorithm:
    """The recipe's algorithm, ready to step; ``batch`` images are sampled at once."""
    on.model.checkpointing(recipe.update.checkpoint)
    make = ALGORITHMS[type(recipe.algorithm)]
    return make(recipe.algorithm, Parts(recipe, on, optimiser, scorer, batch or rollouts(recipe)))


def evaluator(
    recipe: Recipe,
    on: Sampler,
    known: dict[str, Reward] | None = None,
    ranks: Ranks = ALONE,
    batch: MicroBatch | None = None,
) -> Evaluator:
    """What the reward curves are made of; rewards in ``known`` are not loaded again."""
    sets = {name: prompts.load(name) for name in recipe.evaluated_prompts}
    known, where = known or {}, on.model.device
    functions = {name: known.get(name) or rewards.load(name, where) for name in recipe.evaluated_rewards}
    return Evaluator(
        on,
        recipe.sampler.guidance,
        sets,
        {name: on.model.encode_set(texts) for name, texts in sets.items()},
        functions,
        batch or rollouts(recipe),
        recipe.evaluation.images,
        ranks,
        features.choose(functions, [member.name for member in parse(recipe.reward)]),
    )
