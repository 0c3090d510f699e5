"""A run, or several, as one HTML file: curves, images, exploration, recipe. It opens from disk, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from diffexp.errors import UserError, writing
from diffexp.report.page import render
from diffexp.report.sources import Material

__all__ = ["FILE", "Material", "render", "write"]

FILE = "report.html"


def write(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of some runs to ``out``, by default ``report.html`` in the folder of a single run.

    A file that is there is replaced, in one go.

    Raises:
        UserError: if a run is none, several runs have no ``out``, or it can't be written.
    """
    if out is None and len(runs) > 1:
        raise UserError("several runs have no folder in common: say where their report goes, --out FILE")
    file = Path(out) if out is not None else Path(runs[0]) / FILE
    if file.is_dir():
        file = file / FILE
    text, part = render(Material.read(runs)), file.with_name(f".{file.name}.part")
    with writing("--out", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # in a stranger's run it may be a link
        try:
            with part.open("x", encoding="utf-8", newline="\n") as opened:
                opened.write(text)
            part.replace(file)
        except OSError:
            with suppress(OSError):
                part.unlink()  # gives the space back
            raise
    return file
