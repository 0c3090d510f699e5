"""Files that want to do harm: nothing of them runs or writes where it must not, and each is told in one line."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Command, recipe, refused, sets, snapshot, tiny
from hostile import LYING, MODELS, code, eps, pickled, png, zipped
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffexp import models
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.rewards import sources, weights
from diffexp.runs import checkpoint
from diffexp.runs.runfolder import prepare
from diffexp.training import Training

LORA = "lora/pytorch_lora_weights.safetensors"
INJECTION = "a</script><img src=x onerror=alert(1)> ![x](http://evil.example) `b` | c [/red] $\\frac \"'''\n```\n# d"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that only hostile code makes."""
    return tmp_path / "canary"


@pytest.fixture
def model(tmp_path: Path, sd_folder: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """A finished run of a tiny model."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_bombs_go_off(canary: Path) -> None:
    pickle.loads(pickled(canary))  # noqa: S301
    assert canary.exists()
    canary.unlink()
    exec(code(canary))  # noqa: S102
    assert canary.exists()


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, model: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, says = MODELS[name]
    spoil(model, canary)
    monkeypatch.chdir(canary.parent)
    monkeypatch.syspath_prepend(str(model))
    before = snapshot(canary.parent)
    if says is None:
        models.load(str(model))
    else:
        with pytest.raises(UserError, match=re.escape(says)) as caught:
            models.load(str(model))
        assert "\n" not in str(caught.value)
    assert {key: value for key, value in snapshot(canary.parent).items() if "__pycache__" not in key} == before
    assert not canary.exists()


@pytest.mark.parametrize("name", LYING)
def test_lying_safetensors(name: str, run: Path, model: Path, canary: Path, diffexp: Command) -> None:
    for file in (run / LORA, model / "unet" / "diffusion_pytorch_model.safetensors"):
        file.write_bytes(LYING[name])
    before = snapshot(canary.parent)
    # these two are no lies, only no LoRA: of two equal names the last counts, and names are no paths
    if name not in ("a name that leads out", "the same name twice"):
        refused(diffexp("show", str(run / LORA)), "no safetensors file")
        refused(diffexp("train", "--like", str(run)), "no safetensors file")
    refused(diffexp("sample", str(run), "--prompt", "a cat", "--out", str(canary.parent / "new")), str(run / LORA))
    with pytest.raises(UserError, match="unet"):
        models.load(str(model))
    assert snapshot(canary.parent) == before


def test_a_header_of_100_megabytes_is_not_read(run: Path, diffexp: Command) -> None:
    with (run / LORA).open("wb") as file:
        file.write((99_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)  # takes no room on the disk
    refused(diffexp("show", str(run)), "a header of 99,000,000 bytes")
    refused(diffexp("sample", str(run), "--prompt", "a cat", "--out", "new"), "a header of 99,000,000 bytes")


@pytest.mark.parametrize("make", [pickled, zipped])
def test_pickles_as_loras(make: Any, run: Path, canary: Path, diffexp: Command) -> None:
    (run / LORA).write_bytes(make(canary))
    for name in ("pytorch_lora_weights.bin", "x.pt", "x.ckpt"):
        (run / "lora" / name).write_bytes(make(canary))
        refused(diffexp("show", str(run / "lora" / name)), "no safetensors file")
    refused(diffexp("show", str(run)), "no safetensors file")
    refused(
        diffexp("sample", str(run), "--prompt", "a cat", "--out", str(canary.parent / "new")), "can't read the LoRA"
    )
    (run / LORA).unlink()
    refused(
        diffexp("sample", str(run), "--prompt", "a cat", "--out", str(canary.parent / "new")), "can't read the LoRA"
    )
    assert not canary.exists()


SLOW = "(.*a){25}x"  # takes for ever as a regular expression
ADAPTERS: list[tuple[Any, str | None]] = [
    ({"unet.alpha_pattern": {SLOW: 3.0}, "unet.rank_pattern": {SLOW: 3}}, None),
    ({"unet.alpha_pattern": {"(": 3.0}}, None),
    ({"unet.lora_alpha": "3; import os"}, "its alpha is no number"),
    ({"unet.lora_alpha": [1]}, "its alpha is no number"),
    ({"unet.lora_alpha": float("nan")}, "not finite"),
    ({"unet.lora_alpha": 1e999}, "not finite"),
    ({"unet.alpha_pattern": 3}, "its alpha is no number"),
    ({"unet.r": 10**12, "unet.target_modules": SLOW}, None),
    ([1], "lora_adapter_metadata is damaged"),
    ("x", "lora_adapter_metadata is damaged"),
    (3, "lora_adapter_metadata is damaged"),
]


@pytest.mark.parametrize(("header", "says"), ADAPTERS, ids=repr)
def test_loras_with_hostile_settings(header: Any, says: str | None, run: Path, diffexp: Command) -> None:
    with_header(run / LORA, lora_adapter_metadata=json.dumps(header))
    said = diffexp("sample", str(run), "--prompt", "a cat", "--n", "1", "--out", str(run.parent / "new"))
    if says:
        refused(said, says)
    else:
        assert said.code == 0


def with_header(file: Path, **metadata: str) -> None:
    """Replaces entries of a LoRA's header."""
    with safe_open(file, "numpy") as opened:
        known = opened.metadata()
    save_file(load_file(file), file, {**known, **{key.replace("__", "."): value for key, value in metadata.items()}})


@pytest.mark.parametrize(
    "foreign",
    [
        {"reward": "EVIL:f"},
        {"reward": "2*EVIL:f+jpeg-compressibility"},
        {"reward": "jpeg-compressibility", "evaluation": {"rewards": ["EVIL:f"]}},
        {"reward": "jpeg-compressibility", "exploration": {"strategy": "EVIL:f"}},
        {"reward": "jpeg-compressibility", "algorithm": {"name": "EVIL:f"}},
        {"reward": "os:system"},
        {"base": "EVIL"},
    ],
    ids=repr,
)
def test_a_header_that_names_code(
    foreign: dict[str, Any], run: Path, canary: Path, model: Path, diffexp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "loop", lambda self: None)  # all code of users is loaded before
    evil = run / "evil.py"
    evil.write_text(code(canary) + "def f(*arguments): pass")
    text = json.dumps(recipe(model) | foreign).replace("EVIL", str(evil))
    with_header(run / LORA, diffexp__recipe=text)
    said = diffexp("train", "--like", str(run), "--out", str(canary.parent / "again"), *sets(device="cpu"))
    assert not canary.exists()
    if said.code:
        refused(said)


BOMBS = {
    "a list in a list in a list": f"seed = {'[' * 30_000}",
    "tables in tables": f"{'a.' * 20_000}b = 1",
    "tables in tables, inline": f"a = {'{b = ' * 3_000}1{'}' * 3_000}",
    "a number of a million digits": f"seed = {'9' * 90_000}",
    "a key without end": f"{'k' * 99_000} = 1",
    "a megabyte of keys": "".join(f"k{k} = {k}\n" for k in range(90_000)),
    "letters that steer a terminal": '"\\u001b[2J\\u0007" = 1\nreward = "\\u001b]0;owned\\u0007"',
    "no text": "\0" * 1000,
}
"""Texts of a run's ``config.toml``."""


@pytest.mark.parametrize("name", BOMBS)
def test_recipes_that_are_bombs(name: str, run: Path, diffexp: Command) -> None:
    (run / "config.toml").write_text(BOMBS[name])
    before = snapshot(run)
    for command in (["sample", str(run), "--prompt", "a", "--out", str(run / "new")], ["resume", str(run)]):
        said = diffexp(*command)
        refused(said, "config.toml", lines=said.err.count("\n"))
        assert said.err.count("\n") <= 21
    for command in (["report", str(run)], ["compare", str(run), "--out", str(run.parent / "new")]):
        refused(diffexp(*command), "config.toml")
    assert snapshot(run) == before


HEADERS = {
    "steers the terminal": ("\x1b[2J\x07\x9b31m\u202e", "\x1b]0;owned\x07"),
    "is nested": ("reward", '{"a": ' * 50_000 + "1" + "}" * 50_000),
    "is a list": ("reward", f"[{'1,' * 1000}1]"),
    "has a number without end": ("reward", f'{{"seed": {"9" * 50_000}}}'),
    "has keys of a terminal": ("reward", json.dumps({"\x1b[2J": {"\x07": "\x1b[31m"}})),
    "names itself twice": ("reward", '{"seed": 1, "seed": 2, "__class__": "os.system", "base": "../../x"}'),
}
"""A reward and a recipe in a LoRA's header."""


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, run: Path, diffexp: Command) -> None:
    reward, text = HEADERS[name]
    tensors = {"unet.\x1b[2J.lora_A.weight": np.zeros((1, 1)), "unet.x.lora_B.weight": np.zeros((1, 1))}
    save_file(tensors, run / LORA, {"diffexp.recipe": text, "diffexp.reward": reward, "\x1b[2J": "\x1b[2J"})
    before = snapshot(run.parent)
    for arguments in (["show", str(run)], ["show", str(run), "--json"]):
        shown = diffexp(*arguments)
        assert shown.code == 0
        assert shown.out.replace("\n", "").isprintable()
    said = diffexp("train", "--like", str(run), "--out", str(run.parent / "new"))
    refused(said, lines=said.err.count("\n"))
    refused(diffexp("sample", str(run), "--prompt", "a", "--out", str(run.parent / "new")))
    assert snapshot(run.parent) == before


