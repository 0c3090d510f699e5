"""What the commands do once their arguments are read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from diffexp import assembly, emoji
from diffexp import prompts as prompt_sets
from diffexp.config import PaintingRecipe, Recipe
from diffexp.diversity import pairwise_diversity
from diffexp.errors import UserError, cut, printable, writing
from diffexp.evaluation import Score
from diffexp.exploration import ConstantGuidance, Exploration, GuidanceSchedule, StepGuidance, WordWeighting
from diffexp.figures import image_grid
from diffexp.images import grid, save_images, to_images
from diffexp.memory import MicroBatch
from diffexp.models.hub import locate
from diffexp.prompts.files import clean
from diffexp.report import FILE
from diffexp.report import write as write_report
from diffexp.rewards.base import score
from diffexp.rewards.features import encoder_of, thumbnails
from diffexp.rewards.spec import check_one
from diffexp.rollout import Batch, Sampler
from diffexp.runs import runfolder
from diffexp.runs.environment import base_commit
from diffexp.runs.names import CONFIG
from diffexp.sharing.lora_header import LoraHeader
from diffexp.sharing.lora_header import like as recipe_like
from diffexp.study.comparison import compare as compare_runs
from diffexp.terminal.console import say
from diffexp.toml import parse_overrides, read_toml

console = Console(soft_wrap=True)


def read_recipe(name: str, overrides: Sequence[str] | None) -> Recipe:
    """A recipe by name or file, with ``--set`` overrides."""
    return Recipe.load(name, parse_overrides(overrides))


def recipe_to_train(name: str | None, like: Path | None, overrides: Sequence[str] | None) -> tuple[Recipe, str]:
    """The recipe called ``name``, or that of the LoRA ``like``, and what its run is called.

    Raises:
        UserError: if both are given, or neither.
    """
    if (name is None) == (like is None):
        raise UserError("give a recipe, or --like and a LoRA file: one of the two")
    if name is not None:
        return read_recipe(name, overrides), Path(name).stem
    source = LoraHeader.read(Path(str(like))).path.resolve()
    recipe, notes = recipe_like(source, parse_overrides(overrides))
    for note in notes:
        say(console, f"warning: {note}")
    # in a run's folder the file is called as in every other's
    stem = source.parent.parent.name if source.parent.name in ("lora", "unet") else source.stem
    return recipe, f"{stem}-again"


def begin(recipe: Recipe, folder: Path, arguments: list[str], processes: int, quiet: bool, as_json: bool) -> None:
    """Trains in this process, or as ``diffexp ARGUMENTS`` in several."""
    if processes > 1:
        from diffexp.processes.launch import launch

        return launch(processes, [*arguments, *["--quiet"] * quiet, *["--json"] * as_json])
    from diffexp.terminal.console import reporter
    from diffexp.training import train

    told = reporter(quiet, as_json)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        train(recipe, folder, told)


def resume(run: Path, processes: int, quiet: bool, as_json: bool) -> None:
    """Goes on with a run by its own recipe, or says that it is finished."""
    recipe = runfolder.read_recipe(run)
    refuse_code(recipe, run)
    if runfolder.finished(run, recipe):
        return say(console, f"{run} is finished: there is nothing left to do")
    begin(recipe, run, ["resume", str(run)], processes, quiet, as_json)


class Painter(NamedTuple):
    """A model, perhaps with a run's LoRA, ready to sample as ``recipe`` says."""

    recipe: Recipe
    sampler: Sampler

    def batch(self, prompts: Sequence[str], seed: int, n: int) -> Batch:
        """``n`` images of each prompt, without exploration; the k-th of every prompt starts from the same noise."""
        texts = self.sampler.model.encode(prompts).select([row for row in range(len(prompts)) for _ in range(n)])
        keys = [(seed, "sample", k) for _ in prompts for k in range(n)]
        scale = ConstantGuidance(self.recipe.sampler.guidance)
        return Batch([prompt for prompt in prompts for _ in range(n)], texts, scale, keys)

    def paint(self, batch: Batch) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1]."""
        memory = MicroBatch(self.recipe.rollout.batch, "rollout.batch")
        return memory.fit(partial(self.sampler.rollout, batch)).images


def open_painter(target: str, overrides: Sequence[str] | None) -> Painter:
    """The model of a run folder with its LoRA, or a bare model under the default recipe; the emoji's takes 20 steps."""
    changes = parse_overrides(overrides)
    config = Path(target) / CONFIG
    if config.is_file():
        recipe = PaintingRecipe.parse(read_toml(config), str(config), changes)
        refuse_code(recipe, Path(target))
        commit = None if "model.revision" in changes else base_commit(Path(target), recipe.model.path)
        model = assembly.model(recipe, commit)
        assembly.load_trained(recipe, model, Path(target))
    else:
        steps = {"steps": emoji.STEPS} if target in emoji.MODELS else {}
        recipe = PaintingRecipe.parse({"model": {"path": target}, "sampler": steps}, target, changes)
        model = assembly.model(recipe, commit_of(target, recipe) if recipe.model.path == target else None)
    return Painter(recipe, assembly.sampler(recipe, model))


