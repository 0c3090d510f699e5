"""Run folders as training leaves them, without training: for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffexp.config import Recipe

PROMPTS = ("a cat riding a bike", "a dog playing chess")
UNSEEN = ("a snail driving a car",)


def make_run(
    folder: Path,
    seed: int = 0,
    explores: bool = True,
    algorithm: str = "ddpo",
    iterations: int = 8,
    done: int | None = None,
    every: int = 2,
    held_out: str | None = "emoji-judge",
    prompts: tuple[str, ...] = PROMPTS,
    evaluated: bool = True,
    side: int = 16,
    slope: float = 0.1,
    hacked: bool = False,
    **settings: Any,
) -> Path:
    """A run of ``iterations`` of which so many are ``done``, evaluated and painted ``every`` so many."""
    folder.mkdir(parents=True)
    done = iterations if done is None else done
    moments = [k for k in range(done + 1) if k % every == 0 or k == iterations]
    rewards = ["emoji-alignment", *([held_out] if held_out else [])]
    recipe = {
        "seed": seed,
        "iterations": iterations,
        "samples": 64,
        "prompts": "animal-activities",
        "algorithm": {"name": algorithm},
        "exploration": {"guidance": {"fraction": 0.1}, "words": {}} if explores else {},
        "evaluation": {
            "every": every,
            "images": 2,
            "rewards": rewards,
            "prompts": ["animal-activities", "animal-activities-unseen"],
        },
        **settings,
    }
    (folder / "config.toml").write_text(Recipe.parse(recipe, "test").to_toml())
    noise = np.random.default_rng(seed)
    write_lines(folder / "metrics.jsonl", [metrics(k, noise, slope) for k in range(1, done + 1)])
    sets = ["animal-activities", "animal-activities-unseen"]
    scores = [score(k, p, r, noise, slope, hacked) for k in moments for p in sets for r in rewards] if evaluated else []
    write_lines(folder / "evaluations.jsonl", scores)
    last = min(done, iterations * 3 // 4) if explores else 0
    write_lines(folder / "exploration.jsonl", [exploration(k) for k in range(1, last + 1)])
    environment = {"diffexp": "0.1.0", "python": "3.12.1", "device": "CPU, 2 threads", "processes": 1}
    (folder / "environment.json").write_text(json.dumps(environment))
    paint(folder / "samples", prompts, moments, side)
    return folder


def metrics(k: int, noise: np.random.Generator, slope: float) -> dict[str, Any]:
    mean = 6 + slope * k + 0.05 * float(noise.normal())
    figures = {"reward_mean": mean, "reward_std": 1.5, "reward_max": mean + 3, "grad_norm": 1.0}
    return {"iteration": k, "queries": 64 * k, **figures, "seconds": 4.0 + 0.01 * k, "memory_gib": 1.25}


def score(k: int, prompts: str, reward: str, noise: np.random.Generator, slope: float, hacked: bool) -> dict[str, Any]:
    rise = slope * k * (0.6 if "unseen" in prompts else 1)
    if reward == "emoji-judge":
        rise *= -0.8 if hacked else 0.7
    mean = 7 + rise + 0.02 * float(noise.normal())
    diversity = {"diversity": 0.5 - 0.01 * k, "encoder": "emoji-judge", "kl_to_base": 0.001 * k}
    return {
        "iteration": k,
        "queries": 64 * k,
        "prompts": prompts,
        "reward": reward,
        "mean": mean,
        "std": 1.5,
        "n": 270,
        **diversity,
    }


def exploration(k: int) -> dict[str, Any]:
    words = {
        "word": ["a", "bike", "cat"],
        "weighted": [8, 20, 4],
        "weight": [1.1, 1.1, 1.1],
        "reward": [6.0, 6.6, 6.1],
        "advantage": [-0.1, 0.5, 0.0],
        "other": [24, 12, 28],
        "other_reward": [6.1, 5.9, 6.1],
        "other_advantage": [0.1, -0.3, 0.02],
    }
    return {"iteration": k, "guidance": [[981, 1.0], [881, 5.0]], "words": words}


def paint(samples: Path, prompts: tuple[str, ...], moments: list[int], side: int) -> None:
    """Every image in a colour of its own, so that a test can tell them apart."""
    if not prompts:
        return
    shown = [*prompts, *UNSEEN]
    for k in moments:
        folder = samples / f"iteration-{k:04d}"
        folder.mkdir(parents=True)
        for row in range(len(shown)):
            Image.new("RGB", (side, side), (min(255, 4 * k), 40 * row, 128)).save(folder / f"{row}.png")
    (samples / "prompts.json").write_text(json.dumps(shown))
    sets = ["animal-activities"] * len(prompts) + ["animal-activities-unseen"] * len(UNSEEN)
    (samples / "sets.json").write_text(json.dumps(sets))


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
