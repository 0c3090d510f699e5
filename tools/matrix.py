"""Runs the test suite over the supported versions: each Python, with the oldest and the newest of what we stand on.

    python tools/matrix.py                                  # every corner; hours, and some GB for each
    python tools/matrix.py 3.10-oldest 3.13-newest          # some corners
    python tools/matrix.py 3.10-oldest -- tests/test_cli.py # some tests
    python tools/matrix.py --list

"oldest" is the lower bound of each requirement in pyproject.toml: of all of them on the oldest Python, and of torch,
diffusers, transformers and peft on the others, for which the rest has no such old builds. A corner's environment stays
in build/matrix and is used again; --fresh makes it anew. Options of pip, such as where to find torch without CUDA, go
into PIP_* variables or pip's configuration, as ever.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ENDS = ("oldest", "newest")
MAIN = ("torch", "diffusers", "transformers", "peft")


class Corner(NamedTuple):
    """One combination of versions."""

    python: str
    end: str

    @property
    def name(self) -> str:
        return f"{self.python}-{self.end}"

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "matrix" / self.name


CORNERS = {corner.name: corner for corner in (Corner(python, end) for end in ENDS for python in PYTHONS)}


def lower_bounds(requirements: Iterable[str]) -> dict[str, str]:
    """The version after ">=" of each requirement that has one."""
    found = (re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


def constraints(corner: Corner, requirements: Iterable[str]) -> list[str]:
    """What pip may install in a corner: nothing is said of the newest."""
    if corner.end == "newest":
        return []
    bounds = lower_bounds(requirements)
    names = bounds if corner.python == PYTHONS[0] else MAIN
    return [f"{name}=={bounds[name]}" for name in names]


def interpreter(version: str) -> str | None:
    """A Python of this version that starts, or None."""
    shims = Path.home() / ".pyenv" / "versions"
    candidates = [shutil.which(f"python{version}"), *shims.glob(f"{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False).stdout
        if said.startswith(f"Python {version}."):
            return str(candidate)
    return None


def install(corner: Corner, python: str, requirements: Sequence[str]) -> None:
    """Makes the corner's environment, if it is not there."""
    done = corner.folder / "installed"
    if done.is_file():
        return
    shutil.rmtree(corner.folder, ignore_errors=True)
    run([python, "-m", "venv", str(corner.folder)])
    limits = corner.folder / "constraints.txt"
    limits.write_text("\n".join(constraints(corner, requirements)) + "\n", encoding="utf-8")
    run([str(corner.folder / "bin" / "pip"), "install", "--quiet", "--constraint", str(limits), "--editable", ".[dev]"])
    done.touch()


def run(command: Sequence[str]) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def try_corner(corner: Corner, tests: Sequence[str], requirements: Sequence[str], fresh: bool) -> str:
    """Runs the tests in a corner; says in a few words how that ended."""
    python = interpreter(corner.python)
    if python is None:
        return f"skipped: no Python {corner.python} here"
    if fresh:
        shutil.rmtree(corner.folder, ignore_errors=True)
    try:
        install(corner, python, requirements)
    except subprocess.CalledProcessError as error:
        return f"could not be installed (exit code {error.returncode})"
    own = str(corner.folder / "bin" / "python")
    run([own, "-m", "pip", "list"])
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    # old libraries use what newer ones below them have deprecated since: that is not ours to mend
    lenient = ["-W", "default::DeprecationWarning"] if corner.end == "oldest" else []
    done = subprocess.run([own, "-m", "pytest", *lenient, *tests], cwd=ROOT, env=environment, check=False)
    return "passed" if done.returncode == 0 else f"FAILED (pytest's exit code {done.returncode})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corners", nargs="*", metavar="CORNER", help=f"default: all; {', '.join(CORNERS)}")
    parser.add_argument("--list", action="store_true", help="only say what each corner installs")
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    own, _, tests = partition(sys.argv[1:])
    options = parser.parse_args(own)
    if unknown := [name for name in options.corners if name not in CORNERS]:
        parser.error(f"no such corner: {', '.join(unknown)}; known: {', '.join(CORNERS)}")
    chosen = [CORNERS[name] for name in options.corners] or list(CORNERS.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if options.list:
        for corner in chosen:
            print(f"{corner.name:12}", ", ".join(constraints(corner, project["dependencies"])) or "the newest of all")
        return 0
    outcomes = {c.name: try_corner(c, tests, project["dependencies"], options.fresh) for c in chosen}
    for name, outcome in outcomes.items():
        print(f"{name:12} {outcome}")
    return any(outcome != "passed" and not outcome.startswith("skipped") for outcome in outcomes.values())


def partition(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """The arguments before "--", and those after it."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:cut]), "--", list(arguments[cut + 1 :])


if __name__ == "__main__":
    sys.exit(main())
