"""Finds a model's folder: one that is there, or a repository of the hub at one commit, without pickles or code.

A hub name is resolved to a commit once, as an index can change between its check and its download (CVE-2026-45804).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from diffexp.emoji import MODELS, model_path
from diffexp.errors import UserError, one_line
from diffexp.models.base import Source
from diffexp.models.foreign import read_json

COMMIT = re.compile("[0-9a-f]{40}")

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""The parts with weights, and what their files are called."""


def locate(name: str, revision: str | None, variant: str | None = None) -> tuple[Path, Source]:
    """The folder that holds the model called ``name``.

    Raises:
        UserError: if there is no such model here, and none to be had from the hub.
    """
    if name in MODELS:
        return model_path(name), Source(name)
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise UserError(f"model.path = {name!r}: no model_index.json in it, so it is no diffusers folder")
        return Path(name), Source(name)
    # what a commit is never changes, so that nobody has to be asked
    folder = cached(name, revision, variant) if revision and COMMIT.fullmatch(revision) else None
    folder = folder or fetched(name, revision, variant)
    return folder, Source(name, folder.name)


def cached(name: str, revision: str | None, variant: str | None) -> Path | None:
    """The snapshot of a hub model in the cache, if it has the weights of all the model's parts."""
    try:
        index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    except ValueError:  # no name that the hub would take
        return None
    if not isinstance(index, str):
        return None
    folder = Path(index).parent
    parts = WEIGHTS.keys() & read_json(folder / "model_index.json").keys()
    weights = [pattern for pattern in needed_files(variant) if pattern.endswith(".safetensors")]
    return folder if parts <= {pattern.partition("/")[0] for pattern in weights if any(folder.glob(pattern))} else None


def fetched(name: str, revision: str | None, variant: str | None) -> Path:
    """The snapshot of a hub model: the hub's, or where it can't be reached the cache's.

    Raises:
        UserError: if neither has it.
    """
    try:
        # asks once for the commit, and leaves a note of it in the cache, by which it is found again without a network
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(needed_files(variant))))
    except Exception as error:  # of the hub's library, or of any of those that it asks the network by
        if folder := cached(name, revision, variant):  # some versions want a list of files from the hub all the same
            return folder
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"model.path = {name!r}: neither a folder nor a model that the hub or its cache has{at} "
            f"({one_line(error.__cause__ or error)}); for a machine without internet, fill the cache on another one: "
            "diffexp download RECIPE"
        ) from error


def needed_files(variant: str | None) -> Iterable[str]:
    """Patterns of what is downloaded: JSON, texts, and of the weights one variant in safetensors.

    Repositories also hold the same weights in other formats and precisions, several times what is needed.
    """
    yield "model_index.json"
    yield "scheduler/*.json"
    for tokenizer in ("tokenizer", "tokenizer_2"):
        yield from (f"{tokenizer}/*.json", f"{tokenizer}/*.txt")
    for part, stem in WEIGHTS.items():
        named = f"{part}/{stem}" + (f".{variant}" if variant else "")
        yield from (f"{part}/*.json", f"{named}.safetensors", f"{named}-*-of-*.safetensors")
