from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from brightness import brightness
from commandline import recipe as tiny_recipe
from safetensors.torch import save_file

from diffexp import cli, train
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.rewards.checksum import checksum, digest
from diffexp.sharing import lora_header
from diffexp.sharing.lora_header import LoraHeader, like, without_paths

REWARD = f"{Path(__file__).parent / 'brightness.py'}:{brightness.__name__}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """One iteration of a tiny run on a reward of diffexp's own."""
    settings = tiny_recipe(sd_folder) | {
        "lora": {"rank": 2, "alpha": 6},
        "exploration": {"guidance": {"threshold": 800}, "words": {}},
        "preview": {"images": 2},
    }
    return train(Recipe.parse(settings, "test"), tmp_path_factory.mktemp("runs") / "first")


def lora_file(folder: Path, recipe: dict[str, Any], **metadata: str) -> Path:
    """A LoRA file with a recipe in its header."""
    path = folder / "stranger.safetensors"
    tensors = {"unet.to_q.lora_A.weight": torch.zeros(3, 8), "unet.to_q.lora_B.weight": torch.zeros(8, 3)}
    save_file(tensors, path, {"diffexp.recipe": json.dumps(recipe), **metadata})
    return path


def diffexp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    monkeypatch.setattr(sys, "argv", ["diffexp", *args])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "first.kohya.safetensors"])
def test_show_says_what_made_a_lora(
    file: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = diffexp(capsys, monkeypatch, "show", str(run / "lora" / file))
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for expected in ("reward: jpeg-compressibility", "trained: 1 iterations, 2 queries", "threshold = 800.0"):
        assert expected in lines
    assert any(line.startswith("rank, alpha: 2, 6") for line in lines)
    assert any(line.startswith("further: ") and line.endswith("; --json has their values") for line in lines)
    (again,) = re.findall(r"`diffexp (train --like .*?)`", out)
    assert shlex.split(again)[2] == str(run / "lora" / file), "as it was given, to be pasted"
    whole = json.loads(diffexp(capsys, monkeypatch, "show", str(run / "lora" / file), "--json")[1])
    assert whole["metadata"]["diffexp.recipe"]["lora"]["rank"] == 2
    assert len(whole["shapes"]) == len(LoraHeader.read(run / "lora" / file).shapes) > 10


def test_headers_say_what_was_trained(run: Path) -> None:
    """Ours, kohya's and ModelSpec's, in both files; the same run makes the same bytes, so there is no date in them."""
    both = [dict(LoraHeader.read(file).metadata) for file in sorted((run / "lora").glob("*.safetensors"))]
    for header in both:
        assert json.loads(header["diffexp.recipe"])["lora"]["alpha"] == 6
        assert header["diffexp.recipe_sha256"] == hashlib.sha256(header["diffexp.recipe"].encode()).hexdigest()
        assert header["diffexp.reward_sha256"] == checksum("jpeg-compressibility")
        assert (header["ss_steps"], header["ss_epoch"], header["ss_seed"]) == ("2", "1", "0"), "two minibatches"
        assert json.loads(header["ss_tag_frequency"]) == {"diffexp": {"a cat": 1}}
        assert "ddpo towards the reward jpeg-compressibility" in header["modelspec.description"]
        assert not any("date" in key or "_at" in key for key in header)
    different = {key for key in {**both[0], **both[1]} if both[0].get(key) != both[1].get(key)}
    # kohya's legacy hash is of the second megabyte, which these files don't have
    assert different == {"lora_adapter_metadata", "sshs_model_hash", "modelspec.hash_sha256"}


def test_a_checksum_is_that_of_a_rewards_code_or_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def f(images, prompts): return images.mean((1, 2, 3))\n")
    other = tmp_path / "elsewhere" / "mine.py"
    other.parent.mkdir()
    other.write_bytes(code.read_bytes())
    first = checksum(f"{code}:f")
    assert first == checksum(f"{other}:f"), "where a file lies is no part of it"
    assert len({first, checksum(f"{code}:g"), checksum(f"2*{code}:f"), checksum("emoji-judge")}) == 4
    other.write_text("def f(images, prompts): return -images.mean((1, 2, 3))\n")
    digest.cache_clear()
    checksum.cache_clear()
    assert checksum(f"{other}:f") != first
    assert checksum("os.path:join") == checksum("posixpath:join"), "a module is its file"
    assert checksum(f"{tmp_path / 'gone.py'}:f") is None
    assert checksum("hpsv2+2*aesthetic") not in (None, checksum("2*hpsv2+aesthetic")), "known without the weights"


def test_like_tells_when_the_reward_is_another(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_header, "checksum", lambda spec: "0" * 64)
    assert "is another one than the header's" in like(run, {})[1][0]
    assert like(run, {"reward": "jpeg-incompressibility"})[1] == [], "asked for"


def test_a_run_folder_shows_its_lora(run: Path) -> None:
    assert (
        LoraHeader.read(run).path == LoraHeader.read(run / "lora").path == run / "lora" / LoraHeader.read(run).path.name
    )


def test_like_repeats_the_recipe(run: Path, sd_folder: Path) -> None:
    for file in ("pytorch_lora_weights.safetensors", "first.kohya.safetensors"):
        recipe, notes = like(run / "lora" / file, {"device": "cpu", "trackers": [], "model.path": str(sd_folder)})
        assert recipe == Recipe.load(run / "config.toml")
        assert notes == []
    assert like(run, {"seed": 7, "exploration.words.high": 1.5})[0].exploration.words.high == 1.5


def test_train_like_makes_the_same_lora(
    run: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--set", "device=cpu", "--set", "trackers=[]", "--set", f"model.path={sd_folder}"]
    assert diffexp(capsys, monkeypatch, "train", "--like", str(run), *settings)[0] == 0
    again = tmp_path / "runs" / "first-again-s0" / "lora" / "pytorch_lora_weights.safetensors"
    first = run / "lora" / "pytorch_lora_weights.safetensors"
    assert again.read_bytes()[-1000:] == first.read_bytes()[-1000:]


def test_a_reward_of_ones_own_is_code_and_is_left_out(tmp_path: Path) -> None:
    recipe = {
        "reward": "evil.py:steal",
        "evaluation": {"rewards": ["evil.py:steal", "http://evil.example", "clipscore"]},
    }
    path = lora_file(tmp_path, recipe)
    with pytest.raises(
        UserError, match=r"'evil.py:steal' is not one of diffexp's own and was left out; .*--set reward="
    ):
        like(path, {})
    chosen, notes = like(path, {"reward": "jpeg-compressibility"})
    assert chosen.reward == "jpeg-compressibility"
    assert chosen.evaluation.rewards == ("jpeg-compressibility", "clipscore")
    assert len(notes) == 2
    assert "http://evil.example" in notes[1]
    for foreign in ("http://evil.example:80", "evil.py:steal", 3):
        held = {"reward": "clipscore", "evaluation": {"held_out": foreign, "patience": 2}}
        chosen, notes = like(lora_file(tmp_path, held), {})
        assert (chosen.evaluation.held_out, chosen.evaluation.patience) == (None, None)
        assert notes == [f"the header's evaluation.held_out {foreign!r} is not one of diffexp's own and was left out"]
    for foreign in ("2*hpsv2+evil:steal", "os:system", "no-such-reward", 3):
        with pytest.raises(UserError, match="was left out"):
            like(lora_file(tmp_path, {"reward": foreign}), {})
    assert like(lora_file(tmp_path, {"reward": "2*hpsv2+clipscore"}), {})[0].reward == "2*hpsv2+clipscore"


def test_ones_own_reward_is_used_again_when_named(run: Path, tmp_path: Path) -> None:
    path = lora_file(tmp_path, {"reward": REWARD})
    assert like(path, {"reward": REWARD})[0].reward == REWARD


@pytest.mark.parametrize(
    ("name", "travels"),
    [
        ("/home/me/mine.py:f", "mine.py:f"),
        ("2*/a/b c/m.py:f+hpsv2", "2*m.py:f+hpsv2"),
        ("aesthetic + /q/w.py:g", "aesthetic + w.py:g"),
        ("~/models/sd15/", "sd15"),
        (r"C:\Users\me\m.py:f", "m.py:f"),
        ("someone/model", "someone/model"),
        ("2*http://gpu7.lan:8420+hpsv2+https://b.example/x/", "2*http://…:8420+hpsv2+https://…/x"),
        ("http://[fe80::1]:8420", "http://…:8420"),
        ("text:a /b/ c", "text:a /b/ c"),
        ({"a": {"path": "/x/y"}, "b": ["/x/m.py:f", 3]}, {"a": {"path": "y"}, "b": ["m.py:f", 3]}),
    ],
)
def test_absolute_paths_stay_at_home(name: Any, travels: Any) -> None:
    assert without_paths(name) == travels


def test_headers_name_no_folder_of_this_machine(run: Path) -> None:
    for file in (run / "lora").glob("*.safetensors"):
        assert str(run.parent) not in json.dumps(dict(LoraHeader.read(file).metadata))


def test_the_commit_of_the_base_model_is_kept(tmp_path: Path) -> None:
    path = lora_file(tmp_path, {"model": {"path": "someone/model"}}, **{"diffexp.base_commit": "c0ffee"})
    override = {"reward": "jpeg-compressibility"}
    assert like(path, override)[0].model.revision == "c0ffee"
    assert like(path, {**override, "model.path": "emoji"})[0].model.revision is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such LoRA file"), (b"", "no safetensors file"), (b"\x08\0\0\0\0\0\0\0{}      junk", "no recipe")],
)
def test_files_that_are_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{message}|no safetensors file"):
        like(path, {})


def test_a_header_does_not_steer_the_terminal(tmp_path: Path) -> None:
    path = lora_file(
        tmp_path, {"reward": "\x1b[2Jgone"}, **{"diffexp.reward": "\x1b]0;title\x07x\u202e", "diffexp.queries": "7"}
    )
    text = LoraHeader.read(path).describe()
    assert text.replace("\n", "").isprintable()
    assert "7 queries" in text
    with pytest.raises(UserError) as caught:
        like(path, {})
    assert str(caught.value).isprintable()


def test_rewards_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFEXP_CACHE", str(tmp_path))
    code, out, _ = diffexp(capsys, monkeypatch, "rewards", "check", "hpsv2+2*aesthetic")
    assert code == 0
    for part in ("xswu/HPSv2", "Apache-2.0", "missing: HPS_v2.1_compressed.pt", "1.97 GB", "to download"):
        assert part in out
    assert "needs nothing" in diffexp(capsys, monkeypatch, "rewards", "check", "emoji-judge")[1]
    code, _, err = diffexp(capsys, monkeypatch, "rewards", "check", "hpsv3")
    assert (code, "did you mean 'hpsv2'" in err) == (2, True)
