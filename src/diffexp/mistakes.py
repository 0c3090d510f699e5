"""Says what is wrong with a recipe: every mistake at once, each in one line with its key, its value and the remedy."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from diffexp.errors import closest, cut
from diffexp.foreign import OTHER_NAMES

MOST = 20
"""Mistakes that are told of one recipe."""


def mistakes(schema: type[BaseModel], data: Mapping[str, Any]) -> list[str]:
    """A line for every mistake in ``data``. What is found is taken out and the rest read again until all is well."""
    lines: list[str] = []
    remaining = copy.deepcopy(dict(data))
    while True:
        try:
            schema.model_validate(remaining)
        except ValidationError as error:
            found = error.errors()
            lines = list(dict.fromkeys([*lines, *(line for item in found[:MOST] for line in explain(schema, item))]))
            if len(found) > MOST:
                return [*lines, f"{len(found) - MOST:,} further mistakes"]
            if not any([remove(remaining, keys(schema, item)) for item in found]):
                return lines
        else:
            return lines


def keys(schema: type[BaseModel], item: Mapping[str, Any]) -> list[str]:
    """The key of the recipe that an error is about. In a union, pydantic names the member: that is no key."""
    found: list[str] = []
    for part in item["loc"]:
        options = sections(schema, found)
        if isinstance(part, str) and not (len(options) > 1 and any(part in tag(option) for option in options)):
            found.append(part)
    return found


def explain(schema: type[BaseModel], item: Mapping[str, Any]) -> list[str]:
    """The lines for one of pydantic's errors."""
    path = keys(schema, item)
    key, kind = ".".join(path), item["type"]
    if kind == "extra_forbidden":
        options = sections(schema, path[:-1])
        fitting = [option for option in options if set(tag(option)) & set(item["loc"])] or options
        known = sorted({name for option in fitting for name in option.model_fields})
        if len(path) == 1 and path[0] in OTHER_NAMES:
            return [f"unknown key {key!r}: here that is {OTHER_NAMES[key]}"]
        guess = closest(path[-1], known)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}"
        return [f"unknown key {cut(repr(key))}: {hint}"]
    if kind == "value_error":
        return [f"{key}: {line}" if key else line for line in str(item["ctx"]["error"]).split("\n")]
    if kind == "union_tag_invalid":
        known, name = [name for option in sections(schema, path) for name in tag(option)], str(item["ctx"]["tag"])
        guess = closest(name, known)
        hint = f"did you mean {guess!r}? " if guess else ""
        return [f"{key}.name = {cut(repr(name))}: {hint}known: {', '.join(known)}"]
    return [f"{key} = {cut(json.dumps(item['input'], default=str))}: {advice(kind, key, item)}"]


def listed(text: str) -> str:
    """A text as a list. Of ["a", "b"] a shell leaves [a, b]: then as it was meant, and quoted for a shell."""
    if text.startswith("[") and text.endswith("]"):
        return f"'{json.dumps([part.strip() for part in text[1:-1].split(',')])}', in single quotes in a shell"
    return json.dumps([text])


def advice(kind: str, key: str, item: Mapping[str, Any]) -> str:
    """What is wrong with a value, or how TOML writes the list or table that should stand there."""
    if kind == "missing":
        return "too few values"
    if kind == "tuple_type":
        return "write a list" + (f": {cut(listed(item['input']))}" if isinstance(item["input"], str) else "")
    if kind in ("model_type", "model_attributes_type"):
        return f"write a table: [{key}]"
    return item["msg"][0].lower() + item["msg"][1:]


def sections(schema: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    """The settings classes that a section of the recipe may be: several where it is a union, none for a value."""
    found = [schema]
    for key in path:
        annotations = [option.model_fields[key].annotation for option in found if key in option.model_fields]
        members = [member for annotation in annotations for member in within(annotation)]
        found = [member for member in members if is_section(member)]
    return found


def is_section(annotation: Any) -> bool:
    """Whether a type is that of a section of the recipe."""
    # Python 3.10 calls list[int] a type, too
    return isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel)


def within(annotation: Any) -> list[Any]:
    """An annotation, and the types that it is made of."""
    return [annotation, *(inner for part in get_args(annotation) for inner in within(part))]


def tag(option: type[BaseModel]) -> tuple[str, ...]:
    """The names under which a union knows its member."""
    return get_args(option.model_fields["name"].annotation) if "name" in option.model_fields else ()


def remove(data: dict[str, Any], path: list[str]) -> bool:
    """Takes a key out of nested tables; false if it is not there."""
    for key in path[:-1]:
        data = data.get(key, {})
        if not isinstance(data, dict):
            return False
    return bool(path) and data.pop(path[-1], None) is not None
