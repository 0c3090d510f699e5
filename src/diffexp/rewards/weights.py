"""Getting published weights onto this machine safely: pinned commits, safetensors, and pickles only by their hash."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from diffexp.errors import UserError, first_line, writing
from diffexp.quiet import no_progress_bars
from diffexp.rewards.sources import CACHE, TRUST, Source, cache_folder, converted_folder, find_converted, trusted

State = dict[str, Tensor]
Model = TypeVar("Model")


def hub_folder(source: Source) -> Path:
    """The folder that holds the source's files, downloaded at its commit unless the hub cache has them.

    Raises:
        UserError: if a file is neither cached nor to be had from the hub.
    """
    paths = [_hub_file(source, name) for name in source.files]
    return paths[0].parent


def unpickled(source: Source, convert: Callable[[State, Path], None]) -> Path:
    """The folder with the safetensors made of a published pickle; made on first use, then only read.

    ``convert(state, folder)`` gets the pickle's tensors and writes safetensors (and JSON) into the folder. The pickle
    is opened only if its SHA-256 is the known one or one that the user vouches for, and then by torch's restricted
    reader, which builds tensors and runs no code.

    Raises:
        UserError: if the file is missing, has another hash, or holds anything but tensors, or there is no room.
    """
    folder = find_converted(source)
    if folder:
        return folder
    placed = cache_folder() / source.files[0]
    with (placed if placed.is_file() else _hub_file(source, source.files[0])).open("rb") as file:
        digest = _accepted_digest(source, file)
        state = _read_tensors(source, file)
    folder = converted_folder(source, digest)
    with writing(CACHE, folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            convert(state, scratch)
            scratch.rename(folder)
        except OSError:
            # Another process may have been quicker; its folder holds the same.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def frozen(model: type[Model], folder: Path, device: torch.device | str, **kwargs: Any) -> Model:
    """A transformers model of a concrete class from a local folder: safetensors, float32, evaluation, no gradients.

    Raises:
        UserError: if the folder's weights are not exactly those of the class.
    """
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, **kwargs}
    try:
        with no_progress_bars():
            loaded, report = model.from_pretrained(folder, dtype=torch.float32, **options)  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"{folder} cannot be read as a {model.__name__}: {first_line(error)}") from error
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise UserError(f"{folder} does not hold a {model.__name__}: {len(wrong)} weights are missing, as {wrong[0]}")
    return loaded.requires_grad_(False).eval().to(device)


def _hub_file(source: Source, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repo, name, revision=source.revision))
    except Exception as error:
        # Besides its own errors the hub's client lets through those of its HTTP library, which differs by version.
        by_hand = f", or put the file at {cache_folder() / name}" if source.pickled else ""
        raise UserError(
            f"{source.what} needs {name} of {source.repo} (about {source.size / 1e9:.2g} GB in all), which is not on "
            f"this machine and could not be downloaded ({type(error).__name__}): run once with a network, "
            f"'hf download {source.repo} {name} --revision {source.revision}'{by_hand}"
        ) from error


def _accepted_digest(source: Source, file: BinaryIO) -> str:
    hasher = hashlib.sha256()
    while block := file.read(1 << 20):
        hasher.update(block)
    digest = hasher.hexdigest()
    if digest == source.sha256 or digest in trusted():
        return digest
    known = f"not the known {source.sha256}" if source.sha256 else "and no published hash of it is known"
    raise UserError(
        f"{source.files[0]} of {source.repo} is a pickle with the SHA-256 {digest}, {known}: it was not opened; "
        f"if you trust where it comes from, set {TRUST}={digest}"
    )


def _read_tensors(source: Source, file: BinaryIO) -> State:
    file.seek(0)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # A file that is no archive of tensors fails in many ways, each with an error type of its own.
        raise UserError(f"{source.files[0]} of {source.repo} holds more than tensors: {first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source.files[0]} of {source.repo} is no table of tensors")
    return state
