"""The images of a report: the same prompts and noise at every moment that was painted, small and embedded."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffexp.pictures import iterations, moment_name, open_png
from diffexp.report.charts import number
from diffexp.report.sources import Material, Source
from diffexp.runs import names
from diffexp.sharing.lora_header import without_paths
from diffexp.study.comparison import Arm
from diffexp.study.comparison_report import shown, spread

LARGEST = 256
"""The side in pixels to which larger images are shrunk."""

MOMENTS = 48
"""The most moments: a slider has no more places that one can tell apart."""

PROMPTS = 16
"""The most prompts."""

BUDGET = 6_000_000
"""The most characters that all images take."""

QUALITY = 85

EXACT = 128
"""Up to this side images are embedded without loss: at so few pixels a lossy one shows."""


@dataclass(frozen=True)
class Tile:
    """What is painted: a prompt, from which set, and whether training saw it."""

    prompt: str
    set: str
    seen: bool


@dataclass(frozen=True, eq=False)
class Moment:
    """The images of an arm at one time, a data URI a tile."""

    iteration: int
    queries: int
    images: Sequence[str]


@dataclass(frozen=True, eq=False)
class Reel:
    """One arm's moments, in order."""

    label: str
    run: str
    moments: Sequence[Moment]


@dataclass(frozen=True, eq=False)
class Film:
    """All that the slider shows. ``base`` is the untouched model. ``stops`` are the slider's places."""

    tiles: Sequence[Tile]
    base: Sequence[str]
    reels: Sequence[Reel]
    stops: Sequence[dict[str, Any]]
    thinned: bool
    side: int

    def as_json(self) -> dict[str, Any]:
        """What the page's script shows; the last images stand in the page itself."""
        return {
            "stops": list(self.stops),
            "reels": [[list(moment.images) for moment in reel.moments[:-1]] for reel in self.reels],
        }


def film(material: Material, budget: int = BUDGET) -> Film | None:
    """The film of the first run of every arm, on a seed that all arms have if there is one; None without images.

    Moments are thinned out evenly, with the first and the last kept, until all fits into ``budget`` characters.
    """
    chosen = [material.of(run) for run in shown(material.arms)]
    found = [(arm, source, moments_of(source)) for arm, source in zip(material.arms, chosen, strict=True)]
    shape = prompts_of(found[0][1])
    found = [(arm, source, moments) for arm, source, moments in found if moments and prompts_of(source) == shape]
    if not shape or not found:
        return None
    rows = spread(len(shape), PROMPTS)
    tiles = tiles_of(found[0][1], rows)
    total, count = max(len(moments) for _, _, moments in found), MOMENTS
    while True:
        reels = [reel(arm, source, moments, rows, count) for arm, source, moments in found]
        size = sum(len(image) for one in reels for moment in one.moments for image in moment.images)
        if size <= budget or count <= 2:
            break
        count = max(2, min(count - 1, int(min(count, total) * budget / size)))
    first, moments = found[0][1], found[0][2]
    base = [encoded(picture(first, 0, row)) for row in rows] if 0 in moments else []
    side = open_png(picture(first, moments[0], rows[0]), LARGEST).width
    stops = [stop(material, found, reels, queries) for queries in sorted({m.queries for r in reels for m in r.moments})]
    return Film(tiles, base, reels, stops, total > count, side)


def moments_of(source: Source) -> list[int]:
    """The iterations whose previews are whole, in order."""
    count = len(prompts_of(source))
    return [k for k, path in iterations(source.run.path / names.SAMPLES).items() if is_whole(path, count)]


def is_whole(folder: Path, count: int) -> bool:
    """Whether all of a moment's images are there."""
    return all((folder / f"{row}.png").is_file() for row in range(count))


def prompts_of(source: Source) -> list[str]:
    """The prompts of the previews."""
    return read_list(source.run.path / names.SAMPLES / names.PROMPTS)


def tiles_of(source: Source, rows: Sequence[int]) -> list[Tile]:
    """The tiles of some of the previews. Runs of older versions painted prompts of the training set only."""
    prompts, own = prompts_of(source), str(source.setting("prompts"))
    sets = read_list(source.run.path / names.SAMPLES / names.SETS)
    sets = sets if len(sets) == len(prompts) else [own] * len(prompts)
    return [Tile(prompts[row], str(without_paths(sets[row])), sets[row] == own) for row in rows]


def reel(arm: Arm, source: Source, moments: Sequence[int], rows: Sequence[int], count: int) -> Reel:
    """Some moments of a run."""
    picked = [moments[k] for k in spread(len(moments), count)]
    found = [Moment(k, source.queries_at(k), [encoded(picture(source, k, row)) for row in rows]) for k in picked]
    return Reel(arm.label, source.run.name, found)


def stop(
    material: Material, found: Sequence[tuple[Arm, Source, Sequence[int]]], reels: Sequence[Reel], queries: int
) -> dict[str, Any]:
    """A place of the slider: which moment of each reel it shows, and what is known of it."""
    shown = [max([0, *(k for k, m in enumerate(one.moments) if m.queries <= queries)]) for one in reels]
    lines = [scores_at(material, source, queries) for _, source, _ in found]
    labels = [f"{one.label}: " if len(reels) > 1 else "" for one in reels]
    iterations = {one.moments[k].iteration for one, k in zip(reels, shown, strict=True)}
    iteration = f"iteration {min(iterations)}, " if len(iterations) == 1 else ""
    return {
        "queries": queries,
        "shown": shown,
        "label": "untouched model" if queries == 0 else f"{iteration}{queries:,} queries",
        "scores": [f"{label}{line}" for label, line in zip(labels, lines, strict=True) if line],
    }


def scores_at(material: Material, source: Source, queries: int) -> str:
    """The newest evaluations until then, on the training prompts, in words."""
    parts = []
    for measure, lines in source.run.scores.items():
        known = [line for line in lines if line["queries"] <= queries]
        if known and measure.prompts == material.objective.prompts:
            kind = " (held out)" if source.run.held_out(measure) else ""
            parts.append(f"{without_paths(measure.reward)}{kind} {number(known[-1]['mean'])}")
    return ", ".join(parts)


def encoded(path: Path) -> str:
    """An image, shrunk if it is large, as the data URI of a WebP."""
    return _encoded(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2048)  # a page that follows a run is made anew every few seconds
def _encoded(path: Path, _: int) -> str:
    buffer, picture = io.BytesIO(), open_png(path, LARGEST)
    picture.save(buffer, "WEBP", quality=QUALITY, method=4, lossless=max(picture.size) <= EXACT)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(source: Source, iteration: int, row: int) -> Path:
    """The file of a preview."""
    return source.run.path / names.SAMPLES / moment_name(iteration) / f"{row}.png"


def read_list(file: Path) -> list[str]:
    """A JSON list of texts; empty where there is none, or a run is just writing it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(entry) for entry in found] if isinstance(found, list) else []
