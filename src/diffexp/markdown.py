"""Text that others wrote, in Markdown: it shows as it is, and is neither markup nor HTML."""

from __future__ import annotations

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
