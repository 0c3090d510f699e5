"""Kills training runs at random moments and checks that what they end with is what an undisturbed run ends with.

    python benchmarks/kill_storm.py --kills 200 --algorithm both

A run of a few tiny iterations is done once undisturbed. Then the same run is begun again and again, killed by SIGKILL,
continued, perhaps killed once more, and left to finish. LoRA files, card, evaluations, previews and metrics (timings
and memory aside) have to be those of the undisturbed run, byte for byte, and no unfinished file may be left. A run
that was killed after its card was written is finished: then the same command has to say so, and to change nothing.
Four ways of killing take turns (``--kinds`` picks some of them):

- ``time``: at a moment that is uniform over the duration of the run, from its first file to its model card;
- ``save``: some milliseconds after a checkpoint has begun to be written;
- ``call``: immediately before a file operation (open for writing, write, fsync, mkdir, rename, truncate, remove), each
  of the run's operations being equally likely;
- ``finish``: the same among the operations after the last iteration: publishing, the report, the card.

All draws come from ``--seed``. Which instruction ``time`` and ``save`` hit depends on the machine as well. Runs are
children of one process that has imported everything: otherwise a kill would cost seconds of imports. Needs fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from tiny import write_pipeline

from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.runs import durable
from diffexp.sharing import card
from diffexp.training import Training

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ddpo": {"name": "ddpo", "minibatches": 1},
    "alignprop": {"name": "alignprop", "last_steps": 1},
}
KINDS = ("time", "save", "call", "finish")
MOST_KILLS = 4
"""Of one run."""
ASIDE = ("seconds", "memory_gib")
"""Figures of metrics.jsonl that no two runs share."""


class Blow(NamedTuple):
    """How a process is killed: ``time`` and ``save`` strike from outside, the others from within."""

    kind: str
    share: float  # of the undisturbed run's duration, or of its file operations, or of those of its finish
    saves: int  # checkpoints to let pass
    delay: float  # seconds into a save


class Whole(NamedTuple):
    """The undisturbed run."""

    contents: dict[str, Any]
    seconds: float
    calls: int
    finish_calls: int


def recipe(model: Path, algorithm: str) -> Recipe:
    """Three iterations of a model of a few kilobytes, with everything on that a run folder can hold."""
    settings = {
        "iterations": 3,
        "samples": 2,
        "prompts": "text:a cat riding a bike",
        "reward": f"{Path(__file__).parents[1] / 'tests' / 'brightness.py'}:brightness",
        "device": "cpu",
        "trackers": [],
        "model": {"path": str(model)},
        "lora": {"rank": 1},
        "sampler": {"steps": 2},
        "algorithm": ALGORITHMS[algorithm],
        "exploration": {"guidance": {"fraction": 0.5}, "words": {}},
        "evaluation": {"every": 3, "images": 1},
        "preview": {"every": 3, "images": 1},
        "checkpoint": {"every": 1, "keep_last": 1},
    }
    return Recipe.parse(settings, "kill_storm")


def contents(run: Path) -> dict[str, Any]:
    """What a finished run has left, timings aside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"metrics.jsonl": [{k: v for k, v in line.items() if k not in ASIDE} for line in lines]}
    for pattern in ("lora/*.safetensors", "lora/README.md", "lora/images/*", "samples/**/*.png", "e*.jsonl"):
        found |= {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob(pattern))}
    return found | {str(path.relative_to(run)): b"unfinished" for path in run.rglob(f"{durable.TEMPORARY}*")}


class FileOperations:
    """Has ``before`` called before everything that changes a file, in this process and its children."""

    names = ("os.mkdir", "os.rename", "os.truncate", "os.remove", "os.rmdir")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        sys.addaudithook(self.hear)
        for name in ("write", "fsync"):  # these raise no audit event
            setattr(os, name, self.announced(getattr(os, name)))

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.names or (event == "open" and isinstance(arguments[2], int) and arguments[2] & self.writing):
            self.before()

    def announced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any) -> Any:
            self.before()
            return function(*arguments)

        return both


OPERATIONS = FileOperations()


