"""TOML files: reading recipes, overriding single keys, writing a resolved recipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffexp.errors import UserError, cut, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = files("diffexp") / "recipes"
LARGEST = 100_000
"""Bytes of a recipe: thirty times what a resolved one takes."""
DEEPEST = 16
"""Tables and lists of a recipe, one in another."""
DOTTED = re.compile(r"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){40}""")
"""A key of so many parts; what tomllib does with one grows as the square of its length."""
LONGEST_CHAIN = 8
"""Recipes that stand on one another."""


@cache
def shipped() -> Mapping[str, str]:
    """The recipes of the package: name → the first comment of its file."""
    names = sorted(Path(entry.name).stem for entry in FOLDER.iterdir() if entry.name.endswith(".toml"))
    return MappingProxyType({name: first_comment(text_of(name)) for name in names})


def text_of(name: str) -> str:
    """The file of a shipped recipe."""
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def memory_of(name: str) -> float:
    """GiB that a shipped recipe takes of a GPU's memory, or of the machine's: a comment in it or its base says so."""
    text = text_of(name)
    if found := re.search(r"^# Memory: about ([\d.]+) GiB", text, re.MULTILINE):
        return float(found[1])
    return memory_of(tomllib.loads(text)["base"])


def first_comment(text: str) -> str:
    """The first line of TOML that is a comment for people, which ``#:schema`` is not."""
    comments = (line for line in text.splitlines() if line.startswith("#") and not line.startswith("#:"))
    return next(comments, "").lstrip("# ")


def read_toml(source: str | Path) -> dict[str, Any]:
    """The tables of a TOML file or of a shipped recipe, over those of its ``base``.

    ``base = "sd15-ddpo"`` names the recipe, shipped or a file beside or below this one, whose settings hold where this
    one is silent.

    Raises:
        UserError: if there is neither, it is no TOML, it is its own base, or the base lies elsewhere.
    """
    return _with_base(str(source), ())


def _with_base(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    where = f"{above[-1]}: base = {name!r}: " if above else ""
    if _key(name) in map(_key, above):
        raise UserError(f"{where}the recipe is its own base ({' → '.join((*above, name))})")
    if len(above) > LONGEST_CHAIN:
        raise UserError(f"{where}at most {LONGEST_CHAIN} recipes may stand on one another")
    try:
        data = _tables(name)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{name}: base = {cut(str(base))}: give the name of a recipe, or a TOML file")
    if base not in shipped() and name not in shipped():
        base = _beside(name, base)
    return merged(inherited(_with_base(base, (*above, name)), data), data)


def _key(name: str) -> str:
    """What tells two recipes apart, however their paths are spelled."""
    return name if name in shipped() else str(Path(name).resolve())


def _beside(name: str, base: str) -> str:
    """The path of a base, which a stranger's recipe may have written: it must not lead out of the recipe's folder."""
    folder = Path(name).parent
    if not (folder / base).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name}: base = {cut(repr(base))} lies outside the recipe's folder: put it beside the recipe")
    return str(folder / base)


def _tables(name: str) -> dict[str, Any]:
    if name in shipped():
        return tomllib.loads(text_of(name))
    if not name.endswith(".toml"):
        raise unknown("recipe", name, shipped(), "`diffexp recipes` lists them; a file's name must end in .toml")
    return read_tables(Path(name), f"the recipe {cut(name)}")


def read_tables(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file, which may be anybody's; ``what`` is what messages call it.

    Raises:
        UserError: if it is no file, too large, not UTF-8, no TOML, or nested too deeply.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"can't read {what}: no file; give a TOML file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"can't read {what}: too large; a recipe has at most {LARGEST:,} bytes")
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {what}: {error.strerror}; check its name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is no valid TOML: not UTF-8 text; save it as UTF-8") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what} is no valid TOML: {cut(str(error), 200)}") from error


def loads(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ValueError: if it is none, or nested too deeply.
    """
    if DOTTED.search(text):
        raise ValueError("nested too deeply: a key of more than 40 parts")
    try:
        data = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    check_depth(data)
    return data


def check_depth(data: Any) -> None:
    """Checks that later steps may walk through nested tables and lists.

    Raises:
        ValueError: if they are nested too deeply.
    """
    level = [data]
    for _ in range(DEEPEST):
        level = [item for table in level for item in _items(table)]
        if not level:
            return
    raise ValueError(f"nested too deeply; a recipe has at most {DEEPEST} levels")


def _items(table: Any) -> Iterable[Any]:
    return table.values() if isinstance(table, Mapping) else table if isinstance(table, list) else ()


def inherited(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """What tables that say ``above`` take from those below: nothing that only makes sense with what is replaced.

    Settings of another algorithm, and the other way to say how long the guidance stays low.
    """
    kept = dict(below)
    old, new = section(below, "algorithm"), section(above, "algorithm")
    if "name" in new and new["name"] != old.get("name", "ddpo"):
        kept["algorithm"] = {}
    given = section(section(above, "exploration"), "guidance").keys() & {"threshold", "fraction"}
    exploration = section(below, "exploration")
    if given and isinstance(guidance := exploration.get("guidance"), Mapping):
        left = {key: value for key, value in guidance.items() if key not in ("threshold", "fraction")}
        kept["exploration"] = {**exploration, "guidance": left}
    return kept


def section(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of a recipe; empty if it is none."""
    found = tables.get(name)
    return found if isinstance(found, Mapping) else {}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables over nested tables: sections are merged, values of ``above`` win."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            both[key] = merged(below[key], above[key])
    return both


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``section.key`` in nested tables.

    Raises:
        UserError: if a section is a value, or the key has too many of them.
    """
    *sections, last = key.split(".")
    if len(sections) > DEEPEST:
        raise UserError(f"--set {cut(key)}: nested too deeply; write section.key=value")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {cut(key)}: {cut(section)} is a value, not a section")
    data[last] = value


def parse_overrides(texts: Sequence[str] | None) -> dict[str, Any]:
    """The settings that ``--set`` gave, each as ``parse_override`` reads it; a later one holds."""
    return dict(map(parse_override, texts or ()))


def parse_override(text: str) -> tuple[str, Any]:
    """("section.key", value) from "section.key=value"; the value in TOML, or else a plain string.

    Raises:
        UserError: if there is no "=", more than one setting, or what is no Unicode.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {cut(repr(text))}: write section.key=value")
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):  # how Python hands on bytes that are not UTF-8
        raise UserError(f"--set {cut(repr(text))}: not valid Unicode; write it in UTF-8")
    try:
        tables = loads(f"value = {raw}")
    except ValueError:
        tables = {"value": raw.strip()}
    if tables.keys() != {"value"}:
        raise UserError(f"--set {cut(repr(text))}: one setting for each --set")
    return key.strip(), tables["value"]


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def written_as_read(table: Mapping[str, Any]) -> bool:
    """Whether a table is still the same when it was written by :func:`toml_lines` and read again."""
    try:
        plain = json.loads(json.dumps({key: value for key, value in table.items() if value is not None}))
        return tomllib.loads("\n".join(toml_lines(plain))) == plain
    except (ValueError, TypeError, RecursionError):
        return False


def toml_lines(table: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """A table as TOML: first its values, then its sections. JSON's strings, numbers and arrays are TOML's too."""
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
    for key, value in table.items():
        if isinstance(value, dict):
            yield f"\n[{prefix}{key}]"
            yield from toml_lines(value, f"{prefix}{key}.")
