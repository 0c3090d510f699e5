"""Prompts from the user's own file: one a line (``.txt``), or one JSON object a line (``.jsonl``)."""

from __future__ import annotations

import json
from pathlib import Path

from diffexp.errors import UserError

SUFFIXES: tuple[str, ...] = (".txt", ".jsonl")
"""The file formats that :func:`read` understands."""


def read(path: Path) -> tuple[str, ...]:
    """The prompts of a file in their order; a prompt that occurs twice is kept twice, so it counts double.

    ``.txt``: one prompt a line; blank lines and lines that start with ``#`` are skipped.
    ``.jsonl``: one object a line whose key "prompt" holds the text; other keys are ignored, blank lines skipped.

    Raises:
        UserError: no such file, another suffix, not UTF-8 text, a line that is no such object, or no prompt at all.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"prompts {str(path)!r}: a prompt file ends in {' or '.join(SUFFIXES)}")
    text = _text(path)
    parse = _lines if path.suffix.lower() == ".txt" else _objects
    prompts = parse(path, text)
    if not prompts:
        raise UserError(f"prompts {str(path)!r}: the file holds no prompt; write at least one line")
    return prompts


def _text(path: Path) -> str:
    try:
        # utf-8-sig: some editors put a byte order mark first, which would become part of the first prompt.
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompts {str(path)!r}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts {str(path)!r}: not UTF-8 text; save the file as UTF-8") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"prompts {str(path)!r}: cannot be read ({reason}); give a readable text file") from None
    if "\0" in text:
        raise UserError(f"prompts {str(path)!r}: a binary file; give UTF-8 text with one prompt a line")
    return text


def _lines(path: Path, text: str) -> tuple[str, ...]:
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _objects(path: Path, text: str) -> tuple[str, ...]:
    # Not splitlines(): a JSON string may hold U+2028, which splitlines() takes for the end of a line.
    lines = enumerate(text.split("\n"), start=1)
    return tuple(_prompt(path, number, line) for number, line in lines if line.strip())


def _prompt(path: Path, number: int, line: str) -> str:
    remedy = 'write one object a line, as {"prompt": "a cat riding a bike"}'
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"prompts {str(path)!r}, line {number}: not valid JSON; {remedy}") from None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'prompts {str(path)!r}, line {number}: no text under "prompt"; {remedy}')
    return prompt.strip()
