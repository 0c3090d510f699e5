"""What ``diffexp compare`` writes: the table, the numbers, the curves and the images side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexp import figures
from diffexp.errors import UserError, cut, one_line, printable
from diffexp.markdown import plain
from diffexp.pictures import iterations, open_png
from diffexp.runs.names import PROMPTS, SAMPLES
from diffexp.runs.reading import Measure, Run
from diffexp.study.statistics import Estimate, Ratio, Reach, mean_curve

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

    from diffexp.study.comparison import Arm, Comparison, Level, Result

COLUMNS = 8
"""The most prompts that ``grid.png`` shows."""

LARGEST = 256
"""The size in pixels to which it shrinks larger images."""

DEFINITIONS = """\
- Arm: the runs of one recipe, which differ in their seed only.
- Seconds: by the clock, with whatever else the machine did meanwhile. Queries do not depend on that.
- Final reward: the mean of the last 10 % of a run's evaluations.
- Queries: a query is one image that training had the reward score. A level is reached where the evaluation curve,
  smoothed by a running mean of 3, first meets it, linear between evaluations; the median over seeds, "≥" where runs
  ended below it; in parentheses the seeds that reached it.
- Ratio: queries of the arm over queries of its baseline, paired by seed: the geometric mean, or bounds of the median
  where runs were censored.
- Brackets: bootstrap 95 % intervals over seeds, 10,000 resamples.
- IQM: interquartile mean of the final reward. nAUC: mean of the curve over the common budget, where 0 is the untouched
  model's reward and 1 the baseline's final one.
- Figures: the mean over seeds, and a band of one standard deviation; dots where an arm reaches its baseline.
"""


def write(comparison: Comparison, out: Path) -> tuple[Path, ...]:
    """Write every file of a comparison into ``out`` (made if need be) and return their paths."""
    picture = grid([result.arm for result in comparison.results])
    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in ("comparison.json", "comparison.md", "curves.png", "curves.svg")]
    numbers = json.dumps(as_dict(comparison), indent=2, allow_nan=False, ensure_ascii=False)
    files[0].write_text(numbers + "\n", encoding="utf-8")
    figures.save(figures.curves(panels(comparison), columns=_panel_columns(comparison)), files[2], files[3])
    if picture is not None:
        files.append(out / "grid.png")
        picture.save(files[-1])
    files[1].write_text(markdown(comparison, has_grid=picture is not None), encoding="utf-8")
    return tuple(files)


def rich_table(comparison: Comparison) -> Table:
    """The main table for a terminal, with the notes below it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    header, *rows = main_rows(comparison)
    title = Text(printable(f"{comparison.objective.reward} on {comparison.objective.prompts}"))
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, caption_justify="left")
    table.caption = Text(printable("\n".join(f"* {note}" for note in comparison.notes))) if comparison.notes else None
    for k, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="right" if k else "left", vertical="top")
    for row in rows:
        # Text, as rich would take brackets for its markup; one line for each part of a cell, to fit 80 columns.
        table.add_row(*(Text(re.sub(r" (?=[\[(+])", "\n", printable(cell))) for cell in row))
    return table


def markdown(comparison: Comparison, has_grid: bool) -> str:
    """The text of ``comparison.md``."""
    objective = comparison.objective
    levels = [level for result in comparison.results for level in result.levels]
    parts = [
        f"# {plain(f'{objective.reward} on {objective.prompts}')}: {len(comparison.results)} arms",
        table_text(main_rows(comparison)),
        *(["\n".join(f"- {plain(note)}" for note in comparison.notes)] if comparison.notes else []),
        "![Reward over queries](curves.png)",
        *(["## Queries to a part of the baseline's gain", table_text(level_rows(comparison))] if levels else []),
        "## Final reward on everything evaluated",
        table_text(final_rows(comparison)),
        *(["## The same prompts and seeds", "![Before and after](grid.png)"] if has_grid else []),
        "## How to read this",
        DEFINITIONS,
    ]
    return "\n\n".join(parts)


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """What ``comparison.json`` holds: every number, by arm and seed; null where one is unknown or unbounded."""
    return {
        "objective": comparison.objective._asdict(),
        "arms": [_arm_dict(result) for result in comparison.results],
        "notes": list(comparison.notes),
    }


