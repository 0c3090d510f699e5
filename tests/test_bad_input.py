"""Bad input to every command: one clear line a mistake, exit code 2, and nothing that was there is touched."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Command, commands, make_read_only, refused, sets, snapshot, tiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffexp import cli
from diffexp.errors import UserError, writing
from diffexp.processes import launch
from diffexp.rewards import sources, weights
from diffexp.runs import durable

LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with something precious in it; nothing may come from the network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DIFFEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


def check(diffexp: Command, place: Path, command: list[str], *says: str | tuple[str, ...], lines: int = 1) -> None:
    """Runs a command that must be refused and leave ``place`` as it was."""
    before = snapshot(place)
    refused(diffexp(*command), *says, lines=lines)
    assert snapshot(place) == before


ARGUMENTS = [
    ("trian emoji-ddpo", "no such command 'trian'", "did you mean 'train'?"),
    ("train emoji-ddpo --iterations 3", "no such option", "--iterations", "diffexp train --help"),
    ("train", "give a recipe, or --like and a LoRA file"),
    ("train emoji-ddpo --like thesis", "one of the two"),
    (
        "train emoji-ddpo --processes 0",
        "--processes",
        ("should be greater than or equal to 1", "is not in the range x>=1"),
        "see diffexp train --help",
    ),
    ("train emoji-ddpo emoji-ddpo", "unexpected extra argument"),
    ("train emoji-ddpo --out", "--out", "requires an argument"),
    ("evaluate", "missing argument", "RUN_OR_MODEL", "diffexp evaluate --help"),
    ("evaluate nowhere", "RUN_OR_MODEL 'nowhere': neither a run folder nor a model, here or on the hub; check"),
    ("evaluate nowhere --set model.path=elsewhere", "model.path = 'elsewhere': neither a folder nor a model"),
    (
        "evaluate emoji --images 0",
        "--images",
        ("should be greater than or equal to 1", "is not in the range x>=1"),
        "see diffexp evaluate --help",
    ),
    (
        "evaluate emoji --images many",
        "--images",
        ("should be a valid integer", "is not a valid int"),
        "see diffexp evaluate --help",
    ),
    ("evaluate emoji --prompts animles --set device=cpu", "unknown prompt set 'animles'", "did you mean 'animals'?"),
    ("evaluate emoji --reward picscore --set device=cpu", "unknown reward 'picscore'", "did you mean 'pickscore'?"),
    ("sample emoji --out x", "missing option", "--prompt"),
    ("sample emoji --prompt cat", "missing option", "--out"),
    (
        "sample emoji --prompt cat --out x --n 0",
        "--n",
        ("should be greater than or equal to 1", "is not in the range x>=1"),
        "see diffexp sample --help",
    ),
    (
        "sample emoji --prompt cat --out x --seed -1",
        "--seed",
        ("should be greater than or equal to 0", "is not in the range x>=0"),
        "see diffexp sample --help",
    ),
    ("sample emoji --prompt cat --out x --set sampler.stepz=3", "unknown key 'sampler.stepz'", "did you mean 'steps'?"),
    (
        "explore emoji-ddpo --prompt cat --out x --n 1",
        "--n",
        ("should be greater than or equal to 2", "is not in the range x>=2"),
        "see diffexp explore --help",
    ),
    ("explore emoji-dppo --prompt cat --out x", "unknown recipe 'emoji-dppo'", "did you mean 'emoji-ddpo'?"),
    ("resume", "missing argument", "RUN"),
    ("resume nowhere", "nowhere is no run folder", "give one that `diffexp train` made"),
    ("resume thesis", "thesis is no run folder", "give one that `diffexp train` made"),
    (
        "resume thesis --processes 0",
        "--processes",
        ("should be greater than or equal to 1", "is not in the range x>=1"),
        "see diffexp resume --help",
    ),
    ("compare --out x", "missing argument", "RUN..."),
    ("compare thesis", "missing option", "--out"),
    ("reproduce", "missing argument", "FIGURE"),
    ("reproduce 99", "unknown figure '99'", "known:"),
    ("reproduce 4 --scale sd9", "unknown scale 'sd9'", "known: emoji, sd15, sdxl"),
    (
        "reproduce 4 --seeds 0",
        "--seeds",
        ("should be greater than or equal to 1", "is not in the range x>=1"),
        "see diffexp reproduce --help",
    ),
    ("reproduce 4 --dry-run --set samples=0", "samples = 0"),
    ("reproduce 4 --dry-run --set samples", "--set 'samples'", "write section.key=value"),
    ("report", "missing argument", "RUN..."),
    ("report thesis", "not a run folder"),
    ("report thesis --watch", "not a run folder"),
    ("report thesis --watch --out x", "--out and --watch", "leave one out"),
    (
        "report thesis --port 99999",
        "--port",
        ("should be less than or equal to 65535", "is not in the range 0<=x<=65535"),
        "see diffexp report --help",
    ),
    ("show", "missing argument", "FILE"),
    ("show nowhere", "nowhere: no such LoRA file; give a .safetensors file, or a run folder"),
    ("ctl thesis", "missing argument"),
    ("ctl thesis save", "thesis: no run folder; give one that `diffexp train` writes"),
    ("ctl thesis paint", "unknown request 'paint'", "known: sample, save, stop"),
    ("push thesis", "missing option", "--to"),
    ("download", "missing argument", "RECIPE"),
    ("download emoji-dppo", "unknown recipe 'emoji-dppo'", "did you mean 'emoji-ddpo'?"),
    ("download sd15-ddpo --set model.path=no/model", "neither a folder nor a model that the hub or its cache has"),
    ("download emoji-ddpo --set reward=pickscore", "PickScore needs config.json", "run once with a network"),
    ("push thesis --to me/x", "thesis: no lora/pytorch_lora_weights.safetensors"),
    ("serve-reward beauty", "unknown reward 'beauty'"),
    (
        "serve-reward emoji-judge --port 99999",
        "--port",
        ("should be less than or equal to 65535", "is not in the range 0<=x<=65535"),
        "see diffexp serve-reward --help",
    ),
    ("serve-reward emoji-judge --token-file nowhere", "can't read the token file nowhere"),
    ("serve-reward 2*aesthetic+hpsv2", "a server has one reward"),
    ("serve-reward http://127.0.0.1:1", "a server has one reward"),
    ("serve-reward emoji-judge --host 0.0.0.0", "--host 0.0.0.0 lets other machines in, which needs a token"),
    ("serve-reward emoji-judge --host 0.0.0.0 --token-file file", "the token file file holds no token"),
    (
        "serve-reward emoji-judge --batch 0",
        "--batch",
        ("should be", "is not in the range"),
        "see diffexp serve-reward --help",
    ),
    ("serve-reward emoji-judge --device tpu9", "device = 'tpu9': not on this machine"),
    ("doctor all", "unexpected extra argument"),
    ("config-schema recipe.json", "unexpected extra argument"),
    ("rewards check http://127.0.0.1:9", "reward server http://127.0.0.1:9 does not answer", "diffexp serve-reward"),
    ("recipes all", "no such command 'all'"),
    ("prompts animals all", "unexpected extra argument"),
    ("prompts animles", "unknown prompt set 'animles'", "did you mean 'animals'?"),
    ("prompts nowhere.txt", "prompts 'nowhere.txt': no such file"),
    ("prompts file.csv", "which column? write file.csv#column"),
    ("recipes chek", "no such command 'chek'"),
    ("recipes copy", "missing argument", "NAME"),
    ("recipes copy demmo", "unknown recipe 'demmo'"),
    ("recipes copy demo file", "file: the name of a recipe's file ends in .toml"),
    ("recipes copy demo file/my.toml", "FILE file/my.toml: can't write there"),
    ("rewards chek", "no such command 'chek'"),
    ("rewards check", "missing argument", "REWARD"),
    ("rewards check beauty", "unknown reward 'beauty'", "`diffexp rewards` lists them"),
    ("rewards check 2*", "empty part"),
    ("rewards check 0*aesthetic", "a weight is a finite number other than 0"),
    ("rewards check aesthetic+aesthetic", "more than once"),
]


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case[0])
def test_arguments(case: tuple[str, ...], place: Path, diffexp: Command) -> None:
    check(diffexp, place, shlex.split(case[0]), *case[1:])


def test_every_command_refuses_what_it_does_not_know(place: Path, diffexp: Command) -> None:
    found = list(commands(cli.app))
    assert len(found) > 12
    assert ["train"] in found
    assert ["rewards", "check"] in found
    for command in found:
        check(diffexp, place, [*command, "--nonsense"], "no such option: --nonsense", f"{command[-1]} --help")


def test_without_arguments_there_is_help(diffexp: Command) -> None:
    said = diffexp()
    assert "train" in said.out + said.err
    assert "error" not in said.err


SETTINGS = [
    ("iterations", "write section.key=value"),
    ("=3", "write section.key=value"),
    ("iterations=many", 'iterations = "many": input should be a valid integer'),
    ("iterations=true", "iterations = true: input should be a valid integer"),
    ("iterations=1.5", "iterations = 1.5: input should be a valid integer"),
    ("iterations=1979-05-27", "iterations", "input should be a valid integer"),
    ("iterations=[1]", "iterations = [1]: input should be a valid integer"),
    ("iterations=0", "iterations = 0: input should be greater than or equal to 1"),
    ("iteratons=3", "unknown key 'iteratons': did you mean 'iterations'?"),
    ("samples=1000000000000", "samples = 1000000000000: input should be less than or equal to"),
    ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
    (f"seed={2**70}", "seed = ", "input should be less than"),
    (f"seed={'9' * 5000}", "seed", "input should be a valid integer"),
    ("seed=1\niterations=2", "one setting"),
    ("prompts=3", "prompts = 3: input should be a valid string"),
    ("prompts=", "unknown prompt set ''"),
    ("prompts=animles", "did you mean 'animals'?"),
    ('prompts="text: "', "no prompt after 'text:'"),
    (r'prompts="text:a\nb\u001b[2Jc"', "control character"),
    ("prompts=text:\udcff", "not valid Unicode"),
    ("reward=", "empty part"),
    ("reward=[1]", "reward = [1]: input should be a valid string"),
    ("reward=emoji-alignement", "did you mean 'emoji-alignment'?"),
    ("reward=nan*aesthetic", "a weight is a finite number other than 0"),
    ("reward=nowhere.py:f", "there is no file 'nowhere.py'"),
    ("reward=nowhere:f", "there is no module 'nowhere' to import"),
    ("reward=mine.py:", "reward 'mine.py:' is no custom reward: write it as 'module:name' or 'file.py:name'"),
    (f"reward={'long' * 2000}.py:f", "no such file or module", "check its name"),
    ("reward=__main__.x:f", "reward", "'__main__.x:f'"),
    ("reward=http://", "is no address: write http://host:port"),
    ("reward=http://me:secret@host/", "has no user or password in it"),
    ("device=3", "device = 3: input should be a valid string"),
    ("device=tpu9", "device = 'tpu9': not on this machine; take 'cpu' or 'auto'"),
    ("device=cuda:99", "device = 'cuda:99': not on this machine"),
    ("device=meta", "device = 'meta': not on this machine"),
    ('trackers="tensorboard"', 'trackers = "tensorboard": write a list: ["tensorboard"]'),
    ('trackers=["mlfow"]', 'trackers = "mlfow": input should be'),
    ("model=sd15", 'model = "sd15": write a table: [model]'),
    ("model.path=3", "model.path = 3: input should be a valid string"),
    ("model.path=", "model.path = ''"),
    ("model.path=thesis", "no model_index.json in it"),
    ("model.path=./nowhere", "neither a folder nor a model"),
    ("model.path=someone/not-cached", "neither a folder nor a model that the hub or its cache has"),
    ("model.precision=fp8", "input should be 'fp32', 'bf16' or 'fp16'"),
    ("lora.rank=0", "lora.rank = 0"),
    ("lora.rank=1000000", "lora.rank = 1000000: input should be less than or equal to"),
    ("lora.alpha=0", "lora.alpha = 0: input should be greater than 0"),
    ("lora.targets=[]", "lora.targets"),
    ('lora.targets=["to_z"]', "lora.targets", "to_z"),
    ("sampler=3", "sampler = 3: write a table: [sampler]"),
    ("sampler.steps.x=1", "sampler.steps"),
    ("seed.x=1", "seed"),
    ("sampler.steps=0", "sampler.steps = 0"),
    ("sampler.steps=5000", "sampler.steps = 5000: this model takes 1…999"),
    ("sampler.guidance=-1", "sampler.guidance = -1: input should be greater than or equal to 0"),
    ("sampler.guidance=nan", "sampler.guidance = NaN: input should be a finite number"),
    ("sampler.guidance=inf", "sampler.guidance = Infinity: input should be a finite number"),
    ("sampler.eta=2", "sampler.eta = 2: input should be less than or equal to 1"),
    ("sampler.eta=0", "sampler.eta = 0 is deterministic, and ddpo needs a density: take eta = 1"),
    ("sampler.size=64", "sampler.size = 64: write a list"),
    ("sampler.size=[64]", "sampler.size = [64]: too few values"),
    ("sampler.size=[17, 17]", "sampler.size = [17, 17]: this model needs multiples of"),
    ("sampler.size=[1000000, 1000000]", "sampler.size = 1000000: input should be less than or equal to"),
    ("exploration=off", 'exploration = "off": write a table: [exploration]'),
    ("exploration.guidance=off", 'exploration.guidance = "off": write a table: [exploration.guidance]'),
    ("exploration.until=1.5", "exploration.until = 1.5"),
    ("exploration.guidance.threshold=1001", "less than or equal to 1000"),
    ("exploration.guidance.low=9", "exploration.guidance.low = 9.0 is above sampler.guidance = 5.0"),
    ("exploration.guidance={threshold = 800, fraction = 0.2}", "leave one out"),
    ("exploration.words.low=3", "low = 3.0 is above high = 1.2: exchange them"),
    ("exploration.words.unit=letter", "input should be 'word' or 'token'"),
    ("algorithm=3", "algorithm = 3: give a table with a name: 'ddpo'"),
    ("algorithm.name=ppo", "algorithm", "'ddpo'", "'alignprop'"),
    ("algorithm.name=[1]", "algorithm"),
    ("algorithm.clip=0", "algorithm.clip = 0: input should be greater than 0"),
    ("algorithm.truncation=fixed", "unknown key 'algorithm.truncation'"),
    ('algorithm={name = "alignprop", last_steps = 99}', "algorithm.last_steps = 99 is above sampler.steps"),
    ('algorithm={name = "alignprop", copies = 2}', "DRaFT-LV"),
    ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1: input should be greater than 0"),
    ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]: too few values"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas = 1.0: input should be less than 1"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay = -1"),
    ("rollout.batch=0", "rollout.batch = 0"),
    ("rollout.images_per_prompt=3", "is no multiple of rollout.images_per_prompt = 3"),
    ("update.checkpoint=unet", 'update.checkpoint = "unet": write a list: ["unet"]'),
    ("update.checkpoint_unet=true", "unknown key 'update.checkpoint_unet': did you mean 'checkpoint'?"),
    ("lora.text_encoders=1", "lora.text_encoders = 1: input should be a valid boolean"),
    ("lora.start=nowhere.safetensors", "can't read the LoRA nowhere.safetensors"),
    ("model.train=vae", "input should be 'lora' or 'unet'"),
    ("exploration.strategy=nowhere.py:f", "exploration strategy 'nowhere.py:f': there is no file 'nowhere.py'"),
    ("algorithm.name=nowhere.py:f", "algorithm 'nowhere.py:f': there is no file 'nowhere.py'"),
    ("prompts=nowhere.csv#text", "prompts nowhere.csv#text: no such file"),
    ("prompts=file.csv", "which column? write file.csv#column"),
    ("prompts=hub:nobody#text", "write a data set of the hub as hub:org/name#column"),
    ("evaluation.every=0", "evaluation.every = 0"),
    ('evaluation.prompts=["animls"]', "evaluation.prompts: unknown prompt set 'animls'"),
    ('evaluation.rewards=["picscore"]', "evaluation.rewards: unknown reward 'picscore'"),
    ("preview.images=-1", "preview.images = -1"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last = 0"),
    (f"sampler.steps={'[' * 3000}", "sampler.steps"),
    (f"{'a.' * 3000}b=1", "nested too deeply"),
    (f"{'long' * 20000}=1", "unknown key"),
]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: ascii(case[0][:40]))
def test_settings(case: tuple[str, ...], place: Path, sd_folder: Path, diffexp: Command) -> None:
    command = ["train", "emoji-ddpo", "--out", "new", *tiny(sd_folder, reward="emoji-alignment"), "--set", case[0]]
    check(diffexp, place, command, *case[1:])


def test_all_mistakes_are_reported_at_once_and_not_too_many(place: Path, diffexp: Command) -> None:
    (place / "my.toml").write_text("iterations = 0\nseed = -1\nsamplez = 3\n[sampler]\nstep = 4\n")
    check(diffexp, place, ["train", "my.toml"], "iterations = 0", "seed = -1", "'samplez'", "'sampler.step'", lines=4)
    (place / "my.toml").write_text("".join(f"key{k} = {k}\n" for k in range(1_000)))
    check(diffexp, place, ["train", "my.toml"], "my.toml: unknown key 'key0'", "980 further mistakes", lines=21)


RECIPES: list[tuple[str, str | bytes, str | tuple[str, ...]]] = [
    ("my.toml", "[[seed", "no valid TOML"),
    ("my.toml", "seed = 1\nseed = 2", ("Cannot overwrite a value", "Can not overwrite a value")),
    ("my.toml", b"\x7fELF\x02\x01\x01\x00\x00", "no valid TOML"),
    ("my.toml", b"prompts = 'caf\xe9'", "not UTF-8"),
    ("my.toml", f"seed = {'9' * 5000}", "no valid TOML"),
    ("my.toml", f"seed = {'[' * 50_000}", "nested too deeply"),
    ("my.toml", f"seed = {'[' * 300}{']' * 300}", "nested too deeply"),
    ("my.toml", f"{'a.' * 1000}b = 1", "nested too deeply"),
    ("my.toml", "#" * 200_000, "too large"),
    ("my.toml", 'base = "my.toml"', "is its own base"),
    ("my.toml", 'base = "./thesis/../my.toml"', "is its own base"),
    ("my.toml", 'base = "nowhere.toml"', "can't read the recipe"),
    ("my.toml", 'base = "emoji-dddpo"', "did you mean 'emoji-ddpo'?"),
    ("my.toml", 'base = "../other.toml"', "lies outside"),
    ("my.toml", 'base = "/etc/other.toml"', "lies outside"),
    ("my.toml", "base = 3", "base = 3: give the name of a recipe"),
    ("my.toml", "samplers = {}", "did you mean 'samples'?"),
    ("my.toml", "[sampler]\n[sampler.steps]\nx = 1", "sampler.steps"),
    ("my.toml", "[algorithm]\nname = 'alignprop'\nclip = 1", "unknown key 'algorithm.clip'"),
    ("my.toml", "reward = 'jpeg-compressibility'\nalgorithm.name = 'alignprop'", "has no gradient"),
    ("my.toml", r'prompts = "text:a\u0000b"', "control character"),
    ("my.json", "{}", "a file's name must end in .toml"),
]


@pytest.mark.parametrize(("name", "content", "says"), RECIPES, ids=lambda value: repr(value[:30]))
def test_recipes(name: str, content: str | bytes, says: str | tuple[str, ...], place: Path, diffexp: Command) -> None:
    (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    check(diffexp, place, ["train", name, "--out", "new"], says, name.removesuffix(".toml"))


def test_a_recipe_that_is_no_file(place: Path, diffexp: Command) -> None:
    (place / "folder.toml").mkdir()
    os.mkfifo(place / "pipe.toml")
    check(diffexp, place, ["train", "folder.toml"], "can't read the recipe folder.toml")
    check(diffexp, place, ["train", "pipe.toml"], "can't read the recipe pipe.toml: no file")
    check(diffexp, place, ["train", "nowhere.toml"], "can't read the recipe nowhere.toml")


def test_bases_in_a_circle_and_too_many(place: Path, diffexp: Command) -> None:
    (place / "a.toml").write_text('base = "b.toml"')
    (place / "b.toml").write_text('base = "a.toml"')
    check(diffexp, place, ["train", "a.toml"], "is its own base")
    for k in range(50):
        (place / f"r{k}.toml").write_text(f'base = "r{k + 1}.toml"')
    check(diffexp, place, ["train", "r0.toml"], "base", "at most")


PROMPTS: list[tuple[str, bytes, str]] = [
    ("p.txt", b"", "holds no prompt"),
    ("p.txt", b"\n  \n\t\n", "holds no prompt"),
    ("p.txt", b"# only\n# comments\n", "holds no prompt"),
    ("p.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8"),
    ("p.txt", b"a cat\0\0", "a binary file"),
    ("p.txt", b"caf\xe9", "not UTF-8 text; save the file as UTF-8"),
    ("p.txt", "a cat".encode("utf-16"), "not UTF-8"),
    ("p.txt", b"a cat\n" * 1_000_000, "1,000,000 lines; the most are 500,000"),
    ("p.txt", b"a cat\n" * 100_000, "100,000 prompts; the most are 50,000"),
    ("p.txt", b"\n" * 1_000_000, "1,000,000 lines"),
    ("p.txt", b"a" * 1_000_000, "line 1: a prompt of 1,000,000 letters"),
    ("p.txt", b"a \x1b[2J cat", "line 1: a control character"),
    ("p.md", b"a cat", "ends in .txt or .jsonl"),
    ("p.csv#text", b"prompt\na cat\n", "unknown column 'text': known: prompt"),
    ("p.csv#text", b"text\n\n", "the column holds no prompt"),
    ("p.csv#text", b"", "the table is empty"),
    ("p.csv#text", b"text\ncaf\xe9\n", "can't be read"),
    ("p.csv#text", b"text\na\x1b[2Jcat\n", "row 1: a control character"),
    ("p.parquet#text", b"PAR1 is not all that it takes", "can't be read"),
    ("p.arrow#text", b"", "can't be read"),
    ("p.jsonl", b"", "holds no prompt"),
    ("p.jsonl", b'{"prompt": "a cat"}\n{"prompt": ', "line 2: not valid JSON"),
    ("p.jsonl", b'{"text": "a cat"}', 'line 1: no text under "prompt"'),
    ("p.jsonl", b'["a cat"]', 'line 1: no text under "prompt"'),
    ("p.jsonl", b'{"prompt": 3}', 'line 1: no text under "prompt"'),
    ("p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    ("p.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1: not valid JSON"),
    ("p.jsonl", rb'{"prompt": "\ud800"}', "line 1: not valid Unicode"),
    ("p.jsonl", b'{"prompt": "a cat"}\n' * 1_000_000, "1,000,000 lines"),
]


@pytest.mark.parametrize(("name", "content", "says"), PROMPTS, ids=lambda value: repr(value[:30]))
def test_prompt_files(name: str, content: bytes, says: str, place: Path, diffexp: Command) -> None:
    (place / name.partition("#")[0]).write_bytes(content)
    check(diffexp, place, ["train", "emoji-ddpo", "--set", f"prompts=./{name}", "--out", "new"], name, says)


def test_prompts_that_are_no_file(place: Path, diffexp: Command) -> None:
    (place / "folder.txt").mkdir()
    os.mkfifo(place / "pipe.txt")
    with (place / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)
    for name, says in (("folder", "no file"), ("pipe", "no file"), ("nowhere", "no such file"), ("huge", "too large")):
        refused(diffexp("evaluate", "emoji", "--prompts", f"{name}.txt"), f"{name}.txt", says)
    (place / "huge.txt").unlink()


REWARDS = [
    ("def f(images, prompts):\n    return 1 / 0", "ZeroDivisionError: division by zero", "mine.py, line 2"),
    ("def f(images, prompts):\n    raise ValueError('a\\nb')", "ValueError: a b", "mine.py, line 2"),
    ("def f(images, prompts):\n    return images", "it returned shape"),
    ("def f(images, prompts):\n    return None", "must return one number an image: it returned NoneType"),
    ("def f(images, prompts):\n    return 'good'", "must return one number an image: it returned str"),
    ("def f(images, prompts):\n    return [1.0]", "it returned shape (1,)"),
    ("def f(images, prompts):\n    return [float('nan')] * len(images)", "nan for the prompt 'a cat'"),
    ("def f(images, prompts):\n    import sys; sys.exit(0)", "SystemExit: 0"),
    ("def f(images):\n    return 1", "TypeError", "mine.py"),
    ("def g(images, prompts):\n    return 1", "unknown reward function 'mine.py:f'", "did you mean 'mine.py:g'?"),
    ("f = 3", "is a int, not a function"),
    ("def f(images, prompts:\n", "importing 'mine.py' failed with SyntaxError", "line 1"),
    ("import nowhere", "importing 'mine.py' failed with ModuleNotFoundError: No module named 'nowhere'"),
    ("import sys; sys.exit(0)", "importing 'mine.py' failed with SystemExit"),
    ("raise ValueError('a\\nb')", "importing 'mine.py' failed with ValueError: a b"),
]


@pytest.mark.parametrize("case", REWARDS, ids=lambda case: case[0])
def test_rewards(case: tuple[str, ...], place: Path, sd_folder: Path, diffexp: Command) -> None:
    (place / "mine.py").write_text(case[0])
    command = ["explore", "emoji-ddpo", "--prompt", "a cat", "--n", "2", "--out", "thesis"]
    check(diffexp, place, [*command, *tiny(sd_folder, reward="mine.py:f")], *case[1:])


def test_rewards_that_have_no_gradient(place: Path, sd_folder: Path, diffexp: Command) -> None:
    (place / "mine.py").write_text("def f(images, prompts):\n    return images.detach().mean((1, 2, 3))\n")
    settings = tiny(sd_folder, reward="mine.py:f", algorithm__last_steps=1)
    command = ["train", "emoji-alignprop", "--out", "new", *settings]
    check(diffexp, place, command, "has no gradient, which alignprop needs: take ddpo instead")
    with (place / "mine.py").open("a") as file:
        file.write("f.differentiable = True")
    refused(diffexp(*command), "says differentiable = True but its scores carry no gradient")


def test_a_reward_whose_weights_are_not_here(place: Path, diffexp: Command) -> None:
    command = ["evaluate", "emoji", "--set", "device=cpu", "--reward", "pickscore"]
    check(diffexp, place, command, "PickScore needs config.json", "not on this machine", "hf download")


def spoilt(run: Path, **files: bytes | str | None) -> None:
    """Replaces files of a run; None removes one. A double underscore stands for a slash, a single one for a dot."""
    for name, content in files.items():
        path = run / name.replace("__", "/").replace("_", ".")
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


RUNS: list[tuple[str, dict[str, bytes | str | None], str]] = [
    ("sample RUN --prompt cat --out new", {"lora": None}, "can't read the LoRA"),
    ("sample RUN --prompt cat --out new", {"config_toml": "seed = ["}, "no valid TOML"),
    ("sample RUN --prompt cat --out new", {"config_toml": b"\xff\xfe"}, "not UTF-8"),
    ("sample RUN --prompt cat --out new", {"config_toml": "sede = 1"}, "unknown key 'sede': did you mean 'seed'?"),
    ("sample RUN --prompt cat --out new", {"config_toml": None}, "RUN_OR_MODEL 'run': neither a run folder (no config"),
    ("sample RUN --prompt cat --out new", {"config_toml": None}, "nor a model (no model_index.json in it)"),
    ("evaluate RUN", {"lora": None}, "can't read the LoRA"),
    ("evaluate RUN", {"config_toml": ""}, "does not fit"),
    ("show RUN", {"lora": None}, "no such LoRA file"),
    ("train --like RUN", {"lora": None}, "no such LoRA file"),
    ("compare RUN --out new", {"config_toml": None}, "not a run folder"),
    ("compare RUN --out new", {"config_toml": "x"}, "config.toml"),
    ("compare RUN --out new", {"config_toml": f"x = {'[' * 100_000}"}, "config.toml"),
    ("compare RUN --out new", {"config_toml": "samples = 2"}, "has no seed"),
    ("compare RUN --out new", {"evaluations_jsonl": None}, "no evaluations"),
    ("compare RUN --out new", {"evaluations_jsonl": ""}, "no evaluations"),
    ("compare RUN --out new", {"evaluations_jsonl": "{}\n"}, "entry 1: needs prompts, reward, queries and mean"),
    ("compare RUN --out new", {"evaluations_jsonl": "[1\n{}\n"}, "line 1: not a JSON object"),
    ("compare RUN --out new", {"evaluations_jsonl": b"\xff\xff\n{}\n"}, "line 1: not a JSON object"),
    ("compare RUN --out new", {"evaluations_jsonl": f"{'[' * 100_000}\n{{}}\n"}, "line 1: not a JSON object"),
    ("compare RUN --out new", {"evaluations_jsonl": '{"queries": []}\n'}, "line 1: queries = [] is no number"),
    ("compare RUN --out new", {"metrics_jsonl": "3\n4\n"}, "line 1: not a JSON object"),
    ("compare RUN --out new", {"metrics_jsonl": '{"iteration": [1]}\n'}, "line 1: iteration = [1] is no number"),
    ("compare RUN --out new", {"config_toml": 'seed = 1\niterations = "x"'}, "has no iterations"),
    ("resume RUN", {"config_toml": None}, "is no run folder"),
    ("resume RUN", {"config_toml": "sede = 1"}, "unknown key 'sede': did you mean 'seed'?"),
    ("resume RUN", {"config_toml": b"\xff\xfe"}, "not UTF-8"),
    (
        "resume RUN",
        {"checkpoints": None, "lora__README_md": None, "metrics_jsonl": '{"iteration": 1}\n' * 100},
        "the checkpoints of this run are gone",
    ),
    ("ctl RUN save", {"config_toml": None}, "no run folder"),
    ("ctl RUN stop", {}, "run: no process trains this run; unless it is finished, `diffexp resume run` goes on"),
    ("push RUN --to nobody", {}, "--to 'nobody': give user/name"),
    ("push RUN --to 'me/a name'", {}, "--to 'me/a name'"),
    ("push RUN --to me/x", {"lora__README_md": None}, "no lora/README.md; give the folder of a run that is finished"),
    ("report RUN", {"config_toml": None}, "not a run folder"),
    ("report RUN", {"config_toml": 'seed = 1\nsamples = "x"'}, "has no samples"),
    ("report RUN", {"evaluations_jsonl": "{}\n"}, "entry 1: needs prompts, reward, queries and mean"),
    ("report RUN", {"metrics_jsonl": '{"queries": "x"}\n'}, "line 1: queries = 'x' is no number"),
    ("report RUN", {"exploration_jsonl": '{"iteration": {}}\n'}, "line 1: iteration = {} is no number"),
    ("report RUN", {"samples__iteration-0000__0.png": b"no picture"}, "0.png"),
    ("report RUN RUN", {}, "say where their report goes, --out FILE"),
    ("report RUN RUN --out new.html", {}, "same seed"),
    ("report RUN --out file/x", {}, "--out"),
    ("report RUN --out /proc/x.html", {}, "--out /proc/x.html: nothing can be made in /proc; choose another folder"),
    ("report RUN nowhere --out new", {}, "no such folder"),
    ("compare RUN --out new", {"samples__iteration-0000__0.png": b"no picture"}, "0.png"),
    ("compare RUN --out new", {"samples__prompts_json": "3"}, "prompts.json"),
    ("compare RUN --out new", {"samples__prompts_json": "{"}, "prompts.json"),
    ("compare RUN RUN --out new", {}, "are the same recipe with the same seed 0"),
    ("compare RUN nowhere --out new", {}, "no such folder"),
    ("compare RUN thesis --out new", {}, "not a run folder"),
    ("compare RUN --out RUN", {}, "is a run; give a folder of its own"),
    ("compare RUN --out file", {}, "is a file"),
    ("train emoji-ddpo --set device=cpu --out RUN", {}, "already holds a run of another recipe"),
    ("train RUN/config.toml --out RUN", {}, "already holds this run, finished"),
    ("train emoji-ddpo --set device=cpu --out thesis", {}, "holds other files and no run"),
    (
        "train RUN/config.toml --out RUN",
        {"checkpoints__iteration-000001__state_json": "{}", "lora__README_md": None},
        "no checkpoint is whole",
    ),
]


@pytest.mark.parametrize(("command", "files", "says"), RUNS, ids=lambda value: repr(value)[:70])
def test_run_folders(
    command: str, files: dict[str, Any], says: str, place: Path, finished: Path, diffexp: Command
) -> None:
    shutil.copytree(finished, place / "run")
    spoilt(place / "run", **files)
    check(diffexp, place, shlex.split(command.replace("RUN", "run")), says)


LORAS: list[tuple[str, Any, str]] = [
    ("empty", b"", "no safetensors file"),
    ("text", b"once upon a time", "no safetensors file"),
    ("truncated", lambda data: data[:-100], "no safetensors file"),
    ("cut in its header", lambda data: data[:50], "no safetensors file"),
    ("a zip", b"PK\x03\x04" + bytes(100), "no safetensors file"),
]


@pytest.mark.parametrize(("name", "content", "says"), LORAS, ids=lambda value: str(value)[:20])
def test_lora_files(name: str, content: Any, says: str, place: Path, finished: Path, diffexp: Command) -> None:
    shutil.copytree(finished, place / "run")
    file = place / "run" / LORA
    file.write_bytes(content(file.read_bytes()) if callable(content) else content)
    check(diffexp, place, ["show", str(file)], LORA, says)
    check(diffexp, place, ["train", "--like", "run"], LORA, says)
    check(diffexp, place, ["sample", "run", "--prompt", "a cat", "--out", "new"], LORA, "can't read the LoRA")


def test_loras_that_do_not_fit(place: Path, finished: Path, xl_folder: Path, diffexp: Command) -> None:
    shutil.copytree(finished, place / "run")
    sample = ["sample", "run", "--prompt", "a cat", "--out", "new"]
    check(diffexp, place, [*sample, *sets(model__path=str(xl_folder))], "does not fit this model")
    tensors = load_file(place / "run" / LORA)
    spoilt_one = min(tensors)
    save_file({**tensors, spoilt_one: tensors[spoilt_one] * float("nan")}, place / "run" / LORA)
    check(diffexp, place, sample, spoilt_one.removesuffix(".lora_A.weight"), "not finite")
    check(diffexp, place, ["train", "--like", "run"], "has no recipe in its header")


UNDER_A_FILE = [
    "sample MODEL --prompt cat --set sampler.steps=2 --out file/x",
    "explore emoji-ddpo --prompt cat --n 2 --out file/x",
    "compare RUN --out file/x",
    "train emoji-ddpo --out file/x",
    "train emoji-ddpo --out file",
    "train emoji-ddpo --out /proc/x",
    "compare RUN --out /proc/x",
    f"sample MODEL --prompt cat --set sampler.steps=2 --out {'x' * 300}",
    f"train emoji-ddpo --out {'x' * 300}",
    "reproduce 3 --out file/x",
]


@pytest.mark.parametrize("command", UNDER_A_FILE, ids=lambda command: command[:60])
def test_folders_that_cannot_be_made(
    command: str, place: Path, finished: Path, sd_folder: Path, diffexp: Command
) -> None:
    """Not permissions: the tests may run as root, who has them all."""
    words = shlex.split(command.replace("RUN", str(finished)).replace("MODEL", str(sd_folder)))
    settings = tiny(sd_folder) if words[0] in ("train", "explore") else []
    check(diffexp, place, [*words, *settings], "--out", words[words.index("--out") + 1][:100])


NO_SPACE = [
    ("sample MODEL --prompt cat --out new --set sampler.steps=2", "PIL.Image.Image.save"),
    ("explore emoji-ddpo --prompt cat --n 2 --out new", "PIL.Image.Image.save"),
    ("compare RUN --out new", "pathlib.Path.write_text"),
    ("train emoji-ddpo --out new", "pathlib.Path.mkdir"),
    ("train emoji-ddpo --out new", "diffexp.runs.records.JsonLines.append"),
    ("recipes copy demo", "pathlib.Path.open"),
]


@pytest.mark.parametrize(("command", "where"), NO_SPACE)
def test_no_space(
    command: str,
    where: str,
    place: Path,
    finished: Path,
    sd_folder: Path,
    diffexp: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = shlex.split(command.replace("RUN", str(finished)).replace("MODEL", str(sd_folder)))
    settings = {"sample": sets(sampler__steps=2), "explore": tiny(sd_folder), "train": tiny(sd_folder)}.get(
        words[0], []
    )
    before = snapshot(place)
    monkeypatch.setattr(where, full)
    refused(diffexp(*words, *settings), "no space left on device")
    monkeypatch.undo()
    assert {name: content for name, content in snapshot(place).items() if name.split("/")[0] != "new"} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_disk_that_is_really_full(place: Path, finished: Path, diffexp: Command) -> None:
    (place / "new").mkdir()
    (place / "new" / "comparison.json").symlink_to("/dev/full")
    says = "--out new: can't write there: no space left on device; make room on that disk"
    check(diffexp, place, ["compare", str(finished), "--out", "new"], says)


def test_what_a_library_in_rust_says_of_a_disk(place: Path) -> None:
    says = "--out x: can't write there: is a directory; choose another folder"
    with pytest.raises(UserError, match=says), writing("--out", Path("x")):
        save_file({}, place / "thesis")
    with pytest.raises(UserError, match="no space left on device; make room"), writing("--out", Path("x")):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(ValueError, match="of ours"), writing("--out", Path("x")):
        raise ValueError("a mistake of ours")


def test_a_cache_without_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = sources.cache_folder() / sources.HPS_20.files[0]
    placed.parent.mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, placed)
    monkeypatch.setenv(sources.TRUST, hashlib.sha256(placed.read_bytes()).hexdigest())
    make_read_only(place, monkeypatch)
    with pytest.raises(UserError, match=r"DIFFEXP_CACHE .*read-only file system; choose a folder"):
        weights.unpickled(sources.HPS_20, lambda state, folder: None)


READ_ONLY = [
    "train emoji-ddpo --out new",
    "train emoji-ddpo --out empty",
    "sample MODEL --prompt cat --out new --set sampler.steps=2",
    "explore emoji-ddpo --prompt cat --n 2 --out new",
    "compare run --out new",
    "report run",
    "report run --out new.html",
    "recipes copy demo",
    "resume run",
    "reproduce 3 --out new",
]


@pytest.mark.parametrize("command", READ_ONLY)
def test_a_folder_that_is_read_only(
    command: str, place: Path, finished: Path, sd_folder: Path, diffexp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, place / "run")
    (place / "run" / "lora" / "README.md").unlink()  # the run is not finished, then
    (place / "empty").mkdir()
    words = shlex.split(command.replace("MODEL", str(sd_folder)))
    settings = tiny(sd_folder) if words[0] in ("train", "explore") else []
    make_read_only(place, monkeypatch)
    check(diffexp, place, [*words, *settings], "read-only file system", "choose a folder that you may write to")


def test_a_request_that_cannot_be_left(
    place: Path, finished: Path, diffexp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, place / "run")
    (place / "run" / "control").write_text("a file")
    with durable.claimed(place / "run"):
        check(diffexp, place, ["ctl", "run", "save"], "control: can't leave a request there")
        (place / "run" / "control").unlink()
        make_read_only(place, monkeypatch)
        check(diffexp, place, ["ctl", "run", "save"], "read-only file system", "choose a folder that you may write to")


MISSING = [
    ("diffexp.tracking.find_spec", {"trackers": ["wandb"]}, "wandb is not installed; pip install 'diffexp[wandb]'"),
    ("diffexp.tracking.find_spec", {"trackers": ["mlflow"]}, "mlflow is not installed; pip install 'diffexp[mlflow]'"),
    ("diffexp.prompts.tables.find_spec", {"prompts": "p.parquet#text"}, "pip install 'diffexp[datasets]'"),
    ("diffexp.prompts.tables.find_spec", {"prompts": "hub:me/set#text"}, "pip install 'diffexp[datasets]'"),
]


@pytest.mark.parametrize(("looked_up", "settings", "says"), MISSING, ids=lambda value: str(value)[:40])
def test_an_extra_that_is_not_installed(
    looked_up: str,
    settings: dict[str, Any],
    says: str,
    place: Path,
    sd_folder: Path,
    diffexp: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (place / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(looked_up, lambda name: None)
    check(diffexp, place, ["train", "emoji-ddpo", "--out", "new", *tiny(sd_folder, **settings)], says)


ENVIRONMENT = [
    ("train emoji-ddpo --out new --processes 2", "DIFFEXP_PATIENCE", "soon", "give the seconds that processes wait"),
    ("train emoji-ddpo --out new --processes 2", "DIFFEXP_PATIENCE", "-1", "DIFFEXP_PATIENCE = '-1'"),
    ("train emoji-ddpo --out new --set device=cpu", "WORLD_SIZE", "many", "WORLD_SIZE = 'many'"),
    ("train emoji-ddpo --out new --set device=cpu", "RANK", "first", "RANK = 'first'"),
    (
        "explore emoji-ddpo --prompt cat --out new --set reward=http://127.0.0.1:9 --set device=cpu",
        "DIFFEXP_REWARD_PATIENCE",
        "soon",
        "DIFFEXP_REWARD_PATIENCE = 'soon'",
    ),
    ("rewards check http://127.0.0.1:9", "DIFFEXP_REWARD_TOKEN", "short", "DIFFEXP_REWARD_TOKEN holds no token"),
    ("rewards check http://127.0.0.1:9", "DIFFEXP_REWARD_TOKEN_FILE", "nowhere", "can't read the token file nowhere"),
    ("serve-reward emoji-judge", "DIFFEXP_REWARD_TOKEN", "two words of a sentence", "holds no token"),
    ("rewards check imagereward", "DIFFEXP_TRUST_SHA256", "me", "which is no SHA-256: it takes 64 hex digits"),
]


@pytest.mark.parametrize(("command", "variable", "value", "says"), ENVIRONMENT)
def test_an_environment_that_says_nonsense(
    command: str,
    variable: str,
    value: str,
    says: str,
    place: Path,
    diffexp: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(variable, value)
    check(diffexp, place, shlex.split(command), says)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            "(signal 9); the others were ended; the same command again goes on from",
        ),
        ("import sys; sys.exit('no luck')", "(exit code 1: no luck); the others were ended$"),
    ],
)
def test_a_process_that_is_killed_can_go_on(code: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "program", lambda: [sys.executable, "-c", code])
    with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
        launch.launch(2, [])


def test_a_port_that_is_taken(place: Path, finished: Path, diffexp: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in (["report", str(finished), "--watch"], ["serve-reward", "jpeg-compressibility"]):
            check(diffexp, place, [*command, "--port", port], f"--port {port}", "can't listen there", "--port 0 takes")


def program(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The installed program, in a process of its own."""
    command = [sys.executable, "-m", "diffexp", *arguments]
    return subprocess.run(command, capture_output=True, timeout=100, check=False, **options)


def test_the_program_itself(place: Path) -> None:
    for arguments in (["show", "nowhere"], ["recipes", "copy", "nothing"], ["recipes", b"\xff"]):
        ended = program(*arguments)
        assert ended.returncode == 2
        assert ended.stdout == b""
        assert ended.stderr.startswith(b"error: ")
        assert ended.stderr.count(b"\n") == 1


def test_a_limit_that_even_root_has(place: Path) -> None:
    def no_file_may_grow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    ended = program("recipes", "copy", "demo", preexec_fn=no_file_may_grow)
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: FILE demo.toml: can't write there: file too large; choose")


def test_a_reader_that_goes_away(place: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "diffexp", "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_out_of_memory_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): take model.precision"
    )
