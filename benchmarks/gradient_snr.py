"""Which denoising steps does DDPO learn from? The signal and the noise of its gradient, step by step.

    python benchmarks/gradient_snr.py [--batches 16] [--images 32] [--steps 20] [--prompts SET] [--run RUN]
                                      [--table docs/study.md]

Rolls out batches from the untouched emoji model, or from the LoRA of a run, and keeps the LoRA gradient of every batch
and step at the sampling policy. Every weighting of the steps is a recombination of them, so all are compared on the
same images: SNR² = |E g|² / tr Cov(g), of a batch, without bias; so many times fewer queries give a gradient as good.
The files lie in ``--out``; the same command goes on where it was stopped. Their inner products go to ``--store``.
Prints two tables with jackknife 95 % intervals over batches; ``--table`` also puts them into a document.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from diffexp import assembly, prompts, rewards
from diffexp.algorithms import DDPO
from diffexp.algorithms.timesteps import sensitivity, step_weights
from diffexp.config import Recipe
from diffexp.exploration import ConstantGuidance
from diffexp.markdown import replace_section
from diffexp.randomness import generator
from diffexp.rewards.base import score
from diffexp.rollout import Batch, Trajectory

Array = NDArray[np.float64]
MICRO = 16  # images in one backward pass
SCHEMES = {
    "none": "all steps alike (DDPO)",
    "masked": "without t ≤ 100",
    "sigma": "without t ≤ 100, weights σ_t",
    "uniform": "without t ≤ 100, weights 1/w_t",
}


def step_gradients(ddpo: DDPO, trajectory: Trajectory, advantages: torch.Tensor) -> NDArray[np.float32]:
    """The gradient of each step's mean loss with respect to all of the LoRA, (steps, parameters)."""
    parameters, count = list(ddpo.learner.parameters.values()), len(advantages)
    found = []
    for i in range(ddpo.sampler.steps):
        for parameter in parameters:
            parameter.grad = None
        for start in range(0, count, MICRO):
            rows = list(range(start, min(start + MICRO, count)))
            (ddpo.figures(trajectory, [i], rows, advantages)["loss"].sum() / count).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).numpy().copy())
    return np.stack(found)