def main_rows(comparison: Comparison) -> list[list[str]]:
    """Header and rows: one arm a row, with the other rewards on the same prompts as further columns."""
    objective = comparison.objective
    others = [m for m in comparison.measures if m.prompts == objective.prompts and m != objective]
    kinds = ["held out" if comparison.held_out(measure) else "also trained on" for measure in others]
    header = ["arm", "seeds", "final reward", "queries to baseline's final", "ratio"]
    rows = [[*header, *(f"{kind}: {m.reward}" for kind, m in zip(kinds, others, strict=True)), "seconds a run"]]
    finals = [_column(result.final.get(measure) for result in comparison.results) for measure in (objective, *others)]
    for result, (final, *beside) in zip(comparison.results, zip(*finals, strict=True), strict=True):
        whole = next((level for level in result.levels if level.fraction == 1), None)
        rows.append(
            [
                result.arm.label,
                str(len(result.arm.runs)),
                final,
                *_level_cells(result, whole),
                *beside,
                "–" if result.seconds is None else f"{result.seconds:,.0f}",
            ]
        )
    return rows


def level_rows(comparison: Comparison) -> list[list[str]]:
    """Header and rows: each arm at each fraction of its baseline's gain."""
    rows = [["arm", "part of the gain", "reward", "queries", "ratio"]]
    places = decimals(level.reward for result in comparison.results for level in result.levels)
    for result in comparison.results:
        for level in result.levels:
            cells = _level_cells(result, level)
            rows.append([result.arm.label, f"{level.fraction:.0%}", fixed(level.reward, places), *cells])
    return rows


def final_rows(comparison: Comparison) -> list[list[str]]:
    """Header and rows: each arm's final reward on every prompt set and reward that was evaluated."""
    rows = [["arm", *(f"{measure.reward} on {measure.prompts}" for measure in comparison.measures), "IQM", "nAUC"]]
    found = comparison.results
    columns = [_column(result.final.get(measure) for result in found) for measure in comparison.measures]
    columns += [_column(Estimate(result.iqm, None, None) for result in found), _column(result.nauc for result in found)]
    return rows + [[result.arm.label, *cells] for result, cells in zip(found, zip(*columns, strict=True), strict=True)]


def panels(comparison: Comparison) -> list[figures.Panel]:
    """One panel of curves for each prompt set and reward; the first with the baselines' final rewards marked."""
    return [_panel(comparison, measure) for measure in comparison.measures]


def grid(arms: Sequence[Arm]) -> Image | None:
    """Before and after of each arm on the same prompts and noise; None without sample images.

    Up to 8 prompts, evenly chosen, of the runs that are ``shown``.
    """
    chosen = shown(arms)
    start = _samples(chosen[0], min)
    finals = [(arm.label, _samples(run, max)) for arm, run in zip(arms, chosen, strict=True)]
    finals = [(label, images) for label, images in finals if len(images) == len(start)]
    if not start or not finals:
        return None
    picked = spread(len(start), COLUMNS)
    rows = [[open_png(images[k], LARGEST) for k in picked] for _, images in [("before", start), *finals]]
    prompts = _sample_prompts(chosen[0], len(start))
    return figures.image_grid(rows, ["before", *(label for label, _ in finals)], [prompts[k] for k in picked])


def shown(arms: Sequence[Arm]) -> list[Run]:
    """The run of each arm whose images are shown: that of the lowest seed that all have, else the arm's first."""
    shared = set.intersection(*(set(arm.runs) for arm in arms))
    return [arm.runs[min(shared)] if shared else arm.first for arm in arms]


def _panel(comparison: Comparison, measure: Measure) -> figures.Panel:
    lines, levels = [], []
    for result in comparison.results:
        arm, found = result.arm, result.arm.curves(measure).values()
        if found:
            queries, mean, spread = mean_curve([(curve.queries, curve.values) for curve in found])
            lines.append(figures.Line(arm.label, queries, mean, spread, arm.first.algorithm, arm.first.explores))
        if measure == comparison.objective and arm is result.baseline and result.levels:
            levels.append(_mark(comparison, result))
    held_out = " (held out)" if comparison.held_out(measure) else ""
    return figures.Panel(cut(measure.prompts, 60), cut(measure.reward, 60) + held_out, lines, levels)


def _mark(comparison: Comparison, baseline: Result) -> figures.Level:
    reached = {}
    for result in comparison.results:
        if result.baseline is baseline.arm and result.levels and result.levels[-1].median.reached:
            reached[result.arm.label] = result.levels[-1].median.queries
    return figures.Level(f"final reward of {baseline.arm.label}", baseline.levels[-1].reward, reached)


