"""What ``diffexp bench`` foretells over what then happens, on the emoji recipes.

    OMP_NUM_THREADS=1 python benchmarks/foretold.py [RECIPE ...] [--set samples=32] [--clock cpu] [--repeat 3]

In one process: the estimate, then iterations of the recipe and an evaluation. AlignProp draws K; here it is 3 in
both. Prints the ratios of the estimate to the medians, and the one furthest from 1 last; the goal is 0.85 to 1.15.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from diffexp import Recipe, bench
from diffexp.toml import parse_override
from diffexp.training import Training

RECIPES = ("emoji-ddpo", "emoji-ddpo-diffexp", "emoji-alignprop", "emoji-alignprop-diffexp")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def ratios(name: str, changes: list[str], repeat: int) -> list[float]:
    """Estimate over outcome: of an iteration, and of an evaluation."""
    drawn = {"algorithm.truncation": "fixed", "algorithm.last_steps": 3} if "alignprop" in name else {}
    alike = {"evaluation.prompts": ["text:a cat", "text:a dog"], "evaluation.images": 8, "device": "cpu", **drawn}
    recipe = Recipe.load(name, alike | dict(parse_override(change) for change in changes))
    meter = bench.Meter(recipe, "emoji")
    with tempfile.TemporaryDirectory() as folder:
        training = Training(recipe, Path(folder, "run"))
        guidance = training.batch(1).guidance
        foretold = meter.iteration(training.sampler.scales(guidance)), meter.evaluation()
        works = lambda: training.algorithm.step(training.batch(1)), lambda: training.evaluate()
        found = []
        for what, seconds, work in zip(("iteration", "evaluation"), foretold, works, strict=True):
            work()
            times = []
            for _ in range(repeat):
                start = bench.clock()
                work()
                times.append(bench.clock() - start)
            found.append(seconds / median(times))
            said = f"{name}: {what} foretold {seconds:.2f} s, took {median(times):.2f} s"
            print(f"{said}, ratio {found[-1]:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    chosen = parser.parse_args()
    bench.clock = CLOCKS[chosen.clock]
    found = [ratio for name in chosen.recipes for ratio in ratios(name, chosen.changes, chosen.repeat)]
    print(f"{max(found, key=lambda ratio: abs(ratio - 1)):.2f}")


if __name__ == "__main__":
    main()
