"""What a run writes into the headers of its files: what made them, and what the world's tools show. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from diffexp.config import Recipe
from diffexp.rewards.checksum import checksum, digest
from diffexp.settings import DDPOSettings
from diffexp.sharing.lora_header import CHECKSUM, COMMIT, ITERATIONS, QUERIES, RECIPE, REWARD, without_paths

SHOWN = 1000
"""Prompts in a header, the most frequent ones: no reader takes headers of any length."""


def made_by(recipe: Recipe, texts: Iterable[str], commit: str | None, iteration: int, queries: int) -> dict[str, str]:
    """The header of a run on the prompts ``texts``, on a base model that is of a ``commit`` of the hub or of none.

    There is no date in it, as the same run makes the same file; nor is there a folder of this machine.
    """
    settings = json.dumps(without_paths(recipe.model_dump(mode="json", exclude={"device", "trackers"})))
    header = {
        RECIPE: settings,
        "diffexp.recipe_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        REWARD: without_paths(recipe.reward),
        CHECKSUM: checksum(recipe.reward),
        ITERATIONS: str(iteration),
        QUERIES: str(queries),
        COMMIT: commit,
        "diffexp.start_sha256": digest(Path(recipe.lora.start)) if recipe.lora.start else None,
        **for_tools(recipe, texts, iteration),
    }
    return {key: value for key, value in header.items() if value is not None}


def for_tools(recipe: Recipe, texts: Iterable[str], iteration: int) -> dict[str, str]:
    """kohya's and ModelSpec's entries that are about the training; those about the model are ``lora.writer``'s."""
    algorithm, goal = recipe.algorithm, f"{recipe.algorithm.name} towards the reward {without_paths(recipe.reward)}"
    updates = algorithm.minibatches * algorithm.inner_epochs if isinstance(algorithm, DDPOSettings) else 1
    header = {
        "ss_learning_rate": str(recipe.optimizer.learning_rate),
        "ss_optimizer": "torch.optim.AdamW",
        "ss_seed": str(recipe.seed),
        "ss_epoch": str(iteration),
        "ss_num_epochs": str(recipe.iterations),
        "ss_steps": str(iteration * updates),
        "ss_mixed_precision": "no" if recipe.model.precision == "fp32" else recipe.model.precision,
        "ss_training_comment": f"{goal}, by diffexp",
        "ss_tag_frequency": json.dumps({"diffexp": dict(Counter(texts).most_common(SHOWN))}),  # A1111 offers them
        "modelspec.description": f"Fine-tuned with {goal}",
        "modelspec.usage_hint": f"Trained at a guidance scale of {recipe.sampler.guidance:g}",
        "modelspec.tags": f"reward-fine-tuning, {algorithm.name}, diffexp",
    }
    if recipe.sampler.size:
        height, width = recipe.sampler.size
        header |= {"ss_resolution": f"({width}, {height})", "modelspec.resolution": f"{width}x{height}"}
    return header
