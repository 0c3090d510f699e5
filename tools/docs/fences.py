"""What the pages' special code blocks become: ``math`` is typeset, ``source`` shows the code that it names.

Both are done while the site is built: a page needs no script and no network, and quotes no code that has changed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename


def math(text: str, *_: Any, **__: Any) -> str:
    """A formula in LaTeX as MathML."""
    return convert(text, display="block")


def source(text: str, *_: Any, **__: Any) -> str:
    """The code that ``text`` names, one a line: a file, or an object such as ``diffexp.exploration.StepGuidance``.

    Raises:
        OSError: if there is no such file.
        KeyError: if there is no such object.
    """
    return "\n".join(listing(*(find if name.startswith("diffexp.") else read)(name)) for name in text.split())


def read(file: str) -> tuple[str, str]:
    """A file's name and content."""
    return file, Path(file).read_text(encoding="utf-8")


def find(name: str) -> tuple[str, str]:
    """The file that has an object of the package, and the object's code."""
    found = package()[name.removeprefix("diffexp.")]
    return f"src/{found.relative_package_filepath}", found.source


@cache
def package() -> Any:
    """The package, read but not imported."""
    return griffe.load("diffexp", search_paths=["src"])


def listing(file: str, code: str) -> str:
    """Highlighted code under the name of its file."""
    return highlight(code, get_lexer_for_filename(file), HtmlFormatter(wrapcode=True, filename=file))
