"""On a device that is not the CPU, such as a GPU, nothing is left behind on the wrong side, and no step waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffexp import Recipe, train

REWARD = f"{Path(__file__).parent / 'resized.py'}:resized"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ddpo": {"name": "ddpo", "min_count": 2, "kl": 0.1},
    "alignprop": {"name": "alignprop", "truncation": "fixed", "last_steps": 2},
}


def settings(folder: Path, algorithm: str, **changes: Any) -> dict[str, Any]:
    """Two iterations with everything on: the first leaves numbers on the device that the second needs."""
    return {
        "iterations": 2,
        "samples": 4,
        "prompts": "text:a cat riding a bike",
        "reward": REWARD,
        "device": "other",
        "trackers": [],
        "model": {"path": str(folder)},
        "sampler": {"steps": 2},
        "algorithm": ALGORITHMS[algorithm],
        "exploration": {"guidance": {"fraction": 0.4}, "words": {}, "until": 1.0},
        "rollout": {"batch": 2},
        "update": {"batch": 2},
        "evaluation": {"every": 2, "prompts": ["text:a cat"], "images": 2},
        "preview": {"every": 2, "images": 1},
        **changes,
    }


@pytest.fixture(scope="module")
def done(sd_folder: Path, xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of all these jobs; one process does them, for most of its time it imports."""
    root = tmp_path_factory.mktemp("other")
    train(Recipe.parse(settings(sd_folder, "ddpo", device="cpu"), "test"), root / "run")
    run, there, prompt = str(root / "run"), ("--set", "device=other"), ("--prompt", "a cat")
    more = {"update": {"batch": 2, "checkpoint": ["unet", "decoder"]}, "lora": {"text_encoders": True}}
    recipes = {
        **{name: settings(sd_folder, name) for name in ALGORITHMS},
        **{f"{name} longer": settings(sd_folder, name, sampler={"steps": 3}) for name in ALGORITHMS},
        "xl": settings(xl_folder, "ddpo", model={"path": str(xl_folder), "precision": "bf16"}, **more),
    }
    commands = {
        "sample": ("sample", run, *prompt, *there, "--explore", "--out", str(root / "images")),
        "evaluate": ("evaluate", run, *there, "--json"),
        "explore": ("explore", f"{run}/config.toml", *prompt, *there, "--n", "2", "--out", str(root / "ways")),
        "bench": ("bench", f"{run}/config.toml", "--device", "other"),
    }
    jobs = [["train", recipe, str(root / name)] for name, recipe in recipes.items()]
    jobs += [["command", *arguments] for arguments in commands.values()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = str(Path(__file__).parent / "otherdevice.py")
    printed = subprocess.run([sys.executable, script, str(root / "jobs.json")], stdout=subprocess.PIPE, check=True)
    return dict(zip([*recipes, *commands], json.loads(printed.stdout), strict=True)) | {"folder": root}


def result(outcome: dict[str, Any]) -> Any:
    """What a job returned."""
    assert "error" not in outcome, outcome["error"]
    return outcome["result"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_device_trains_as_the_cpu_does(
    algorithm: str, done: dict[str, Any], sd_folder: Path, tmp_path: Path
) -> None:
    result(done[algorithm])
    train(Recipe.parse(settings(sd_folder, algorithm, device="cpu"), "test"), tmp_path / "cpu")
    runs = (done["folder"] / algorithm, tmp_path / "cpu")
    other, cpu = (json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in runs)
    for name in ("reward_mean", "reward_std", "grad_norm"):
        assert other[name] == pytest.approx(cpu[name], rel=1e-3)  # a CPU has layers of its own, which round differently


def test_nothing_of_sdxl_is_left_behind(done: dict[str, Any]) -> None:
    """In bf16, with everything recomputed and the text encoders learning."""
    assert result(done["xl"])["up"] > 0


@pytest.mark.parametrize(("run", "there"), [("ddpo", "cpu"), ("alignprop", "cpu"), ("xl", "other")])
def test_text_encoders_are_on_the_device_only_where_they_learn(run: str, there: str, done: dict[str, Any]) -> None:
    found = result(done[run])
    assert (found["encoders"], found["embedded"]) == ([there], "other")


@pytest.mark.parametrize("what", ["sample", "evaluate", "explore", "bench"])
def test_every_command_that_computes(what: str, done: dict[str, Any]) -> None:
    assert result(done[what])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_further_step_copies_its_noise_and_waits_for_nothing(algorithm: str, done: dict[str, Any]) -> None:
    few, many = result(done[algorithm]), result(done[f"{algorithm} longer"])
    assert many["down"] == few["down"]
    assert many["up"] - few["up"] == 2  # four samples, two at a time