def _panel_columns(comparison: Comparison) -> int:
    # One row of panels for each prompt set, where they fit.
    rewards = sum(measure.prompts == comparison.objective.prompts for measure in comparison.measures)
    return min(rewards, 3) if rewards > 1 else 2


def _samples(run: Run, which: Callable[[Iterable[int]], int]) -> list[Path]:
    folders = iterations(run.path / SAMPLES)
    if 0 not in folders:
        return []
    images = (image for image in folders[which(folders)].glob("*.png") if image.stem.isdecimal())
    return sorted(images, key=lambda image: int(image.stem))


def _sample_prompts(run: Run, count: int) -> list[str]:
    file = run.path / SAMPLES / PROMPTS
    try:
        prompts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r}: no JSON ({one_line(error)}); the file is damaged") from error
    if not isinstance(prompts, list):
        raise UserError(f"{str(file)!r}: no list of prompts; the file is damaged")
    return [str(prompt) for prompt in prompts] if len(prompts) == count else [""] * count


def _level_cells(result: Result, level: Level | None) -> list[str]:
    if level is None:
        return ["–", "–"]
    ratio = "1.00" if result.arm is result.baseline else ratio_text(level.ratio)
    reached = sum(reach.reached for reach in level.reaches.values())
    return [f"{_reach(level.median)} ({reached}/{len(level.reaches)})", ratio]


def _reach(reach: Reach) -> str:
    return f"{'' if reach.reached else '≥ '}{reach.queries:,.0f}"


def ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    if ratio.least == ratio.most:
        text = f"{ratio.least:.2f}"
    elif ratio.least == 0:
        text = "not determined" if math.isinf(ratio.most) else f"≤ {ratio.most:.2f}"
    else:
        text = f"≥ {ratio.least:.2f}" if math.isinf(ratio.most) else f"{ratio.least:.2f} to {ratio.most:.2f}"
    if ratio.low is None or ratio.high is None or text == "not determined":
        return text
    return f"{text} [{ratio.low:.2f}, {'∞' if math.isinf(ratio.high) else f'{ratio.high:.2f}'}]"


def _column(estimates: Iterable[Estimate | None]) -> list[str]:
    found = list(estimates)
    places = decimals(value for one in found if one for value in one)
    return [estimate_text(estimate, places) for estimate in found]


def estimate_text(estimate: Estimate | None, places: int | None = None) -> str:
    """An estimate and its interval; without ``places`` with as many decimals as stand it well alone."""
    if estimate is None:
        return "–"
    places = decimals(estimate) if places is None else places
    if estimate.low is None or estimate.high is None:
        return fixed(estimate.value, places)
    return f"{fixed(estimate.value, places)} [{fixed(estimate.low, places)}, {fixed(estimate.high, places)}]"


def spread(total: int, most: int) -> list[int]:
    """At most ``most`` of ``total`` indices, evenly, the first and the last among them."""
    if total <= most:
        return list(range(total))
    return [round(k * (total - 1) / (most - 1)) for k in range(most)]


def decimals(values: Iterable[float | None], digits: int = 4) -> int:
    """How many decimals a column of ``values`` has, so that the largest of them has so many significant digits."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return max(0, digits - 1 - math.floor(math.log10(largest))) if largest else digits - 1


def fixed(value: float, places: int) -> str:
    """A number with so many decimals; what they round to zero has no sign."""
    return f"{round(value, places) + 0.0:,.{places}f}"


def table_text(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    rule = "| --- |" + " ---: |" * (len(rows[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])


def _arm_dict(result: Result) -> dict[str, Any]:
    return {
        "arm": result.arm.label,
        "baseline": result.baseline.label,
        "runs": [{"seed": seed, "run": run.name} for seed, run in result.arm.runs.items()],
        "final": [
            {**measure._asdict(), **estimate._asdict(), "by_seed": result.arm.final(measure)}
            for measure, estimate in result.final.items()
        ],
        "iqm": result.iqm,
        "nauc": result.nauc._asdict() if result.nauc else None,
        "levels": [
            {
                "fraction": level.fraction,
                "reward": level.reward,
                "reached_share": level.share,
                "by_seed": [{"seed": seed, **reach._asdict()} for seed, reach in level.reaches.items()],
                "ratio": {key: _finite(value) for key, value in level.ratio._asdict().items()} if level.ratio else None,
            }
            for level in result.levels
        ],
        "seconds": result.seconds,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
