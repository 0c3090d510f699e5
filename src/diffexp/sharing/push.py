"""Publishing a run's LoRA on the hub: only ever when asked to, and only the LoRA files, the card and its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffexp.errors import UserError, one_line
from diffexp.sharing.lora_header import DIFFUSERS_FILE
from diffexp.version import __version__

CARD = "README.md"
PUBLISHED = ("*.safetensors", CARD, "images/*.png", "images/*.svg")


def push(run: Path, to: str, private: bool = False) -> str:
    """Uploads ``run``'s LoRA and card to the model repository ``to`` ("user/name"); returns its address.

    Raises:
        UserError: if the run has no LoRA or card, ``to`` is no name for a repository, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = run / "lora"
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in published(run, folder)]
    check_name(to)
    api = HfApi()
    try:
        api.create_repo(to, private=private or None, exist_ok=True)
        if private and not api.model_info(to).private:
            raise UserError(f"--private: {to} exists and is public; make it private first, or choose another name")
        done = api.create_commit(to, operations, commit_message=f"LoRA trained with diffexp {__version__}")
    except UserError:
        raise
    except Exception as error:
        # besides its own errors the hub's client lets through those of its HTTP library, which differs by version
        raise UserError(f"--to {to}: {remedy(error)}") from error
    return str(done.repo_url)


def published(run: Path, folder: Path) -> list[Path]:
    """The files that are uploaded.

    Raises:
        UserError: if the LoRA or its card is missing, or one of the files is a link.
    """
    found = sorted(path for pattern in PUBLISHED for path in folder.glob(pattern) if not path.name.startswith("."))
    for needed in (DIFFUSERS_FILE, CARD):
        if folder / needed not in found:
            raise UserError(f"{run}: no lora/{needed}; give the folder of a run that is finished")
    for path in found:
        # what a link leads to was not made by the run
        if path.is_symlink() or path.parent.is_symlink() or folder.is_symlink():
            raise UserError(f"{path} is a link: only files that the run wrote are uploaded")
    return found


def check_name(to: str) -> None:
    """Checks that ``to`` may be the name of a repository.

    Raises:
        UserError: if not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise UserError(f"--to {to!r}: {one_line(error)}") from error
    if "/" not in to:
        raise UserError(f"--to {to!r}: give user/name")


def remedy(error: Exception) -> str:
    """What the hub's refusal means to the user."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "the hub does not know you: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: nothing can be uploaded"
    if status == 403:
        return "your token may not write there: make one with write access, or choose another name"
    return f"the hub could not be reached or refused ({type(error).__name__}: {one_line(error)})"
