"""How a recipe's cost grows with batch, steps and resolution: what ``diffexp bench`` measures, a process for each.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [RECIPE ...] [--set model.precision=bf16]

Prints a table for each recipe: seconds an image while training, and the most memory. Prints last by how much the most
expensive setting costs more than the cheapest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

RECIPES = ("emoji-ddpo", "emoji-alignprop")
VARIED = {
    # DDPO learns from its samples in two minibatches
    "images a call": [{"samples": 2 * n, "rollout.batch": n, "update.batch": n} for n in (4, 8, 16, 32, 64)],
    "steps": [{"sampler.steps": n} for n in (5, 10, 20, 50)],
    "pixels": [{"sampler.size": [n, n]} for n in (32, 64, 128)],
}


def measured(recipe: str, settings: dict[str, object], changes: list[str]) -> dict[str, float]:
    """What ``diffexp bench`` says of a recipe with these settings."""
    told = [*(f"{key}={value}" for key, value in settings.items()), *changes]
    command = [sys.executable, "-m", "diffexp", "bench", recipe, "--json"]
    command += [part for change in told for part in ("--set", change)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    chosen, costs = parser.parse_args(), []
    for recipe in chosen.recipes:
        print(f"| {recipe} | | s an image | GiB |\n| --- | ---: | ---: | ---: |")
        for what, values in VARIED.items():
            for settings in values:
                found = measured(recipe, settings, chosen.changes)
                costs.append(1 / found["images_per_second"])
                value = next(reversed(settings.values()))
                size = value[0] if isinstance(value, list) else value
                print(f"| {what} | {size} | {costs[-1]:.3f} | {found['memory_gib']:.2f} |", flush=True)
    print(f"{max(costs) / min(costs):.1f}")


if __name__ == "__main__":
    main()
