"""Asking a run for something from a second shell: ``diffexp ctl RUN sample|save|stop``.

A request is an empty file of its name in the folder ``control`` of the run, which the run looks into between
iterations. Nothing is ever read from such a file, links are not followed, and whatever else lies there is let be.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffexp.errors import UserError, one_line, refusal, unknown
from diffexp.runs.durable import is_free
from diffexp.runs.names import CONFIG

FOLDER = "control"
REQUESTS = {
    "sample": "it paints the previews",
    "save": "it saves a checkpoint and the LoRA",
    "stop": "it saves and ends as on SIGTERM, and the command that started it goes on from there",
}


def ask(run: Path, request: str) -> str:
    """Leaves a request for the process that trains ``run``; returns what that process will do.

    Raises:
        UserError: for an unknown request, a folder that is no run or can't be written, or a run that nobody trains.
    """
    if request not in REQUESTS:
        raise unknown("request", request, REQUESTS)
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: no run folder; give one that `diffexp train` writes")
    if is_free(run):
        raise UserError(f"{run}: no process trains this run; unless it is finished, `diffexp resume {run}` goes on")
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with opened(folder) as inside:
            if not is_waiting(request, inside):
                os.close(os.open(request, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=inside))
    except OSError as error:
        what = f"{folder}: can't leave a request there"
        raise refusal(error, what) or UserError(f"{what} ({one_line(error)})") from error
    return REQUESTS[request]


def take(run: Path) -> frozenset[str]:
    """The requests that wait, each of which is told once. Never fails: what can't be taken away is no request."""
    taken = set()
    try:
        with opened(run / FOLDER) as inside:
            for request in REQUESTS:
                if is_waiting(request, inside):
                    os.unlink(request, dir_fd=inside)
                    taken.add(request)
    except OSError:
        pass  # no folder, or one that can't be written: without the file gone, it would be asked again and again
    return frozenset(taken)


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A descriptor of the folder itself: of no link, and whatever is put in its place meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_waiting(request: str, inside: int) -> bool:
    """Whether the request's file is there, and a file."""
    try:
        return stat.S_ISREG(os.stat(request, dir_fd=inside, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
