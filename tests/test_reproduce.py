from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brightness import brightness
from PIL import Image
from rich.console import Console

from diffexp import models
from diffexp.commands import Painter
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.rollout import Batch
from diffexp.study import drawing as drawn_by
from diffexp.study import pace
from diffexp.study import reproduce as reproduction
from diffexp.study import trainer as trainer_module
from diffexp.study.archive import Folders
from diffexp.study.drawing import Drawing
from diffexp.study.experiments import jobs, paintings
from diffexp.study.pace import Spent, Times, Work
from diffexp.study.paper import FIGURES, Bars, Grid, Panel, Strategies, arms
from diffexp.study.reproduce import reproduce
from diffexp.study.scales import SCALES
from diffexp.study.trainer import State, Trainer, painted
from diffexp.training import train

REWARD = f"{Path(__file__).parent / 'brightness.py'}:{brightness.__name__}"
MEASURED = {"queries": 4, "training": 8.0, "evaluated": 4, "rest": 4.0}


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """Overrides that make every run of a figure a tiny one."""
    return {
        "model.path": str(folder),
        "reward": REWARD,
        "iterations": 2,
        "samples": 2,
        "rollout.images_per_prompt": 1,
        "sampler.steps": 5,
        "evaluation.prompts": ["text:a cat", "text:bike"],
        "evaluation.rewards": [REWARD, "jpeg-compressibility"],
        "evaluation.images": 2,
        "evaluation.every": 1,
        "preview.every": 1,
        "preview.images": 2,
        "prompts": "text:a cat",
        "trackers": [],
        "device": "cpu",
        **changes,
    }


