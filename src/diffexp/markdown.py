"""Text that others wrote, in Markdown: it shows as it is, and is neither markup nor HTML."""

from __future__ import annotations

from pathlib import Path

from diffexp.errors import printable

ESCAPES = (("\\", "\\\\"), ("`", "\\`"), ("<", "&lt;"), ("](", "]\\("), ("|", "\\|"))


def plain(text: str) -> str:
    """A text for a paragraph, a heading or a table's cell: one line, without HTML, links, code or further cells."""
    text = printable(" ".join(text.split()))
    for mark, escaped in ESCAPES:
        text = text.replace(mark, escaped)
    return text


def code(text: str) -> str:
    """A text as code within a line."""
    return f"`{printable(' '.join(text.split())).replace('`', chr(39))}`"


def replace_section(document: Path, name: str, text: str) -> None:
    """Puts ``text`` between the marks ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a document, instead of what is there.

    The rest stays as it is, so that a document may be partly written by people; where the marks are missing, they are
    added at its end.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = document.read_text(encoding="utf-8") if document.is_file() else ""
    before, begun, rest = old.partition(first)
    _, ended, after = rest.partition(last)
    if not (begun and ended):
        before, after = f"{old.rstrip()}\n\n" if old.strip() else "", "\n"
    document.write_text(f"{before}{first}\n{text.strip()}\n{last}{after}", encoding="utf-8")
