"""Prompts from the user's own file: one a line (``.txt``), or one JSON object a line (``.jsonl``)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from diffexp.errors import UserError

SUFFIXES: tuple[str, ...] = (".txt", ".jsonl")
"""The file formats that :func:`read` understands."""

MOST = 50_000
"""Prompts in a file: a run keeps all of them embedded."""
MOST_LINES = 10 * MOST
"""Lines of a file, empty ones and comments too."""
LARGEST = 64_000_000
"""Bytes of a file."""
LONGEST = 10_000
"""Letters of a prompt; text encoders read the first few hundred."""
UNCLEAN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def read(path: Path) -> tuple[str, ...]:
    """The prompts of a file in their order; a prompt that occurs twice is kept twice, so it counts double.

    ``.txt``: one prompt a line; blank lines and lines that start with ``#`` are skipped.
    ``.jsonl``: one object a line whose key "prompt" holds the text; other keys are ignored, blank lines skipped.

    Raises:
        UserError: no such file, another suffix, not UTF-8 text, a line that is no such object, or no prompt at all; too
            many prompts, or one that :func:`clean` refuses.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"prompts {str(path)!r}: a prompt file ends in {' or '.join(SUFFIXES)}")
    text = _text(path)
    parse = _lines if path.suffix.lower() == ".txt" else _objects
    prompts = parse(path, text)
    if not prompts:
        raise UserError(f"prompts {str(path)!r}: the file holds no prompt; write at least one line")
    return prompts


def clean(prompt: str, where: str) -> str:
    """The prompt, if it is one that can be embedded, written and shown; ``where`` is its place in messages.

    Raises:
        UserError: if it is too long, or holds control characters or halves of Unicode's pairs.
    """
    if len(prompt) > LONGEST:
        raise UserError(f"{where}: a prompt of {len(prompt):,} letters; the most are {LONGEST:,}")
    if found := UNCLEAN.search(prompt):
        code = ord(found[0])
        kind = "not valid Unicode" if 0xD800 <= code < 0xE000 else "a control character"
        raise UserError(f"{where}: {kind} (U+{code:04X}) in a prompt; remove it")
    return prompt


def _text(path: Path) -> str:
    try:
        path = path.expanduser()
        if path.exists() and not path.is_file():
            raise UserError(f"prompts {str(path)!r}: cannot be read (no file); give a text file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"prompts {str(path)!r}: too large; a prompt file has at most {LARGEST:,} bytes")
        # utf-8-sig: some editors put a byte order mark first, which would become part of the first prompt.
        text = path.read_text(encoding="utf-8-sig")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"prompts {str(path)!r}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts {str(path)!r}: not UTF-8 text; save the file as UTF-8") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"prompts {str(path)!r}: cannot be read ({reason}); give a readable text file") from None
    if (lines := text.count("\n")) > MOST_LINES:
        raise UserError(f"prompts {str(path)!r}: {lines:,} lines; the most are {MOST_LINES:,}: take a part of them")
    if "\0" in text:
        raise UserError(f"prompts {str(path)!r}: a binary file; give UTF-8 text with one prompt a line")
    return text


def _lines(path: Path, text: str) -> tuple[str, ...]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    kept = [(number, line) for number, line in lines if line and not line.startswith("#")]
    _check_count(path, len(kept))
    return tuple(clean(line, f"prompts {str(path)!r}, line {number}") for number, line in kept)


def _objects(path: Path, text: str) -> tuple[str, ...]:
    # Not splitlines(): a JSON string may hold U+2028, which splitlines() takes for the end of a line.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    _check_count(path, len(lines))
    return tuple(_prompt(line, f"prompts {str(path)!r}, line {number}") for number, line in lines)


def _check_count(path: Path, count: int) -> None:
    if count > MOST:
        raise UserError(f"prompts {str(path)!r}: {count:,} prompts; the most are {MOST:,}: take a part of them")


def _prompt(line: str, where: str) -> str:
    remedy = 'write one object a line, as {"prompt": "a cat riding a bike"}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not valid JSON; {remedy}") from None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{where}: no text under "prompt"; {remedy}')
    return clean(prompt.strip(), where)
