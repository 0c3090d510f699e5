from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffexp import train
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.processes.interruption import Interrupted
from diffexp.runs import checkpoint
from diffexp.terminal.reporter import Reporter
from diffexp.training import Training

ALGORITHMS = {
    "ddpo": {"name": "ddpo"},
    "alignprop": {"name": "alignprop", "last_steps": 2},
    "refl": {"name": "refl", "last_steps": 2},
    "rwr": {"name": "rwr"},
}


def recipe(folder: Path, algorithm: str = "ddpo", **changes: Any) -> Recipe:
    """Four iterations of a tiny run with everything on: exploration, evaluation, previews, checkpoints."""
    return Recipe.parse(
        {
            "iterations": 4,
            "samples": 4,
            "prompts": "text:a cat riding a bike",
            "reward": f"{Path(__file__).parent / 'brightness.py'}:brightness",
            "device": "cpu",
            "trackers": [],
            "model": {"path": str(folder)},
            "sampler": {"steps": 3},
            "algorithm": ALGORITHMS[algorithm],
            "exploration": {"guidance": {"fraction": 0.4}, "words": {}},
            "rollout": {"batch": 4},
            "evaluation": {"every": 2, "images": 2},
            "preview": {"every": 2, "images": 2},
            "checkpoint": {"every": 1},
        },
        "test",
        changes,
    )


def contents(run: Path) -> tuple[Any, ...]:
    """What a run left, timings aside."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        line.pop("seconds")
        line.pop("memory_gib")
    tensors = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    pictures = {p.relative_to(run): p.read_bytes() for p in run.glob("samples/**/*.png")}
    return (
        metrics,
        (run / "evaluations.jsonl").read_text(),
        (run / "exploration.jsonl").read_text(),
        {k: v.numpy().tobytes() for k, v in tensors.items()},
        pictures,
    )


class Noisy(Reporter):
    """Disturbs every global generator wherever training lets someone else speak."""

    def disturb(self) -> None:
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        random.random()  # noqa: S311

    def stepped(self, record: Any) -> None:
        self.disturb()

    def evaluated(self, record: Any) -> None:
        self.disturb()


class Stop(Reporter):
    """Ends the process's work after an iteration, as a crash would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def stepped(self, record: Any) -> None:
        if record["iteration"] == self.after:
            raise KeyboardInterrupt


def test_an_ensemble_starts_from_the_same_statistics_with_and_without_exploration(
    sd_folder: Path, tmp_path: Path
) -> None:
    strong = {"guidance": {"fraction": 1.0}, "words": {"low": 1.9, "high": 2.0}}
    reward, started = f"{Path(__file__).parent / 'brightness.py'}:brightness+jpeg-compressibility", []
    for explores in (strong, {}):
        training = Training(recipe(sd_folder, reward=reward, exploration=explores), tmp_path / "run")
        training.calibrate()
        started.append(training.reward.state_dict())
    assert started[0] == started[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_seed_same_run_and_resume_is_exact(algorithm: str, sd_folder: Path, tmp_path: Path) -> None:
    settings = recipe(sd_folder, algorithm)
    whole = contents(train(settings, tmp_path / "whole"))
    disturbed = contents(train(settings, tmp_path / "disturbed", Noisy()))
    assert disturbed == whole
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "resumed", Stop(after=3))
    resumed = contents(train(settings, tmp_path / "resumed"))
    assert resumed == whole


def test_run_folder_holds_what_it_should(xl_folder: Path, tmp_path: Path) -> None:
    run = train(recipe(xl_folder), tmp_path / "run")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4]
    assert [line["queries"] for line in metrics] == [4, 8, 12, 16]
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["queries"], line["n"]) for line in evaluations] == [
        (0, 0, 2),
        (2, 8, 2),
        (4, 16, 2),
    ]
    assert Recipe.load(run / "config.toml") == recipe(xl_folder)
    names = {path.name for path in (run / "samples").iterdir()}
    assert names == {f"iteration-{k:04d}{end}" for k in (0, 2, 4) for end in ("", ".png")} | {
        "prompts.json",
        "sets.json",
    }
    assert {path.name for path in (run / "lora").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "run.kohya.safetensors",
        "README.md",
        "images",
    }


