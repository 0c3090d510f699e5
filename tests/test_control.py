from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_training import contents, recipe

from diffexp import control, train
from diffexp.errors import UserError
from diffexp.processes.interruption import Interrupted
from diffexp.runs import checkpoint, durable
from diffexp.terminal.reporter import Reporter


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run's folder, claimed as one that trains has it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    with durable.claimed(tmp_path / "run"):
        yield tmp_path / "run"


def test_a_request_is_told_once(run: Path) -> None:
    assert control.take(run) == frozenset()
    control.ask(run, "save")
    control.ask(run, "save")
    control.ask(run, "stop")
    assert control.take(run) == {"save", "stop"}
    assert control.take(run) == frozenset()


def test_a_run_that_nobody_trains_is_asked_nothing(run: Path, tmp_path: Path) -> None:
    idle = tmp_path / "idle"
    idle.mkdir()
    (idle / "config.toml").touch()
    with pytest.raises(UserError, match=f"no process trains this run; .*`diffexp resume {idle}`"):
        control.ask(idle, "stop")
    assert [path.name for path in idle.iterdir()] == ["config.toml"]
    with durable.claimed(idle):  # to look took no lock away, and left none
        control.ask(idle, "stop")
        with pytest.raises(UserError, match="another process"), durable.claimed(idle):
            pass


def test_unknown_requests_and_folders_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown request 'stopp': did you mean 'stop'"):
        control.ask(run, "stopp")
    with pytest.raises(UserError, match="no run folder"):
        control.ask(tmp_path, "stop")


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "stop").write_text("precious")
    (run / "control").symlink_to(elsewhere)
    assert control.take(run) == frozenset()
    with pytest.raises(UserError, match="can't leave a request there"):
        control.ask(run, "save")
    assert [path.name for path in elsewhere.iterdir()] == ["stop"]

    (run / "control").unlink()
    (run / "control").mkdir()
    (run / "control" / "stop").symlink_to(elsewhere / "stop")
    (run / "control" / "save").symlink_to(elsewhere / "nothing")
    assert control.take(run) == frozenset()
    with pytest.raises(UserError, match="file exists; choose another folder"):
        control.ask(run, "save")
    assert (elsewhere / "stop").read_text() == "precious"
    assert not (elsewhere / "nothing").exists()


def test_junk_is_let_be(run: Path) -> None:
    folder = run / "control"
    folder.mkdir()
    (folder / "stop").mkdir()
    os.mkfifo(folder / "save")
    (folder / "rm -rf").write_bytes(b"\0" * 100)
    assert control.take(run) == frozenset()
    control.ask(run, "sample")
    assert control.take(run) == {"sample"}
    assert {path.name for path in folder.iterdir()} == {"stop", "save", "rm -rf"}
    with pytest.raises(UserError, match="file exists; choose another folder"):
        control.ask(run, "save")


def test_a_file_in_the_folders_place_is_no_request(run: Path) -> None:
    (run / "control").write_text("stop")
    assert control.take(run) == frozenset()
    with pytest.raises(UserError, match="can't leave"):
        control.ask(run, "stop")


class Ask(Reporter):
    """Asks for something after an iteration, as a second shell would."""

    def __init__(self, folder: Path, after: int, *requests: str) -> None:
        self.folder, self.after, self.requests = folder, after, requests
        self.checkpoints: list[int] = []

    def stepped(self, record: Any) -> None:
        if record["iteration"] == self.after:
            for request in self.requests:
                control.ask(self.folder, request)

    def saved(self, iteration: int) -> None:
        self.checkpoints.append(iteration)


RARE = {"checkpoint.every": 100, "preview.every": 100, "evaluation.every": 100, "iterations": 3}


@pytest.fixture(scope="module")
def undisturbed(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What a run leaves that nobody asks for anything."""
    return contents(train(recipe(sd_folder, **RARE), tmp_path_factory.mktemp("runs") / "whole"))


def test_a_run_samples_and_saves_when_asked(sd_folder: Path, tmp_path: Path, undisturbed: tuple[Any, ...]) -> None:
    run = tmp_path / "run"
    asked = Ask(run, 2, "sample", "save")
    train(recipe(sd_folder, **RARE), run, asked)
    assert asked.checkpoints == [2, 3]
    assert (run / "samples" / "iteration-0002.png").is_file()
    assert not (run / "samples" / "iteration-0001.png").exists()
    assert contents(run)[:4] == undisturbed[:4], "asking changes nothing else"


def test_previews_can_be_asked_for_where_the_recipe_has_none(sd_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe(sd_folder, **RARE | {"preview.images": 0, "iterations": 1}), run, Ask(run, 1, "sample"))
    assert (run / "samples" / "iteration-0001.png").is_file()


def test_a_run_stops_when_asked_and_goes_on_exactly(
    sd_folder: Path, tmp_path: Path, undisturbed: tuple[Any, ...]
) -> None:
    settings, run = recipe(sd_folder, **RARE), tmp_path / "run"
    with pytest.raises(Interrupted, match="stopped after iteration 2 of 3"):
        train(settings, run, Ask(run, 2, "stop"))
    assert checkpoint.read_newest(run / "checkpoints").numbers["iteration"] == 2
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    (run / "control" / "stop").touch()  # of nobody any more: the run that goes on later must not hear it
    assert contents(train(settings, run)) == undisturbed


class Warnings(Reporter):
    """Remembers what the user was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warned(self, message: str) -> None:
        self.messages.append(message)


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("diffexp.preview.grid", OSError(28, "No space left on device")),
        ("diffexp.preview.to_images", RuntimeError("broken")),
        ("diffexp.sharing.card.draw_curve", OSError("cannot open font resource")),
    ],
)
def test_a_failing_preview_never_stops_a_run(
    broken: str, error: Exception, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(broken, fail)
    told = Warnings()
    run = train(recipe(sd_folder, iterations=1), tmp_path / "run", told)
    what = "model card" if "card" in broken else "preview"
    assert told.messages[-1] == f"no {what} after iteration 1: {type(error).__name__}: {error}"
    assert len(told.messages) == (1 if "card" in broken else 2)
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert ([*(run / "samples").glob("iteration-*")] == []) == ("card" not in broken), "no half of a preview stays"
