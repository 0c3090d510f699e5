"""Draws the figures of the paper from finished runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexp import assembly, figures
from diffexp.commands import Painter, open_painter, ways
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.images import to_images
from diffexp.pictures import iterations, open_png
from diffexp.rewards.spec import parse
from diffexp.runs.names import SAMPLES
from diffexp.runs.reading import Measure, Run
from diffexp.study import comparison
from diffexp.study.archive import Folders
from diffexp.study.comparison_report import spread
from diffexp.study.experiments import Choice, Job, job, run_name, seeds_of
from diffexp.study.findings import Measured
from diffexp.study.paper import (
    COLUMNS,
    STRATEGIES,
    Arm,
    Bars,
    Block,
    Curves,
    Figure,
    Grid,
    Panel,
    Strategies,
    Tuning,
)
from diffexp.study.scales import Scale
from diffexp.study.statistics import bootstrap_mean, mean_curve

if TYPE_CHECKING:
    from PIL.Image import Image

MOMENTS = 5
"""Moments of training that Figure 1 shows."""
LARGEST = 256
"""Pixels to which a grid shrinks larger images."""


@dataclass(frozen=True)
class Drawing:
    """Where the runs are, and where figures go. ``overrides`` and ``chosen`` are those that the runs were made with.

    ``seeds`` are the user's; None: as many as the scale has for each figure. With ``partly``, runs may be missing.
    """

    scale: Scale
    runs: Folders
    out: Path
    seeds: int | None
    overrides: Mapping[str, Any]
    chosen: Choice = field(default_factory=dict)
    partly: bool = False

    def draw(self, name: str, figure: Figure) -> list[Path]:
        """Writes ``figure-NAME.png``, and what belongs to it; returns all files.

        Raises:
            UserError: if a run it needs is damaged or was never evaluated.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        this = replace(self, seeds=seeds_of(name, self.scale, self.seeds))
        if isinstance(figure, Tuning):
            return []
        if isinstance(figure, Curves | Bars):
            files = self.plotted(name, figure, self.measured(name, figure))
            return files + (this.details(name, figure) if isinstance(figure, Curves) else [])
        picture = this.strategies(figure) if isinstance(figure, Strategies) else this.grid(figure)
        return [saved(picture, self.out / f"figure-{name}.png")]

    def measured(self, name: str, figure: Figure) -> list[Measured]:
        """The panels of a figure of numbers under each of their measures: those with runs of every arm."""
        if not isinstance(figure, Curves | Bars):
            return []
        this, found = replace(self, seeds=seeds_of(name, self.scale, self.seeds)), []
        for panel in figure.panels:
            arms = this.arms(panel)
            if all(arm.runs for arm in arms.values()):
                asked = measures(this.job(panel.task, panel.arms[0]).recipe, panel)
                found += [Measured(panel, measure, arms) for measure in asked]
        return found

    def job(self, task: str, arm: Arm, seed: int = 0) -> Job:
        return job(self.scale, task, arm, seed, self.overrides, self.chosen)

    def folders(self, task: str, arm: Arm) -> list[Path]:
        """The runs of an arm, one a seed; with numbers only, those that are there."""
        found = [self.runs.find(run_name(task, arm, seed)) for seed in range(self.seeds or 1)]
        return [folder for folder in found if folder.is_dir()] if self.partly else found

    def arms(self, panel: Panel) -> dict[Arm, comparison.Arm]:
        """A panel's arms with their runs, labelled as its legend does."""
        read = {arm: [Run.read(folder) for folder in self.folders(panel.task, arm)] for arm in panel.arms}
        return {arm: comparison.Arm(panel.label(arm), {run.seed: run for run in runs}) for arm, runs in read.items()}

    def plotted(self, name: str, figure: Figure, measured: Sequence[Measured]) -> list[Path]:
        """Curves or bars: one set of axes, or one group, for every panel and measure."""
        if isinstance(figure, Bars):
            return self.plot(name, bars(measured))
        panels = [axes(one) for one in measured]
        return self.plot(name, figures.curves(panels, columns=2 if len(panels) % 3 else 3))

    def details(self, name: str, figure: Curves) -> list[Path]:
        """The statistics of panels on training prompts, and where the figure has them, images over training."""
        files: list[Path] = []
        for number, panel in enumerate(figure.panels, start=1):
            if not (panel.unseen or panel.held_out):
                slug = re.sub(r"[^a-z0-9]+", "-", panel.title.lower()).strip("-")
                runs = [folder for arm in panel.arms for folder in self.folders(panel.task, arm)]
                files += comparison.compare(runs, self.out / f"figure-{name}" / f"{number}-{slug}").files
        if figure.progress:
            pictures = [self.progress(panel) for panel in figure.panels]
            picture = figures.captioned(pictures, [panel.title for panel in figure.panels])
            files.append(saved(picture, self.out / f"figure-{name}-images.png"))
        return files

    def progress(self, panel: Panel) -> Image:
        """The same noise at moments of training: two rows an arm, of seed 0."""
        rows, labels, heads = [], [], []
        for arm in panel.arms:
            folder = self.folders(panel.task, arm)[0] / SAMPLES
            moments = list(iterations(folder).items())
            picked = [moments[place] for place in spread(len(moments), MOMENTS)]
            samples = self.job(panel.task, arm).recipe.samples
            heads = [f"{iteration * samples:,} queries" for iteration, _ in picked]
            for k in range(2):
                if (picked[0][1] / f"{k}.png").is_file():
                    rows.append([open_png(path / f"{k}.png", LARGEST) for _, path in picked])
                    labels.append(panel.label(arm))
        return figures.image_grid(rows, labels, heads)

    def grid(self, figure: Grid) -> Image:
        """Every prompt in turn: the untouched model and each arm, the same noise in a column."""
        captions, pictures = [], []
        for block in figure.blocks:
            instead = self.scale.tasks[block.task].instead
            prompts = [instead.get(prompt, prompt) for prompt in block.prompts]
            rows = self.rows(block, prompts)
            for k, prompt in enumerate(prompts):
                images = [row[k * COLUMNS : (k + 1) * COLUMNS] for row in rows.values()]
                pictures.append(figures.image_grid(images, list(rows)))
                captions.append(f"“{prompt}”  ({self.job(block.task, block.arms[0]).recipe.reward})")
        return figures.captioned(pictures, captions)

    def rows(self, block: Block, prompts: Sequence[str]) -> dict[str, list[Image]]:
        """What the untouched model and each arm paint: ``COLUMNS`` images of each prompt."""
        panel = Panel("", block.task, block.arms)
        found: dict[str, list[Image]] = {}
        for arm in block.arms:
            if not found:
                recipe = self.job(block.task, arm).recipe
                # algorithms have scales of their own, and this row stands for all of them
                found[f"pre-trained, w={recipe.sampler.guidance:g}"] = painted(untouched(recipe), prompts)
            found[panel.label(arm)] = painted(open_painter(str(self.folders(block.task, arm)[0]), None), prompts)
        return found

    def strategies(self, figure: Strategies) -> Image:
        """Figure 3: constant high, constant low and scheduled guidance, the same noise in a column."""
        recipe = self.job(figure.task, Arm(figure.algorithm, "diffexp")).recipe
        painter = untouched(recipe)
        batch = painter.batch([figure.prompt], 0, 2 * COLUMNS)
        rows = {
            label: shrunk(to_images(painter.paint(batch.explored(way))))
            for label, way in list(ways(recipe, painter.sampler).items())[:STRATEGIES]
        }
        return figures.captioned([figures.image_grid(list(rows.values()), list(rows))], [f"“{figure.prompt}”"])

    def plot(self, name: str, plot: Any) -> list[Path]:
        files = [self.out / f"figure-{name}.{suffix}" for suffix in ("png", "svg")]
        figures.save(plot, *files)
        return files


