"""Fetches everything that a recipe needs, on a machine with internet for one without."""

from __future__ import annotations

from collections.abc import Callable

from diffexp import rewards
from diffexp.config import Recipe
from diffexp.models.hub import locate
from diffexp.rewards.address import is_remote
from diffexp.rewards.spec import parse


def download(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Puts the recipe's model and rewards into the caches, and tries the rewards out; ``say`` hears of each.

    A pickle among a reward's weights is checked and converted now. Prompts from the hub are there already: reading the
    recipe has fetched them.

    Raises:
        UserError: for what can't be had.
    """
    model = recipe.model
    folder, _ = locate(model.path, model.revision, model.variant)
    say(f"model {model.path}: {folder}")
    specs = [recipe.reward, *(recipe.evaluation.rewards or ()), recipe.evaluation.held_out]
    for name in dict.fromkeys(member.name for spec in specs if spec for member in parse(spec)):
        if is_remote(name):
            say(f"reward {name}: a server's, nothing to fetch")
        else:
            rewards.load(name)
            say(f"reward {name}: ready")
