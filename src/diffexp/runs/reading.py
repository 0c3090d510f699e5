"""What is read back from the folder of a run: its recipe, its training metrics and its evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffexp.errors import UserError, cut
from diffexp.rewards.spec import parse
from diffexp.runs.names import CONFIG, EVALUATIONS, METRICS, TITLES
from diffexp.toml import flat, read_tables

STRATEGIES: dict[tuple[str, ...], str] = {
    (): "",
    ("guidance",): " + guidance schedule",
    ("words",): " + word weighting",
    ("guidance", "words"): " + DiffExp",
}
"""What a label adds for the parts of exploration that are on."""

LARGEST = 1e30
"""Rewards and counts beyond this are no measurement."""

COUNTS = frozenset(("iteration", "queries", "seconds", "n"))
"""What is a number in every record that has it."""

NOT_THE_METHOD = ("seed", "device", "trackers", "rollout.batch", "update", "evaluation", "preview", "checkpoint")
"""Settings, and whole sections, that runs of one method may differ in: they change no training sample."""


class Measure(NamedTuple):
    """What an evaluation measures: the mean ``reward`` on a set of ``prompts``."""

    prompts: str
    reward: str


@dataclass(frozen=True, eq=False)
class Curve:
    """R(q) of one run: ``values[k]``, the mean reward after ``queries[k]`` reward queries; queries increase."""

    queries: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Run:
    """A folder that ``diffexp train`` wrote."""

    path: Path
    config: Mapping[str, Any]
    """The recipe as nested tables; ``recipe`` are those of its settings that make the method, by their dotted names."""
    seed: int
    algorithm: str
    strategies: tuple[str, ...]
    recipe: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    scores: Mapping[Measure, Sequence[Mapping[str, Any]]]
    """The records of the evaluations in the order of their queries; ``evaluations`` are the curves of their means."""
    evaluations: Mapping[Measure, Curve]
    diversity: Mapping[str, Curve]  # by prompt set, of its evaluations' images

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def explores(self) -> bool:
        """Whether any part of training explored."""
        return bool(self.strategies)

    @property
    def label(self) -> str:
        """What was trained, in words: "DDPO", "DDPO + DiffExp"; "DDPO + word weighting" with one strategy only.

        A strategy of the user's own is called by its function.
        """
        known = tuple(part for part in self.strategies if part in ("guidance", "words"))
        own = "".join(f" + {part}" for part in self.strategies if part not in known)
        return TITLES.get(self.algorithm, self.algorithm) + STRATEGIES[known] + own

    @property
    def goal(self) -> Measure:
        """What training was for. The reward may be a sum, which no evaluation measures: see ``objective``."""
        return Measure(str(self.config.get("prompts")), str(self.config.get("reward")))

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The rewards that were trained on, as :func:`trained_on` has them."""
        return trained_on(self.goal.reward)

    def held_out(self, measure: Measure) -> bool:
        """Whether training never saw this reward."""
        return measure.reward not in self.trained

    @cached_property
    def objective(self) -> Measure:
        """The evaluation that is nearest to the goal: of a sum its first member, on other prompts where need be."""

        def distance(measure: Measure) -> tuple[int, bool]:
            order = len(self.trained) if self.held_out(measure) else self.trained.index(measure.reward)
            return order, measure.prompts != self.goal.prompts

        return min(self.evaluations, key=distance, default=self.goal)

    @property
    def seconds(self) -> float | None:
        """The time spent in iterations; None if no metrics say so."""
        spent = [m["seconds"] for m in self.metrics if is_number(m.get("seconds"))]
        return float(sum(spent)) if spent else None

    @classmethod
    def read(cls, path: str | Path, evaluated: bool = True) -> Run:
        """Read a run folder; unless it must be ``evaluated``, also that of a run that has only begun.

        Raises:
            UserError: if it is no run folder, has no evaluations, or one of its files is damaged (which line).
        """
        path = Path(path).resolve()
        config = read_config(path)
        scores = _scores(path / EVALUATIONS)
        if evaluated and not scores:
            raise UserError(f"run {str(path)!r}: no evaluations; compare needs runs that were evaluated at least once")
        for key, default in (("seed", None), ("iterations", 0), ("samples", 0)):
            if not isinstance(config.get(key, default), int):
                remedy = "give a folder that `diffexp train` wrote"
                raise UserError(f"run {str(path)!r}: {CONFIG} has no {key}; {remedy}")
        strategies = _strategies(config)
        return cls(
            path=path,
            config=config,
            seed=config["seed"],
            algorithm=_algorithm(config),
            strategies=strategies,
            recipe={key: value for key, value in flat(config).items() if not _is_incidental(key, bool(strategies))},
            metrics=_last_of_each(objects(path / METRICS)),
            scores=scores,
            evaluations={one: _curve({entry["queries"]: entry["mean"] for entry in scores[one]}) for one in scores},
            diversity=_diversity(scores),
        )


