"""Whether a run goes on with what it was begun with: a changed library or line of code can change its last digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffexp.runs.environment import describe

INPUTS = ("reward", "prompts")
"""Digests of what a recipe only names."""

INCIDENTAL = ("processes", "python", "system")
"""What changes no number, or only where a library changes too."""


def made_with(device: torch.device) -> dict[str, Any]:
    """What the next iterations depend on besides the recipe: versions, device, and a digest of the code itself."""
    found = {key: value for key, value in describe(device).items() if key not in INCIDENTAL}
    return {**found, "code": code()}


@cache
def code() -> str:
    """A digest of this package's source files."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words; nothing where all is the same, or ``before`` does not know."""
    different = [key for key in now if key in before and before[key] != now[key]]
    if different == ["code"]:
        return "the code of diffexp has changed"
    inputs = [f"{key} {'has' if key == 'reward' else 'have'} changed" for key in different if key in INPUTS]
    others = [key for key in different if key not in ("code", *INPUTS)]
    return ", ".join([*inputs, *(f"{key} was {before[key]} and is {now[key]}" for key in others)])
