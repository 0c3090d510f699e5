"""A disk that refuses one operation, and pictures of what a death before each operation would leave behind."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "replace", "truncate", "unlink", "rmdir")
"""Everything in ``os`` by which the code changes a file or makes a change last."""


OWNERS = (os, *filter(None, [getattr(pathlib, "_normal_accessor", None)]))
"""Where the code finds these: Python 3.10's pathlib keeps references of its own."""


class Disk:
    """Counts the operations of the code under test and has ``before(number, name, arguments)`` called before each."""

    def __init__(self) -> None:
        self.before: Callable[[int, str, tuple[Any, ...]], None] = lambda *_: None
        self.log: list[str] = []
        self.busy = False

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patch:
            for owner in OWNERS:
                for name in filter(partial(hasattr, owner), OPERATIONS):
                    patch.setattr(owner, name, self.announced(name, getattr(owner, name)))
            yield self

    def announced(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any, **options: Any) -> Any:
            if not self.busy:
                self.busy = True  # ``before`` uses the disk as well
                try:
                    self.log.append(name)
                    self.before(len(self.log) - 1, name, arguments)
                finally:
                    self.busy = False
            return function(*arguments, **options)

        return both


def refusing(number: int, code: int = errno.EIO) -> Disk:
    """A disk that refuses its operation of that number. What it refuses to write, it has half written."""
    disk = Disk()

    def refuse(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number:
            if name == "write":
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise OSError(code, os.strerror(code))

    disk.before = refuse
    return disk


class Camera(Disk):
    """Copies a folder before every operation: what is found there if the process dies at that moment.

    Without ``power`` the machine dies too, and what was not synced is lost: the content of files, and the last rename.
    """

    def __init__(self, folder: Path, album: Path, power: bool) -> None:
        super().__init__()
        self.folder, self.album, self.power = folder, album, power
        self.synced = {path.stat().st_ino for path in folder.rglob("*")}
        self.renamed: tuple[Path, Path] | None = None
        self.replaced: bytes | None = None
        self.before = self.shoot

    def shoot(self, count: int, name: str, arguments: tuple[Any, ...]) -> None:
        picture = self.album / f"{count:03d}-{name}"
        shutil.copytree(self.folder, picture, copy_function=self.copy)
        if self.renamed and not self.power:
            source, target = (picture / path.relative_to(self.folder) for path in self.renamed)
            if target.exists():
                shutil.move(target, source)
            if self.replaced is not None:
                target.write_bytes(self.replaced)
        self.foresee(name, arguments)

    def foresee(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Keeps account of what the operation makes last, or undoes."""
        if name == "write":
            self.synced.discard(os.fstat(arguments[0]).st_ino)
        elif name == "fsync":
            synced = os.fstat(arguments[0]).st_ino
            self.synced.add(synced)
            if self.renamed and self.renamed[1].parent.stat().st_ino == synced:
                self.renamed = None
        elif name in ("rename", "replace"):
            self.renamed = Path(arguments[0]), Path(arguments[1])
            self.replaced = self.renamed[1].read_bytes() if self.renamed[1].is_file() else None

    def copy(self, source: str, target: str) -> None:
        if self.power or Path(source).stat().st_ino in self.synced:
            shutil.copyfile(source, target)
        else:
            Path(target).touch()

    @property
    def pictures(self) -> list[Path]:
        return sorted(self.album.iterdir())
