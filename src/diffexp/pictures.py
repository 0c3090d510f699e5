"""Pictures out of a run folder, which may be anybody's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from diffexp.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 8192 * 8192
"""What the largest ``sampler.size`` makes; a file of a few kilobytes may unpack to any number."""

MOMENT = "iteration-"


def open_png(path: Path, largest: int = 8192) -> Image:
    """A PNG as RGB, shrunk to at most ``largest`` pixels a side.

    Pillow looks at the content, not at the name, and some of its readers start other programs: only PNG's is let at it.

    Raises:
        UserError: if the file is missing, damaged, of another format, or has too many pixels.
    """
    from PIL import Image as images

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", images.DecompressionBombWarning)
            with images.open(path, formats=("PNG",)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels")
                picture = image.convert("RGB")
    except Exception as error:  # a damaged file fails in many ways, each with an error of its own
        raise UserError(f"{str(path)!r}: no PNG that can be read ({one_line(error)}); remove it") from error
    picture.thumbnail((largest, largest))
    return picture


def moment_name(iteration: int) -> str:
    """The name of the folder of the samples after an iteration."""
    return f"{MOMENT}{iteration:04d}"


def iterations(samples: Path) -> dict[int, Path]:
    """The folders of a run's samples by their iterations, in their order."""
    found = {path.name.removeprefix(MOMENT): path for path in samples.glob(f"{MOMENT}*") if path.is_dir()}
    return {int(number): found[number] for number in sorted(filter(str.isdecimal, found), key=int)}
