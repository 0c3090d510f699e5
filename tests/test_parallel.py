"""Two processes give the run of one: the same samples, and metrics that agree to a millionth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import ALGORITHMS, recipe

from diffexp import train
from diffexp.config import Recipe
from diffexp.processes.parallel import Ranks

LOOSE = ("loss", "grad_norm", "ratio_deviation", "approx_kl", "reward_std")


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "memory_gib")} for record in records]


def command(settings: Recipe, folder: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    """``diffexp train`` of a recipe in a process of its own."""
    file = folder / f"{out}.toml"
    file.write_text(settings.to_toml())
    arguments = [sys.executable, "-m", "diffexp", "train", str(file), "--out", str(folder / out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_are_one(algorithm: str, sd_folder: Path, tmp_path: Path) -> None:
    """Also where a sample is dropped, here by a reward that fails on every prompt of three words."""
    prompts, code = tmp_path / "prompts.txt", tmp_path / "mine.py"
    prompts.write_text("cat\nbike\na cat\na bike\nfox\nowl\nhen\na fox\na hen\nbear\na bear\na cat bike\n")
    code.write_text(
        "def reward(images, prompts):\n"
        "    good = images.new_tensor([len(prompt.split()) < 3 for prompt in prompts])\n"
        "    return images.mean((1, 2, 3)) * good / good\n"
        "reward.differentiable = True\n"
    )
    # an odd number of samples and of minibatches, so that the ranks' shares differ
    changes = {"prompts": str(prompts), "reward": f"{code}:reward", "evaluation.images": 1, "seed": 1}
    settings = recipe(sd_folder, algorithm, iterations=2, samples=11, **changes)
    alone = train(settings, tmp_path / "alone")
    done = command(settings, tmp_path, "both", "--processes", "2")
    assert done.returncode == 0, done.stderr
    both = tmp_path / "both"
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert len(lines(both, name)) == len(lines(alone, name))
        for one, other in zip(lines(both, name), lines(alone, name), strict=True):
            assert [key for key in one if isinstance(one[key], str) and one[key] != other[key]] == []
            assert one.get("bad") == other.get("bad")
            for key in (key for key in one if isinstance(one[key], int | float)):
                # rewards agree to a millionth; the loss adds up what Adam made of rounding in the first iteration
                assert one[key] == pytest.approx(other[key], rel=1e-4 if key in LOOSE else 1e-6, abs=1e-5), key
    assert sum(record["dropped"] for record in lines(alone, "metrics.jsonl")) == 2
    tensors = [load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (both, alone)]
    for key, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][key], rtol=0, atol=1e-4)


def test_alone_nothing_is_sent() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert Ranks().share(3) == [0, 1, 2]
    assert torch.equal(Ranks().gather(rows, 3), rows)
    assert Ranks().total({"a": 1.5}) == {"a": 1.5}
    assert sorted(Ranks(0, 2).share(5) + Ranks(1, 2).share(5)) == [0, 1, 2, 3, 4]