SETTINGS = [("reward", "{}/evil.py:f"), ("reward", "{}/evil.py :f"), ("reward", "2 * {}/evil.py : f + clipscore")]
SETTINGS += [("exploration.strategy", "{}/a+b*c/evil.py: f")]


@pytest.mark.parametrize(("key", "name"), SETTINGS)
def test_a_run_that_brings_code(key: str, name: str, run: Path, canary: Path, diffexp: Command) -> None:
    for file in (run / "evil.py", run / "a+b*c" / "evil.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(code(canary) + "def f(images, prompts): return [0.0] * len(prompts)")
    config = run / "config.toml"
    config.write_text(Recipe.load(config, {key: name.format(run)}).to_toml())
    (run / "lora" / "README.md").unlink()  # the run is not finished, then
    for command in ("evaluate", "resume"):
        refused(diffexp(command, str(run)), "evil.py", "came with the run")
    assert not canary.exists()


LINKS = ["metrics.jsonl", "evaluations.jsonl", "exploration.jsonl", "environment.json", "config.toml"]
LINKS += ["checkpoints/iteration-000001/state.json", "lora/pytorch_lora_weights.safetensors", "samples/prompts.json"]
LINKED_FOLDERS = ["samples", "checkpoints", "lora", "logs", "control", "lora/images", "checkpoints/iteration-000001"]


@pytest.mark.parametrize("name", LINKS + LINKED_FOLDERS)
def test_links_that_lead_out_of_a_run(name: str, tmp_path: Path) -> None:
    """A stranger's unfinished run, to be continued, would write wherever its links lead."""
    outside, folder, chosen = tmp_path / "outside", tmp_path / "run", Recipe()
    outside.mkdir()
    (outside / "precious").mkdir()
    (outside / "precious" / ".tmp-thesis.tex").write_text("precious")
    (outside / "precious.toml").write_text(chosen.to_toml())
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(outside / ("precious" if name in LINKED_FOLDERS else "precious.toml"))
    if name != "config.toml":
        (folder / "config.toml").write_text(chosen.to_toml())
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{name} leads out of the run's folder"):
        prepare(folder, chosen)
    assert snapshot(tmp_path) == before


def test_links_in_a_run(run: Path, tmp_path: Path, diffexp: Command) -> None:
    """Those that stay in it may stay, and so may one that leads to the run; others end the training."""
    (run / "lora" / "README.md").unlink()
    (run / "newest").symlink_to(run / "samples")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "precious").write_text("precious")
    train = ["train", str(run / "config.toml"), "--out", str(tmp_path / "link")]
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "precious")
    refused(diffexp(*train), "metrics.jsonl leads out of the run's folder")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_instead_of_a_run(tmp_path: Path, model: Path, diffexp: Command) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    (tmp_path / "run").symlink_to(tmp_path / "home")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not-there")
    before = snapshot(tmp_path)
    train = ["train", "emoji-ddpo", *tiny(model), "--out"]
    refused(diffexp(*train, str(tmp_path / "run")), "holds other files and no run")
    refused(diffexp(*train, str(tmp_path / "nowhere")), "--out")
    assert snapshot(tmp_path) == before


