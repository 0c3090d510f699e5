from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffexp import prompts
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.prompts import tables

ROWS = ["a cat", " a dog\n", "", None, "an owl, flying"]
EXPECTED = ("a cat", "a dog", "an owl, flying")


def write_csv(path: Path) -> None:
    path.write_text('\ufeffcaption,id\na cat,1\n" a dog\n",2\n,3\n"an owl, flying",4\n', encoding="utf-8")


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"caption": ROWS, "id": range(5)}), path)


def write_arrow(path: Path, stream: bool = True) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"caption": ROWS, "id": range(5)})
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_feather(path: Path) -> None:
    write_arrow(path, stream=False)


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_csv, "t.csv"), (write_parquet, "t.parquet"), (write_arrow, "t.arrow"), (write_feather, "t.ARROW")],
)
def test_a_column_of_a_file(write: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert prompts.load(f"{tmp_path / name}#caption") == EXPECTED
    with pytest.raises(UserError, match=r"t\..*#captoin: unknown column 'captoin': did you mean 'caption'"):
        prompts.load(f"{tmp_path / name}#captoin")
    assert Recipe.parse({"prompts": f"{tmp_path / name}#caption"}, "test").prompts.endswith("#caption")


def test_numbers_are_no_prompts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 1: int instead of text"):
        prompts.load(f"{tmp_path / 't.parquet'}#id")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("t.csv", r"which column\? write .*t.csv#column"),
        ("t.csv#", "which column"),
        ("empty.csv#caption", "the table is empty"),
        ("blank.csv#caption", "holds no prompt"),
        ("none.csv#caption", "no such file"),
        ("bad.parquet#caption", "can't be read|not installed"),
        ("bad.csv#caption", "can't be read"),
    ],
)
def test_what_is_wrong_is_named(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "t.csv")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "blank.csv").write_text("caption\n\n \n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "bad.csv").write_bytes(b"caption\n\xff\xfe\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=part) as caught:
        prompts.load(name)
    assert len(str(caught.value).splitlines()) == 1


def test_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST", 3)
    write_csv(tmp_path / "t.csv")
    with pytest.raises(UserError, match="more than 3 prompts"):
        prompts.load(f"{tmp_path / 't.csv'}#caption")


class Table(dict[str, list[Any]]):
    column_names = ("Prompt", "id")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hub was asked for; it has one data set."""
    calls: list[Any] = []

    def load_dataset(name: str, split: str, revision: str | None) -> Table:
        calls.append((name, split, revision))
        if name == "no/body":
            raise FileNotFoundError("no such data set\nsecond line")
        return Table(Prompt=ROWS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(tables, "find_spec", lambda name: name)
    return calls


def test_a_column_of_the_hub(asked: list[Any]) -> None:
    assert prompts.load("hub:org/some-prompts#Prompt") == EXPECTED
    prompts.load("hub:org/some.prompts@v1.0:validation#Prompt")
    assert asked == [("org/some-prompts", "train", None), ("org/some.prompts", "validation", "v1.0")]


def test_checking_a_recipe_downloads_nothing(asked: list[Any]) -> None:
    Recipe.parse({"prompts": "hub:org/name#Prompt"}, "test")
    assert asked == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("hub:org/name", "which column"),
        ("hub:name#Prompt", "hub:org/name#column"),
        ("hub:../x/y#Prompt", "hub:org/name#column"),
        ("hub:org/name#prompt", "did you mean 'Prompt'"),
        ("hub:no/body#Prompt", r"can't be read \(FileNotFoundError: no such data set"),
    ],
)
def test_mistakes_with_the_hub(name: str, part: str, asked: list[Any]) -> None:
    with pytest.raises(UserError, match=part) as caught:
        prompts.load(name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["hub:org/name#Prompt", "t.parquet#caption"])
def test_without_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"is not installed; pip install 'diffexp\[datasets\]'"):
        Recipe.parse({"prompts": name}, "test")
