"""A run's state on disk: written atomically, verified when read, restored exactly.

A checkpoint is a folder with ``state.safetensors`` (all tensors), ``state.json`` (all numbers), copies of the run's
JSON lines so far and, written last, ``manifest.json`` (sizes and SHA-256 of the others). It is made under a temporary
name, synced, renamed and read back; older checkpoints go only after that. No pickle anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffexp.errors import UserError
from diffexp.runs import durable

TENSORS, NUMBERS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
"""Raised whenever older code could not read what newer code writes."""

BLOCK = 4096  # bytes; files and folders take up whole blocks
DAMAGE = (OSError, ValueError, SafetensorError)
"""What reading a checkpoint may raise whose bytes are not as they were written."""


class NotSaved(UserError):
    """A checkpoint could not be written; the older ones are as they were."""


class Checkpoint(NamedTuple):
    """What was restored, and the newer checkpoints that had to be passed over: where, and what is wrong with them."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    records: dict[str, bytes]
    damaged: tuple[str, ...] = ()


def write(
    folder: Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    records: Mapping[str, bytes],
    keep: int,
) -> Path:
    """Saves the state after an iteration, then removes all but the newest ``keep`` checkpoints.

    ``records`` are the JSON lines that belong to it, by file name.

    Raises:
        NotSaved: if there is no room, or the disk refuses; the older checkpoints are then untouched.
    """
    final = folder / f"iteration-{iteration:06d}"
    contents = {
        TENSORS: save({name: tensor.contiguous() for name, tensor in tensors.items()}),
        NUMBERS: json.dumps(numbers).encode(),
        **records,
    }
    manifest = {"format": FORMAT, "files": {name: fingerprint(data) for name, data in contents.items()}}
    contents[MANIFEST] = json.dumps(manifest, indent=1).encode()
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            durable.sync_folder(folder.parent)
        durable.sweep(folder)
        if wrong_with(final):
            make_room(folder, contents.values())
            create(final, contents)
            if damage := wrong_with(final):
                raise OSError(errno.EIO, f"read back, it was damaged: {damage}")
        durable.sync_folder(folder)
    except OSError as error:
        durable.sweep(folder)  # give the space back
        raise NotSaved(
            f"{final}: not saved ({error.strerror}); the checkpoints before it are as they were: when the disk is in "
            f"order, `diffexp resume {folder.parent}` goes on from the newest"
        ) from error
    prune(folder, iteration, keep)
    return final


def create(final: Path, contents: Mapping[str, bytes]) -> None:
    """Writes a checkpoint under a temporary name and renames it, in place of a damaged one if need be."""
    unfinished = durable.temporary(final)
    unfinished.mkdir()
    for name, data in contents.items():
        durable.write_synced(unfinished / name, data)
    durable.sync_folder(unfinished)
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)


def make_room(folder: Path, contents: Iterable[bytes]) -> None:
    """Checks that there is room for a checkpoint.

    Raises:
        OSError: if there is not.
    """
    needed = sum(-len(data) // BLOCK * -BLOCK for data in contents) + 2 * BLOCK
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes, and {free:,} are free")


def prune(folder: Path, iteration: int, keep: int) -> None:
    """Removes what the checkpoint after ``iteration`` makes superfluous: old ones, and damaged ones after it."""
    found = numbered(folder)
    newer = [path for number, path in found if number > iteration]
    older = [path for number, path in found if number <= iteration][keep:]
    for path in newer + older:
        durable.remove(path)


def read_newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in ``folder``, or None if there is none at all.

    Raises:
        UserError: if there are some, and all of them are damaged.
    """
    damaged: list[str] = []
    for candidate in newest_first(folder):
        try:
            return read(candidate)._replace(damaged=tuple(damaged))
        except DAMAGE as error:
            damaged.append(f"{candidate.name} ({reason(error)})")
    if damaged:
        raise UserError(
            f"{folder}: no checkpoint is whole, not even {damaged[0]}: put one back from a backup, or remove that "
            "folder to begin the run anew"
        )
    return None


def read(checkpoint: Path) -> Checkpoint:
    """One checkpoint whose bytes are what its manifest says.

    Raises:
        OSError: if a file is missing or can't be read.
        ValueError: if a file is not as it was written, or was written by a newer version of the code.
    """
    contents = {}
    for name, expected in read_manifest(checkpoint / MANIFEST).items():
        contents[name] = (checkpoint / name).read_bytes()
        if fingerprint(contents[name]) != expected:
            raise ValueError(f"{name} is not as it was written")
    return Checkpoint(load(contents.pop(TENSORS)), json.loads(contents.pop(NUMBERS)), contents)


def read_manifest(file: Path) -> dict[str, Any]:
    """The fingerprints of a checkpoint's files, by name.

    Raises:
        OSError: if there is no manifest.
        ValueError: if it is none, or of a newer format.
    """
    try:
        manifest = json.loads(file.read_bytes())
        files = manifest["files"] if "format" in manifest else manifest  # the first format had no number
        number = int(manifest.get("format", 0))
        plain = all(Path(name).name == name for name in files) and {TENSORS, NUMBERS} <= files.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is not as it was written") from error
    if number > FORMAT:
        raise ValueError(f"its format {number} is of a newer diffexp, this one knows {FORMAT}: upgrade")
    if not plain:
        raise ValueError(f"{MANIFEST} is not as it was written")
    return files


def wrong_with(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be read, if so."""
    try:
        read(checkpoint)
    except DAMAGE as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """What is wrong with a checkpoint, in a few words."""
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"
    return str(error)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, from the last to the first."""
    return [path for _, path in numbered(folder)]


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints with their iterations, from the last to the first."""
    found = [(re.fullmatch(r"iteration-(\d{6,})", path.name), path) for path in folder.glob("iteration-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def fingerprint(data: bytes) -> dict[str, Any]:
    """What a manifest says about a file."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
