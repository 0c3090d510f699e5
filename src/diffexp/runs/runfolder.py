"""A run folder from outside: whether a run may begin or go on in it, and whether it is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffexp.config import Recipe
from diffexp.errors import UserError, writing
from diffexp.runs import checkpoint, durable
from diffexp.runs.links import check_links
from diffexp.runs.names import CHECKPOINTS, CONFIG, METRICS
from diffexp.sharing import card
from diffexp.toml import flat

SHOWN = 5
"""The most differences between two recipes that a message lists."""


def read_recipe(folder: Path) -> Recipe:
    """The recipe of the run in a folder.

    Raises:
        UserError: if there is no run in it, or this version of the code doesn't know its settings.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}; give one that `diffexp train` made")
    return Recipe.load(folder / CONFIG)


@contextmanager
def claimed(folder: Path, recipe: Recipe) -> Iterator[None]:
    """A context in which this process alone begins a recipe's run in a folder, or goes on with it.

    Raises:
        UserError: if the folder holds anything else, can't be written, or is another process's.
    """
    prepare(folder, recipe)
    with durable.claimed(folder):
        durable.sweep(folder)
        durable.sweep(folder / CHECKPOINTS)  # a run that has all of its checkpoints writes none, which would do it
        yield


def prepare(folder: Path, recipe: Recipe) -> None:
    """Makes a run folder with its ``config.toml``, or checks that the one there is the same recipe's unfinished run.

    Raises:
        UserError: if it is not, or the folder can't be written.
    """
    config = folder / CONFIG
    check_links(folder)
    if config.is_file():
        check_same(folder, recipe)
        if finished(folder, recipe):
            raise UserError(f"--out {folder} already holds this run, finished: choose another folder")
        return
    if folder.is_dir() and any(not path.name.startswith(durable.TEMPORARY) for path in folder.iterdir()):
        raise UserError(f"--out {folder} holds other files and no run: choose a new or an empty folder")
    with writing("--out", folder):
        folder.mkdir(parents=True, exist_ok=True)
        durable.replace(config, recipe.to_toml().encode())


def check_same(folder: Path, recipe: Recipe) -> None:
    """Refuses to go on with another recipe than the run's. Settings that are newer than the run count as default.

    Raises:
        UserError: with the keys that differ.
    """
    if (folder / CONFIG).read_bytes() == recipe.to_toml().encode():
        return
    before, now = (flat(one.model_dump(mode="json", exclude_none=True)) for one in (read_recipe(folder), recipe))
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if keys:
        what = [f"{key} = {told(now.get(key))} instead of {told(before.get(key))}" for key in keys[:SHOWN]]
        more = f"; {len(keys) - SHOWN} more" * (len(keys) > SHOWN)
        raise UserError(
            f"--out {folder} already holds a run of another recipe ({'; '.join(what)}{more}): choose another folder, "
            f"or go on with that run by `diffexp resume {folder}`"
        )


def told(value: Any) -> str:
    """A setting's value as TOML has it."""
    return "nothing" if value is None else json.dumps(value)


def finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in a folder is complete: the card of what it has trained is the last that it writes.

    Raises:
        UserError: if it is not, and its checkpoints are gone.
    """
    if card.path(folder, recipe).is_file():
        return True
    if not checkpoint.newest_first(folder / CHECKPOINTS) and iterations(folder) > recipe.checkpoint.every:
        what = f"the {CHECKPOINTS} of this run are gone, and to begin it anew would wipe its records"
        raise UserError(f"{folder}: {what}: put them back, or choose another folder")
    return False


def iterations(folder: Path) -> int:
    """How many iterations the records tell of."""
    metrics = folder / METRICS
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