def collect(recipe: Recipe, run: Path | None, images: int, batches: int, out: Path) -> None:
    """Writes the gradients of each batch that is not there yet into ``out``."""
    model = assembly.model(recipe)
    assembly.make_trainable(recipe, model)
    if run:
        assembly.load_trained(recipe, model, run)
    names, reward = prompts.load(recipe.prompts), rewards.load(recipe.reward, model.device)
    group = recipe.rollout.images_per_prompt
    for number in range(batches):
        file = out / f"{number:03d}.safetensors"
        if file.is_file():
            continue
        # a new one each time: its statistics of a prompt are those of the batch alone
        ddpo = assembly.algorithm(recipe, assembly.sampler(recipe, model), assembly.learner(recipe, model), reward)
        assert isinstance(ddpo, DDPO)
        chosen = torch.randint(len(names), (images // group,), generator=generator("gradient snr", number)).tolist()
        texts = [names[row] for row in chosen for _ in range(group)]
        keys = [(0, "gradient snr", number, k) for k in range(images)]
        batch = Batch(texts, model.encode(texts), ConstantGuidance(recipe.sampler.guidance), keys)
        trajectory = ddpo.sampler.rollout(batch, MICRO)
        values = score(reward, trajectory.images, texts)
        gradients = step_gradients(ddpo, trajectory, ddpo.advantage(texts, values))
        moved = (trajectory.latents[1:] - trajectory.latents[:-1]).square().flatten(1).mean(1).numpy()
        partial = out / f"{number:03d}.partial"
        save_file({"gradients": gradients, "moved": moved, "rewards": values.numpy()}, partial)
        partial.replace(file)
        print(f"batch {number + 1} of {batches}: mean reward {float(values.mean()):.3f}", flush=True)


def products(files: Sequence[Path]) -> tuple[Array, Array]:
    """Inner products of gradients: of each batch's own steps (B, T, T), and summed over each batch's partners.

    cross[b] = Σ_{b' ≠ b} (G_b G_b'ᵀ + G_b' G_bᵀ) / 2.
    """
    gradients = [load_file(file)["gradients"].astype(np.float64) for file in files]
    total = np.sum(gradients, axis=0)
    own = np.stack([g @ g.T for g in gradients])
    cross = np.stack([(g @ total.T + total @ g.T) / 2 - one for g, one in zip(gradients, own, strict=True)])
    return own, cross


def snr(own: Array, cross: Array, weights: Array, without: int | None = None) -> float:
    """SNR² of one batch's gradient Σ_i ω_i g_i, unbiased: |E g|² from pairs of batches, E |g|² from each with itself.

    ``without`` leaves a batch out.
    """
    kept = [b for b in range(len(own)) if b != without]
    pairs = cross[kept].sum(0)
    if without is not None:
        pairs = pairs - cross[without]  # its partners lose it too
    count = len(kept)
    signal = weights @ pairs @ weights / (count * (count - 1))
    power = weights @ own[kept].mean(0) @ weights
    return float(signal / (power - signal))


def jackknife(figure: Callable[[int | None], float], count: int) -> tuple[float, float, float]:
    """A figure with its 95 % interval, from leaving each batch out in turn. ``figure(None)`` leaves out none."""
    value, rest = figure(None), np.array([figure(b) for b in range(count)])
    error = float(np.sqrt((count - 1) / count * np.sum((rest - rest.mean()) ** 2)))
    return value, value - 1.96 * error, value + 1.96 * error


def tables(own: Array, cross: Array, recipe: Recipe, images: int, moved: Array) -> str:
    """What each step holds, and what each weighting comes to, for 64 images."""
    schedule, eta = assembly.sampler(recipe, assembly.model(recipe)).schedule, recipe.sampler.eta
    steps, count, scale = len(schedule.timesteps), len(own), 64 / images
    noise = np.einsum("btt->t", own)
    lines = ["| t | σ_t | w_t | share of Σ‖g_t‖² | SNR² |", "| ---: | ---: | ---: | ---: | ---: |"]
    for i, t in enumerate(schedule.timesteps):
        alone = jackknife(lambda b, i=i: scale * snr(own, cross, np.eye(steps)[i], b), count)
        lines.append(
            f"| {t} | {schedule.std(i, eta):.3f} | {sensitivity(schedule, i, eta):.3f} | "
            f"{noise[i] / noise.sum():.1%} | {interval(alone)} |"
        )
    weightings = {name: np.array(step_weights(scheme, schedule, eta)) for scheme, name in SCHEMES.items()}
    mask = weightings[SCHEMES["masked"]] > 0
    weightings["without t ≤ 100, weights ‖x_t − x_{t−1}‖²"] = np.where(mask, moved, 0.0)
    base = weightings[SCHEMES["none"]]
    whole = jackknife(lambda b: snr(own, cross, base, b), count)
    rows = ["| weighting | SNR² | times all steps alike | largest step's share |", "| --- | ---: | ---: | ---: |"]
    for name, weights in weightings.items():
        value = jackknife(lambda b, w=weights: scale * snr(own, cross, w, b), count)
        share = (weights**2 * noise).max() / (weights**2 * noise).sum()
        times = "not determined"
        if whole[1] > 0:  # a ratio to what may be 0 says nothing
            times = interval(jackknife(lambda b, w=weights: snr(own, cross, w, b) / snr(own, cross, base, b), count))
        rows.append(f"| {name} | {interval(value)} | {times} | {share:.0%} |")
    head = f"{count} batches of {images} images, {steps} steps; SNR² for 64 images."
    return "\n".join([head, "", *rows, "", *lines])


def interval(figure: tuple[float, float, float]) -> str:
    value, low, high = figure
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def rounded(matrix: Array) -> list[list[float]]:
    return [[float(f"{number:.5g}") for number in row] for row in matrix]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--images", type=int, default=32, help="in a batch, four of each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", help="of these instead of the 135; a set's name, or text:PROMPT")
    parser.add_argument("--run", type=Path, help="start from the LoRA of this run instead of the untouched model")
    parser.add_argument("--out", type=Path, default=Path("runs/gradient_snr"))
    parser.add_argument("--store", type=Path, default=Path("docs/study"))
    parser.add_argument("--table", type=Path, help="a document to put the tables into")
    arguments = parser.parse_args()
    settings = {"prompts": arguments.prompts} if arguments.prompts else {}
    recipe = Recipe.load("emoji-ddpo", {"sampler.steps": arguments.steps, "device": "cpu", **settings})
    name = f"gradient_snr_{arguments.steps}{'_trained' if arguments.run else ''}"
    if arguments.prompts:
        name += "_" + re.sub(r"[^a-z0-9]+", "_", arguments.prompts.lower().removeprefix("text:")).strip("_")
    out = arguments.out / f"{name}-{arguments.images}"
    out.mkdir(parents=True, exist_ok=True)
    collect(recipe, arguments.run, arguments.images, arguments.batches, out)
    files = sorted(out.glob("*.safetensors"))
    own, cross = products(files)
    moved = np.mean([load_file(file)["moved"] for file in files], axis=0)
    arguments.store.mkdir(parents=True, exist_ok=True)
    with (arguments.store / f"{name}.jsonl").open("w", encoding="utf-8") as store:
        for number, pair in enumerate(zip(own, cross, strict=True)):
            inner = {key: rounded(matrix) for key, matrix in zip(("own", "cross"), pair, strict=True)}
            store.write(json.dumps({"batch": number, "images": arguments.images, **inner}) + "\n")
    text = tables(own, cross, recipe, arguments.images, moved)
    print(text)
    if arguments.table:
        replace_section(arguments.table, name, text)


if __name__ == "__main__":
    main()
