from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from diffexp import cli, completion
from diffexp.config import Recipe
from diffexp.doctor import RESERVE
from diffexp.errors import UserError
from diffexp.schema import DIRECTIVE, FILE, copy_recipe, schema, settings, to_json
from diffexp.toml import memory_of, shipped, tomllib

RECIPES = Path(str(files("diffexp") / "recipes"))


def given(table: dict[str, Any]) -> int:
    """How many values a recipe's file sets."""
    return sum(given(value) if isinstance(value, dict) else 1 for value in table.values())


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipes_are_short_and_point_to_the_schema(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    assert given(table) <= 12
    jsonschema.validate(table, schema())
    first, second = text.splitlines()[:2]
    assert first.startswith(DIRECTIVE)
    assert (RECIPES / first.removeprefix(DIRECTIVE)).is_file()
    assert shipped()[name] == second.removeprefix("# ")


def test_there_are_at_most_sixty_settings_and_each_is_described() -> None:
    found = list(settings())
    assert len({name for name, _ in found}) <= 60
    assert [name for name, field in found if not field.description] == []


def test_the_schema_file_is_current() -> None:
    file = files("diffexp") / FILE
    assert file.read_text(encoding="utf-8") == to_json(), f"diffexp config-schema > src/diffexp/{FILE}"


def test_the_schema_has_every_setting_with_its_description() -> None:
    text = to_json()
    whole = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(whole)
    for name, field in settings():
        assert json.dumps(field.description, ensure_ascii=False) in text, name
    resolved = json.loads(json.dumps(Recipe.load("emoji-ddpo-diffexp").model_dump(mode="json", exclude_none=True)))
    jsonschema.validate(resolved, whole)


@pytest.mark.parametrize(
    "mistake",
    [
        {"iterashuns": 3},
        {"samples": 0},
        {"model": {"precision": "fp8"}},
        {"algorithm": {"name": "ppo"}},
        {"algorithm": {"name": "alignprop", "clip": 1e-4}},
        {"exploration": {"words": {"unit": "letter"}}},
        {"trackers": ["paper"]},
        {"sampler": {"size": [64]}},
    ],
)
def test_editors_see_mistakes(mistake: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(mistake, schema())


def test_what_a_base_leaves_open_is_no_mistake() -> None:
    jsonschema.validate({"base": "emoji-alignprop", "algorithm": {"last_steps": 3}}, schema())


def test_a_copy_says_the_same_and_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = copy_recipe("emoji-ddpo-diffexp", tmp_path / "mine.toml")
    assert made.read_text().splitlines()[0] == f"#:schema {FILE}"
    assert (tmp_path / FILE).read_text() == to_json()
    assert Recipe.load(made) == Recipe.load("emoji-ddpo-diffexp")
    assert copy_recipe("demo", tmp_path) == tmp_path / "demo.toml"


@pytest.mark.parametrize(
    ("name", "to", "part"),
    [
        ("emoji-dppo", "mine.toml", "did you mean 'emoji-ddpo'"),
        ("../schema", "mine.toml", "unknown recipe"),
        ("demo", "mine.txt", r"ends in \.toml"),
        ("demo", "there.toml", "exists already"),
        ("demo", "there.toml/mine.toml", "can't write there"),
    ],
)
def test_copies_that_can_not_be(name: str, to: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "there.toml").write_text("precious")
    with pytest.raises(UserError, match=part):
        copy_recipe(name, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["there.toml"]
    assert (tmp_path / "there.toml").read_text() == "precious"


def test_recipes_named_by_memory_class_fit_into_it() -> None:
    classes = {name: int(name.rpartition("-")[2].removesuffix("gb")) for name in shipped() if name.endswith("gb")}
    assert {name.split("-")[0] for name in classes} == {"sd15", "sdxl"}
    for name, gigabytes in classes.items():
        assert 0.4 * gigabytes < memory_of(name) <= RESERVE * gigabytes, name
    assert all(memory_of(name) > 0 for name in shipped())


@pytest.mark.parametrize(
    ("complete", "typed", "expected"),
    [
        (completion.recipes, "emoji-al", ["emoji-alignprop", "emoji-alignprop-diffexp"]),
        (completion.recipes, "mi", ["mine.toml"]),
        (completion.recipes, "runs/", ["runs/one.toml", "runs/first/"]),
        (completion.prompts, "draw", ["drawbench-58"]),
        (completion.rewards, "picks", ["pickscore"]),
        (completion.rewards, "2*hpsv2+aes", ["2*hpsv2+aesthetic"]),
        (completion.runs, "runs/", ["runs/first"]),
        (completion.settings, "exploration.w", [f"exploration.words.{part}=" for part in ("low", "high", "unit")]),
        (completion.settings, "reward=emoji-j", ["reward=emoji-judge"]),
        (completion.settings, "model.precision=b", ["model.precision=bf16"]),
        (
            completion.settings,
            "update.checkpoint=",
            [f'update.checkpoint=["{part}"]' for part in ("unet", "attention", "decoder")],
        ),
        (completion.settings, "nonsense=", []),
    ],
)
def test_completion(
    complete: Any, typed: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for name in ("mine.toml", "runs/one.toml", "runs/first/config.toml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert [name for name, _ in complete(typed)] == expected


def test_the_shell_is_told() -> None:
    words = {"_DIFFEXP_COMPLETE": "complete_bash", "COMP_WORDS": "diffexp train sd15-al", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['diffexp']; from diffexp.cli import main; main()"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert told.stdout.split() == ["sd15-alignprop", "sd15-alignprop-diffexp"]


def test_subcommands_have_help_with_an_example() -> None:
    for command in (["recipes", "copy"], ["rewards", "check"]):
        text = CliRunner().invoke(cli.app, [*command, "--help"], terminal_width=200).stdout
        assert f"Example: diffexp {' '.join(command)}" in " ".join(text.split())


def test_a_recipe_is_copied_and_its_schema_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.app, ["recipes", "copy", "demo"]).exit_code == 0
    assert Recipe.load("demo.toml") == Recipe.load("demo")
    assert CliRunner().invoke(cli.app, ["config-schema"]).stdout == to_json()