def call(
    figure: str, out: Path, settings: dict[str, Any], seeds: int = 1, dry_run: bool = False, scale: str = "emoji"
) -> str:
    """What ``reproduce`` says."""
    console = Console(record=True, width=80, quiet=False)
    with console.capture() as capture:
        reproduce(figure, scale, seeds, out, 2, dry_run, settings, console)
    return capture.get()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process: starting another takes seconds."""

    def run(trainer: Trainer) -> None:
        for state in trainer.waiting:
            train(state.job.recipe, state.folder)
            trainer.times.add(state.job.recipe, state.work, Spent(8.0, 4.0))

    monkeypatch.setattr(Trainer, "run", run)


def test_figure_1_in_processes_of_its_own(sd_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    reward = f"{tmp_path / 'mine.py'}:brightness"
    settings = tiny(sd_folder, reward=reward, **{"evaluation.rewards": [reward]})
    said = call("1", tmp_path, settings)
    runs = tmp_path / "emoji"
    for name in ("dolphin-ddpo-s0", "dolphin-ddpo-diffexp-s0"):
        assert re.search(rf"{name}: [\d.]+ (s|min|h); [12] of 2 runs finished", said)
        assert painted(runs / name) == 2 * 2 + 3 * 2 * 2
        assert Recipe.load(runs / "recipes" / f"{name}.toml") == Recipe.load(runs / name / "config.toml")
    for name in ("figure-1.png", "figure-1.svg", "figure-1-images.png"):
        assert (runs / "figures" / name).stat().st_size > 1000
    legend = (runs / "figures" / "figure-1.svg").read_text()
    assert "<!-- DDPO -->" in legend
    assert "<!-- DDPO + DiffExp -->" in legend
    comparison = next((runs / "figures" / "figure-1").glob("*/comparison.json"))
    assert [arm["arm"] for arm in json.loads(comparison.read_text())["arms"]] == ["DDPO", "DDPO + DiffExp"]

    before = {path: path.stat().st_mtime_ns for path in runs.glob("*-s0/**/*") if path.is_file()}
    dry = call("1", tmp_path, settings, dry_run=True)
    assert "2 runs, 2 finished; the others: 0 queries" in dry
    call("1", tmp_path, settings)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished runs are left alone"


def test_grids_bars_and_curves_share_runs(sd_folder: Path, tmp_path: Path, here: None) -> None:
    settings = tiny(sd_folder, iterations=1)
    call("8", tmp_path, settings)
    folder = tmp_path / "emoji"
    assert {path.name for path in folder.glob("*-s0")} == {"drawbench-alignprop-s0", "drawbench-alignprop-diffexp-s0"}
    with Image.open(folder / "figures" / "figure-8.png") as picture:
        assert picture.height > 2 * 3 * 128, "two prompts, three rows each"
        assert picture.width > 4 * 128
    assert "4 runs, 2 finished" in call("17a", tmp_path, settings, seeds=2, dry_run=True)
    call("17a", tmp_path, settings)
    assert "bike" in (folder / "figures" / "figure-17a.svg").read_text()
    assert not (folder / "figures" / "figure-17a").exists(), "statistics are about training prompts"
    drawing = Drawing(SCALES["emoji"], Folders(folder), tmp_path, 1, settings)
    drawing.draw("bars", Bars("", [Panel("DrawBench", "drawbench", arms("alignprop", "diffexp"), held_out=True)]))
    drawn = (tmp_path / "figure-bars.svg").read_text()
    assert all(
        f"<!-- {text}" in drawn for text in ("final jpeg-compressibility", "baseline", "with DiffExp", "DrawBench")
    )


def test_figure_3_needs_no_run(sd_folder: Path, tmp_path: Path) -> None:
    said = call("3", tmp_path, tiny(sd_folder))
    assert "0 runs" in said
    assert (tmp_path / "emoji" / "figures" / "figure-3.png").is_file()


def test_dry_run_lists_runs_samples_and_time(
    tmp_path: Path, sd_folder: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Times, "try_out", lambda *_: None)
    said = call("9b", tmp_path, {}, seeds=2, dry_run=True)
    assert "figure 9b: How long the guidance stays low" in said
    assert len(re.findall(r"pickscore-alignprop\S*-s[01] .* to do .* unknown", said)) == 8
    assert "8 runs, 0 finished" in said
    assert "expected time, 2 at a time: unknown" in said
    assert not (tmp_path / "emoji").exists()
    settings = tiny(sd_folder, iterations=1)
    call("1", tmp_path, settings)
    # each of the two runs took 12 s, so four more, two at a time, take 24 s
    said = call("1", tmp_path, settings, seeds=3, dry_run=True)
    assert "6 runs, 2 finished" in said
    assert "expected time, 2 at a time: 24 s" in said


def test_names_of_runs_are_never_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Times, "try_out", lambda *_: None)
    said = call("tuning", tmp_path, {}, dry_run=True)
    names = {job.name for job in jobs(["tuning"], SCALES["emoji"])}
    assert max(map(len, names)) > 50, "longer than what is left of 80 columns"
    assert names == set(re.findall(r"^(tuning-\S+) .* to do .* unknown *$", said, re.MULTILINE))


def test_unfinished_runs_go_on_and_strangers_are_refused(tmp_path: Path, sd_folder: Path) -> None:
    settings = tiny(sd_folder, **{"checkpoint.every": 1})
    job = jobs(["1"], SCALES["emoji"], 1, settings)[0]
    folder = tmp_path / "emoji" / job.name
    train(job.recipe, folder)
    for newest in (folder / "checkpoints").glob("*2"):
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    (folder / "lora" / "README.md").unlink()  # where the card is, a run is finished
    state = State.look(job, Folders(folder.parent))
    assert (state.iteration, state.finished, str(state)) == (1, False, "at iteration 1")
    assert state.left == (2 * 2 + 3 * 2 * 2) / 2
    smaller = replace(job, recipe=Recipe.parse(job.recipe.model_dump(), "test", {"update.batch": 1}))
    assert State.look(smaller, Folders(folder.parent)).job.recipe == job.recipe, "it goes on as it began"
    with pytest.raises(UserError, match="holds a run of another recipe: choose another folder"):
        call("1", tmp_path, settings | {"samples": 4})
    with pytest.raises(UserError, match="was trained before tuning, which may choose other settings"):
        call("all", tmp_path, settings)
    with pytest.raises(UserError, match="--seeds says how many"):
        call("1", tmp_path, settings | {"seed": 4})


def test_times_know_alike_runs_only(tmp_path: Path, sd_folder: Path) -> None:
    ddpo, alignprop = (jobs([name], SCALES["emoji"], 1, tiny(sd_folder))[0].recipe for name in ("1", "8"))
    times = Times(tmp_path / "times.jsonl")
    times.add(ddpo, Work(8, 4), Spent(32.0, 2.0))
    again = Times(tmp_path / "times.jsonl")
    # 4 s an image of training, half a second an evaluated one
    assert again.expected(ddpo, Work(2, 10)) == 2 * 4 + 10 / 2
    assert again.expected(alignprop, Work(2, 10)) is None
    assert reproduction.together([30.0, 30.0, 30.0], 2) == "45 s"
    assert reproduction.together([30.0, 80.0, 10.0], 2) == "80 s"
    assert reproduction.together([30.0, None], 2) == "unknown"
    assert reproduction.together([], 2) == "none"


def test_a_dry_run_measures_what_is_not_known(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(pace, "measurements", lambda recipe, workers: tried.append(recipe) or [MEASURED] * workers)
    said = call("1", tmp_path, tiny(sd_folder), dry_run=True)
    assert len(tried) == 1, "both arms are as fast"
    # a run: 2 x 2 images to train on at 2 s, 3 x 2 x 2 to evaluate at 1 s
    assert "expected time, 2 at a time: 20 s" in said
    assert not (tmp_path / "emoji").exists()


def test_a_dry_run_counts_and_times_what_is_painted_to_draw(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 2 s an image of training and 1 s a painted one, where the runs go two at a time and drawing follows them."""
    monkeypatch.setattr(pace, "measurements", lambda _, workers: [MEASURED] * workers)
    said = call("3", tmp_path, tiny(sd_folder), dry_run=True)
    assert "figure 3: Guidance strategies; 24 images are painted to draw it" in said, "three rows of eight"
    assert "0 runs, 0 finished; the others: 0 queries, 0 evaluated images; drawing: 24 images" in said
    assert "expected time, 2 at a time: 24 s" in said
    said = call("8", tmp_path, tiny(sd_folder), dry_run=True)
    # two prompts, three rows of four; and two runs of 2 x 2 images to train on and 3 x 2 x 2 to evaluate
    assert "figure 8: DrawBench samples; 24 images are painted to draw it" in said
    assert "expected time, 2 at a time: 44 s" in said
    assert "painted to draw it" not in call("1", tmp_path, tiny(sd_folder), dry_run=True)


