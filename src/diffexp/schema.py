"""Recipes for people: every setting, the JSON Schema by which editors check a recipe, copies of shipped ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffexp import prompts, rewards
from diffexp.config import Recipe
from diffexp.errors import UserError, unknown, writing
from diffexp.mistakes import is_section, within
from diffexp.toml import shipped, text_of

FILE = "recipe.schema.json"
"""What the schema is called beside a recipe, and in this package."""
DIRECTIVE = "#:schema "
"""What the first line of a recipe says before the schema's path."""
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def schema() -> dict[str, Any]:
    """The schema of a recipe's TOML: every setting with its type, range, default and description."""
    whole = tidy(Recipe.model_json_schema())
    settings, evaluation = whole["properties"], whole["$defs"]["EvaluationSettings"]["properties"]
    settings["reward"] |= known(rewards.available())
    settings["prompts"] |= known(prompts.available())
    evaluation["rewards"]["items"] = known(rewards.available())
    evaluation["prompts"]["items"] = known(prompts.available())
    base = {"description": "A recipe, shipped or a file beside this one, whose settings hold where this one is silent."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of diffexp",
        **whole,
        "properties": {"base": base | known(shipped()), **settings},
    }


def to_json() -> str:
    """The schema as a file holds it."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def known(names: Iterable[str]) -> dict[str, Any]:
    """Any text; editors offer these."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string"}]}


def tidy(part: Any) -> Any:
    """pydantic's schema without what TOML or editors have no use for: titles, null, defaults of whole sections."""
    if isinstance(part, list):
        return [tidy(item) for item in part]
    if not isinstance(part, dict):
        return part
    if "properties" in part:
        part = {**part, "properties": {name: tidy(setting) for name, setting in part["properties"].items()}}
    dropped = {"title", "discriminator"}
    if isinstance(part.get("default", {}), dict) or part["default"] is None:
        dropped.add("default")
    kept: dict[str, Any] = {
        key: value if key == "properties" else tidy(value) for key, value in part.items() if key not in dropped
    }
    for bound in BOUNDS & kept.keys():
        kept[bound] = int(kept[bound]) if kept[bound] == int(kept[bound]) else kept[bound]  # pydantic's versions differ
    # not oneOf: a child recipe may leave the name to its base, and its other keys fit several algorithms
    options = [option for option in kept.pop("oneOf", kept.pop("anyOf", [])) if option != {"type": "null"}]
    return kept | options[0] if len(options) == 1 else kept | ({"anyOf": options} if options else {})


def settings(of: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted name. Where algorithms share a name, each of them has one."""
    for name, field in of.model_fields.items():
        sections = [part for part in within(field.annotation) if is_section(part)]
        for section in sections:
            yield from settings(section, f"{prefix}{name}.")
        if not sections:
            yield prefix + name, field


def choices(key: str) -> list[str]:
    """The values of a setting that takes some of a few, as ``--set`` takes them."""
    return [
        json.dumps([value]) if get_origin(field.annotation) is tuple else str(value)
        for name, field in settings()
        if name == key
        for part in within(field.annotation)
        if get_origin(part) is Literal
        for value in get_args(part)
    ]


def copy_recipe(name: str, to: Path) -> Path:
    """Copies a shipped recipe, and the schema beside it; ``to`` is a TOML file to make, or a folder.

    Raises:
        UserError: if there is no such recipe, or the file exists already, or can't be written.
    """
    if name not in shipped():
        raise unknown("recipe", name, shipped(), "`diffexp recipes` lists them")
    to = to / f"{name}.toml" if to.is_dir() else to
    if to.suffix != ".toml":
        raise UserError(f"{to}: the name of a recipe's file ends in .toml")
    text = text_of(name)
    own = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(DIRECTIVE))
    with writing("FILE", to):
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            with to.open("x", encoding="utf-8") as file:
                file.write(f"{DIRECTIVE}{FILE}\n{own}")
        except FileExistsError:
            raise UserError(f"{to} exists already: choose another name") from None
        (to.parent / FILE).write_text(to_json(), encoding="utf-8")
    return to
