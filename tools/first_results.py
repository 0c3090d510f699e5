"""The runs behind docs/first_results.md: DDPO and AlignProp, each with and without DiffExp, three seeds.

    python -m tools.first_results --out runs/first --workers 2

Interrupted runs go on where they stopped, finished ones are skipped, and the comparisons are drawn at the end. Each run
has one thread: two at a time use two cores better than one with two threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffexp import checkpoint, study
from diffexp.config import Recipe

RECIPES = ("emoji-alignprop", "emoji-alignprop-diffexp", "emoji-ddpo", "emoji-ddpo-diffexp")
ALGORITHMS = ("alignprop", "ddpo")


def finished(run: Path) -> bool:
    """Whether a run folder's newest checkpoint is its last."""
    newest = checkpoint.read_newest(run / "checkpoints")
    return newest is not None and newest.numbers["iteration"] >= Recipe.load(run / "config.toml").iterations


def train(run: Path, recipe: str, seed: int, settings: list[str]) -> None:
    """One run in a process of its own; its output goes to ``<run>.log``."""
    if finished(run):
        return
    start = time.perf_counter()
    overrides = [part for setting in (f"seed={seed}", *settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "diffexp", "train", recipe, *overrides, "--out", str(run)]
    with run.with_suffix(".log").open("a") as log:
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)
    print(f"{run.name}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/first"))
    parser.add_argument("--figures", type=Path, default=Path("docs/first_results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(options.out / f"{recipe}-s{seed}", recipe, seed) for seed in range(options.seeds) for recipe in RECIPES]
    with ThreadPoolExecutor(options.workers) as pool:
        for future in [pool.submit(train, *job, options.settings) for job in jobs]:
            future.result()
    for algorithm in ALGORITHMS:
        runs = [run for run, recipe, _ in jobs if algorithm in recipe]
        study.compare(runs, options.figures / algorithm)


if __name__ == "__main__":
    main()
