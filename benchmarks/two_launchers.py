"""Two machines, played by two launchers on loopback: their run is the run of one process.

    python benchmarks/two_launchers.py [--launcher accelerate]

Each launcher starts one process, as it would on its own machine; they meet at a port and train the emoji model, with
DDPO and with AlignProp. Prints by how much rewards and LoRA differ from the run of one process. Before the first update
that is a millionth at most; afterwards it is what AdamW makes of rounding: its first steps see little more of a
gradient than its sign.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from diffexp.processes.launch import port

SETTINGS = {
    "iterations": 2,
    "samples": 5,  # odd, so that the shares differ
    "prompts": "text:a dolphin riding a bike",
    "sampler.steps": 6,
    "device": "cpu",
    "trackers": [],
    "rollout.images_per_prompt": 1,
    "rollout.batch": 1,  # kernels round by the shape of a batch
    "update.batch": 1,
    "evaluation.every": 2,
    "evaluation.images": 3,
    "evaluation.prompts": ["text:a cat"],
    "evaluation.rewards": ["emoji-alignment"],
    "preview.images": 1,
}
FIGURES = {"metrics.jsonl": "reward_mean", "evaluations.jsonl": "mean"}
BEFORE, AFTER = 1e-6, 1e-2  # by how much, of its value, a figure may differ before and after the first update


def train(recipe: str, out: Path, launcher: list[str]) -> subprocess.Popen[bytes]:
    """``diffexp train`` under a launcher, or without one."""
    changes = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = [
        *(launcher or [sys.executable]),
        "-m",
        "diffexp",
        "train",
        recipe,
        *changes,
        "--out",
        str(out),
        "--quiet",
    ]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def launchers(name: str, where: int) -> list[list[str]]:
    """The command lines that two machines would use."""
    address = ["127.0.0.1", str(where)]
    if name == "accelerate":
        # as it chooses by itself where there are GPUs; with --cpu it would start each process alone
        module, shape = "accelerate.commands.launch", ["--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
        place, rank = ["--main_process_ip", address[0], "--main_process_port", address[1]], "--machine_rank"
    else:
        module, shape = "torch.distributed.run", ["--nnodes", "2", "--nproc-per-node", "1"]
        place, rank = ["--master-addr", address[0], "--master-port", address[1]], "--node-rank"
    return [[sys.executable, "-m", module, *shape, *place, rank, str(machine)] for machine in range(2)]


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def compare(alone: Path, both: Path) -> bool:
    """Prints the differences; whether they are as small as promised."""
    good = True
    for name, key in FIGURES.items():
        for k, (one, other) in enumerate(zip(lines(alone, name), lines(both, name), strict=True)):
            allowed, difference = AFTER if k else BEFORE, abs(one[key] - other[key]) / abs(one[key])
            good &= difference <= allowed
            print(f"  {name} {key} {k + 1}: {one[key]:.7f}, differs by {difference:.1e} of it (allowed {allowed:.0e})")
    first, second = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (alone, both))
    apart = max(float((first[key] - second[key]).abs().max()) for key in first)
    print(f"  LoRA: {apart:.1e} apart at most, its largest number is {max(t.abs().max() for t in first.values()):.1e}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=("torchrun", "accelerate"), default="torchrun")
    parser.add_argument("--recipe", nargs="*", default=["emoji-ddpo-diffexp", "emoji-alignprop-diffexp"])
    chosen, good = parser.parse_args(), True
    for recipe in chosen.recipe:
        with tempfile.TemporaryDirectory() as folder:
            alone, both = Path(folder, "alone"), Path(folder, "both")
            codes = [train(recipe, alone, []).wait()]
            started = [train(recipe, both, launcher) for launcher in launchers(chosen.launcher, port())]
            codes += [process.wait() for process in started]
            print(f"{recipe}: exit codes {codes}")
            good &= codes == [0, 0, 0] and compare(alone, both)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
