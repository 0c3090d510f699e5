"""Two processes on two cores against one on one core, at the same global batch.

    python benchmarks/scaling.py [RECIPE ...] [--samples 64] [--iterations 3]

Each trains the emoji model with one thread a process and as many cores as processes. Prints seconds an iteration, and
the smallest speed-up last; 2 is the most there can be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

RECIPES = ("emoji-ddpo", "emoji-alignprop")


def iteration(recipe: str, processes: int, samples: int, iterations: int) -> float:
    """Seconds of the median iteration but for the first, which warms up."""
    fixed = [f"iterations={iterations + 1}", f"samples={samples}", "device=cpu", "preview.images=0"]
    if "alignprop" in recipe:
        fixed.append("algorithm.truncation=fixed")
    fixed += ["evaluation.images=1", "evaluation.every=1000", 'evaluation.prompts=["text:a cat"]']
    settings = [part for change in fixed for part in ("--set", change)]
    cores = sorted(os.sched_getaffinity(0))[:processes]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "diffexp", "train", recipe, "--out", str(run), "--quiet"]
        subprocess.run(
            [*command, "--processes", str(processes), *settings],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        lines = (run / "metrics.jsonl").read_text().splitlines()
    return median(json.loads(line)["seconds"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3)
    chosen, ratios = parser.parse_args(), []
    for recipe in chosen.recipes:
        one, two = (iteration(recipe, count, chosen.samples, chosen.iterations) for count in (1, 2))
        ratios.append(one / two)
        print(
            f"{recipe}: {one:.2f} s with one process, {two:.2f} s with two, {one / two:.2f} times as fast", flush=True
        )
    print(f"{min(ratios):.2f}")


if __name__ == "__main__":
    main()
