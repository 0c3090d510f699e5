"""What the user can mend is a ``UserError``; the command line prints it as one line and exits with code 2."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

LONGEST = 100
"""Letters of a user's value that a message repeats."""

REMEDIES = {
    errno.ENOSPC: "make room on that disk, or choose another folder",
    errno.EDQUOT: "make room on that disk, or choose another folder",
    errno.EFBIG: "choose a disk that takes files of this size",
    errno.EIO: "the disk fails; choose another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENXIO), "choose another folder"),
}
"""What to do where the file system refuses; other errors of the system may be mistakes of ours."""


class UserError(ValueError):
    """A mistake that the user can mend: its message names the setting, the value and the remedy."""


GOES_ON = "the same command again goes on from the newest checkpoint"


class Lost(RuntimeError):
    """Another process of the run is gone, or stands still: this one ends as well, and the run can be continued."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def closest(name: str, known: Iterable[str]) -> str | None:
    """What the user may have meant by ``name``."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UserError:
    """The error for a name that is not among ``known``, with the closest match as a suggestion.

    ``kind`` is what the name was meant to be ("reward"), ``remedy`` where to look for the right one.
    """
    known = sorted(known)
    guess = closest(name, known)
    hint = f"did you mean {guess!r}? " if guess else ""
    return UserError(f"unknown {kind} {cut(repr(name))}: {hint}{remedy or 'known: ' + ', '.join(known)}")


def refusal(error: OSError, what: str) -> UserError | None:
    """What the file system's refusal to do ``what`` means to the user; None where it may be a mistake of ours."""
    if error.errno not in REMEDIES:
        return None
    return UserError(f"{what}: {(error.strerror or str(error)).lower()}; {REMEDIES[error.errno]}")


@contextmanager
def writing(setting: str, path: Path) -> Iterator[None]:
    """A context that writes to ``path``, which the user named as ``setting``.

    Raises:
        UserError: where the file system refuses: no space, no permission, a file in the way.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = of_the_system(error)
        if refused is None:
            raise
        what = f"{setting} {cut(str(path))}"
        if refused.errno == errno.ENOENT and not path.parent.exists():
            raise UserError(f"{what}: there is no folder {cut(str(path.parent))}") from error
        if refused.errno == errno.ENOENT and Path(str(refused.filename)).parent == path.parent:
            raise UserError(f"{what}: nothing can be made in {cut(str(path.parent))}; choose another folder") from error
        raise refusal(refused, f"{what}: can't write there") or error from error


def of_the_system(error: Exception) -> OSError | None:
    """The operating system's error that one stands for: safetensors, written in Rust, has a type of its own."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message as one line; its kind where it says nothing."""
    return cut(" ".join(str(error).split()) or type(error).__name__, most)


def cut(text: str, most: int = LONGEST) -> str:
    """The beginning of a text that is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}…"


def printable(text: str) -> str:
    """Text without control characters, line breaks aside: what strangers wrote must not steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
