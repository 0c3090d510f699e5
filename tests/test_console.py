from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from diffexp.config import Recipe
from diffexp.durations import clock, duration
from diffexp.terminal import console
from diffexp.terminal.console import JsonReporter, LiveReporter, PlainReporter, QuietReporter
from diffexp.terminal.panel import Panel
from diffexp.terminal.progress import Progress
from diffexp.terminal.reporter import Reporter

RECIPE = Recipe.load("emoji-alignprop-diffexp", {"iterations": 10, "samples": 64})
SEEN, UNSEEN = "animal-activities", "animal-activities-unseen"


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(iteration: int, reward: float, **more: Any) -> dict[str, Any]:
    figures = {"queries": 64 * iteration, "reward_mean": reward, "reward_std": 0.25, "seconds": 8.0}
    return {"iteration": iteration, **figures, "memory_gib": 1.52, **more}


def evaluation(iteration: int, prompts: str, reward: str, mean: float) -> dict[str, Any]:
    return {"iteration": iteration, "prompts": prompts, "reward": reward, "mean": mean, "std": 0.1, "n": 270}


def tell(reporter: Reporter, folder: Path) -> None:
    """Two iterations, with an evaluation before and one after them."""
    reporter.started(RECIPE, folder, 0)
    reporter.evaluating(0)
    reporter.evaluated(evaluation(0, UNSEEN, "emoji-judge", 0.5))
    reporter.stepped(step(1, 0.75))
    reporter.stepped(step(2, 0.625))
    reporter.evaluated(evaluation(2, UNSEEN, "emoji-judge", 0.25))
    reporter.saved(2)
    reporter.warned("look [out]")
    reporter.finished(folder)
    reporter.closed()


def progress(folder: Path) -> tuple[Progress, Clock]:
    clock = Clock()
    return Progress(RECIPE, folder, 0, clock), clock


def test_the_pace_counts_what_happens_between_iterations_but_not_before(tmp_path: Path) -> None:
    run, clock = progress(tmp_path)
    clock.now += 100  # the first evaluation
    clock.now += 8
    run.stepped(step(1, 0.5))
    assert run.seconds_left == 8 * 9
    clock.now += 8 + 4  # with an evaluation of 4 seconds before it
    run.stepped(step(2, 0.5))
    assert run.seconds_left == (8 + 12) / 2 * 8


def test_best_reward_and_held_out_rewards(tmp_path: Path) -> None:
    run, _ = progress(tmp_path)
    for record in (step(1, 0.5), step(2, 0.75), step(3, 0.625)):
        run.stepped(record)
    assert (run.reward, run.best["iteration"]) == ("0.625 ± 0.250", 2)
    assert run.effort == "192 queries, 8.0 images/s, 1.5 GiB"
    for iteration, mean in ((0, 0.1), (5, 0.2), (10, 0.3)):
        run.evaluated(evaluation(iteration, SEEN, "emoji-judge", mean))
        run.evaluated(evaluation(iteration, SEEN, "emoji-alignment", mean))
    judge, trained = run.evaluations.values()
    assert (judge.first, judge.last) == (0.1, 0.3)
    assert run.is_held_out(judge)
    assert not run.is_held_out(trained)


def test_a_continued_run_knows_what_was_before(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step(k, 1 / k)) + "\n" for k in (1, 2, 3)))
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(evaluation(0, SEEN, "emoji-judge", 0.1)) + "\n")
    run = Progress(RECIPE, tmp_path, 3, Clock())
    run.evaluated(evaluation(5, SEEN, "emoji-judge", 0.4))
    assert run.best["iteration"] == 1
    assert [(each.first, each.last) for each in run.evaluations.values()] == [(0.1, 0.4)]
    assert run.left == 7


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7322, "2:02:02")])
def test_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "unknown"), (0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5400, "1.5 h"), (36000, "10.0 h")],
)
def test_a_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def painted(width: int, folder: Path) -> str:
    """The panel after two iterations, in a terminal of this width."""
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    run, clock = progress(folder)
    panel = Panel(run, out)
    for record in (evaluation(0, SEEN, "emoji-alignment", 0.3), evaluation(0, UNSEEN, "emoji-judge", 0.5)):
        run.evaluated(record)
    for record in (step(1, 0.75), step(2, 0.625)):
        clock.now += 8
        run.stepped(record)
    clock.now += 3
    run.evaluated(evaluation(2, UNSEEN, "emoji-judge", 0.25))
    run.saved = 2
    panel.show("evaluating")
    out.print(panel)
    return out.file.getvalue()