def test_checkpoints_that_are_none(run: Path, canary: Path, diffexp: Command) -> None:
    (newest,) = (run / "checkpoints").glob("iteration-*")
    (run / "lora" / "README.md").unlink()  # the run is not finished, then
    outside = run.parent / "outside.json"
    outside.write_text("{}")
    manifest = json.loads((newest / "manifest.json").read_text())
    fingerprint = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    for spoilt in (
        manifest["files"] | {"../../../outside.json": fingerprint},  # as the first version wrote it
        manifest | {"files": manifest["files"] | {"../../../outside.json": fingerprint}},
        manifest | {"files": manifest["files"] | {str(outside): fingerprint}},
        manifest | {"files": manifest["files"] | {"..": fingerprint}},
        manifest | {"files": {}},
        [manifest],
    ):
        (newest / "manifest.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match="no checkpoint is whole"):
            checkpoint.read_newest(run / "checkpoints")
    bomb = pickled(canary)
    (newest / "state.safetensors").write_bytes(bomb)
    files = manifest["files"] | {"state.safetensors": checkpoint.fingerprint(bomb)}
    for spoilt in (manifest, manifest | {"files": files}):
        (newest / "manifest.json").write_text(json.dumps(spoilt))
        before = snapshot(run.parent)
        refused(diffexp("train", str(run / "config.toml"), "--out", str(run)), "no checkpoint is whole")
        assert snapshot(run.parent) == before
    assert not canary.exists()


def test_a_pickle_that_the_user_vouches_for_still_runs_nothing(
    canary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "cache"))
    for content in (pickled(canary), zipped(canary)):
        placed = sources.cache_folder() / sources.HPS_20.files[0]
        placed.parent.mkdir(parents=True, exist_ok=True)
        placed.write_bytes(content)
        with pytest.raises(UserError, match="it was not opened"):
            weights.unpickled(sources.HPS_20, lambda state, folder: None)
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setenv(sources.TRUST, digest)
        with pytest.raises(UserError, match="holds more than tensors"):
            weights.unpickled(sources.HPS_20, lambda state, folder: None)
        monkeypatch.delenv(sources.TRUST)
    assert not canary.exists()