def trained_on(spec: str) -> tuple[str, ...]:
    """The rewards that training on a reward spec sees: itself, and the members of a sum in their order."""
    try:
        return (spec, *(member.name for member in parse(spec)))
    except UserError:  # of a version that knew other rewards
        return (spec,)


def read_config(path: Path) -> dict[str, Any]:
    """The recipe of a run folder, as nested tables.

    Raises:
        UserError: if it is no run folder, or its ``config.toml`` can't be read.
    """
    file = path / CONFIG
    if not path.is_dir():
        raise UserError(f"run {str(path)!r}: no such folder")
    if not file.is_file():
        inside = sorted(child.parent.name for child in path.glob(f"*/{CONFIG}"))
        remedy = f"it holds runs: give them, as {path.name}/{inside[0]}" if inside else f"it has no {CONFIG}"
        raise UserError(f"run {str(path)!r}: not a run folder; {remedy}")
    return read_tables(file, f"run {str(path)!r}: {CONFIG}")


def _algorithm(config: Mapping[str, Any]) -> str:
    section = config.get("algorithm")
    # the user's own are named file.py:Class
    return str(section.get("name", "unknown")).rpartition(":")[2] if isinstance(section, Mapping) else "unknown"


def _strategies(config: Mapping[str, Any]) -> tuple[str, ...]:
    section = config.get("exploration")
    if not isinstance(section, Mapping) or section.get("until") == 0:
        return ()
    own = str(section.get("strategy", "")).rpartition(":")[2]
    return tuple(part for part in ("guidance", "words") if part in section) + (own,) * bool(own)


def _is_incidental(key: str, explores: bool) -> bool:
    ignored = NOT_THE_METHOD if explores else (*NOT_THE_METHOD, "exploration")
    return any(key == name or key.startswith(f"{name}.") for name in ignored)


def _scores(file: Path) -> dict[Measure, list[dict[str, Any]]]:
    found: dict[Measure, dict[float, dict[str, Any]]] = {}
    for number, entry in enumerate(objects(file), start=1):
        try:
            measure = Measure(entry["prompts"], entry["reward"])
            queries, mean = float(entry["queries"]), float(entry["mean"])
        except (KeyError, TypeError, ValueError, OverflowError):
            measure, queries, mean = Measure("", ""), 0.0, 0.0
        if not all(isinstance(name, str) and name for name in measure):
            raise UserError(f"{str(file)!r}, entry {number}: needs prompts, reward, queries and mean")
        if not is_number(mean):
            raise UserError(f"{str(file)!r}, entry {number}: the mean reward is {mean}; train this run anew")
        if not (is_number(queries) and queries >= 0):
            raise UserError(f"{str(file)!r}, entry {number}: queries = {queries}; train this run anew")
        found.setdefault(measure, {})[queries] = {**entry, "queries": queries, "mean": mean}
    return {measure: [entries[q] for q in sorted(entries)] for measure, entries in found.items()}


def _diversity(scores: Mapping[Measure, Sequence[Mapping[str, Any]]]) -> dict[str, Curve]:
    points: dict[str, dict[float, float]] = {}
    for measure, entries in scores.items():
        for entry in entries:
            if is_number(entry.get("diversity")):
                points.setdefault(measure.prompts, {})[entry["queries"]] = float(entry["diversity"])
    return {prompts: _curve(values) for prompts, values in points.items()}


def _curve(points: Mapping[float, float]) -> Curve:
    return Curve(np.array(sorted(points)), np.array([points[q] for q in sorted(points)]))


def objects(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that is still being written is left out.

    Raises:
        UserError: if another line is no object, or what it counts is no number.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            for key in COUNTS & found.keys():
                if found[key] is not None and not is_number(found[key]):
                    what = f"{key} = {cut(repr(found[key]))} is no number"
                    raise UserError(f"{str(file)!r}, line {number}: {what}; the file is damaged")
            objects.append(found)
        elif number < len(lines):  # the last line of a run that was stopped while it wrote has no end yet
            raise UserError(f"{str(file)!r}, line {number}: not a JSON object; the file is damaged")
    return objects


def is_number(value: Any) -> bool:
    """Whether it is one that statistics can take: finite, and far from what floats can hold."""
    return isinstance(value, int | float) and -LARGEST < value < LARGEST


def _last_of_each(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # A resumed run writes the iterations after its checkpoint a second time: the later ones count.
    return list({str(entry.get("iteration", k)): entry for k, entry in enumerate(metrics)}.values())
