"""A run that was interrupted, in whatever way, ends as the one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli import run as command_line
from test_parallel import lines
from test_training import Stop, contents, recipe

from diffexp import train
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.processes.interruption import Interrupted
from diffexp.runs import checkpoint, durable, provenance, runfolder
from diffexp.runs.checkpoint import NotSaved
from diffexp.runs.names import CONFIG, EVALUATIONS, EXPLORATION, METRICS, RECORDS
from diffexp.runs.runfolder import finished
from diffexp.sharing import card
from diffexp.terminal.reporter import Reporter
from diffexp.training import Training

Command = Callable[..., tuple[int, str, str]]
GOLDEN = Path(__file__).parent / "golden" / "checkpoints"


@pytest.fixture
def diffexp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``diffexp ARGUMENTS`` in this process: exit code, output and errors."""
    return partial(command_line, capsys, monkeypatch)


class Listener(Reporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module")
def settings(sd_folder: Path) -> Recipe:
    changes = {"iterations": 3, "samples": 2, "sampler.steps": 2, "exploration.guidance.fraction": 0.5}
    few = {"evaluation.every": 2, "evaluation.images": 2, "preview.images": 1, "preview.every": 3}
    return recipe(sd_folder, **changes, **few, **{"checkpoint.every": 1, "algorithm.minibatches": 1})


@pytest.fixture(scope="module")
def whole(settings: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What an undisturbed run leaves."""
    return contents(train(settings, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def stopped(settings: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended in its third iteration."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(settings, run, Stop(after=3))
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_resume_continues_and_then_says_that_all_is_done(run: Path, whole: tuple[Any, ...], diffexp: Command) -> None:
    code, out, error = diffexp("resume", str(run))
    assert (code, error) == (0, "")
    assert "going on after iteration 2" in out
    assert contents(run) == whole
    assert diffexp("resume", str(run)) == (0, f"{run} is finished: there is nothing left to do\n", "")
    assert contents(run) == whole


def test_resume_needs_a_run(tmp_path: Path, diffexp: Command) -> None:
    message = f"error: {tmp_path} is no run folder: it has no config.toml; give one that `diffexp train` made\n"
    assert diffexp("resume", str(tmp_path)) == (2, "", message)


def test_records_that_were_damaged_come_from_the_checkpoint(
    run: Path, settings: Recipe, whole: tuple[Any, ...]
) -> None:
    (run / METRICS).unlink()
    os.truncate(run / EVALUATIONS, 30)
    (run / EXPLORATION).write_bytes(b"\0" * (run / EXPLORATION).stat().st_size)
    listener = Listener()
    assert contents(train(settings, run, listener)) == whole
    assert listener.warnings == [f"{run / name} was damaged: put back from the checkpoint" for name in RECORDS]


def test_a_torn_line_and_lines_that_no_checkpoint_knows_are_taken_back(
    run: Path, settings: Recipe, whole: tuple[Any, ...]
) -> None:
    with (run / METRICS).open("a") as file:
        file.write('{"iteration": 3, "queries": 6}\n{"iterat')
    listener = Listener()
    assert contents(train(settings, run, listener)) == whole
    assert listener.warnings == []


def test_a_change_of_code_or_library_is_told(run: Path, settings: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "code", lambda: "other")
    listener = Listener()
    Training(settings, run, listener).open_folder()
    assert listener.warnings == [
        "the code of diffexp has changed since the checkpoint: the run may differ from one without a break"
    ]
    before, now = {"torch": "2.13.0", "code": "a", "gone": 1}, {"torch": "2.14.0", "code": "b", "new": 2}
    assert provenance.changes(before, now) == "torch was 2.13.0 and is 2.14.0"
    assert provenance.changes({}, now) == provenance.changes(now, now) == ""


def test_another_recipe_is_refused_with_the_keys_that_differ(run: Path, settings: Recipe) -> None:
    other = Recipe.parse(
        settings.model_dump(mode="json"), "", {"seed": 1, "evaluation.every": 3, "evaluation.prompts": ["text:a cat"]}
    )
    with pytest.raises(UserError) as refused:
        train(other, run)
    assert str(refused.value) == (
        f"--out {run} already holds a run of another recipe (seed = 1 instead of 0; evaluation.every = 3 instead of 2; "
        'evaluation.prompts = ["text:a cat"] instead of nothing): choose another folder, or go on with that run by '
        f"`diffexp resume {run}`"
    )


def test_a_run_of_before_a_setting_existed_goes_on_with_its_default(run: Path, settings: Recipe) -> None:
    config = (run / CONFIG).read_text()
    assert "\nkl = 0.0\n" in config
    (run / CONFIG).write_text(config.replace("\nkl = 0.0\n", "\n"))
    training = Training(settings, run)
    training.run()
    assert training.iteration == 3


def test_without_its_checkpoints_a_run_is_not_begun_anew(run: Path, settings: Recipe) -> None:
    shutil.rmtree(run / "checkpoints")
    before = (run / METRICS).read_bytes()
    with pytest.raises(UserError, match="the checkpoints of this run are gone"):
        train(settings, run)
    assert (run / METRICS).read_bytes() == before


def test_a_run_that_died_before_its_card_is_finished_by_resume(run: Path, settings: Recipe) -> None:
    train(settings, run)
    lora = (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    shutil.rmtree(run / "lora")
    assert not finished(run, settings)
    train(settings, run)
    assert (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes() == lora
    assert card.path(run, settings).is_file()
    assert finished(run, settings)


@pytest.mark.parametrize("where", ["checkpoint.make_room", "durable.replace", "records.os.truncate"])
def test_a_disk_that_refuses_ends_the_run_and_nothing_is_lost(
    where: str, run: Path, settings: Recipe, whole: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, diffexp: Command
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "it needs 9,999 bytes, and 7 are free")

    with monkeypatch.context() as full:
        full.setattr(f"diffexp.runs.{where}", refuse)
        code, _, error = diffexp("resume", str(run), "--quiet")
    assert code == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert str(run) in error
    assert "it needs 9,999 bytes, and 7 are free" in error
    assert contents(train(settings, run)) == whole


def test_two_processes_do_not_train_one_run(run: Path, settings: Recipe) -> None:
    with durable.claimed(run), pytest.raises(UserError, match="another process is training this run"):
        train(settings, run)


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path: Path, settings: Recipe) -> None:
    run = tmp_path / "run"
    runfolder.prepare(run, settings)
    begun, pruned = run / ".tmp-metrics.jsonl", run / "checkpoints" / ".tmp-iteration-000001"
    pruned.mkdir(parents=True)
    begun.write_text("half a li")
    (pruned / "state.json").write_text("{}")
    with runfolder.claimed(run, settings):
        assert not begun.exists()
        assert not pruned.exists()
    assert (run / "config.toml").is_file()


class Signalling(Reporter):
    """Sends this process SIGTERM when an evaluation begins."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def evaluating(self, iteration: int) -> None:
        if iteration == self.iteration:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_an_evaluation_loses_no_iteration(settings: Recipe, whole: tuple[Any, ...], tmp_path: Path) -> None:
    for iteration in (2, 3):
        run = tmp_path / f"{iteration}" / "run"
        with pytest.raises(Interrupted, match=f"stopped after iteration {iteration} of 3"):
            train(settings, run, Signalling(iteration))
        assert checkpoint.read_newest(run / "checkpoints").numbers["iteration"] == iteration
        assert contents(train(settings, run)) == whole


def test_a_signal_ends_an_iteration_at_its_next_step(
    run: Path, settings: Recipe, whole: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(settings, run)
    predict, calls = training.model.predict, []

    def signalling(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return predict(*arguments)

    monkeypatch.setattr(training.model, "predict", signalling)
    with pytest.raises(Interrupted, match="stopped after iteration 2 of 3"):
        training.run()
    assert len(calls) == 1
    assert contents(train(settings, run)) == whole


def test_a_signal_while_the_adapters_are_off_ends_the_run_as_any_other(
    run: Path, settings: Recipe, whole: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The divergence from the untouched model is measured without them; what is saved has to have them."""
    training = Training(settings, run)
    base = training.model.base

    @contextmanager
    def signalling() -> Iterator[None]:
        if not training.interruption.requested:
            signal.raise_signal(signal.SIGTERM)
        with base():
            yield

    monkeypatch.setattr(training.model, "base", signalling)
    with pytest.raises(Interrupted, match="stopped after iteration 3 of 3"):
        training.run()
    assert contents(train(settings, run)) == whole


class Failing(Listener):
    """A run that fails in its third iteration."""

    def stepped(self, record: Any) -> None:
        if record["iteration"] == 3:
            raise ZeroDivisionError


def test_an_error_is_not_hidden_by_a_disk_that_is_full(
    run: Path, settings: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "checkpoints" / "iteration-000002")

    def refuse(*_: object) -> None:
        raise NotSaved("no room")

    monkeypatch.setattr(checkpoint, "write", refuse)
    few = Recipe.parse(settings.model_dump(mode="json"), "", {"checkpoint.every": 9})
    (run / CONFIG).write_text(few.to_toml())
    listener = Failing()
    with pytest.raises(ZeroDivisionError):
        train(few, run, listener)
    assert listener.warnings == ["no room"]


def ranks(count: int, work: Callable[[], None]) -> None:
    """Does something in several processes that know of each other."""
    from diffexp.processes.launch import port

    place = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            try:
                own = {**place, "RANK": rank, "LOCAL_RANK": rank}
                os.environ.update({key: str(value) for key, value in own.items()})
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


class Ending(Reporter):
    """Asks the run to end, as Ctrl-C does, after an iteration."""

    def __init__(self, after: int) -> None:
        self.after = after

    def stepped(self, record: Any) -> None:
        if record["iteration"] == self.after:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_goes_on_with_another_number_of_processes(settings: Recipe, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    # a reward whose spread is far above rounding: advantages divide by it
    code.write_text("def corner(images, prompts):\n    return images[:, 0, 0, 0]\n")
    clear = Recipe.parse(settings.model_dump(mode="json"), "", {"reward": f"{code}:corner", "samples": 3})
    run, alone = tmp_path / "run", train(clear, tmp_path / "alone")

    def until(iteration: int) -> None:
        with pytest.raises(Interrupted, match=f"stopped after iteration {iteration} of 3"):
            train(clear, run, Ending(iteration))

    until(1)
    ranks(2, lambda: until(2))
    assert checkpoint.read_newest(run / "checkpoints").numbers["iteration"] == 2
    train(clear, run)
    for name in (METRICS, EVALUATIONS):
        for one, other in zip(lines(run, name), lines(alone, name), strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                if isinstance(value, float):
                    # the loss is a mean of advantages, which cancel but for rounding
                    assert value == pytest.approx(other[key], rel=1e-6, abs=1e-5 if key == "loss" else 1e-6), key
                else:
                    assert value == other[key], key
    trained = [load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (run, alone)]
    for key, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
@pytest.mark.parametrize("numbered", [True, False], ids=["", "before formats had numbers"])
def test_checkpoints_of_older_versions_go_on(version: str, numbered: bool, sd_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(GOLDEN / version, tmp_path / "run"))
    config = run / CONFIG
    config.write_text(config.read_text().replace("MODEL", str(sd_folder)))
    [saved] = (run / "checkpoints").iterdir()
    if not numbered:
        unnumber(saved)
    before, known = load_file(saved / checkpoint.TENSORS), (run / METRICS).read_text().splitlines()[:2]
    settings = Recipe.load(config)
    training = Training(settings, run)
    training.open_folder()
    assert (training.iteration, training.queries) == (2, 4)
    restored = {f"lora.{key}": value for key, value in training.model.state().items()}
    restored |= {f"optimizer.{key}": value for key, value in training.learner.state().items()}
    assert restored.keys() == before.keys()
    assert all(torch.equal(restored[key], before[key]) for key in before)
    train(settings, run)
    lines = (run / METRICS).read_text().splitlines()
    assert lines[:2] == known
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
    assert finished(run, settings)


def unnumber(saved: Path) -> None:
    """Makes a checkpoint what the first code wrote: without a format number, and with the records' sizes only."""
    numbers = json.loads((saved / checkpoint.NUMBERS).read_text())
    sizes = numbers.pop("records")
    for key in ("made_with", "observed"):
        del numbers[key]
    (saved / checkpoint.NUMBERS).write_text(json.dumps({**numbers, **sizes, "version": "0.1.0"}))
    for name in sizes:
        (saved / name).unlink()
    names = (checkpoint.TENSORS, checkpoint.NUMBERS)
    manifest = {name: checkpoint.fingerprint((saved / name).read_bytes()) for name in names}
    (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_changed_inputs_are_named_without_their_digests() -> None:
    before = {"torch": "2.1", "reward": "a1", "prompts": "b1", "code": "c1"}
    assert provenance.changes(before, {**before, "reward": "a2"}) == "reward has changed"
    assert (
        provenance.changes(before, {**before, "prompts": "b2", "torch": "2.2"})
        == "prompts have changed, torch was 2.1 and is 2.2"
    )
    assert provenance.changes({"torch": "2.1"}, before) == "", "an older checkpoint says nothing of its inputs"
