"""A run's state on disk: written atomically, verified when read, restored exactly.

A checkpoint is a folder with ``state.safetensors`` (all tensors), ``state.json`` (all numbers) and, written last,
``manifest.json`` (sizes and SHA-256 of both). It is made under a temporary name, synced and renamed; older checkpoints
go only after that. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

TENSORS, NUMBERS, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Checkpoint(NamedTuple):
    """What was restored, and the folders that had to be passed over because they are damaged."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    damaged: list[Path]


def write(folder: Path, iteration: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int) -> Path:
    """Saves the state after an iteration, then removes all but the newest ``keep`` checkpoints.

    Raises:
        OSError: if the disk refuses; the older checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"iteration-{iteration:06d}", folder / f".tmp-{iteration:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    contents = {TENSORS: save(dict(tensors)), NUMBERS: json.dumps(numbers).encode()}
    manifest = {name: {"size": len(data), "sha256": digest(data)} for name, data in contents.items()}
    for name, data in (*contents.items(), (MANIFEST, json.dumps(manifest, indent=1).encode())):
        write_synced(temporary / name, data)
    sync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(folder)
    for old in [*newest_first(folder)][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def read_newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in ``folder``, or None if there is none."""
    damaged: list[Path] = []
    for candidate in newest_first(folder):
        try:
            return Checkpoint(*verified(candidate), damaged)
        except (OSError, ValueError, KeyError, SafetensorError):
            damaged.append(candidate)
    return None


def verified(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of one checkpoint whose bytes are what its manifest says.

    Raises:
        ValueError: if they are not.
    """
    manifest, contents = json.loads((checkpoint / MANIFEST).read_bytes()), {}
    for name in (TENSORS, NUMBERS):
        contents[name] = (checkpoint / name).read_bytes()
        if (len(contents[name]), digest(contents[name])) != (manifest[name]["size"], manifest[name]["sha256"]):
            raise ValueError(f"{checkpoint / name} does not match its manifest")
    return load(contents[TENSORS]), json.loads(contents[NUMBERS])


def newest_first(folder: Path) -> Iterator[Path]:
    """The checkpoints of a run, whole or not, from the last to the first."""
    return iter(sorted(folder.glob("iteration-*"), reverse=True))


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
