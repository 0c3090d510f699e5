from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from brightness import brightness
from commandline import commands
from typer.testing import CliRunner

from diffexp import cli

REWARD = f"{Path(__file__).parent / 'brightness.py'}:{brightness.__name__}"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``diffexp args``, in this process."""
    monkeypatch.setattr(sys, "argv", ["diffexp", *args])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def settings(folder: Path) -> list[str]:
    """Overrides that make any recipe a tiny run."""
    changes = {
        "model.path": str(folder),
        "reward": REWARD,
        "prompts": "text:a cat",
        "iterations": 1,
        "samples": 2,
        "rollout.images_per_prompt": 1,
        "sampler.steps": 2,
        "evaluation.rewards": [REWARD],
        "evaluation.prompts": ["text:a cat", "text:bike"],
        "trackers": [],
        "device": "cpu",
    }
    return [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def test_help_needs_no_heavy_library() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'matplotlib', 'scipy', 'numpy'}"
    code = f"import sys, diffexp.cli; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_the_heavy_libraries_load_without_a_look_for_garbage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = []

    class Watch:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "diffexp.commands":
                looking.append(gc.isenabled())

    monkeypatch.delitem(sys.modules, "diffexp.commands", raising=False)
    monkeypatch.delattr("diffexp.commands", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Watch, *sys.meta_path])
    assert run(capsys, monkeypatch, "sample", "nowhere", "--prompt", "a cat", "--out", "nothing")[0] == 2
    assert looking == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(("figure", "scale"), [("99", "emoji"), ("4", "sd9"), ("10b", "sd15")])
def test_a_wrong_figure_is_refused_before_the_heavy_libraries_load(
    figure: str, scale: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffexp.study.reproduce", None)  # importing it fails
    code, _, err = run(capsys, monkeypatch, "reproduce", figure, "--scale", scale)
    assert code == 2
    assert err.startswith("error: ")


@pytest.mark.parametrize("command", [*commands(cli.app)], ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert f"Example: diffexp {' '.join(command)}" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("command", "expected"), [("recipes", "emoji-ddpo"), ("prompts", "drawbench-58"), ("rewards", "pickscore")]
)
def test_lists(command: str, expected: str) -> None:
    assert expected in CliRunner().invoke(cli.app, [command]).stdout


def test_the_prompts_of_a_set_or_a_file_one_a_line(tmp_path: Path) -> None:
    def said(name: object) -> list[str]:
        return CliRunner().invoke(cli.app, ["prompts", str(name)]).stdout.split("\n")[:-1]

    unseen = said("animal-activities-unseen")
    assert len(unseen) == 18
    assert "a cheetah doing laundry" in unseen
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a cat\\nriding\u2028a bike"}\n{"prompt": "a \u202edog"}\n', encoding="utf-8")
    assert said(file) == ["a cat riding a bike", "a ?dog"]
    assert said("text:a cat") == ["a cat"]


def test_download(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sd_folder: Path) -> None:
    more = ["--set", f'evaluation.rewards=["{REWARD}", "emoji-aesthetic", "http://127.0.0.1:1"]']
    code, out, _ = run(capsys, monkeypatch, "download", "emoji-ddpo", *settings(sd_folder), *more)
    assert code == 0
    assert out.splitlines() == [
        f"model {sd_folder}: {sd_folder}",
        f"reward {REWARD}: ready",
        "reward emoji-aesthetic: ready",
        "reward http://127.0.0.1:1: a server's, nothing to fetch",
    ]


def test_from_training_to_comparison(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = settings(sd_folder)
    runs = []
    for recipe in ("emoji-ddpo", "emoji-ddpo-diffexp"):
        runs.append(str(tmp_path / recipe))
        assert run(capsys, monkeypatch, "train", recipe, *tiny, "--out", runs[-1])[0] == 0
    code, out, _ = run(capsys, monkeypatch, "evaluate", runs[0], "--images", "2", "--json")
    assert code == 0
    scores = json.loads(out)
    assert [(score["prompts"], score["n"]) for score in scores] == [("text:a cat", 2), ("text:bike", 2)]
    freely = ["--set", "sampler.eta=0", "--set", "sampler.guidance=0.5"]
    code, out, _ = run(capsys, monkeypatch, "evaluate", runs[1], "--images", "2", "--json", *freely)
    assert code == 0, "a training by DDPO wants neither, painting does not mind"
    assert [(score["prompts"], score["n"]) for score in json.loads(out)] == [("text:a cat", 2), ("text:bike", 2)]
    painted = tmp_path / "painted"
    arguments = ["sample", runs[1], "--prompt", "a cat", "--n", "3", "--explore", "--out", str(painted)]
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    assert {path.name for path in painted.iterdir()} == {"0.png", "1.png", "2.png", "grid.png"}
    assert run(capsys, monkeypatch, "compare", *runs, "--out", str(tmp_path / "both"))[0] == 0
    assert {"comparison.json", "curves.png", "grid.png"} <= {path.name for path in (tmp_path / "both").iterdir()}
    explored = tmp_path / "explored"
    arguments = ["explore", "emoji-ddpo-diffexp", *tiny, "--prompt", "a cat", "--n", "2", "--out", str(explored)]
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    report = json.loads((explored / "exploration.json").read_text())
    assert len(report["ways"]) == 5
    assert (explored / "exploration.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "emoji-dpo"], "unknown recipe 'emoji-dpo': did you mean 'emoji-ddpo'?"),
        (["train", "nowhere.toml"], "can't read the recipe nowhere.toml"),
        (["train", "emoji-ddpo", "--set", "iteratons=3"], "unknown key 'iteratons': did you mean 'iterations'?"),
        (["train", "emoji-ddpo", "--set", "iterations"], "write section.key=value"),
        (["train", "emoji-ddpo", "--set", "reward=beauty"], "unknown reward 'beauty'"),
        (["train", "emoji-ddpo", "--set", "prompts=animales"], "did you mean 'animals'?"),
        (["train", "emoji-ddpo", "--set", "exploration.guidance.threshold=1001"], "less than or equal to 1000"),
        (["train", "emoji-ddpo", "--set", "exploration.words.low=3"], "low = 3.0 is above high = 1.2"),
        (["train", "emoji-alignprop", "--set", "algorithm.last_steps=99"], "above sampler.steps = 20"),
        (["train", "emoji-ddpo", "--set", "model.path=/no/such/model"], "neither a folder nor a model"),
        (["train", "emoji-ddpo", "--set", "device=tpu9"], "not on this machine"),
        (["train", "emoji-ddpo", "--set", "prompts=EMPTY"], "empty.txt"),
        (["evaluate", "/no/such/run"], "neither a run folder nor a model"),
        (["compare", "/no/such/run", "--out", "x"], "/no/such/run"),
        (["sample", "emoji", "--prompt", "cat", "--out", "x", "--explore"], "explores nothing"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    sd_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [argument.replace("EMPTY", "./empty.txt") for argument in arguments]
    if arguments[0] == "sample":
        arguments[1] = str(sd_folder)
    code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert part in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"empty.txt"}, "nothing may be left behind"
