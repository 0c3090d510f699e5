"""Prompts from a table's column: ``file.csv#column``, ``file.parquet#column``, ``file.arrow#column``, or a data set of
the hub as ``hub:org/name#column``, with ``@revision`` and ``:split`` after its name where they are not the main ones.

csv needs nothing; the others need the extra ``datasets``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from diffexp.errors import UserError, one_line, unknown
from diffexp.prompts.files import MOST, clean

HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.+-]+))?")
FILE = re.compile(r"\.(csv|parquet|arrow)(#|$)", re.IGNORECASE)


class Column(NamedTuple):
    """A column of a table: a file, or a data set of the hub."""

    source: str
    name: str

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"prompts {self.source}#{self.name}"


def is_table(name: str) -> bool:
    """Whether ``name`` means a table's column, or tries to."""
    return name.startswith("hub:") or FILE.search(name) is not None


def parse(name: str) -> Column:
    """The column that ``name`` means.

    Raises:
        UserError: if it names no column, or no data set.
    """
    source, _, column = name.partition("#")
    if not column.strip():
        raise UserError(f"prompts {name!r}: which column? write {source}#column")
    if source.startswith("hub:") and not HUB.fullmatch(source):
        raise UserError(f"prompts {name!r}: write a data set of the hub as hub:org/name#column")
    return Column(source, column)


def check(name: str) -> None:
    """What can be told without opening the table: nothing is downloaded.

    Raises:
        UserError: a malformed name, no such file, or a package that is not installed.
    """
    column = parse(name)
    hub = column.source.startswith("hub:")
    if not hub and not Path(column.source).expanduser().is_file():
        raise UserError(f"{column.where}: no such file")
    package = "datasets" if hub else "pyarrow"
    if not column.source.lower().endswith(".csv") and not find_spec(package):
        raise UserError(f"{column.where}: {package} is not installed; pip install 'diffexp[datasets]'")


def read(name: str) -> tuple[str, ...]:
    """The prompts of a column in their order, without empty ones.

    Raises:
        UserError: as :func:`check`; a table that can't be read, no such column, something in it that is no text, or no
            prompt at all; too many prompts, or one that can't be shown.
    """
    check(name)
    column = parse(name)
    try:
        rows = list(islice(reader(column.source)(column), MOST + 1))
    except UserError:
        raise
    except Exception as error:
        # pyarrow, datasets and the hub's client have error types of their own, many of them
        raise UserError(f"{column.where}: can't be read ({type(error).__name__}: {one_line(error)})") from error
    if len(rows) > MOST:
        raise UserError(f"{column.where}: more than {MOST:,} prompts; take a part of them")
    for number, text in enumerate(rows, start=1):
        if text is not None and not isinstance(text, str):
            raise UserError(f"{column.where}, row {number}: {type(text).__name__} instead of text")
    kept = [(number, text.strip()) for number, text in enumerate(rows, start=1) if text and text.strip()]
    if not kept:
        raise UserError(f"{column.where}: the column holds no prompt")
    return tuple(clean(text, f"{column.where}, row {number}") for number, text in kept)


def reader(source: str) -> Callable[[Column], Iterable[Any]]:
    """What reads such a table."""
    if source.startswith("hub:"):
        return from_hub
    return {".csv": from_csv, ".parquet": from_parquet, ".arrow": from_arrow}[Path(source).suffix.lower()]


def present(column: Column, names: Iterable[str]) -> str:
    """The column's name, if the table has it.

    Raises:
        UserError: if not, with the columns there are.
    """
    names = list(names)
    if not names:
        raise UserError(f"{column.where}: the table is empty; its first line names the columns")
    if column.name not in names:
        raise UserError(f"{column.where}: {unknown('column', column.name, names)}")
    return column.name


def from_csv(column: Column) -> Iterable[Any]:
    # utf-8-sig: spreadsheets put a byte order mark first, which would become part of the first column's name
    with Path(column.source).expanduser().open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        name = present(column, rows.fieldnames or [])
        yield from (row[name] for row in rows)


def from_parquet(column: Column) -> Iterable[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(Path(column.source).expanduser())
    name = present(column, file.schema_arrow.names)
    for batch in file.iter_batches(columns=[name]):
        yield from batch.column(0).to_pylist()


def from_arrow(column: Column) -> Iterable[Any]:
    import pyarrow

    with pyarrow.memory_map(str(Path(column.source).expanduser())) as file:
        try:
            batches: Iterable[Any] = (opened := pyarrow.ipc.open_stream(file))
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats, that of Feather
            opened = pyarrow.ipc.open_file(file)
            batches = (opened.get_batch(k) for k in range(opened.num_record_batches))
        name = present(column, opened.schema.names)
        for batch in batches:
            yield from batch.column(name).to_pylist()


def from_hub(column: Column) -> Iterable[Any]:
    load_dataset = import_module("datasets").load_dataset

    found = HUB.fullmatch(column.source)
    if not found:
        raise UserError(f"{column.where}: write hub:org/name#column")
    table = load_dataset(found["name"], split=found["split"] or "train", revision=found["revision"])
    return table[present(column, table.column_names)]
