"""Sprites: every animal and object of the world in two flat art styles, rendered from the emoji sets on npm."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from diffexp.emoji.vocabulary import ALL_ANIMALS, OBJECTS
from tools.emoji.common import WORK

# Flat art only: a small autoencoder redraws it sharply, gradients and soft shadows it would blur.
STYLES = ("fluent-emoji-flat", "twemoji")
SPRITE_SIZE = 160

# The names under which the emoji sets hold what the world calls otherwise.
ICONS = {
    "bee": "honeybee",
    "sheep": "ewe",
    "squirrel": "chipmunk",
    "cheetah": "leopard",
    "plate": "fork-and-knife-with-plate",
    "bike": "bicycle",
    "chess pawn": "chess-pawn",
    "car": "automobile",
    "soccer ball": "soccer-ball",
}


def archive(style: str) -> Path:
    """The npm tarball of one emoji set, fetched with ``npm pack`` when it is not there yet."""
    folder = WORK / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"iconify-json-{style}-[0-9]*.tgz"))
    if not found:
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit(f"npm is needed to fetch @iconify-json/{style}; or put its tarball into {folder}")
        subprocess.run([npm, "pack", f"@iconify-json/{style}"], cwd=folder, check=True)
        found = sorted(folder.glob(f"iconify-json-{style}-[0-9]*.tgz"))
    return found[-1]


def icon_svg(icons: dict, name: str) -> str:
    """One icon of an Iconify collection as a complete SVG document; aliases are followed."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="{SPRITE_SIZE}" height="{SPRITE_SIZE}">{icon["body"]}</svg>'
    )


def render(svg: str) -> Image.Image:
    """An SVG document as an RGBA picture, cropped to what it shows and centred on a square."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIZE, height=SPRITE_SIZE)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    square = Image.new("RGBA", (max(picture.size),) * 2)
    square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


@cache
def sprites() -> dict[tuple[str, str], Image.Image]:
    """(style, noun) → RGBA sprite, for all animals and objects; rendered once and kept as one file."""
    store = WORK / "sprites.npz"
    nouns = [*ALL_ANIMALS, *OBJECTS.values()]
    keys = [(style, noun) for style in STYLES for noun in nouns]
    if not store.exists():
        pictures = []
        for style in STYLES:
            with tarfile.open(archive(style)) as tar:
                icons = json.load(tar.extractfile("package/icons.json"))
            pictures += [np.asarray(render(icon_svg(icons, ICONS.get(noun, noun)))) for noun in nouns]
        np.savez_compressed(store, pictures=np.stack(pictures))
    return dict(zip(keys, map(Image.fromarray, np.load(store)["pictures"]), strict=True))