def test_every_grid_counts_what_it_paints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing asks for as many images as a dry run says, of the models that it names."""
    scale, asked = SCALES["emoji"], list[tuple[Recipe, int]]()

    def paint(painter: Painter, batch: Batch) -> torch.Tensor:
        asked.append((painter.recipe, len(batch.prompts)))
        return torch.zeros(len(batch.prompts), 3, 8, 8)

    emptied(monkeypatch, paint)
    drawing = Drawing(scale, Folders(tmp_path), tmp_path, 1, {})
    for name, figure in FIGURES.items():
        if isinstance(figure, Grid | Strategies):
            asked.clear()
            drawing.draw(name, figure)
            assert asked == paintings(figure, scale), name


def test_rows_of_a_grid_are_in_order_and_start_from_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image says by its colour which row of which prompt it belongs to, and which noise it starts from."""
    keys, grids = list[list[tuple[Any, ...]]](), list[tuple[list[list[tuple[int, ...]]], list[str]]]()

    def paint(painter: Painter, batch: Batch) -> torch.Tensor:
        prompts, noises = list(dict.fromkeys(batch.prompts)), list(dict.fromkeys(batch.keys))
        colours = [
            (len(keys), prompts.index(prompt), noises.index(key))
            for prompt, key in zip(batch.prompts, batch.keys, strict=True)
        ]
        keys.append(list(batch.keys))
        return (torch.tensor(colours) / 255)[:, :, None, None].expand(-1, 3, 8, 8)

    def grid(rows: list[list[Any]], labels: list[str]) -> Image.Image:
        grids.append(([[image.getpixel((0, 0)) for image in row] for row in rows], labels))
        return Image.new("RGB", (8, 8))

    opened = emptied(monkeypatch, paint)
    monkeypatch.setattr(drawn_by.figures, "image_grid", grid)
    drawing = Drawing(SCALES["emoji"], Folders(tmp_path), tmp_path, 1, {})
    drawing.draw("8", FIGURES["8"])
    rows = ["pre-trained, w=7.5", "AlignProp", "AlignProp + DiffExp"]
    assert grids == [([[(row, prompt, k) for k in range(4)] for row in range(3)], rows) for prompt in range(2)]
    assert opened == ["drawbench-alignprop-s0", "drawbench-alignprop-diffexp-s0"]
    assert keys[0] == keys[1] == keys[2] == 2 * keys[0][:4]
    keys.clear()
    grids.clear()
    drawing.draw("3", FIGURES["3"])
    rows = ["constant w=5", "constant w=1", "scheduled 1 to 5"]
    assert grids == [([[(row, 0, k) for k in range(8)] for row in range(3)], rows)]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys[0])) == 8


def emptied(monkeypatch: pytest.MonkeyPatch, paint: Any) -> list[str]:
    """Lets grids be drawn by ``paint`` and without runs; returns the names of the runs as they are asked for."""
    opened: list[str] = []
    whole = models.load("emoji")
    monkeypatch.setattr(drawn_by.assembly, "model", lambda _: whole)
    grids = [name for name, figure in FIGURES.items() if isinstance(figure, Grid)]
    recipes = {job.name: job.recipe for job in jobs(grids, SCALES["emoji"])}

    def open_painter(folder: str, _: None) -> Painter:
        opened.append(Path(folder).name)
        return drawn_by.untouched(recipes[opened[-1]])

    monkeypatch.setattr(drawn_by, "open_painter", open_painter)
    monkeypatch.setattr(Painter, "paint", paint)
    return opened


def test_a_dry_run_says_why_it_can_tell_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "measurements", lambda *_: pytest.fail("nothing is tried"))
    said = call("10b", tmp_path, {"device": "cpu"}, dry_run=True, scale="sdxl")
    assert "timing" not in said
    assert (
        said.splitlines()[-1]
        == "stabilityai/stable-diffusion-xl-base-1.0 needs a GPU to be practical; on this CPU nothing is timed"
    )