def test_exploration_ends_and_never_reaches_evaluation(sd_folder: Path, tmp_path: Path) -> None:
    training = Training(recipe(sd_folder), tmp_path / "run")
    guidance, text = training.batch(3).guidance, training.batch(3).text
    assert [guidance(t) for t in training.sampler.schedule.timesteps] == [1.0, 5.0, 5.0]
    assert not torch.equal(text.hidden, training.texts.select([0] * 4).hidden)
    last = training.batch(4)
    assert last.guidance(999) == 5.0
    assert torch.equal(last.text.hidden, training.texts.select([0] * 4).hidden)
    task = training.evaluate.task("text:a cat riding a bike")
    assert task.guidance(999) == 5.0
    assert torch.equal(task.text.hidden, training.texts.select([0, 0]).hidden)


def test_the_kl_weight_of_a_recipe_reaches_ddpo(sd_folder: Path, tmp_path: Path) -> None:
    assert Training(recipe(sd_folder, **{"algorithm.kl": 0.25}), tmp_path / "run").algorithm.kl == 0.25


def test_images_of_a_group_share_their_prompt(sd_folder: Path, tmp_path: Path) -> None:
    settings = recipe(sd_folder, prompts="animals", samples=12, **{"rollout.images_per_prompt": 3})
    prompts = Training(settings, tmp_path / "run").batch(1).prompts
    groups = [prompts[k : k + 3] for k in range(0, 12, 3)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) > 1


def test_a_folder_in_use_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    settings = recipe(sd_folder, iterations=1)
    run = train(settings, tmp_path / "run")
    before = contents(run)
    with pytest.raises(UserError, match="already holds this run, finished"):
        train(settings, run)
    with pytest.raises(UserError, match=r"another recipe \(seed = 1 instead of 0\)"):
        train(recipe(sd_folder, iterations=1, seed=1), run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        train(settings, tmp_path / "other")
    assert contents(run) == before


def test_a_bad_reward_names_iteration_and_prompt_and_loses_nothing(sd_folder: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "calls = []\n"
        "def reward(images, prompts):\n"
        "    calls.append(1)\n"
        "    r = images.mean((1, 2, 3))\n"
        "    return r * float('nan') if len(calls) > 3 else r\n"
    )
    settings = recipe(
        sd_folder, reward=f"{code}:reward", **{"evaluation.every": 4, "preview.images": 0, "checkpoint.every": 4}
    )
    with pytest.raises(UserError, match=r"iteration 3: .*nan for the prompt 'a cat riding a bike'"):
        train(settings, tmp_path / "run")
    state = checkpoint.read_newest(tmp_path / "run" / "checkpoints")
    assert state.numbers["iteration"] == 2
    assert all(tensor.isfinite().all() for tensor in state.tensors.values())


class Signal(Reporter):
    """Sends this process a signal during an iteration."""

    def stepped(self, record: Any) -> None:
        if record["iteration"] == 2:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_saves_and_the_run_goes_on_exactly(sd_folder: Path, tmp_path: Path) -> None:
    settings = recipe(sd_folder, **{"checkpoint.every": 4})
    whole = contents(train(settings, tmp_path / "whole"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped after iteration 2 of 4"):
        train(settings, tmp_path / "run", Signal())
    assert signal.getsignal(signal.SIGTERM) is before
    assert contents(train(settings, tmp_path / "run")) == whole


def test_a_damaged_checkpoint_is_passed_over(sd_folder: Path, tmp_path: Path) -> None:
    settings = recipe(sd_folder)
    whole = contents(train(settings, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", Stop(after=4))
    newest = checkpoint.newest_first(tmp_path / "run" / "checkpoints")[0]
    file = newest / checkpoint.TENSORS
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert contents(train(settings, tmp_path / "run")) == whole