def commit_of(target: str, recipe: Recipe) -> str | None:
    """The commit at which the hub has the model that a command was given; None for one that is here.

    Raises:
        UserError: if it was given neither a run folder nor a model.
    """
    try:
        _, source = locate(target, recipe.model.revision, recipe.model.variant)
    except UserError as error:
        what = "a run folder (no config.toml in it) nor a model (no model_index.json in it)"
        if not Path(target).is_dir():
            what = "a run folder nor a model, here or on the hub; check the name, and the network"
        raise UserError(f"RUN_OR_MODEL {cut(repr(target))}: neither {what}") from error
    return source.commit


def refuse_code(recipe: Recipe, folder: Path) -> None:
    """Refuses a run's recipe whose code lies in the run's own folder: no training puts any there.

    Raises:
        UserError: which file it is.
    """
    waiting: list[Any] = [recipe.model_dump(mode="json")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and ":" in value:
            # a reward may be a sum; the path of a strategy or an algorithm may have such signs in it
            for name in (value, *re.split(r"[+*]", value)):
                file = Path(name.rpartition(":")[0].strip())
                if file.suffix == ".py" and file.resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{file}: code that came with the run is not run: put it elsewhere if you trust it")


def evaluate(
    target: str,
    prompts: Sequence[str] | None,
    rewards: Sequence[str] | None,
    images: int,
    overrides: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Prints the reward curves' next points."""
    for name in prompts or ():
        prompt_sets.check(name)
    for name in rewards or ():
        check_one(name)
    recipe, sampler = open_painter(target, overrides)
    wanted = {"images": images, "prompts": prompts or None, "rewards": rewards or None}
    settings = recipe.evaluation.model_dump() | {key: value for key, value in wanted.items() if value is not None}
    recipe = PaintingRecipe.parse(recipe.model_dump(mode="json") | {"evaluation": settings}, "evaluate")
    evaluator = assembly.evaluator(recipe, sampler)
    if not as_json and console.is_terminal:
        evaluator = evaluator._replace(watch=lambda batches: track(batches, "sampling", console=console))
    scores = evaluator()
    if as_json:
        console.print_json(json.dumps([result._asdict() for result in scores]))
    else:
        console.print(score_table(scores))


def score_table(scores: Sequence[Score]) -> Table:
    table = Table("prompts", "reward", "mean", "std", "images")
    for result in scores:
        names = (Text(printable(name)) for name in (result.prompts, result.reward))
        table.add_row(*names, f"{result.mean:.4f}", f"{result.std:.4f}", str(result.n))
    return table


def sample(
    target: str,
    prompts: Sequence[str],
    n: int,
    seed: int,
    explore: bool,
    overrides: Sequence[str] | None,
    out: Path,
) -> None:
    """Writes the images, and one sheet of all of them."""
    for prompt in prompts:
        clean(prompt, "--prompt")
    painter = open_painter(target, overrides)
    batch = painter.batch(prompts, seed, n)
    if explore:
        exploration = assembly.exploration(painter.recipe, painter.sampler)
        if exploration.empty:
            raise UserError(f"--explore: {target} explores nothing; --set exploration.guidance.low=1 would")
        batch = batch.explored(exploration)
    make_folder(out)
    pictures = to_images(painter.paint(batch))
    with writing("--out", out):
        paths = save_images(pictures, out)
        grid(pictures, columns=n if len(prompts) > 1 else None).save(out / "grid.png")
    say(console, f"{len(paths)} images in {out}")


def explore(name: str, prompt: str, n: int, seed: int, overrides: Sequence[str] | None, out: Path) -> None:
    """Figure 3 and Eq. 8 in pictures and numbers."""
    from diffexp import rewards

    clean(prompt, "--prompt")
    recipe = read_recipe(name, overrides)
    model = assembly.model(recipe)
    painter = Painter(recipe, assembly.sampler(recipe, model))
    reward = rewards.load(recipe.reward, model.device)
    plain = painter.batch([prompt], seed, n)
    table = Table("sampling", "reward", "best", "spread", "diversity", title=Text(f'"{prompt}"'))
    rows, labels, report = [], [], []
    make_folder(out)
    for label, exploration in ways(recipe, painter.sampler).items():
        images = painter.paint(plain.explored(exploration))
        values = score(reward, images, plain.prompts)
        diversity = pairwise_diversity(features(reward, images).cpu().numpy())
        figures = (float(values.mean()), float(values.max()), float(values.std()), diversity)
        table.add_row(label, *(f"{figure:.3f}" for figure in figures))
        report.append(dict(zip(("sampling", "mean", "best", "std", "diversity"), (label, *figures), strict=True)))
        pictures = to_images(images)
        with writing("--out", out):
            save_images(pictures, out / label.replace(" ", "-").replace("=", ""))
        rows.append(pictures[: min(n, 8)])
        labels.append(label)
    with writing("--out", out):
        image_grid(rows, labels).save(out / "exploration.png")
        report_json = json.dumps({"prompt": prompt, "ways": report}, indent=1)
        (out / "exploration.json").write_text(report_json, encoding="utf-8")
    console.print(table)
    say(console, f"grids in {out}")


def ways(recipe: Recipe, sampler: Sampler) -> dict[str, Exploration]:
    """The ways of sampling that Figure 3 compares, and Eq. 8's."""
    own, high = assembly.exploration(recipe, sampler), recipe.sampler.guidance
    schedule: GuidanceSchedule = own.guidance or StepGuidance(1.0, high)
    words = own.words or WordWeighting()
    low = schedule(1000)
    return {
        f"constant w={high:g}": Exploration(ConstantGuidance(high)),
        f"constant w={low:g}": Exploration(ConstantGuidance(low)),
        f"scheduled {low:g} to {high:g}": Exploration(schedule),
        "weighted words": Exploration(words=words),
        "both": Exploration(schedule, words),
        **({"the recipe's": own} if own.strategy else {}),
    }


def features(reward: object, images: torch.Tensor) -> torch.Tensor:
    """What diversity is measured on, (B, D): the reward's image features where it has any, else small pictures."""
    with torch.no_grad():
        return (encoder_of(reward) or thumbnails)(images)


def compare(runs: Sequence[Path], out: Path) -> None:
    """Statistics and figures over several runs."""
    with writing("--out", out):
        console.print(compare_runs(runs, out).table())
        write_report(runs, out / FILE)
    say(console, f"curves, grids, numbers and {FILE} in {out}")


def make_folder(out: Path) -> None:
    """Makes the folder before the work whose result goes there.

    Raises:
        UserError: if it can't be made.
    """
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