def test_the_panel_shows_it_all(tmp_path: Path) -> None:
    text = painted(200, tmp_path)
    for part in (
        "alignprop on emoji-alignment, prompts animal-activities, DiffExp (Eq. 7 + Eq. 8)",
        "2/10",
        "0:19 so far, about 1:01 left, evaluating",
        "0.625 ± 0.250, best 0.750 after iteration 1",
        "128 queries, 8.0 images/s, 1.5 GiB",
        "0.250, 0.500 before training: emoji-judge on animal-activities-unseen",
    ):
        assert part in text
    assert re.search("checkpoint +after iteration 2", text)
    assert text.index("held-out") < text.index("evaluation ")


def test_the_panel_fits_a_narrow_terminal(tmp_path: Path) -> None:
    rows = painted(50, tmp_path).splitlines()
    assert max(map(len, rows)) <= 50
    assert len(rows) == len(painted(200, tmp_path).splitlines())


def test_live_leaves_the_panel_and_the_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Console(file=io.StringIO(), width=160, force_terminal=True)
    tell(LiveReporter(out), tmp_path)
    text = out.file.getvalue()
    assert "warning: look [out]" in text
    assert "best 0.750 after iteration 1" in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_plain_lines(tmp_path: Path) -> None:
    out = Console(file=io.StringIO(), width=60)
    tell(PlainReporter(out), tmp_path)
    lines = out.file.getvalue().splitlines()
    assert lines[1] == "  evaluation: emoji-judge on animal-activities-unseen: 0.5000 (n = 270)"
    assert lines[2].startswith("1/10  reward 0.750 ± 0.250, 64 queries, 8.0 images/s, 1.5 GiB, ")
    assert lines[-2:] == ["warning: look [out]", f"done: {tmp_path}"]
    assert "\x1b" not in out.file.getvalue()


def test_quiet_says_only_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(console.reporter(quiet=True), tmp_path)
    assert capsys.readouterr() == ("", "warning: look [out]\n")


def test_json_is_one_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = console.reporter(as_json=True)
    tell(reporter, tmp_path)
    reporter.tell("iteration", loss=float("nan"), bad={"loss": [float("inf"), 1.0]})
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == [
        *("start", "evaluation", "iteration", "iteration", "evaluation", "checkpoint", "warning", "end", "iteration")
    ]
    assert events[0]["recipe"]["iterations"] == 10
    assert events[2]["reward_mean"] == 0.75
    assert events[-1] == {"event": "iteration", "loss": None, "bad": {"loss": [None, 1.0]}}
    assert err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [
        ({"TERM": "xterm"}, True, LiveReporter),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, LiveReporter),
        ({"TERM": "dumb"}, True, PlainReporter),
        ({"TERM": "xterm"}, False, PlainReporter),
        ({"TERM": "xterm", "FORCE_COLOR": "1"}, False, PlainReporter),
    ],
)
def test_the_panel_is_for_terminals(
    environment: dict[str, str], terminal: bool, expected: type[Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", Terminal() if terminal else io.StringIO())
    assert type(console.reporter()) is expected


def test_no_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = {}
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for setting in ("", "1"):
        if setting:
            monkeypatch.setenv("NO_COLOR", setting)
        out = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="truecolor")
        tell(LiveReporter(out), tmp_path)
        colours[setting] = bool(re.search(r"\x1b\[(\d+;)*[39]\d[;m]", out.file.getvalue()))
    assert colours == {"": True, "1": False}


def test_quiet_is_a_reporter_without_progress() -> None:
    assert QuietReporter.stepped is Reporter.stepped
    assert JsonReporter.stepped is not Reporter.stepped
