"""Prompt sets against the paper's tables, and what a user's file may hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffexp import prompts
from diffexp.errors import UserError

COUNTS = {
    "animals": 45,
    "animals-unseen": 6,
    "animal-activities": 135,
    "animal-activities-unseen": 18,
    "drawbench-58": 58,
    "parti-150": 150,
}


def test_every_set_has_the_papers_count_and_says_so():
    assert list(prompts.available()) == list(COUNTS)
    for name, description in prompts.available().items():
        loaded = prompts.load(name)
        assert len(loaded) == len(set(loaded)) == COUNTS[name]
        assert description.startswith(f"{COUNTS[name]} ")
        assert "\n" not in description
        assert all(prompt == prompt.strip() and prompt for prompt in loaded)


@pytest.mark.parametrize("name", COUNTS)
def test_the_description_quotes_a_prompt_of_the_set(name: str):
    assert prompts.available()[name].split(': "')[-1].removesuffix('"') in prompts.load(name)


def test_prompts_of_the_tables():
    assert prompts.load("animals")[0] == "ant"
    assert prompts.load("animals")[-1] == "zebra"
    assert {"cow", "sheep", "llama"} <= set(prompts.load("animals"))
    trained = prompts.load("animal-activities")
    assert trained[:3] == ("an ant washing the dishes", "an ant riding a bike", "an ant playing chess")
    assert {"a dolphin riding a bike", "a butterfly playing chess", "a monkey washing the dishes"} <= set(trained)
    unseen = prompts.load("animal-activities-unseen")
    assert {"an octopus driving a car", "a cheetah doing laundry", "a lobster playing soccer"} <= set(unseen)


def test_unseen_prompts_share_no_animal_and_no_activity_with_the_trained():
    assert not set(prompts.ANIMALS) & set(prompts.UNSEEN_ANIMALS)
    assert not set(prompts.ACTIVITIES) & set(prompts.UNSEEN_ACTIVITIES)


def test_published_sets():
    drawbench = prompts.load("drawbench-58")
    assert drawbench[0] == "A horse riding an astronaut."
    assert "Greek statue of a man tripping over a cat." in drawbench
    assert any("Bismarck-Schönhausen" in prompt for prompt in drawbench)
    parti = prompts.load("parti-150")
    assert "a spaceship hovering over The Alamo" in parti
    assert "a horned owl with a graduation cap and diploma" in parti


@pytest.mark.parametrize(("noun", "expected"), [("ant", "an"), ("octopus", "an"), ("Emu", "an"), ("cat", "a")])
def test_article(noun: str, expected: str):
    assert prompts.article(noun) == expected


def test_one_prompt_in_place():
    assert prompts.load("text:a dolphin riding a bike") == ("a dolphin riding a bike",)


def test_text_file(tmp_path: Path):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeff# my prompts\n\n  ein Bär \na cat\r\na cat\n   # not this\n".encode())
    assert prompts.load(file) == prompts.load(str(file)) == ("ein Bär", "a cat", "a cat")


def test_jsonl_file(tmp_path: Path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a cat", "id": 3}\n\n{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert prompts.load(file) == ("a cat", "one\u2028two")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("animal-activites", "did you mean 'animal-activities'"),
        ("nonsense", "known: animals, animals-unseen"),
        ("", "unknown prompt set ''"),
        ("text:  ", "no prompt after 'text:'"),
        ("no/such/file.txt", "no such file"),
        ("prompts.csv", "which column? write prompts.csv#column"),
        ("./animals", "ends in .txt or .jsonl"),
        ("~no-such-user-here/a.txt", "cannot be read"),
        ("a\0b.txt", "cannot be read"),
    ],
)
def test_a_name_that_is_wrong(name: str, message: str):
    with pytest.raises(UserError) as caught:
        prompts.check(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"\n# only a comment\n", "holds no prompt"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"a cat\0\0\0", "binary file"),
        ("a.jsonl", b"\n", "holds no prompt"),
        ("a.jsonl", b'{"prompt": "a cat"}\n{"prompt": ', "line 2: not valid JSON"),
        ("a.jsonl", b'"a cat"', 'line 1: no text under "prompt"'),
        ("a.jsonl", b'\n{"text": "a cat"}', 'line 2: no text under "prompt"'),
        ("a.jsonl", b'{"prompt": 3}', 'line 1: no text under "prompt"'),
        ("a.jsonl", b'{"prompt": " "}', 'line 1: no text under "prompt"'),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prompts.load(tmp_path / name)
    assert message in str(caught.value)


def test_a_folder_is_not_a_file(tmp_path: Path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        prompts.load(tmp_path / "folder.txt")


def test_needs_no_torch():
    code = "import sys, diffexp.prompts; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
