"""TOML files: reading recipes, overriding single keys, writing a resolved recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffexp.errors import UserError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def shipped() -> dict[str, str]:
    """The recipes of the package: name → the first comment line of its file."""
    folder = files("diffexp") / "recipes"
    found = {Path(entry.name).stem: entry for entry in folder.iterdir() if entry.name.endswith(".toml")}
    return {
        name: entry.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, entry in sorted(found.items())
    }


def read_toml(source: str | Path) -> dict[str, Any]:
    """The tables of a TOML file or of a shipped recipe, over those of its ``base``.

    ``base = "sd15-ddpo"`` names the recipe, shipped or a file beside this one, whose settings hold where this one is
    silent.

    Raises:
        UserError: if there is neither, it is no TOML, or it is its own base.
    """
    return _with_base(str(source), ())


def _with_base(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    if name in above:
        raise UserError(f"base = {name!r}: the recipe is its own base ({' → '.join((*above, name))})")
    data = _tables(name)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{name}: base = {base!r}: give the name of a recipe, or a TOML file")
    if base not in shipped() and name not in shipped():
        base = str(Path(name).parent / base)
    return merged(_with_base(base, (*above, name)), data)


def _tables(name: str) -> dict[str, Any]:
    if name in shipped():
        return tomllib.loads((files("diffexp") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))
    if not name.endswith(".toml"):
        raise unknown("recipe", name, shipped(), "`diffexp recipes` lists them; a file's name must end in .toml")
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read the recipe {name}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"the recipe {name} is no valid TOML: {error}") from error


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables over nested tables: sections are merged, values of ``above`` win."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            both[key] = merged(below[key], above[key])
    return both


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``section.key`` in nested tables."""
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {key}: {section} is a value, not a section")
    data[last] = value


def parse_override(text: str) -> tuple[str, Any]:
    """("section.key", value) from "section.key=value"; the value in TOML, or else a plain string.

    Raises:
        UserError: if there is no "=".
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return key.strip(), value


def toml_lines(table: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """A table as TOML: first its values, then its sections. JSON's strings, numbers and arrays are TOML's too."""
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield f"\n[{prefix}{key}]"
            yield from toml_lines(value, f"{prefix}{key}.")
