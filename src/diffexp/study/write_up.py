"""The study as a document: the paper's claims beside ours, tables, figures. Written from the runs' numbers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from diffexp.markdown import plain, replace_section
from diffexp.runs.names import TITLES
from diffexp.runs.reading import read_config
from diffexp.study import tuning
from diffexp.study.claims import CLAIMS, Verdict
from diffexp.study.comparison_report import table_text
from diffexp.study.drawing import Drawing
from diffexp.study.experiments import jobs
from diffexp.study.findings import Finding, Measured, findings, rows, verdict
from diffexp.study.paper import Figure, Tuning
from diffexp.study.statistics import too_narrow

SECTION = "study"


def write(figures: Mapping[str, Figure], drawing: Drawing, store: Path) -> Path:
    """Draws the figures into ``store`` and writes what they say into the document beside it, STORE.md.

    What people wrote around the section of results stays.
    """
    store.mkdir(parents=True, exist_ok=True)
    document = store.with_name(f"{store.name}.md")
    measured = {name: drawing.measured(name, figure) for name, figure in figures.items()}
    found = {name: findings(name, panels) for name, panels in measured.items()}
    planned = {name: runs_of(name, drawing) for name in figures}
    runs = set().union(*planned.values())
    finished = {run for run in runs if drawing.runs.find(run).is_dir()}
    cut_short = {name for name, needed in planned.items() if needed - finished}
    so_far = f"\n\n**So far {len(finished)} of the {len(runs)} runs are finished.**" if cut_short else ""
    mixed = f"\n\n{text}" if (text := precisions([drawing.runs.find(run) for run in sorted(finished)])) else ""
    parts = [f"### The paper's claims{so_far}{mixed}\n\n{claims(found, cut_short)}{narrow(found)}"]
    for name, figure in figures.items():
        if isinstance(figure, Tuning):
            parts.append(tried(figure, drawing))
        elif measured[name]:
            picture = drawing.plotted(name, figure, measured[name])[0]
            parts.append(described(name, figure, measured[name], found[name], f"{store.name}/{picture.name}"))
    replace_section(document, SECTION, "\n\n".join(parts))
    return document


def precisions(runs: Iterable[Path]) -> str:
    """Which runs had their frozen weights in the rarer precision, and of how many seeds; empty if all had the same."""
    groups = defaultdict[str, Counter[str]](Counter)
    for run in runs:
        groups[read_config(run)["model"]["precision"]][run.name.rpartition("-s")[0]] += 1
    most, *others = sorted(groups, key=lambda name: -groups[name].total()) or [""]
    told = [
        f"{other} in {groups[other].total()}: {', '.join(f'{n} of `{run}`' for run, n in groups[other].items())}"
        for other in others
    ]
    return f"Frozen weights were in {most} in {groups[most].total()} runs, {'; '.join(told)}." if told else ""


def runs_of(name: str, drawing: Drawing) -> set[str]:
    """The runs that a figure is planned to have."""
    planned = jobs([name], drawing.scale, drawing.seeds, drawing.overrides, drawing.chosen)
    return {one.name for one in planned}


def claims(tested: Mapping[str, list[Finding]], cut_short: Collection[str]) -> str:
    """Every claim with its verdict; "not run yet" where there is no run, "so far" where some are to come."""
    table = ["| figure | the paper | here |", "| --- | --- | --- |"]
    for name, claim in CLAIMS.items():
        found = tested.get(name, [])
        counts = Counter(finding.verdict for finding in found)
        unknown, failed = counts[Verdict.UNKNOWN], counts[Verdict.NOT]
        parts = [f"{counts[Verdict.REPRODUCED]} of {tests(len(found) - unknown)} passed"] * (len(found) > unknown)
        parts += [f"{failed} failed"] * bool(failed)
        parts += [f"{unknown} not determined"] * bool(unknown) + ["so far"] * (name in cut_short)
        detail = f" ({', '.join(parts)})" if found else ""
        table.append(f"| {name} | {claim.says} | **{verdict(found).value}**{detail} |")
    return "\n".join(table)


def narrow(tested: Mapping[str, list[Finding]]) -> str:
    """What to know of the intervals of few seeds, and so of the tests; empty where there are no such."""
    pairs = {finding.pairs for found in tested.values() for finding in found}
    notes = [note for note in map(too_narrow, sorted(pairs)) if note]
    return "".join(f"\n\n{note} As often a test is passed where there is nothing." for note in notes)


def tests(count: int) -> str:
    """So many tests, in words."""
    return f"{count} test{'s' if count != 1 else ''}"


def described(name: str, figure: Figure, measured: list[Measured], found: list[Finding], picture: str) -> str:
    """A figure: its picture, a table for each panel and measure, and the tests of its claim."""
    title = f"Figure {name}" if name[0].isdigit() else name.capitalize()
    parts = [f"### {title}: {figure.title}", f"![{title}]({picture})"]
    for one in measured:
        parts.append(f"**{plain(one.where)}**; the untouched model has {one.baseline.start(one.measure):.4g}.")
        parts.append(table_text(rows(one)))
    if found:
        table = [["claim", "panel", "number", "pairs", "verdict"]]
        table += [[one.what, one.where, one.number, str(one.pairs), one.verdict.value] for one in found]
        parts.append(table_text(table))
    return "\n\n".join(parts)


def tried(figure: Tuning, drawing: Drawing) -> str:
    """The table of what was tried, and the rule that chose."""
    trials = tuning.tried(figure, drawing.scale, drawing.runs)
    borrowed = [
        f"{TITLES[algorithm]} on {taker} takes {task}'s"
        for algorithm, tasks in figure.tasks.items()
        for task, takers in tasks.items()
        for taker in takers
        if taker != task
    ]
    rule = (
        "The same candidates for both sides, on seeds 100 and 101, in runs of half the length; the one with the "
        "highest mean of the final training reward over both sides is taken for all figures of the task. Without a "
        f"tuning of its own, {', '.join(borrowed)}."
    )
    table = table_text(tuning.rows(trials)) if trials else "Not run yet."
    return f"### {figure.title}\n\n{rule}\n\n{table}"
