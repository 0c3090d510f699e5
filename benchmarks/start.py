"""How long a user waits: for ``diffexp --help``, and for the first emoji image.

    python benchmarks/start.py [--repeat 5]

Prints the medians over their goals, 0.3 s and 5 s, and the larger of the two ratios last. Beside them, what plain
diffusers takes for the same image, and what its imports alone take: most of a first image is importing them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

GOALS = {"help": 0.3, "image": 5.0}
PROMPT = "a dolphin riding a bike"
IMPORTS = "from diffusers import AutoencoderKL, UNet2DConditionModel; from transformers import CLIPTextModel"
PLAIN = """
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffexp.emoji import STEPS, model_path
pipeline = StableDiffusionPipeline.from_pretrained(model_path())
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
pipeline({prompt!r}, num_inference_steps=STEPS, guidance_scale=5.0, eta=1.0).images[0].save({file!r})
"""


def seconds(command: list[str]) -> float:
    """Wall time of a command, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat, worst = parser.parse_args().repeat, 0.0
    program = str(Path(sys.executable).with_name("diffexp"))
    with tempfile.TemporaryDirectory() as folder:
        paint = [program, "sample", "emoji", "--prompt", PROMPT, "--n", "1", "--out"]
        for name, command in {"help": [program, "--help"], "image": paint}.items():
            ends = [[str(Path(folder, str(k)))] if name == "image" else [] for k in range(repeat + 1)]
            first, *times = [seconds([*command, *end]) for end in ends]
            worst = max(worst, median(times) / GOALS[name])
            print(f"{name}: {median(times):.2f} s, the first time {first:.2f} s; goal {GOALS[name]} s", flush=True)
        plain = PLAIN.format(prompt=PROMPT, file=str(Path(folder, "plain.png")))
        for name, code in {"plain diffusers, the same image": plain, "plain diffusers, imports alone": IMPORTS}.items():
            print(f"{name}: {median(seconds([sys.executable, '-c', code]) for _ in range(repeat)):.2f} s", flush=True)
    print(f"{worst:.2f}")


if __name__ == "__main__":
    main()