def bars(measured: Sequence[Measured]) -> Any:
    """The final reward of every arm, a group a panel."""
    groups, rewards = [], {}
    for one in measured:
        found = [
            figures.Bar(
                "with DiffExp" if seeds.first.explores else "baseline",
                *bootstrap_mean(seeds.final(one.measure)),
                explores=seeds.first.explores,
            )
            for seeds in one.arms.values()
            if seeds.runs
        ]
        groups.append(figures.Group(one.panel.title.replace(", ", "\n"), one.baseline.start(one.measure), found))
        rewards[one.measure.reward] = None
    return figures.bars(groups, f"final {' / '.join(rewards)}")


def axes(one: Measured) -> figures.Panel:
    """A panel's curves under one measure."""
    lines = []
    for seeds in one.arms.values():
        if found := list(seeds.curves(one.measure).values()):
            queries, mean, spread = mean_curve([(curve.queries, curve.values) for curve in found])
            run = seeds.first
            lines.append(figures.Line(seeds.label, queries, mean, spread, run.algorithm, run.explores))
    return figures.Panel(one.panel.title, f"{one.measure.reward} on\n{shortened(one.measure.prompts)}", lines)


def measures(recipe: Recipe, panel: Panel) -> list[Measure]:
    """What a panel shows of a run: one measure for each prompt set and reward that it asks for.

    Raises:
        UserError: if the recipe evaluates none.
    """
    trained = [member.name for member in parse(recipe.reward)]
    rewards = [reward for reward in recipe.evaluated_rewards if (reward in trained) != panel.held_out]
    prompts = [name for name in recipe.evaluated_prompts if (name == recipe.prompts) != panel.unseen]
    if not (prompts and rewards):
        raise UserError(
            f"figure panel {panel.title!r} has nothing to show of evaluation.prompts = "
            f"{list(recipe.evaluated_prompts)} and evaluation.rewards = {list(recipe.evaluated_rewards)}: it needs "
            f"{'other prompts than' if panel.unseen else 'also'} {recipe.prompts!r}"
            f"{', and a held-out reward' if panel.held_out else ''}"
        )
    return [Measure(name, reward) for name in prompts for reward in rewards]


def untouched(recipe: Recipe) -> Painter:
    """The recipe's model before training."""
    return Painter(recipe, assembly.sampler(recipe, assembly.model(recipe)))


def painted(painter: Painter, prompts: Sequence[str]) -> list[Image]:
    """``COLUMNS`` images of each prompt."""
    return shrunk(to_images(painter.paint(painter.batch(prompts, 0, COLUMNS))))


def shrunk(pictures: Sequence[Image]) -> list[Image]:
    for picture in pictures:
        picture.thumbnail((LARGEST, LARGEST))
    return list(pictures)


def saved(picture: Image, path: Path) -> Path:
    picture.save(path)
    return path


def shortened(name: str, most: int = 40) -> str:
    """A prompt set's name as an axis has room for it."""
    name = name.removeprefix("text:")
    return name if len(name) <= most else f"{name[: most - 1]}…"
