"""The most memory that training the emoji model holds, in GiB.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [RECIPE ...] [--set model.precision=bf16]

Each recipe trains one iteration in a process of its own, with an evaluation before and after it; AlignProp with its
largest K. Prints each process's peak, and the largest last. The goal is 1.5 GB, which is 1.4 GiB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GIB = 2**30
RECIPES = ("emoji-ddpo", "emoji-ddpo-diffexp", "emoji-alignprop", "emoji-alignprop-diffexp")


def peak(recipe: str, changes: list[str]) -> float:
    """GiB that a training of one iteration held at most."""
    largest = ["algorithm.truncation=fixed"] if "alignprop" in recipe else []
    fixed = ["iterations=1", "device=cpu", "evaluation.images=1", *largest, *changes]
    settings = [part for change in fixed for part in ("--set", change)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "diffexp", "train", recipe, "--out", str(Path(folder, "run")), "--quiet"]
        process = subprocess.Popen([*command, *settings])
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{recipe}: the training ended with {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    chosen, found = parser.parse_args(), []
    for recipe in chosen.recipes:
        found.append(peak(recipe, chosen.changes))
        print(f"{recipe}: {found[-1]:.2f} GiB", flush=True)
    print(f"{max(found):.2f}")


if __name__ == "__main__":
    main()