@pytest.mark.parametrize("content", ["bomb", "eps", "link", "text", "short"])
def test_pictures_that_are_none(content: str, run: Path, canary: Path, diffexp: Command) -> None:
    picture = run / "samples" / "iteration-0000" / "0.png"
    picture.unlink()
    if content == "link":
        picture.symlink_to("/dev/zero")
    else:
        small = png(8, 8)
        made = {"bomb": png(60_000, 60_000), "eps": eps(canary), "text": b"no picture", "short": small[:40]}
        picture.write_bytes(made[content])
    before = snapshot(run) if content != "link" else None
    refused(diffexp("compare", str(run), "--out", str(canary.parent / "new")), "0.png", "no PNG that can be read")
    assert not canary.exists()
    assert not (canary.parent / "new").exists()
    assert before is None or snapshot(run) == before


def test_prompts_are_no_markup_in_a_comparison(run: Path, diffexp: Command) -> None:
    prompt = f"text:{INJECTION}\x1b[2J\u202e"
    config = run / "config.toml"
    config.write_text(config.read_text().replace('prompts = "text:a cat"', f"prompts = {toml(prompt)}"))
    lines = [json.loads(line) | {"prompts": prompt} for line in (run / "evaluations.jsonl").read_text().splitlines()]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples" / "prompts.json").write_text(json.dumps([prompt]))
    said = diffexp("compare", str(run), "--out", str(run.parent / "new"))
    assert said.code == 0, said.err
    assert said.out.replace("\n", "").isprintable()
    page = (run.parent / "new" / "report.html").read_text()
    assert "<img src=x" not in page
    assert not {"\x1b", "\u202e"} & set(page)
    text = (run.parent / "new" / "comparison.md").read_text()
    assert "<" not in text.replace("&lt;", "")
    assert "](http" not in text
    assert text.count("\n```") == 0
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    tables = [len(list(same)) for _, same in itertools.groupby(cells)]
    assert tables and min(tables) >= 3, "a header, a rule, and rows of as many cells"


def toml(text: str) -> str:
    return json.dumps(text).replace("\\u001b", "\\u001B")


def test_prompts_are_no_markup_in_a_card(model: Path, tmp_path: Path, diffexp: Command) -> None:
    folder = tmp_path / "run"
    said = diffexp("train", "emoji-ddpo", *tiny(model, prompts=f"text:{INJECTION}"), "--out", str(folder))
    assert said.code == 0, said.err
    card = (folder / "lora" / "README.md").read_text()
    front, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert "<" not in re.sub(r"&lt;|<Gallery />|```python.*?\n```\n", "", text, flags=re.DOTALL).replace(
        f"`text:{' '.join(INJECTION.replace('`', chr(39)).split())}`", ""
    )
    (block,) = re.findall(r"```python\n(.*?)\n```\n", text, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert len(calls) == 3
    assert any(
        isinstance(call.args[0], ast.Constant) and call.args[0].value == INJECTION for call in calls if call.args
    )
    assert "widget:" in front
    # what the terminal shows, and what is asked of it
    painted = diffexp("evaluate", str(folder), "--images", "1")
    assert painted.code == 0, painted.err


def test_control_characters_are_refused_as_prompts(model: Path, tmp_path: Path, diffexp: Command) -> None:
    for prompt in ("\x1b[2J", "a\x07", "\x9b31m", "a\0b"):
        refused(
            diffexp("sample", str(model), "--prompt", prompt, "--out", str(tmp_path / "new")), "a control character"
        )
    assert not (tmp_path / "new").exists()