def test_what_can_not_be_timed_is_listed_all_the_same(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("too large")

    monkeypatch.setattr(pace, "measurements", refuse)
    said = call("1", tmp_path, tiny(sd_folder), dry_run=True)
    assert "too large" in said
    assert "2 runs, 0 finished" in said
    assert "2 at a time: unknown" in said


def test_a_panel_shows_all_that_a_run_evaluates() -> None:
    recipe = Recipe.parse({"reward": "hpsv2", "evaluation": {"held_out": "clipscore"}}, "test")
    shown = [drawn_by.measures(recipe, Panel("", "", (), held_out=held_out)) for held_out in (False, True)]
    assert shown == [[("animals", "hpsv2")], [("animals", "clipscore")]]


def test_what_a_dry_run_measures_is_a_whole_run(sd_folder: Path) -> None:
    recipe = jobs(["8"], SCALES["emoji"], 1, tiny(sd_folder))[0].recipe
    (measured,) = pace.measurements(recipe, 1)
    assert (measured["queries"], measured["evaluated"]) == (2 * 2, 3 * 2 * 2)
    assert min(measured["training"], measured["rest"]) > 0


def test_a_run_that_fails_has_the_last_word(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "POLL", 0.05)
    monkeypatch.setattr(trainer_module, "program", lambda: ["/bin/false"])
    with pytest.raises(UserError, match=r"run dolphin-ddpo-s0 failed.*\n.*failed.*\n0 of 2 runs finished; the same"):
        call("1", tmp_path, tiny(sd_folder))


class Process:
    """A process that ends when it is told to."""

    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


def test_progress_reads_only_the_runs_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(folder: Path) -> int:
        read.append(folder.name)
        return painted(folder)

    def tell(state: State, queries: int, evaluated: int) -> None:
        state.folder.mkdir(exist_ok=True)
        records = {
            "metrics.jsonl": {"iteration": 1, "queries": queries, "seconds": 1.0},
            "evaluations.jsonl": {"iteration": 0, "prompts": "a", "n": evaluated},
        }
        for name, record in records.items():
            (state.folder / name).write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(trainer_module, "painted", counted)
    monkeypatch.setattr(trainer_module.subprocess, "Popen", lambda *_, **__: Process())
    first, second, _ = states = [State(job, tmp_path / job.name, 0) for job in jobs(["10a"], SCALES["emoji"])[:3]]
    tell(first, 10, 5)  # of a process that was killed
    trainer = Trainer(states, Times(tmp_path / "times.jsonl"), 2, torch.device("cpu"), Console(quiet=True))
    trainer.start(first)
    trainer.start(second)
    tell(first, 30, 5)
    tell(second, 8, 4)
    assert trainer.progress() == 20 + 12
    trainer.running[0].process.returncode = 0
    trainer.collect()
    tell(first, 1000, 1000)
    tell(second, 9, 4)
    read.clear()
    assert trainer.progress() == 20 + 13
    assert read == [second.job.name]


def test_every_worker_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus: list[str] = []

    def begin(*_: Any, env: dict[str, str], **__: Any) -> Process:
        gpus.append(env["LOCAL_RANK"])
        return Process()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(trainer_module.subprocess, "Popen", begin)
    states = [State(job, tmp_path / job.name, 0) for job in jobs(["10a"], SCALES["emoji"])[:5]]
    trainer = Trainer(states, Times(tmp_path / "times.jsonl"), 3, torch.device("cuda"), Console(quiet=True))
    for state in states[:3]:
        trainer.start(state)
    trainer.running[1].process.returncode = 0
    trainer.collect()
    trainer.start(states[3])
    assert gpus == ["0", "1", "2", "1"]


def test_ctrl_c_lets_every_run_save(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train"
    lines = ["#!/bin/sh", 'trap "echo saved; exit 130" TERM', "for last; do :; done", 'touch "$last.started"']
    script.write_text("\n".join([*lines, "while :; do sleep 0.05; done", ""]))
    script.chmod(0o755)
    monkeypatch.setattr(trainer_module, "POLL", 0.05)
    monkeypatch.setattr(trainer_module, "program", lambda: [str(script)])
    collect = Trainer.collect

    def collected(trainer: Trainer) -> None:
        collect(trainer)
        if len(list((tmp_path / "emoji").glob("*.started"))) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "collect", collected)
    with pytest.raises(KeyboardInterrupt, match="stopped with 0 of 2 runs finished"):
        call("1", tmp_path, tiny(sd_folder))
    assert [log.read_text() for log in (tmp_path / "emoji").glob("*.log")] == ["saved\n", "saved\n"]
