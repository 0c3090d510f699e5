"""Trains what the figures of the paper need, then draws them and writes down what they say."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffexp import assembly
from diffexp.config import Recipe
from diffexp.devices import slow
from diffexp.durations import duration
from diffexp.errors import UserError
from diffexp.runs.names import TITLES
from diffexp.study import archive, tuning, write_up
from diffexp.study.archive import Folders
from diffexp.study.comparison_report import table_text
from diffexp.study.drawing import Drawing
from diffexp.study.experiments import Choice, Painting, jobs, paintings, shown
from diffexp.study.pace import Times, Work, impractical
from diffexp.study.paper import Figure, Tuning, chosen
from diffexp.study.scales import SCALES, Scale
from diffexp.study.trainer import State, Trainer
from diffexp.terminal.console import say

TIMES = "times.jsonl"


@dataclass(frozen=True)
class Plan:
    """The figures to make, at which scale, how many ``seeds`` the user wants (None: the scale's own), and where."""

    figures: Mapping[str, Figure]
    scale: Scale
    seeds: int | None
    overrides: Mapping[str, Any]
    runs: Folders

    def choice(self) -> Choice:
        """What tuning chose. Recipes of algorithms whose tuning is not finished stay as they are."""
        return tuning.choice(self.scale, self.runs)

    def states(self) -> list[State]:
        """How far every run is, tuning first. While that is not finished, the others have the recipes' own settings."""
        found = jobs(self.figures, self.scale, self.seeds, self.overrides, self.choice())
        pictured = shown(self.figures.values())
        return [State.look(job, self.runs, images=job.name in pictured) for job in found]

    def paintings(self) -> dict[str, list[Painting]]:
        """What drawing each figure paints."""
        choice = self.choice()
        return {name: paintings(one, self.scale, self.overrides, choice) for name, one in self.figures.items()}

    def drawing(self, out: Path, partly: bool = False) -> Drawing:
        return Drawing(self.scale, self.runs, out, self.seeds, self.overrides, self.choice(), partly)


def reproduce(
    name: str,
    scale: str,
    seeds: int | None,
    out: Path,
    workers: int | None,
    dry_run: bool,
    overrides: Mapping[str, Any],
    console: Console,
    source: Path | None = None,
    store: Path | None = None,
) -> None:
    """Trains what the figure (or "all") needs, except what is finished already, and draws it into ``out``/scale.

    With a ``store``, also keeps the numbers of the runs there, writes what they say, and trains none of those that it
    has, but where their images are to be drawn. With a ``source``, a store or a folder of runs, nothing is trained.

    Raises:
        UserError: for a name that is none, settings that make no recipe, a folder of other runs, or a run that failed.
    """
    figures = chosen(name, scale)
    if "seed" in overrides:
        raise UserError("--set seed: the runs of a figure have seeds 0, 1, 2 …; --seeds says how many")
    if source and dry_run:
        raise UserError("--dry-run: with --from nothing is trained; leave one of them out")
    with TemporaryDirectory() as kept:
        if store and (store / archive.FILE).is_file():
            archive.unpack(store / archive.FILE, Path(kept))
        plan = Plan(figures, SCALES[scale], seeds, overrides, Folders(source or out / scale, Path(kept)))
        if not source:
            make(plan, workers, dry_run, console)
        target = store or source
        if target and not dry_run:
            keep(plan, target, console)


def make(plan: Plan, workers: int | None, dry_run: bool, console: Console) -> None:
    """Says what there is to do, trains what is not finished, ``workers`` at a time, and draws the figures."""
    times, states, pictures = Times(plan.runs.trained / TIMES), plan.states(), plan.paintings()
    ahead = [state.job.recipe for state in states if not state.finished]
    ahead += [painting.recipe for figure in pictures.values() for painting in figure]
    where = device([*(state.job.recipe for state in states), *ahead])
    workers = workers or ({"cpu": os.cpu_count(), "cuda": torch.cuda.device_count()}.get(where.type) or 1)
    tell = partial(say, console)
    if ahead and (reason := slow(ahead[0].model.precision, where)):
        tell(reason)
    if dry_run:
        times.try_out(ahead, workers, tell)
    describe(plan.figures, states, pictures, times, workers, console)
    if large := [recipe.model.path for recipe in ahead if impractical(recipe)]:
        tell(f"{large[0]} needs a GPU to be practical; on this CPU nothing is timed")
    if plan.scale.candidates:
        tuned = ", ".join(dict.fromkeys(f"{TITLES[algorithm]} on {task}" for algorithm, task in plan.choice()))
        tell(f"tuned so far: {tuned or 'nothing; recipes have their own settings until then'}")
    if dry_run:
        return
    tried = [name for name, figure in plan.figures.items() if isinstance(figure, Tuning)]
    first = replace(plan, figures={name: plan.figures[name] for name in tried})
    trials = first.states()
    early = [state.folder for state in states if state.job.name not in {trial.job.name for trial in trials}]
    if any(not trial.finished for trial in trials) and (there := [folder for folder in early if folder.is_dir()]):
        raise UserError(
            f"--out: {there[0]} was trained before tuning, which may choose other settings: choose another --out, or "
            "remove that folder"
        )
    for stage in (first, plan):
        # the second stage's recipes are known when the first is finished
        Trainer(stage.states(), times, workers, where, console).run()
    drawing = plan.drawing(plan.runs.trained / "figures")
    for key, figure in plan.figures.items():
        if isinstance(figure, Tuning):
            tell(table_text(tuning.rows(tuning.tried(figure, plan.scale, plan.runs))))
        for file in drawing.draw(key, figure)[:1]:
            tell(f"figure {key}: {file}")


def keep(plan: Plan, store: Path, console: Console) -> None:
    """The numbers of all runs that are finished into the ``store``, figures of them, and a document beside it.

    The document has all figures of the paper, whichever was asked for: they share one store. Of ours it has those that
    were asked for or have runs of their own.

    Raises:
        UserError: if there are neither runs nor a store, the store would lie among the runs, or it has other runs.
    """
    file, runs = store / archive.FILE, plan.runs.trained
    if not runs.is_dir():
        raise UserError(f"--from {runs}: no such folder")
    if not (runs / archive.FILE).is_file():
        if runs == store:
            raise UserError(f"--from {runs} has no {archive.FILE}, so it is no store: also give --store FOLDER")
        done = [state.folder for state in plan.states() if state.finished]
        archive.pack([folder for folder in done if archive.complete(folder)], file)
    elif runs != store:
        raise UserError(f"--from {runs} is a store already: leave --store out")
    with TemporaryDirectory() as unpacked:
        kept = {folder.name for folder in archive.unpack(file, Path(unpacked))}
        paper = chosen("all", plan.scale.name)
        whole = replace(plan, figures=paper, runs=Folders(store, Path(unpacked)))
        theirs = {state.job.name for state in whole.states()}  # of the recipes that are asked for, or refused
        drawing = whole.drawing(store, partly=True)
        ours = {
            name: figure
            for name, figure in chosen("ours", plan.scale.name).items()
            if name in plan.figures or (write_up.runs_of(name, drawing) - theirs) & kept
        }
        document = write_up.write(paper | ours, drawing, store)
    say(console, f"{len(kept)} runs in {file}; figures beside it; {document}")


def describe(
    figures: Mapping[str, Figure],
    states: Sequence[State],
    pictures: Mapping[str, Sequence[Painting]],
    times: Times,
    workers: int,
    console: Console,
) -> None:
    """What there is to do: the figures, the runs, what drawing paints, and how long it all will take."""
    for key, figure in figures.items():
        images = sum(painting.images for painting in pictures[key])
        drawn = f"; {images} images are painted to draw it" if images else ""
        say(console, f"figure {key}: {figure.title}{drawn}")
    left = [state for state in states if not state.finished]
    expected = {state.job.name: times.expected(state.job.recipe, state.work) for state in left}
    if states:
        table = Table(box=None, pad_edge=False)
        for column in ("run", "queries", "evaluated", "state", "expected"):
            table.add_column(column, no_wrap=True, justify="right" if column in ("queries", "evaluated") else "left")
        for state in states:
            job, due = state.job, duration(expected[state.job.name]) if not state.finished else ""
            table.add_row(job.name, f"{job.queries:,}", f"{job.evaluated:,}", str(state), due)
        whole = console.options.update(max_width=sys.maxsize)  # a name that is cut short names no folder
        table.width = console.measure(table, options=whole).maximum
        console.print(table, soft_wrap=True)
    queries, evaluated = sum(state.job.queries for state in left), sum(state.job.evaluated for state in left)
    drawings = [painting for figure in pictures.values() for painting in figure]
    drawing = [times.expected(painting.recipe, Work(0, painting.images)) for painting in drawings]
    say(
        console,
        f"{len(states)} runs, {len(states) - len(left)} finished; the others: {queries:,} queries, "
        f"{evaluated:,} evaluated images; drawing: {sum(painting.images for painting in drawings):,} images; "
        f"expected time, {workers} at a time: {together(expected.values(), workers, drawing)}",
    )


def together(runs: Collection[float | None], workers: int, drawing: Collection[float | None] = ()) -> str:
    """How long runs take, ``workers`` at a time, and what is drawn after them, one by one."""
    known, drawn = ([seconds for seconds in times if seconds is not None] for times in (runs, drawing))
    if len(known) + len(drawn) < len(runs) + len(drawing):
        return "unknown"
    if not (known or drawn):
        return "none"
    return duration(max(sum(known) / workers, max(known, default=0.0)) + sum(drawn))


def device(recipes: Sequence[Recipe]) -> torch.device:
    """Where the runs train."""
    return assembly.device(recipes[0].device if recipes else "auto")
