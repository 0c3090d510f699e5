"""What users bring: a function or a class of theirs, named ``module:name`` or ``path/file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from diffexp.errors import UserError, cut, one_line, unknown

PACKAGE = Path(__file__).parent
LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))


def split(kind: str, name: str) -> tuple[str, str]:
    """The two halves of a name. ``kind`` is what it names: "reward".

    Raises:
        UserError: if a half is missing.
    """
    where, _, attribute = name.rpartition(":")
    if not where.strip() or not attribute.strip():
        raise UserError(f"{kind} {name!r} is no custom {kind}: write it as 'module:name' or 'file.py:name'")
    return where.strip(), attribute.strip()


def check(kind: str, name: str) -> None:
    """Checks that the file or the package of a name is there, without importing it.

    Raises:
        UserError: if it is not.
    """
    where, _ = split(kind, name)
    shown, package = cut(repr(name)), where.partition(".")[0]
    try:
        there = Path(where).is_file() if where.endswith(".py") else is_module(package)
    except (OSError, ValueError, ImportError) as error:  # a name that no file or module can have
        raise UserError(f"{kind} {shown}: no such file or module ({one_line(error)}); check its name") from error
    if not there and where.endswith(".py"):
        raise UserError(f"{kind} {shown}: there is no file {cut(repr(where))}")
    if not there:
        raise UserError(f"{kind} {shown}: there is no module {cut(repr(package))} to import; a file is 'file.py:name'")


def is_module(package: str) -> bool:
    """Whether a package or module can be imported, without importing it."""
    return package.isidentifier() and importlib.util.find_spec(package) is not None


def find(kind: str, name: str) -> Callable[..., Any]:
    """Imports what a name means.

    Raises:
        UserError: if the file or module is missing, fails on import, or has no such callable.
    """
    where, attribute = split(kind, name)
    try:
        module = from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        # Whatever a user's file raises on import is theirs to mend; the cause stays attached for the traceback.
        raise UserError(f"{kind} {name!r}: importing {where!r} failed with {described(error)}") from error
    try:
        found = attrgetter(attribute)(module)
    except AttributeError:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"{kind} function", name, [f"{where}:{known}" for known in names]) from None
    if not callable(found):
        raise UserError(f"{kind} {name!r}: {attribute!r} is a {type(found).__name__}, not a function")
    return found


def described(error: BaseException) -> str:
    """What a user's code raised, and where: the innermost line that is neither ours nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((str(PACKAGE), "<", *LIBRARIES))]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"


def from_file(path: Path) -> ModuleType:
    """A Python file as a module."""
    path = path.resolve(strict=True)
    # A name of its own, so that the file shadows no installed module and two files of one name do not meet.
    name = f"diffexp_custom_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