def dying(number: int) -> Callable[[], None]:
    """A function that kills this process when it is called for the ``number``-th time."""
    countdown = iter(range(number - 1))

    def strike() -> None:
        if next(countdown, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def fork(work: Callable[[], None], log: Path) -> int:
    """Runs ``work`` in a child of this process, which has everything imported; returns its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        with log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            work()
            code = 0
    except BaseException:
        log.open("a").write(traceback.format_exc())
    finally:
        os._exit(code)


class Announced(Training):
    """A run that tells when all of its iterations are done."""

    trained: Callable[[], None]

    def finish(self) -> None:
        self.trained()
        super().finish()


def train(settings: Recipe, run: Path, trained: Callable[[], None] = lambda: None) -> None:
    """Begins a run, continues it, or is told that it is finished: which has to be so, and only then."""
    finished = card.path(run, settings).is_file()
    training = Announced(settings, run)
    training.trained = trained
    try:
        training.run()
    except UserError as error:
        if not finished or "already holds this run, finished" not in str(error):
            raise
    else:
        if finished:
            raise RuntimeError(f"{run} was finished, and was trained again")


def attempt(settings: Recipe, run: Path, log: Path, whole: Whole, blow: Blow | None) -> int:
    """Begins or continues a run, strikes, and returns how the process ended: 0 well, -9 killed."""

    def work() -> None:
        if blow and blow.kind == "call":
            OPERATIONS.before = dying(1 + int(blow.share * whole.calls))
        train(settings, run, strike_in_finish if blow and blow.kind == "finish" else lambda: None)

    def strike_in_finish() -> None:
        if blow:
            OPERATIONS.before = dying(1 + int(blow.share * whole.finish_calls))

    child = fork(work, log)
    if blow and blow.kind == "time":
        time.sleep(blow.share * whole.seconds)
        os.kill(child, signal.SIGKILL)
    elif blow and blow.kind == "save":
        strike_in_save(child, run / "checkpoints", blow)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def strike_in_save(child: int, checkpoints: Path, blow: Blow) -> None:
    """Kills a process when it writes a checkpoint, unless it ends before that."""
    unfinished, seen = False, 0
    while seen <= blow.saves:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        before, unfinished = unfinished, any(checkpoints.glob(".tmp-*"))
        seen += unfinished and not before
        time.sleep(0.001)
    time.sleep(blow.delay)
    os.kill(child, signal.SIGKILL)


def undisturbed(settings: Recipe, run: Path) -> Whole:
    """Does the run in this process, and counts its file operations."""
    calls: list[None] = []
    before_finish: list[int] = []
    OPERATIONS.before = lambda: calls.append(None)
    start = time.perf_counter()
    train(settings, run, lambda: before_finish.append(len(calls)))
    seconds = time.perf_counter() - start
    OPERATIONS.before = lambda: None
    return Whole(contents(run), seconds, len(calls), len(calls) - before_finish[0])


def blows(draw: random.Random, kinds: Sequence[str]) -> Iterator[Blow]:
    """What happens to the next run."""
    for _ in range(draw.randint(1, MOST_KILLS)):
        yield Blow(draw.choice(kinds), draw.random(), draw.randint(0, 1), draw.uniform(0, 0.02))


def storm(
    settings: Recipe, whole: Whole, kills: int, draw: random.Random, folder: Path, chosen: Sequence[str]
) -> tuple[int, dict[str, int]]:
    """Kills runs until there were so many kills; how many of them did no harm, and how many there were of each kind."""
    well, done, kinds, number = 0, 0, dict.fromkeys(chosen, 0), 0
    while done < kills:
        number += 1
        run, log, struck, code = folder / str(number) / "run", folder / f"{number}.log", [], 0
        run.parent.mkdir()
        for blow in blows(draw, chosen):
            code = attempt(settings, run, log, whole, blow)
            if code != -signal.SIGKILL:
                break
            struck.append(blow)
        struck = struck[: kills - done]
        done += len(struck)
        for blow in struck:
            kinds[blow.kind] += 1
        code = attempt(settings, run, log, whole, None) if code == -signal.SIGKILL else code
        different = differences(run, whole) if code == 0 else [f"it ended with exit code {code}: {log}"]
        if different:
            print(f"run {run} after {struck}: {'; '.join(different)}", flush=True)
        else:
            well += len(struck)
            shutil.rmtree(run.parent)
    return well, kinds


def differences(run: Path, whole: Whole) -> list[str]:
    """The files in which a run differs from the undisturbed one."""
    found = contents(run)
    return [name for name in {**whole.contents, **found} if found.get(name) != whole.contents.get(name)]


def main() -> int:
    """Prints how the storm went; 1 if any run came out differently."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--algorithm", choices=[*ALGORITHMS, "both"], default="both")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="ways of killing (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw, well = random.Random(given.seed), 0  # noqa: S311
    folder = Path(tempfile.mkdtemp(prefix="kill-storm-"))
    model = write_pipeline(folder / "model")
    chosen = list(ALGORITHMS) if given.algorithm == "both" else [given.algorithm]
    for k, algorithm in enumerate(chosen):
        kills = given.kills * (k + 1) // len(chosen) - given.kills * k // len(chosen)
        place, settings = folder / algorithm, recipe(model, algorithm)
        place.mkdir()
        undisturbed(settings, place / "warm-up")  # what is imported late is compiled, and files are written for that
        whole = undisturbed(settings, place / "run")
        survived, kinds = storm(settings, whole, kills, draw, place, given.kinds)
        counted = ", ".join(f"{count} by {kind}" for kind, count in kinds.items())
        print(f"{algorithm}: {kills} kills ({counted}), {survived} ended identical", flush=True)
        well += survived
    if well == given.kills:
        shutil.rmtree(folder)
    print(f"{well}/{given.kills} identical")
    return int(well < given.kills)


if __name__ == "__main__":
    sys.exit(main())
