"""Writes ``docs/settings.md``, the page of every setting, from the types in ``diffexp.settings`` and ``.config``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffexp.config import ALGORITHM_DEFAULTS, Recipe

PAGE = Path("docs/settings.md")
INTRODUCTION = """\
# Every setting

<!-- written by `python -m tools.docs settings` from the types in src/diffexp/settings.py and config.py; edit those -->

A recipe is a TOML file. What it leaves out has the default below, the paper's where the paper has one; a setting
without a default is absent unless given. `--set section.key=value` on the command line, or
`Recipe.load(name, {"section.key": value})` in Python, changes one setting. `base = "NAME"` at the top of a recipe takes
whatever the recipe does not say from another one, shipped or in a file beside it.
"""

OWN = "file.py:Class"
"""What stands for a name that the user chooses."""

Schema = Mapping[str, Any]


def page() -> str:
    """The whole page."""
    schema = Recipe.model_json_schema()
    return INTRODUCTION + "".join(line + "\n" for line in section(schema, schema, "")) + by_algorithm()


def section(schema: Schema, root: Schema, prefix: str) -> Iterator[str]:
    """A table of a section's own settings, then a part for each section inside it."""
    inner = {key: found for key, value in schema["properties"].items() if (found := sections(value, root))}
    own = {key: value for key, value in schema["properties"].items() if key not in inner and key != "name"}
    if own:
        yield from ("", "| setting | default | values | what |", "| --- | --- | --- | --- |")
    for key, value in own.items():
        cells = (f"`{prefix}{key}`", default(value), kind(value), value.get("description", ""))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    for key, options in inner.items():
        one_of = "One of these, by its name." if len(options) > 1 else ""
        yield from heading(2, f"{prefix}{key}", schema["properties"][key].get("description", one_of))
        for option in options:
            if len(options) > 1:
                name = option["properties"]["name"]
                yield from heading(3, f'{prefix}{key}.name = "{name.get("const", OWN)}"', name.get("description", ""))
            yield from section(option, root, f"{prefix}{key}.")


def heading(level: int, title: str, note: str = "") -> Iterator[str]:
    """A heading, and the line under it."""
    yield from ("", f"{'#' * level} `{title}`")
    if note:
        yield from ("", note)


def sections(value: Schema, root: Schema) -> list[Schema]:
    """The tables that a setting may be; none where it is a plain value."""
    members = [value, *value.get("anyOf", ()), *value.get("oneOf", ())]
    found = [root["$defs"][member["$ref"].rpartition("/")[2]] for member in members if "$ref" in member]
    return [table for table in found if "properties" in table]


def default(value: Schema) -> str:
    """A setting's default, as a recipe would say it."""
    if value.get("default") is None:
        return ""
    return f"`{json.dumps(value['default'], ensure_ascii=False)}`"


def kind(value: Schema) -> str:
    """What a setting's values may be, in words."""
    if "enum" in value:
        return ", ".join(f"`{json.dumps(one)}`" for one in value["enum"])
    if options := value.get("anyOf"):
        return " or ".join(kind(option) for option in options if option.get("type") != "null")
    if value.get("type") == "array":
        if places := value.get("prefixItems"):
            return f"[{', '.join(kind(place) for place in places)}]"
        return f"list of {kind(value['items'])}"
    names = {"string": "text", "boolean": "`true`, `false`", "object": "table"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    # versions of pydantic differ in whether a bound is 0 or 0.0
    known = {key: int(value[key]) if value[key] == int(value[key]) else value[key] for key in signs if key in value}
    bounds = [f"{signs[key]} {bound:,}" for key, bound in known.items()]
    return " ".join([names.get(value["type"], value["type"]), ", ".join(bounds)]).strip()


def by_algorithm() -> str:
    """The defaults that are not the same for every algorithm."""
    rows = {(part, key) for parts in ALGORITHM_DEFAULTS.values() for part, keys in parts.items() for key in keys}
    names = list(ALGORITHM_DEFAULTS)
    lines = ["", "## Defaults that depend on the algorithm", "", f"| setting | {' | '.join(names)} |"]
    lines.append("| --- |" + " --- |" * len(names))
    for part, key in sorted(rows):
        values = (ALGORITHM_DEFAULTS[name].get(part, {}).get(key) for name in names)
        lines.append(f"| `{part}.{key}` | " + " | ".join("" if v is None else f"`{v:g}`" for v in values) + " |")
    return "\n".join(lines) + "\n"
