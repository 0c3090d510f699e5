"""The model card beside a run's LoRA files: what it was trained for, what that gained, images before and after."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexp import figures
from diffexp.config import Recipe
from diffexp.emoji import MODELS
from diffexp.errors import cut
from diffexp.markdown import code, plain
from diffexp.pictures import iterations, open_png
from diffexp.runs import durable
from diffexp.runs.names import CARD, PROMPTS, SAMPLES
from diffexp.runs.reading import Run
from diffexp.sharing.lora_header import FOLDERS, LoraHeader, without_paths
from diffexp.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffexp.models.base import Source

SHOWN = 4
"""The most prompts that the gallery shows."""

LICENCES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
"""The licence of a base model, which a LoRA inherits."""


def path(folder: Path, recipe: Recipe) -> Path:
    """Where a finished run has its card."""
    return folder / recipe.model.train / CARD


def write(folder: Path, recipe: Recipe, source: Source, xl: bool) -> Path:
    """Writes ``README.md`` and ``images`` beside what a finished run has trained, and returns the card's path.

    ``source`` is where the base model came from, ``xl`` whether it is a Stable Diffusion XL. The card names files, but
    no folder of this machine: it is meant to be published.
    """
    from jinja2 import Environment, StrictUndefined

    run, card = Run.read(folder), path(folder, recipe)
    where = card.parent
    data = without_paths(recipe.model_dump(mode="json"))
    base = without_paths(source.name)
    widget = gallery(folder / SAMPLES, where / "images")
    draw_curve(run, where / "images" / "curve.svg")
    template = (files("diffexp") / "templates" / "card.md.jinja").read_text(encoding="utf-8")
    # Markdown, not HTML: there is nothing to escape.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701
    # Prompts and names may be a stranger's: in text they are plain, in the example they are Python's literals.
    environment.filters |= {"plain": plain, "code": code, "literal": literal}
    text = environment.from_string(template).render(
        front_matter=front_matter(source, recipe, xl, widget),
        name=run.name,
        base=base,
        shipped=source.name in MODELS,
        opened=opened(source),
        commit=source.commit,
        whole=recipe.model.train == "unet",
        adapter=adapter(where) if recipe.model.train == "lora" else None,
        reward=data["reward"],
        prompts=data["prompts"],
        widget=widget,
        queries=int(next(iter(run.evaluations.values())).queries[-1]),
        scores=scores(run),
        pipeline="StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        example=widget[0]["text"] if widget else "a cat",
        kohya=f"{run.name}.kohya.safetensors",
        file=FOLDERS[recipe.model.train],
        revision=f', revision="{source.commit}"' if source.commit else "",
        recipe=data,
        exploration=exploration(recipe),
        explores=run.explores,
        version=__version__,
    )
    durable.replace(card, text.encode())  # whole or absent: that it is there says that the run is finished
    return card


def opened(source: Source) -> str:
    """The Python expression that ``from_pretrained`` opens the base model by; a placeholder for a folder here."""
    if source.name in MODELS:
        return f"emoji.model_path({literal(source.name)})"
    return literal(source.name if source.commit else "path/to/the/base/model")


def literal(text: str) -> str:
    """A text as Python writes it in its source."""
    return json.dumps(text, ensure_ascii=False)


def adapter(where: Path) -> str:
    """Rank, alpha and what is adapted, as the LoRA file in that folder has it."""
    file = where / FOLDERS["lora"]
    if not file.is_file():
        return "none"
    header = LoraHeader.read(file)
    return f"rank {header.rank}, alpha {header.alpha or header.rank}, on {' and '.join(header.adapted)}"


def front_matter(source: Source, recipe: Recipe, xl: bool, widget: list[dict[str, Any]]) -> str:
    """The card's YAML, by which the hub files it. ``template:sd-lora`` is what makes it show the gallery."""
    from huggingface_hub import ModelCardData

    kind = "stable-diffusion-xl" if xl else "stable-diffusion"
    common = ["text-to-image", "diffusers", "diffusers-training"]
    common += ["lora", "template:sd-lora"] if recipe.model.train == "lora" else []
    data = ModelCardData(
        base_model=source.name if source.commit else None,
        library_name="diffusers",
        license=LICENCES.get(source.name),
        pipeline_tag="text-to-image",
        tags=[*common, kind, "reward-fine-tuning", recipe.algorithm.name, "diffexp"],
        widget=widget or None,
    )
    return data.to_yaml().strip()


def gallery(samples: Path, images: Path) -> list[dict[str, Any]]:
    """Copies up to ``SHOWN`` previews of the untouched and the final model; returns the hub's widget for them."""
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    moments = list(iterations(samples).values())
    if not moments:
        return []
    prompts = json.loads((samples / PROMPTS).read_text(encoding="utf-8"))
    picked = [k * len(prompts) // min(SHOWN, len(prompts)) for k in range(min(SHOWN, len(prompts)))]
    widget: list[dict[str, Any]] = []
    rows: list[list[Image]] = []
    for label, moment in (("before", moments[0]), ("after", moments[-1])):
        row = []
        for k in picked:
            shutil.copyfile(moment / f"{k}.png", images / f"{label}-{k}.png")
            text = prompts[k] if label == "after" else f"{prompts[k]} (before training)"
            widget.append({"text": text, "output": {"url": f"images/{label}-{k}.png"}})
            row.append(open_png(moment / f"{k}.png"))
        rows.append(row)
    figures.before_after(rows[0], rows[1], [prompts[k] for k in picked]).save(images / "before-after.png")
    return widget[len(picked) :] + widget[: len(picked)]


def draw_curve(run: Run, path: Path) -> None:
    """The run's reward on everything that was evaluated, a panel each."""
    panels = []
    for measure, curve in run.evaluations.items():
        line = figures.Line(run.label, curve.queries, curve.values, 0 * curve.values, run.algorithm, run.explores)
        prompts, reward = (cut(without_paths(name), 60) for name in measure)
        panels.append(figures.Panel(prompts, reward, [line]))
    figures.save(figures.curves(panels, columns=2), path)


def scores(run: Run) -> list[dict[str, Any]]:
    """The first and the last evaluation of every prompt set and reward."""
    return [
        {
            "prompts": without_paths(measure.prompts),
            "reward": without_paths(measure.reward),
            "held_out": run.held_out(measure),
            "before": entries[0]["mean"],
            "after": entries[-1]["mean"],
            "n": entries[0]["n"],
        }
        for measure, entries in run.scores.items()
    ]


def exploration(recipe: Recipe) -> str:
    """What explored, in words."""
    settings, parts = recipe.exploration, []
    if guidance := settings.guidance:
        until = (
            f"t > {guidance.threshold:g}" if guidance.threshold is not None else f"the first {guidance.fraction:.0%}"
        )
        parts.append(f"guidance {guidance.low:g} for {until}, then {recipe.sampler.guidance:g}")
    if words := settings.words:
        parts.append(f"a random {words.unit}'s weight from U({words.low:g}, {words.high:g})")
    if settings.strategy:
        parts.append(f"the strategy {without_paths(settings.strategy)}")
    if not parts or settings.until == 0:
        return "none"
    return f"{'; '.join(parts)}; in the first {settings.until:.0%} of the iterations"
