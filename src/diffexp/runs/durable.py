"""Files that are whole or absent, whatever happens while they are written, and folders with one writer at a time.

A file is written under a temporary name, synced, and renamed; its folder is synced after that. Whatever a process that
was killed has left under such a name may go.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from diffexp.errors import UserError

TEMPORARY = ".tmp-"
"""What the names of unfinished files and folders begin with."""

UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""How file systems say that they can't sync a folder."""


def temporary(path: Path) -> Path:
    """The name beside ``path`` under which it is made."""
    return path.with_name(TEMPORARY + path.name)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Makes ``data`` the content of a file: at every moment it has the old content or the new one.

    Raises:
        OSError: if the disk refuses; the file is then as it was.
    """
    with replacing(path) as unfinished:
        write_synced(unfinished, data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context in which a file is written and synced under the name given, and which gives it ``path``'s at its end.

    Raises:
        OSError: if the disk refuses; whatever goes wrong, ``path`` is then as it was, and what was written is gone.
    """
    unfinished = temporary(path)
    try:
        yield unfinished
        unfinished.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            unfinished.unlink()
        raise
    sync_folder(path.parent)


def remove(folder: Path) -> None:
    """Deletes a folder, which first loses its name: none is ever seen half deleted. What can't go stays."""
    unfinished = temporary(folder)
    with suppress(OSError):
        shutil.rmtree(unfinished, ignore_errors=True)
        folder.rename(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Deletes what a killed process has left unfinished in a folder. What can't go stays."""
    for unfinished in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A context in which no other process can claim the folder; the end of this process ends it too.

    Raises:
        UserError: if another process has claimed it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is training this run: wait until it ends, or stop it") from error
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(descriptor)


def is_free(folder: Path) -> bool:
    """Whether no process has claimed a folder; false also where the system has no locks to tell by."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
