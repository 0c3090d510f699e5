"""One SHA-256 for what a reward is made of: a model can say which reward exactly it was trained on. Needs no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path

from diffexp.emoji import weights_path
from diffexp.rewards.sources import NEEDS, Source, find_converted
from diffexp.rewards.spec import SHIPPED, parse

EMOJI_PARTS = {
    "emoji-alignment": ("alignment",),
    "emoji-aesthetic": ("alignment", "aesthetic"),
    "emoji-judge": ("judge",),
}
"""The folders of the package that the emoji world's rewards are in."""


@lru_cache
def checksum(spec: str) -> str | None:
    """The SHA-256 of a reward: of its weights or its code, with the weights of a sum. None where that can't be told.

    Files of the hub count by their commit and, where they are pickles, their own hash; a function by its whole file,
    but not by what that imports.
    """
    members = [(member.weight, contents(member.name)) for member in parse(spec)]
    if any(content is None for _, content in members):
        return None
    return hashlib.sha256(json.dumps(members).encode()).hexdigest()


def contents(name: str) -> list[str] | None:
    """What one reward is made of: hashes, and names of what has a hash of its own."""
    if name in NEEDS:
        return [identity(source) for source in NEEDS[name]]
    if name in EMOJI_PARTS:
        files = [file for part in EMOJI_PARTS[name] for file in sorted(weights_path(part).glob("*.safetensors"))]
        return [digest(file) or "" for file in files]
    if name in SHIPPED:
        return [name]
    where, _, function = name.rpartition(":")
    file = Path(where) if where.endswith(".py") else module_file(where)
    code = digest(file) if file else None
    return [function, code] if code else None


def identity(source: Source) -> str:
    """The files of a source: the commit that they are of, and the hash of the pickle that was read."""
    converted = find_converted(source) if source.pickled else None
    return " ".join([source.repo, source.revision, *source.files, converted.name if converted else ""])


def module_file(name: str) -> Path | None:
    """The file of a module, if it is one that can be imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None


@lru_cache
def digest(file: Path) -> str | None:
    """The SHA-256 of a file; None if it can't be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
