from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import accelerate
import pytest

from diffexp import tracking
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.tracking import Trackers

ALL = ["tensorboard", "wandb", "mlflow", "trackio"]


class Accelerator:
    """Remembers what it is told; fails where ``broken`` says."""

    broken = ""
    made: ClassVar[list[Any]] = []

    def __init__(self, log_with: list[str], project_dir: Path, cpu: bool) -> None:
        self.log_with, self.logged = log_with, []
        self.made.append(self)

    def init_trackers(self, project: str, config: Any, init_kwargs: Any) -> None:
        if self.broken == "start":
            raise RuntimeError("no key\nsecond line")
        self.project, self.config, self.init_kwargs = project, config, init_kwargs

    def log(self, values: Any, step: int) -> None:
        if self.broken == "log" and step == 2:
            raise ConnectionError("down")
        self.logged.append((step, values))

    @property
    def trackers(self) -> list[Any]:
        return [self]

    def end_training(self) -> None:
        raise AssertionError("accelerate's own ends the run's process group, too")

    def finish(self) -> None:
        if self.broken == "end":
            raise ConnectionError("down")
        self.logged.append("end")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> type[Accelerator]:
    monkeypatch.setattr(accelerate, "Accelerator", Accelerator)
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    monkeypatch.setattr(Accelerator, "made", [])
    monkeypatch.setattr(Accelerator, "broken", "")
    return Accelerator


def test_all_trackers_get_the_run_and_its_settings(accelerator: type[Accelerator], tmp_path: Path) -> None:
    recipe = Recipe.load("emoji-ddpo", {"trackers": ALL, "reward": "emoji-alignment", "model.path": "/home/me/emoji"})
    with Trackers(recipe, tmp_path / "first") as trackers:
        trackers.log({"evaluation/text:a cat/2*hpsv2+aesthetic": 1.5}, 1)
    (made,) = accelerator.made
    assert made.log_with == ALL
    assert made.project == "diffexp"
    assert made.init_kwargs == {
        "wandb": {"name": "first"},
        "mlflow": {"run_name": "first"},
        "trackio": {"name": "first"},
    }
    assert made.config["sampler.steps"] == 20
    assert made.config["evaluation.rewards"] == '["emoji-alignment", "emoji-judge"]'
    assert made.config["model.path"] == "emoji", "no folder of this machine"
    assert {type(value) for value in made.config.values()} <= {str, int, float, bool}
    assert made.logged == [(1, {"evaluation/text:a cat/2_hpsv2_aesthetic": 1.5}), "end"]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    recipe = Recipe.load("emoji-ddpo", {"trackers": ["tensorboard", name]})
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install 'diffexp\[{name}\]'"):
        Trackers(recipe, tmp_path)
    assert tracking.trackers_of(Recipe()) == [], "TensorBoard is the default, and may be missing"


def test_a_tracker_that_does_not_start(accelerator: type[Accelerator], tmp_path: Path) -> None:
    accelerator.broken = "start"
    with pytest.raises(UserError, match=r'trackers = \["wandb"\]: can\'t start \(no key') as caught:
        Trackers(Recipe.load("emoji-ddpo", {"trackers": ["wandb"]}), tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("broken", "steps"), [("log", 1), ("end", 3)])
def test_a_tracker_that_fails_ends_tracking_and_not_the_run(
    broken: str, steps: int, accelerator: type[Accelerator], tmp_path: Path
) -> None:
    accelerator.broken = broken
    told: list[str] = []
    recipe = Recipe.load("emoji-ddpo", {"trackers": ["mlflow"]})
    with Trackers(recipe, tmp_path, warn=told.append) as trackers:
        for iteration in (1, 2, 3):
            trackers.log({"x": 1.0}, iteration)
    assert told == ['trackers = ["mlflow"] failed and are off from here on: down']
    assert len(accelerator.made[0].logged) == steps


def test_other_ranks_send_nothing(accelerator: type[Accelerator], tmp_path: Path) -> None:
    with Trackers(Recipe.load("emoji-ddpo", {"trackers": ALL}), tmp_path, main=False) as trackers:
        trackers.log({"x": 1.0}, 1)
    assert accelerator.made == []


@pytest.mark.parametrize("name", ALL)
def test_what_is_installed_takes_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is first imported
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with Trackers(Recipe.load("emoji-ddpo", {"trackers": [name]}), tmp_path / "run") as trackers:
        trackers.log({"train/reward_mean": 0.5, "evaluation/text:a cat/x+y": 1.0}, 1)
        assert trackers.accelerator is not None
