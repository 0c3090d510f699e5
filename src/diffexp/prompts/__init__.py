"""Prompt sets by name, prompts from a file, or one prompt given in place. Needs neither torch nor numpy.

>>> from diffexp import prompts
>>> prompts.load("animal-activities")[25]
'a cat riding a bike'
>>> prompts.load("text:a dolphin riding a bike")
('a dolphin riding a bike',)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from importlib.resources import files as package_files
from pathlib import Path

from diffexp.errors import UserError, cut, unknown
from diffexp.prompts import tables
from diffexp.prompts.files import SUFFIXES, clean, read
from diffexp.prompts.words import (
    ACTIVITIES,
    ANIMALS,
    UNSEEN_ACTIVITIES,
    UNSEEN_ANIMALS,
    activity_prompts,
    article,
)

__all__ = ["ACTIVITIES", "ANIMALS", "UNSEEN_ACTIVITIES", "UNSEEN_ANIMALS", "article", "available", "check", "load"]

LITERAL = "text:"
"""What turns the rest of the name into the one prompt of the set."""


def load(name_or_path: str | Path) -> tuple[str, ...]:
    """The prompts of a named set, a ``.txt`` or ``.jsonl`` file, a table's column, or the one after ``text:``.

    Never empty; duplicates and the order are kept. A name of :func:`available` wins over a file of the same name; write
    ``./animals`` for the file. Columns are named as :mod:`diffexp.prompts.tables` says.

    Raises:
        UserError: an unknown name, a file that is missing, empty, not UTF-8 or not in one of the formats, or a prompt
            that can't be shown.
    """
    name = str(name_or_path)
    if name.startswith(LITERAL):
        prompt = name.removeprefix(LITERAL).strip()
        if not prompt:
            raise UserError(f"prompts {name!r}: no prompt after {LITERAL!r}; write {LITERAL}a dolphin riding a bike")
        return (clean(prompt, f"prompts {cut(repr(name))}"),)
    if name in _SETS:
        return _SETS[name][1]()
    if tables.is_table(name):
        return tables.read(name)
    if isinstance(name_or_path, Path) or _looks_like_a_file(name):
        return read(Path(name))
    known = ", ".join(_SETS)
    remedy = f"known: {known}; or a {' or '.join(SUFFIXES)} file, a table's file.csv#column, or {LITERAL}one prompt"
    raise unknown("prompt set", name, _SETS, remedy)


def check(name_or_path: str | Path) -> None:
    """Nothing, if :func:`load` would succeed; it reads a file but changes nothing. Tables are not opened.

    Raises:
        UserError: as :func:`load`.
    """
    if tables.is_table(str(name_or_path)):
        tables.check(str(name_or_path))
    else:
        load(name_or_path)


def available() -> dict[str, str]:
    """One line for every named set: how many prompts, where they are from, and one of them."""
    return {name: description for name, (description, _) in _SETS.items()}


def _looks_like_a_file(name: str) -> bool:
    return "/" in name or "\\" in name or bool(Path(name).suffix)


def _column(file: str) -> tuple[str, ...]:
    lines = io.StringIO((package_files(__name__) / "data" / file).read_text(encoding="utf-8"))
    return tuple(row["prompt"] for row in csv.DictReader(lines))


_SETS: dict[str, tuple[str, Callable[[], tuple[str, ...]]]] = {
    "animals": ('45 animals, the paper\'s Table 1: "cat"', lambda: ANIMALS),
    "animals-unseen": ('6 animals not trained on, Table 2: "octopus"', lambda: UNSEEN_ANIMALS),
    "animal-activities": (
        '135 prompts, 45 animals x 3 activities, Table 1: "a cat riding a bike"',
        lambda: activity_prompts(ANIMALS, ACTIVITIES),
    ),
    "animal-activities-unseen": (
        '18 prompts, 6 unseen animals x 3 unseen activities, Table 2 and Figure 13: "a cheetah doing laundry"',
        lambda: activity_prompts(UNSEEN_ANIMALS, UNSEEN_ACTIVITIES),
    ),
    "drawbench-58": (
        '58 of DrawBench (Conflicting, Gary Marcus et al., Reddit): "A pizza cooking an oven."',
        lambda: _column("drawbench.csv"),
    ),
    "parti-150": (
        '150 of PartiPrompts (challenge "Imagination"): "a spaceship hovering over The Alamo"',
        lambda: _column("parti_imagination.csv"),
    ),
}
