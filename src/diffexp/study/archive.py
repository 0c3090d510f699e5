"""The numbers of many runs in one small file: what curves and tables are made of, without images and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffexp.errors import UserError
from diffexp.runs import durable
from diffexp.runs.names import CONFIG, EVALUATIONS, METRICS
from diffexp.runs.reading import objects, read_config
from diffexp.toml import toml_lines

FILE = "runs.jsonl"
DIGITS = 6  # significant ones


@dataclass(frozen=True)
class Folders:
    """Where a study's runs are: those ``trained`` here, and the numbers of those that a store has, ``kept``."""

    trained: Path
    kept: Path | None = None

    def find(self, run: str) -> Path:
        """A run's folder; that of its numbers alone where it is not finished here."""
        here = self.trained / run
        numbers = self.kept / run if self.kept else here
        return numbers if complete(numbers) and not complete(here) else here


def pack(runs: Iterable[Path], file: Path) -> int:
    """Writes a line for each run folder into ``file``, and returns how many. Runs that ``file`` has already stay in it.

    A line has the name of the run, its whole recipe, and its metrics and evaluations by column.
    """
    lines = {record["run"]: record for record in objects(file)}
    for run in runs:
        metrics = {entry["iteration"]: entry for entry in objects(run / METRICS)}  # a resumed run has some twice
        evaluations = {
            (entry["iteration"], entry["prompts"], entry["reward"]): entry for entry in objects(run / EVALUATIONS)
        }
        lines[run.name] = {
            "run": run.name,
            "config": read_config(run),
            "metrics": columns(list(metrics.values())),
            "evaluations": columns(list(evaluations.values())),
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(lines[name], ensure_ascii=False)}\n" for name in sorted(lines))
    durable.replace(file, text.encode())  # it may hold the only copy of its runs
    return len(lines)


def unpack(file: Path, into: Path) -> list[Path]:
    """Makes the folders of the runs in ``file`` again, as far as curves and tables read them.

    Raises:
        UserError: if the file is damaged.
    """
    found = []
    for number, record in enumerate(objects(file), start=1):
        try:
            run = into / Path(record["run"]).name
            texts = {
                CONFIG: "\n".join(toml_lines(record["config"])) + "\n",
                METRICS: json_lines(record["metrics"]),
                EVALUATIONS: json_lines(record["evaluations"]),
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{str(file)!r}, line {number}: no run ({error!r}); the file is damaged") from error
        run.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (run / name).write_text(text, encoding="utf-8")
        found.append(run)
    return found


def complete(run: Path) -> bool:
    """Whether a run has been evaluated after its last iteration; without looking for its weights."""
    if not (run / CONFIG).is_file():
        return False
    metrics, evaluations = objects(run / METRICS), objects(run / EVALUATIONS)
    last = read_config(run).get("iterations")
    return any(entry["iteration"] == last for entry in metrics) and any(e["iteration"] == last for e in evaluations)


def columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The records' numbers and names by key, rounded; null where a record has none."""
    keys = dict.fromkeys(key for record in records for key, value in record.items() if not isinstance(value, list))
    return {key: [rounded(record.get(key)) for record in records] for key in keys}


def json_lines(table: Mapping[str, Sequence[Any]]) -> str:
    """The records of a table of columns, an object a line."""
    rows = zip(*table.values(), strict=True)
    records = [{key: cell for key, cell in zip(table, row, strict=True) if cell is not None} for row in rows]
    return "".join(f"{json.dumps(record)}\n" for record in records)


def rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
