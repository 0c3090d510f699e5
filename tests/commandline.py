"""The command line in this process, by the same way as the installed program, and what a folder held before it."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from faultydisk import OWNERS

from diffexp import cli, train
from diffexp.config import Recipe

LONGEST = 600
"""No complaint is longer: it is read in a terminal."""


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def diffexp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ``diffexp ARGUMENTS``; whatever is no clean exit is raised."""

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["diffexp", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, said.err)

    return run


def refused(said: Said, *parts: str | tuple[str, ...], lines: int = 1) -> None:
    """Asserts that a command ended with exit code 2 and one clear line a mistake, which has all of ``parts``.

    A tuple is one part in the words of several versions of a library.
    """
    assert said.code == 2, said
    complaints = said.err.strip("\n").split("\n")
    assert len(complaints) == lines, said.err
    for line in complaints:
        assert line.startswith("error: "), said.err
        assert line.isprintable(), repr(line)
        assert len(line) <= LONGEST, f"{len(line)} letters: {line[:LONGEST]}"
    for part in parts:
        assert any(words in said.err for words in ([part] if isinstance(part, str) else part)), said.err


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder: a digest of each file, the target of each link."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(where) / name
            key = str(path.relative_to(folder))
            if path.is_symlink():
                found[key] = f"→ {path.readlink()}"
            elif path.is_file():
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[key] = "folder" if path.is_dir() else "special"
    return found


def make_read_only(folder: Path, patch: pytest.MonkeyPatch, code: int = errno.EROFS) -> None:
    """Lets nothing below a folder be made, changed or removed: permissions would not do, for root has them all."""

    def guarded(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def guard(path: Any, *arguments: Any, **options: Any) -> Any:
            inside = isinstance(path, (str, os.PathLike)) and Path(path).absolute().is_relative_to(folder)
            if (inside or "dir_fd" in options) and writes(*arguments, **options):
                raise OSError(code, os.strerror(code), str(path))
            return function(path, *arguments, **options)

        return guard

    def to_write(mode: str | int = "r", *_: Any, **options: Any) -> bool:
        mode = options.get("mode", mode)
        return bool(mode & (os.O_WRONLY | os.O_RDWR)) if isinstance(mode, int) else bool(set(mode) & set("wax+"))

    for owner in (builtins, io, *OWNERS):
        patch.setattr(owner, "open", guarded(owner.open, to_write))
    for owner in OWNERS:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "symlink", "truncate", "utime"):
            if hasattr(owner, name):
                patch.setattr(owner, name, guarded(getattr(owner, name), lambda *_, **__: True))


def commands(app: typer.Typer, *above: str) -> Iterator[list[str]]:
    """Every command, with the group that it is in, and every group that is a command itself."""
    for command in app.registered_commands:
        if command.callback:
            yield [*above, command.name or command.callback.__name__.replace("_", "-")]
    for group in app.registered_groups:
        if group.typer_instance:
            inside = [*above, *[group.name] * isinstance(group.name, str)]
            if group.typer_instance.registered_callback and inside:
                yield inside
            yield from commands(group.typer_instance, *inside)


def sets(**changes: Any) -> list[str]:
    """``--set`` for each change; a double underscore stands for a dot."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return [part for key, value in pairs for part in ("--set", f"{key}={json.dumps(value)}")]


def tiny(model: Path | str, **changes: Any) -> list[str]:
    """Overrides that make any recipe a run of a second on a tiny model."""
    settings: dict[str, Any] = {
        "model__path": str(model),
        "reward": "jpeg-compressibility",
        "prompts": "text:a cat",
        "iterations": 1,
        "samples": 2,
        "rollout__images_per_prompt": 1,
        "sampler__steps": 2,
        "lora__rank": 2,
        "evaluation__images": 1,
        "evaluation__prompts": ["text:a cat"],
        "evaluation__rewards": [],
        "preview__images": 1,
        "trackers": [],
        "device": "cpu",
    }
    return sets(**{**settings, **changes})


def recipe(model: Path | str) -> dict[str, Any]:
    """The tables of such a run."""
    return {
        "iterations": 1,
        "samples": 2,
        "prompts": "text:a cat",
        "reward": "jpeg-compressibility",
        "device": "cpu",
        "trackers": [],
        "model": {"path": str(model)},
        "lora": {"rank": 2},
        "sampler": {"steps": 2},
        "evaluation": {"images": 1},
        "preview": {"images": 1},
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """Such a run, finished."""
    return train(Recipe.parse(recipe(sd_folder), "test"), tmp_path_factory.mktemp("finished") / "run")
