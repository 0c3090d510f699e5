"""A chart as the page draws it, and as the table that says the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffexp.study import comparison_report
from diffexp.study.comparison import Arm
from diffexp.study.comparison_report import spread
from diffexp.study.statistics import mean_curve

ROWS = 24
"""The most rows of a chart's table; more are thinned out evenly."""

POINTS = 1000
"""The most points of a line: a screen shows no more."""

DIGITS = 6
"""Significant digits of the numbers on the page."""

COLOURS = 4
"""How many colours there are of each kind."""

Values = Sequence[float | None]


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart: a value for each x, None where it has none.

    ``colour`` is the name of a colour of the style sheet, ``dash`` counts line styles from 0, solid. ``low`` and
    ``high`` bound the spread over seeds.
    """

    label: str
    values: Values
    colour: str
    dash: int = 0
    low: Values | None = None
    high: Values | None = None


@dataclass(frozen=True, eq=False)
class Chart:
    """Lines over a common x. ``key`` is unique on the page.

    ``x`` says what x counts: "queries" or "iteration", or "timestep" for t from 1000 down to 0. ``stepped`` lines keep
    each value until the next x. ``zero`` makes 0 a part of y, with a line. ``mark`` is
    an x with a word to it, ``limits`` what y spans at least. ``unit`` stands behind values, the largest of which has
    ``digits`` significant digits, and the others as many decimals as that.
    """

    key: str
    title: str
    x: str
    xs: Sequence[float]
    lines: Sequence[Line]
    note: str = ""
    unit: str = ""
    stepped: bool = False
    zero: bool = False
    mark: tuple[float, str] | None = None
    limits: tuple[float, float] | None = None
    digits: int = 4
    tags: Sequence[str] = field(default=())

    def extremes(self) -> list[float]:
        """Every value of its lines and their bands."""
        rows = [row for line in self.lines for row in (line.values, line.low, line.high) if row is not None]
        return [value for row in rows for value in row if value is not None]

    @property
    def places(self) -> int:
        """The decimals of its values."""
        return comparison_report.decimals([*self.extremes(), *(self.limits or ())], self.digits)

    def as_json(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {
            "key": self.key,
            "title": self.title,
            "x": self.x,
            "xs": rounded(self.xs),
            "unit": self.unit,
            "stepped": self.stepped,
            "zero": self.zero,
            "mark": self.mark,
            "limits": self.limits,
            "places": self.places,
            "lines": [
                {
                    "label": line.label,
                    "values": rounded(line.values),
                    "low": rounded(line.low) if line.low is not None else None,
                    "high": rounded(line.high) if line.high is not None else None,
                    "colour": line.colour,
                    "dash": line.dash,
                }
                for line in self.lines
            ],
        }

    def header(self) -> list[str]:
        """The header of the chart's table."""
        return [self.x, *(f"{line.label} ± sd" if line.low is not None else line.label for line in self.lines)]

    def rows(self) -> list[list[str]]:
        """The rows of the chart's table: every x, or ``ROWS`` of them, the first and the last included."""
        picked, places = spread(len(self.xs), ROWS), self.places
        return [[count(self.xs[k]), *(cell(line, k, places) for line in self.lines)] for k in picked]

    @property
    def thinned(self) -> bool:
        """Whether the table leaves values out."""
        return len(self.xs) > ROWS


def over_seeds(arm: Arm, curves: Sequence[tuple[ArrayLike, ArrayLike]]) -> tuple[list[float], list[list[float]]]:
    """x, and mean, low and high (one standard deviation) over the seeds of an arm; one seed has only a mean."""
    arrays = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in curves]
    xs, mean, deviation = mean_curve(arrays)
    picked = spread(len(xs), POINTS)
    rows = [mean, mean - deviation, mean + deviation] if len(arrays) > 1 else [mean]
    return xs[picked].tolist(), [row[picked].tolist() for row in rows]


def joined(curves: Sequence[tuple[Sequence[float], list[list[float]]]]) -> tuple[list[float], list[list[Values]]]:
    """Curves with an x each on all their x; None where a curve has no value of its own."""
    xs = sorted({x for own, _ in curves for x in own})
    found: list[list[Values]] = []
    for own, rows in curves:
        known = [dict(zip(own, row, strict=True)) for row in rows]
        found.append([[row.get(x) for x in xs] for row in known])
    return xs, found


def colour(arms: Sequence[Arm], arm: Arm) -> str:
    """The colour of an arm: one of the plain, or one of those that explore."""
    alike = [other for other in arms if other.first.explores == arm.first.explores]
    return f"{'explore' if arm.first.explores else 'plain'}-{alike.index(arm) % COLOURS + 1}"


def dash(arms: Sequence[Arm], arm: Arm) -> int:
    """The line style of an arm: its algorithm's."""
    return list(dict.fromkeys(other.first.algorithm for other in arms)).index(arm.first.algorithm)


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Numbers with so many digits as one can see; None for what is no number."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}") for value in values]


def cell(line: Line, k: int, places: int) -> str:
    """A value in a table, with its spread."""
    value = line.values[k]
    if value is None or not math.isfinite(value):
        return "–"
    high = line.high[k] if line.high is not None else None
    text = fixed(value, places)
    return text if high is None else f"{text} ± {fixed(high - value, places)}"


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, and a minus sign that is one."""
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def fixed(value: float, places: int) -> str:
    """So many decimals, and a minus sign that is one."""
    return comparison_report.fixed(value, places).replace("-", "−")


def signed(value: float, places: int = 2) -> str:
    """A difference."""
    text = fixed(value, places)
    return text if text.startswith("−") else f"+{text}"


def count(value: float) -> str:
    """A whole number with commas; others as they are."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
