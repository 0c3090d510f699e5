"""The page itself: one HTML file with everything in it, which asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from diffexp.report import curves, facts, film, words
from diffexp.report.charts import Chart
from diffexp.report.sources import Material
from diffexp.version import __version__

NUMBER = re.compile(r"^[−+≥≤-]? ?\d|^[–∞]$|^not determined$")
"""How the cells of a column begin that is set flush right."""

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What steers a terminal that shows the file, or turns letters around: prompts may be a stranger's."""

REFRESH = 3
"""Seconds between two looks of a page that follows a run."""


def render(material: Material, etag: str = "") -> str:
    """The report as HTML. With an ``etag`` it looks for a newer one where it came from, every few seconds."""
    shown = charts(material)
    reels = film.film(material)
    data = {
        "charts": [chart.as_json() for group in shown.values() for chart in group],
        "film": reels.as_json() if reels else None,
    }
    style = asset("uplot/uPlot.min.css") + asset("report.css")
    scripts = asset("uplot/uPlot.iife.min.js"), asset("report.js")
    text = template().render(
        policy=policy(style, scripts, watched=bool(etag)),
        style=trusted(style),
        scripts=[trusted(script) for script in scripts],
        data=trusted(embedded(data)),
        etag=etag,
        refresh=REFRESH,
        version=__version__,
        numeric=numeric,
        charts=shown,
        film=reels,
        words=words.tables(material),
        **content(material),
    )
    return text.lstrip()


def charts(material: Material) -> dict[str, list[Chart]]:
    """All charts by the part of the page that they stand in."""
    guidance, training = curves.guidance_chart(material), curves.training_chart(material)
    return {
        "gains": curves.gain_charts(material),
        "rewards": curves.reward_charts(material),
        "training": [*([training] if training else []), *curves.drift_charts(material)],
        "guidance": [guidance] if guidance else [],
        "diversity": curves.diversity_charts(material),
        "costs": curves.cost_charts(material),
    }


def content(material: Material) -> dict[str, Any]:
    """What stands on the page besides charts and images."""
    found = facts.comparison(material)
    return {
        "title": facts.title(material),
        "lede": facts.lede(material),
        "progress": facts.progress(material),
        "arms": material.arms,
        "several": len(material.arms) > 1,
        "seeds": max(len(arm.runs) for arm in material.arms),
        "figures": facts.figures(material) if len(material.arms) == 1 else [],
        "costs": [(arm.label, facts.costs(material, arm)) for arm in material.arms],
        "tables": facts.comparison_tables(found) if found else [],
        "notes": found.notes if found else [],
        "outcome": facts.outcome_table(material),
        "verdicts": facts.verdicts(material),
        "exploration": [(arm.label, facts.exploration_text(material, arm)) for arm in material.arms],
        "images_a_prompt": material.first.setting("evaluation", "images"),
        "encoders": encoders(material),
        "recipes": facts.recipes(material),
        "environment": facts.environment(material),
    }


def encoders(material: Material) -> list[str]:
    """What diversity was measured with."""
    lines = (line for source in material.sources for found in source.run.scores.values() for line in found)
    return list(dict.fromkeys(str(line["encoder"]) for line in lines if line.get("encoder")))


def policy(style: str, scripts: tuple[str, ...], watched: bool) -> str:
    """The content security policy: these very scripts and styles, images from the page itself, and nothing else."""
    parts = [
        "default-src 'none'",
        "script-src " + " ".join(map(digest, scripts)),
        f"style-src {digest(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        *(["connect-src 'self'"] if watched else []),
    ]
    return "; ".join(parts)


def digest(text: str) -> str:
    """How a policy names an inline script or style."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or a line of JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return STEERING.sub("\ufffd", text)


@cache
def asset(name: str) -> str:
    """A file beside the template, with the line ends that a browser hashes."""
    text = (files("diffexp") / "templates" / "report" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


@cache
def template() -> Any:
    """The page's template. What it is given is escaped; only :func:`trusted` text is not."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, finalize=steady, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(asset("report.html.jinja"))


def steady(value: Any) -> Any:
    """What the template is given, without characters that steer; :func:`trusted` text as it is."""
    return STEERING.sub("\ufffd", value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Of each column of a table, below its header: whether it holds numbers only."""
    columns = zip(*rows[1:], strict=True)
    return [all(NUMBER.match(cell) for cell in column) for column in columns] or [False] * len(rows[0])


def trusted(text: str) -> Any:
    """Text of this package's own, or escaped already."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704
