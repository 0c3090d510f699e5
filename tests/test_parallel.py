"""Two processes give the run of one: the same samples, and metrics that agree to a millionth.

So they do whoever starts them; and one that is lost ends both, whose run then goes on as if nothing had been.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import contents, recipe

from diffexp import train
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.processes.launch import port
from diffexp.processes.parallel import Ranks, refuse_shared
from diffexp.processes.patience import VARIABLE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROMPTS = "cat\nbike\na cat\na bike\nfox\nowl\nhen\na fox\na hen\nbear\na bear\na cat bike\n"
REWARD = """
import os
from pathlib import Path

calls = []

def corner(images, prompts):
    calls.append(None)
    number, call = os.environ.get("STRIKE", "0 0").split()
    if os.environ.get("RANK") == "1" and len(calls) == int(call):
        Path(__file__).with_name("struck").touch()
        os.kill(os.getpid(), int(number))
    good = images.new_tensor([len(prompt.split()) < 3 for prompt in prompts])
    return images[:, 0, 0, 0] * good / good

corner.differentiable = True
"""
"""Fails on every prompt of three words, and is hit by a signal where a test asks for it. One pixel, because its spread
is far above rounding: advantages divide by it."""

Run = Callable[[str], Path]


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "memory_gib")} for record in records]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    pipe, own = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=own, stdout=pipe, stderr=pipe, text=True)


def diffexp(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    """``diffexp ARGUMENTS`` in a process of its own: exit code and errors, once it and all that it started are gone."""
    process = start([sys.executable, "-m", "diffexp", *map(str, arguments)], **environment)
    _, error = process.communicate(timeout=240)  # the ranks hold its output, too
    return process.returncode, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def settings(folder: Path, sd_folder: Path) -> Callable[[str], Recipe]:
    """The recipe of an algorithm; also in a file of its name."""
    prompts, code = folder / "prompts.txt", folder / "mine.py"
    prompts.write_text(PROMPTS)
    code.write_text(REWARD)
    # an odd number of samples and of minibatches, so that the ranks' shares differ
    changes = {"prompts": str(prompts), "reward": f"{code}:corner", "evaluation.images": 1, "seed": 1}
    changes["trackers"] = ["tensorboard"]  # ends while the ranks still have to meet
    changes["optimizer.learning_rate"] = 1e-5  # the smaller Adam's steps, the less they make of rounding

    def written(algorithm: str) -> Recipe:
        settings = recipe(sd_folder, algorithm, iterations=2, samples=11, **changes)
        (folder / f"{algorithm}.toml").write_text(settings.to_toml())
        return settings

    return written


@pytest.fixture(scope="module")
def alone(folder: Path, settings: Callable[[str], Recipe]) -> Run:
    """The run of one process."""
    return cache(lambda algorithm: train(settings(algorithm), folder / algorithm / "alone"))


@pytest.fixture(scope="module")
def both(folder: Path, settings: Callable[[str], Recipe]) -> Run:
    """The run of two."""

    @cache
    def trained(algorithm: str) -> Path:
        settings(algorithm)
        run = folder / algorithm / "both"
        assert diffexp("train", folder / f"{algorithm}.toml", "--out", run, "--processes", "2") == (0, "")
        return run

    return trained


def assert_same(run: Path, alone: Path) -> None:
    """The same pictures, and figures that agree to a millionth of their value, or as far as they can.

    AlignProp's first iteration can. DDPO's has two updates, and Adam's first steps see little more of a gradient than
    its sign: where a parameter's is rounding, so is its step. What comes of it differs between makes of processor, for
    the next gradient up to 1.4e-5 of its value. From there on the loss, which cancels, needs more.
    """
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for one, other in zip(lines(run, name), lines(alone, name), strict=True):
            assert one.keys() == other.keys()
            first = one["iteration"] <= 1
            for key, value in one.items():
                rel, near = 1e-4 if key == "grad_norm" else 1e-6, 1e-6 if first or key != "loss" else 1e-5
                if first and "backprop_steps" in one:
                    rel, near = 1e-6, 0.0
                same = pytest.approx(other[key], rel=rel, abs=near) if isinstance(value, float) else other[key]
                assert value == same, (one["iteration"], key)
    assert contents(run)[-1] == contents(alone)[-1]  # the pictures
    tensors = [load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (run, alone)]
    for key, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
def test_two_processes_are_one(algorithm: str, alone: Run, both: Run) -> None:
    """Also where a sample is dropped, here by a reward that fails on every prompt of three words."""
    assert_same(both(algorithm), alone(algorithm))
    assert sum(record["dropped"] for record in lines(alone(algorithm), "metrics.jsonl")) == 2


@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_two_launchers_give_the_run_of_one(
    name: str, folder: Path, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines, with a process on each."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from two_launchers import launchers

    expected, run = alone("ddpo"), folder / "ddpo" / name
    train = ["-m", "diffexp", "train", str(folder / "ddpo.toml"), "--out", str(run)]
    started = [start([*launcher, *train]) for launcher in launchers(name, port())]
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert_same(run, expected)


@pytest.mark.timeout(900)
def test_a_process_lost_in_training_ends_the_run_which_goes_on_as_if_nothing_had_been(folder: Path, both: Run) -> None:
    """Killed in its second iteration, and stopped in the same one when it is resumed."""
    whole, run, struck = both("ddpo"), folder / "ddpo" / "lost", folder / "struck"
    begin, resume = ["train", folder / "ddpo.toml", "--out", run], ["resume", run]
    blows = [  # the reward has been called twice by the first evaluation, and once an iteration
        (begin, signal.SIGKILL, 4, "process 1 of 2 failed (signal 9"),
        (resume, signal.SIGSTOP, 1, "process 1 of 2 has given no sign of life for 5 s"),
    ]
    for command, number, call, message in blows:
        code, error = diffexp(*command, "--processes", "2", **{VARIABLE: "5", "STRIKE": f"{number:d} {call}"})
        assert time.time() - struck.stat().st_mtime < 60
        assert (code, message in error) == (2, True), error
        assert [record["iteration"] for record in lines(run, "metrics.jsonl")] == [1]
        struck.unlink()
    assert diffexp(*resume, "--processes", "2") == (0, "")
    assert contents(run) == contents(whole)


def test_alone_nothing_is_sent() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert Ranks().share(3) == [0, 1, 2]
    assert torch.equal(Ranks().gather(rows, 3), rows)
    assert Ranks().total({"a": 1.5}) == {"a": 1.5}
    assert sorted(Ranks(0, 2).share(5) + Ranks(1, 2).share(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("gpus", "said"), [(["a", "b"], None), (["a", "a"], "2 processes have 1 GPU between them")])
def test_no_two_processes_share_a_gpu(gpus: list[str], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gpu = torch.distributed.HashStore(), torch.device("cuda:0")
    store.set("gpu/1", f"{socket.gethostname()} {gpus[1]}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=gpus[0]))
    with pytest.raises(UserError, match=said) if said else nullcontext():
        refuse_shared(gpu, store, rank=0, size=2)
