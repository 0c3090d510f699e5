"""Builds the objects of a run from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from diffexp import models, prompts, rewards
from diffexp.algorithms import DDPO, Algorithm, AlignProp, ReFL, RewardWeightedRegression
from diffexp.algorithms.advantages import PromptAdvantages
from diffexp.algorithms.base import Scorer
from diffexp.config import AlignPropSettings, DDPOSettings, Recipe, ReFLSettings, RWRSettings
from diffexp.devices import device
from diffexp.errors import UserError
from diffexp.evaluation import Evaluator
from diffexp.exploration import Exploration, StepGuidance, WordWeighting
from diffexp.learner import Learner
from diffexp.lora_header import DIFFUSERS_FILE
from diffexp.models import TextToImage, full, lora
from diffexp.parallel import ALONE, Ranks
from diffexp.rewards import features
from diffexp.rewards.base import Reward
from diffexp.rewards.spec import parse
from diffexp.rollout import Sampler


def model(recipe: Recipe) -> TextToImage:
    """The frozen model, without an adapter."""
    settings = recipe.model
    where, whole = str(device(recipe.device)), settings.train == "unet"
    return models.load(settings.path, settings.precision, where, settings.revision, settings.variant, whole)


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
        lora.add(of, settings.rank or 4, settings.alpha, settings.targets or lora.ATTENTION, **more)


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


def one_shape(recipe: Recipe, on: Sampler, optimiser: Learner) -> Sampler:
    """The sampler as policy gradients need it: rollout and update call the network with equally many samples.

    Only float32 on a CPU needs no such care: there the shape of a batch moves no log-probability by as much as the clip
    range. CUDA computes convolutions of float32 in TF32.
    """
    careless = recipe.model.precision == "fp32" and on.model.device.type == "cpu"
    return on if careless else replace(on, rows=lambda: optimiser.batch.size)


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
    return Exploration(schedule, words, settings.until)


def learner(recipe: Recipe, of: TextToImage, ranks: Ranks = ALONE) -> Learner:
    """AdamW on the model's trainable parameters."""
    return Learner(of.trainable(), **recipe.optimizer.model_dump(), ranks=ranks)


def ddpo(recipe: Recipe, settings: DDPOSettings, on: Sampler, optimiser: Learner, scorer: Scorer) -> Algorithm:
    statistics = PromptAdvantages(settings.buffer, settings.min_count) if settings.advantages == "prompt" else None
    return DDPO(
        sampler=one_shape(recipe, on, optimiser),
        learner=optimiser,
        reward=scorer,
        clip=settings.clip,
        advantage_clip=settings.advantage_clip,
        inner_epochs=settings.inner_epochs,
        minibatches=settings.minibatches,
        advantages=statistics,
        min_timestep=settings.min_timestep,
        kl=settings.kl,
        rollout_batch=recipe.rollout.batch,
        update_batch=recipe.update.batch,
    )


def alignprop(
    recipe: Recipe, settings: AlignPropSettings, on: Sampler, optimiser: Learner, scorer: Scorer
) -> Algorithm:
    return AlignProp(
        sampler=on,
        learner=optimiser,
        reward=scorer,
        truncation=settings.truncation,
        last_steps=settings.last_steps or on.steps,
        copies=settings.copies,
        update_batch=recipe.update.batch,
    )


def refl(recipe: Recipe, settings: ReFLSettings, on: Sampler, optimiser: Learner, scorer: Scorer) -> Algorithm:
    return ReFL(on, optimiser, scorer, settings.last_steps, recipe.update.batch)


def rwr(recipe: Recipe, settings: RWRSettings, on: Sampler, optimiser: Learner, scorer: Scorer) -> Algorithm:
    batches = (recipe.rollout.batch, recipe.update.batch)
    return RewardWeightedRegression(on, optimiser, scorer, settings.temperature, settings.draws, *batches)


ALGORITHMS: dict[type, Callable[..., Algorithm]] = {
    DDPOSettings: ddpo,
    AlignPropSettings: alignprop,
    ReFLSettings: refl,
    RWRSettings: rwr,
}


def algorithm(recipe: Recipe, on: Sampler, optimiser: Learner, scorer: Scorer) -> Algorithm:
    """The recipe's algorithm, ready to step."""
    on.model.checkpointing(recipe.update.checkpoint_unet, recipe.update.checkpoint_decoder)
    return ALGORITHMS[type(recipe.algorithm)](recipe, recipe.algorithm, on, optimiser, scorer)


def evaluator(recipe: Recipe, on: Sampler, known: dict[str, Reward] | None = None, ranks: Ranks = ALONE) -> Evaluator:
    """What the reward curves are made of; rewards in ``known`` are not loaded again."""
    sets = {name: prompts.load(name) for name in recipe.evaluation.prompts or (recipe.prompts,)}
    trained = tuple(member.name for member in parse(recipe.reward))
    names = recipe.evaluation.rewards or trained
    where = on.model.device
    functions = {name: (known or {}).get(name) or rewards.load(name, where) for name in names}
    return Evaluator(
        on,
        recipe.sampler.guidance,
        sets,
        {name: on.model.encode(texts) for name, texts in sets.items()},
        functions,
        recipe.evaluation.images,
        recipe.rollout.batch,
        ranks,
        features.choose(functions, trained),
    )
