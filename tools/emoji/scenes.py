"""Captioned 64×64 scenes: an animal, an activity's object, or both, on one of eight backgrounds."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffexp.emoji.vocabulary import ALL_ANIMALS, OBJECTS, prompt, scenes, with_article
from tools.emoji.common import WORK
from tools.emoji.sprites import STYLES, sprites

SIZE = 64
CANVAS = 128

BACKGROUNDS = (
    (250, 247, 240),  # paper
    (176, 216, 240),  # sky
    (170, 217, 160),  # meadow
    (246, 218, 140),  # sand
    (246, 184, 178),  # rose
    (198, 180, 226),  # lilac
    (66, 84, 120),  # dusk
    (120, 126, 132),  # stone
)


@dataclass(frozen=True)
class Split:
    """A set of scenes that no other split shares a random draw with.

    ``both`` is the share of scenes that show an animal and an object: it decides how often the painter drops a half.
    ``play``: how far place, size and colour vary, 0 … 1; at 1 an object may also stand on the other side of its animal.
    """

    name: str
    size: int
    seed: int
    both: float
    objects: float = 0.06
    styles: tuple[str, ...] = STYLES
    play: float = 1.0


SPLITS = {
    split.name: split
    for split in (
        Split("painter", 12_000, seed=1, both=0.30, styles=STYLES[:1], play=0.25),
        Split("autoencoder", 32_000, seed=6, both=0.30),
        Split("alignment", 32_000, seed=2, both=0.80, objects=0.02),
        Split("judge", 32_000, seed=3, both=0.80, objects=0.02),
        Split("heldout", 2_904, seed=4, both=0.0),
    )
}


def _paste(canvas: Image.Image, sprite: Image.Image, size: float, x: float, y: float) -> None:
    """Paste ``sprite`` with its centre at (x, y) and the given edge length, all as fractions of the canvas."""
    edge = round(size * CANVAS)
    sprite = sprite.resize((edge, edge), Image.Resampling.BILINEAR, reducing_gap=2.0)
    canvas.alpha_composite(sprite, (max(0, round(x * CANVAS - edge / 2)), max(0, round(y * CANVAS - edge / 2))))


def compose(animal: str | None, activity: str | None, rng: np.random.Generator, split: Split) -> np.ndarray:
    """One scene, uint8 (64, 64, 3): random background, art style, place and size, as far as its split varies them."""
    style = split.styles[rng.integers(len(split.styles))]
    colour = np.clip(np.array(BACKGROUNDS[rng.integers(len(BACKGROUNDS))]) + rng.normal(0, 6 * split.play, 3), 0, 255)
    canvas = Image.new("RGBA", (CANVAS, CANVAS), (*(int(c) for c in colour), 255))
    around = lambda middle, spread: middle + split.play * rng.uniform(-spread, spread)  # noqa: E731
    picture = lambda noun: sprites()[style, noun]  # noqa: E731
    if animal is None or activity is None:
        noun = OBJECTS[activity] if animal is None else animal
        size = around(0.79, 0.11)
        slack = 0.5 - size / 2
        _paste(canvas, picture(noun), size, around(0.5, slack), around(0.5, slack))
    elif activity in ("riding a bike", "driving a car"):
        size, below, x = around(0.53, 0.05), around(0.57, 0.05), around(0.5, 0.08)
        _paste(canvas, picture(OBJECTS[activity]), below, around(x, 0.04), around(0.95, 0.02) - below / 2)
        _paste(canvas, picture(animal), size, x, around(0.06, 0.02) + size / 2)
    else:
        size, beside = around(0.60, 0.06), around(0.37, 0.05)
        x, other = around(0.06, 0.02) + size / 2, around(0.95, 0.02) - beside / 2
        if split.play == 1 and rng.integers(2):
            x, other = 1 - x, 1 - other
        _paste(canvas, picture(OBJECTS[activity]), beside, other, around(0.90, 0.04) - beside / 2)
        _paste(canvas, picture(animal), size, x, around(0.5, 0.1))
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def draw_classes(split: Split) -> np.ndarray:
    """Which of the 363 scenes each picture of the split shows; the held-out split shows every one equally often."""
    count, singles, objects = len(scenes()), len(ALL_ANIMALS), len(OBJECTS)
    if split.name == "heldout":
        return np.arange(split.size) % count
    rng = np.random.default_rng((split.seed, 0))
    shares = np.empty(count)
    shares[:singles] = (1 - split.both - split.objects) / singles
    shares[singles : singles + objects] = split.objects / objects
    shares[singles + objects :] = split.both / (count - singles - objects)
    return rng.choice(count, size=split.size, p=shares / shares.sum())


def _paint(job: tuple[Split, int, int]) -> np.ndarray:
    split, index, scene = job
    return compose(*scenes()[scene], np.random.default_rng((split.seed, 1, index)), split)


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures, uint8 (N, 64, 64, 3), and scene numbers (N,) of a split; painted on first use."""
    path, split = WORK / f"scenes-{name}.npy", SPLITS[name]
    classes = draw_classes(split)
    if not path.exists():
        sprites()
        jobs = [(split, index, int(scene)) for index, scene in enumerate(classes)]
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            pictures = np.stack(list(pool.imap(_paint, jobs, chunksize=500)))
        partial = path.with_suffix(".partial.npy")
        np.save(partial, pictures)
        partial.replace(path)
    return np.load(path, mmap_mode="r"), classes


def caption(animal: str | None, activity: str | None, rng: np.random.Generator) -> str:
    """A caption of a scene, in one of the forms that people use: "cat", "a cat", "a photo of a cat"."""
    plain = prompt(animal, activity)
    if animal is not None and activity is None:
        return (plain, with_article(plain), f"a photo of {with_article(plain)}")[rng.integers(3)]
    return plain if rng.random() < 0.8 else f"a photo of {plain}"


def all_captions() -> list[str]:
    """Every caption that :func:`caption` can give, in a fixed order: the tokenizer's corpus."""
    plain = [prompt(*scene) for scene in scenes()]
    articles = [with_article(animal) for animal in ALL_ANIMALS]
    return plain + articles + [f"a photo of {text}" for text in articles + plain[len(articles) :]]
