"""A run stops when a reward that it never sees has not risen for a while; the best LoRA stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from test_training import recipe

from diffexp import train
from diffexp.errors import UserError
from diffexp.evaluation import Score
from diffexp.stopping import EarlyStopping


def score(mean: float, prompts: str = "a", reward: str = "judge") -> Score:
    return Score(prompts, reward, mean, 0.0, 1)


def test_patience_counts_evaluations_without_a_better_one() -> None:
    stopping = EarlyStopping("judge", patience=2)
    # the mean over both prompt sets counts, and nothing of other rewards
    evaluations = [(1.0, 3.0), (2.0, 4.0), (3.0, 3.0), (9.0, -9.0)]
    best = [
        stopping.observe(k, [score(a), score(b, "b"), score(k, reward="x")]) for k, (a, b) in enumerate(evaluations)
    ]
    assert best == [True, True, False, False]
    assert stopping.over
    assert (stopping.best, stopping.iteration) == (3.0, 1)
    again = EarlyStopping("judge", patience=2)
    again.load_state(json.loads(json.dumps(stopping.state())))
    assert again == stopping


def test_without_patience_or_reward_nothing_stops() -> None:
    kept = EarlyStopping("judge")
    assert [kept.observe(k, [score(-k)]) for k in range(9)] == [True] + [False] * 8
    assert not kept.over
    assert not EarlyStopping().observe(0, [score(1.0)])


def test_a_run_ends_early_keeps_its_best_and_stays_ended(sd_folder: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    # rises once, then falls: every evaluation of two images is one call
    code.write_text(
        "calls = []\n"
        "def judge(images, prompts):\n"
        "    calls.append(1)\n"
        "    return images.mean((1, 2, 3)) * 0 - abs(len(calls) - 2)\n"
    )
    held_out = {"evaluation.held_out": f"{code}:judge", "evaluation.patience": 1, "evaluation.every": 1}
    settings = recipe(sd_folder, **held_out, **{"preview.images": 0, "checkpoint.every": 4})
    run = train(settings, tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    assert len(before.splitlines()) == 2
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    distance = [line["kl_to_base"] for line in evaluations if line["reward"] == settings.evaluation.held_out]
    assert distance[0] == 0 < distance[1], "the divergence from the untouched model stands beside the held-out reward"
    with safe_open(run / "best" / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["diffexp.iterations"] == "1"
    with safe_open(run / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["diffexp.iterations"] == "2"
    with pytest.raises(UserError, match="already holds this run, finished"):
        train(settings, run)
    assert (run / "metrics.jsonl").read_text() == before


def test_patience_without_a_reward_is_refused(sd_folder: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.patience = 3 needs a reward"):
        recipe(sd_folder, **{"evaluation.patience": 3})
