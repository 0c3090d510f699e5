"""The same work through TRL 0.22.2's trainers and through this package: images a second of both.

    python3 -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl==0.22.2 \\
        "transformers==4.56.*" "diffusers==0.35.*" "peft==0.17.*" "accelerate==1.10.*"
    OMP_NUM_THREADS=1 python benchmarks/against_trl.py --trl /tmp/trl/bin/python [--precision fp32 bf16] [--clock cpu]
    python benchmarks/against_trl.py --trl /tmp/trl/bin/python --arch sd15 --device cuda --precision bf16 --batch 8

The work: the emoji model, or Stable Diffusion 1.5 with random weights, a LoRA of rank 4 on its attention, 20 steps
under guidance 5, 32 images, of which ``--batch`` learn at once, one optimiser step; DDPO on all steps, AlignProp
through the last 3 and a CLIP. Each side lives in a process of its own, and both take turns within one run. TRL's
networks are put into the memory layout that is fastest here, which it does not do itself. Prints medians, each side's
peak memory, on a GPU the GPU's, and the smallest ratio last.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "diffexp"
WEIGHTS = PACKAGE / "emoji" / "weights"
PROMPT = "a dolphin riding a bike"
LEARNED, GUIDANCE = 3, 5.0
MEMORY = 8  # images whose graph AlignProp keeps at once: changes no gradient; TRL has recomputation in its place
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build(folder: Path, size: int | None) -> None:
    """Stable Diffusion 1.5 with random weights, for images of ``size`` pixels; the tokenizer is the emoji world's."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def config(part: str, name: str = "config.json") -> dict[str, Any]:
        return json.loads((PACKAGE / "models" / "configs" / "sd15" / part / name).read_text(encoding="utf-8"))

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(config("vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
        tokenizer=CLIPTokenizer.from_pretrained(WEIGHTS / "model" / "tokenizer"),
        unet=UNet2DConditionModel.from_config(config("unet") | ({"sample_size": size // 8} if size else {})),
        scheduler=DDIMScheduler.from_config(config("scheduler", "scheduler_config.json")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def scorer(device: str) -> Callable[..., Any]:
    """A differentiable reward out of the world's CLIP, in either version of transformers."""
    import torch
    from torch.nn import functional
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(WEIGHTS / "alignment").float().eval().requires_grad_(False).to(device)
    direction = torch.randn(clip.config.projection_dim, generator=torch.Generator().manual_seed(0)).to(device)
    side = clip.config.vision_config.image_size

    def score(images: Any) -> Any:
        pixels = functional.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
        features = clip.get_image_features(pixel_values=2 * pixels - 1)
        return functional.normalize(getattr(features, "pooler_output", features), dim=-1) @ direction

    return score


def ours(algorithm: str, chosen: argparse.Namespace) -> Callable[[], object]:
    """One iteration of this package."""
    from diffexp import Recipe, assembly
    from diffexp.exploration import ConstantGuidance
    from diffexp.rollout import Batch

    samples = chosen.samples
    alike = {"samples": samples, "sampler.steps": chosen.steps, "sampler.guidance": GUIDANCE, "device": chosen.device}
    alike |= {"model.path": chosen.model, "model.precision": chosen.precision[0]}
    alike |= {"rollout.batch": samples, "update.batch": chosen.batch}
    own = {"algorithm.minibatches": 1, "algorithm.advantages": "batch"}
    if algorithm == "alignprop":
        own = {"algorithm.truncation": "fixed", "algorithm.last_steps": LEARNED}
        own |= {"update.checkpoint": [], "update.batch": min(MEMORY, chosen.batch)}
    recipe = Recipe.load(f"emoji-{algorithm}", alike | own)
    model = assembly.model(recipe)
    assembly.make_trainable(recipe, model)
    sampler, learner, score = assembly.sampler(recipe, model), assembly.learner(recipe, model), scorer(chosen.device)
    trainer = assembly.algorithm(recipe, sampler, learner, lambda images, prompts: score(images))
    texts, done = model.encode([PROMPT] * samples), []

    def iteration() -> None:
        done.append(None)
        keys = [(0, len(done), k) for k in range(samples)]
        trainer.step(Batch([PROMPT] * samples, texts, ConstantGuidance(GUIDANCE), keys))

    return iteration


def trls(algorithm: str, chosen: argparse.Namespace) -> Callable[[], object]:
    """One step of TRL's trainer."""
    import torch
    import trl
    from accelerate import PartialState

    cpu, precision = chosen.device == "cpu", {"bf16": "bf16", "fp32": "no"}[chosen.precision[0]]
    PartialState(cpu=cpu)  # TRL's pipeline writes to accelerate's log, which needs it
    alike = {"mixed_precision": precision, "save_freq": 10**9, "num_epochs": 1, "accelerator_kwargs": {"cpu": cpu}}
    alike |= {"sample_num_steps": chosen.steps, "sample_guidance_scale": GUIDANCE}
    alike |= {"train_batch_size": chosen.batch, "train_gradient_accumulation_steps": chosen.samples // chosen.batch}
    score = scorer(chosen.device)
    where = str(WEIGHTS / "model") if chosen.model == "emoji" else chosen.model
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(where, use_lora=True)
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    common = lambda images, prompts, metadata: (score(images), {}), lambda: (PROMPT, {}), pipeline
    if algorithm == "ddpo":
        config = trl.DDPOConfig(sample_batch_size=chosen.samples, sample_num_batches_per_epoch=1, **alike)
        trainer = trl.DDPOTrainer(config, *common)
    else:
        first = chosen.steps - LEARNED
        config = trl.AlignPropConfig(truncated_backprop_rand=False, truncated_backprop_timestep=first, **alike)
        trainer = trl.AlignPropTrainer(config, *common)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: trainer.step(0, 0)


def work(side: str, chosen: argparse.Namespace) -> None:
    """A side's process: does an iteration for every line that it is sent, and says how many seconds that took."""
    import torch

    make, clock = {"ours": ours, "trl": trls}[side], CLOCKS[chosen.clock]
    iteration, on_gpu = make(chosen.algorithms[0], chosen), chosen.device == "cuda"
    for _ in sys.stdin:
        start = clock()
        iteration()
        if on_gpu:
            torch.cuda.synchronize()
        took = clock() - start
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        print("took", took, (torch.cuda.max_memory_reserved() if on_gpu else own) / 2**30, flush=True)


def ask(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Seconds of one iteration of a side, and the GiB that it has held at most."""
    assert process.stdin and process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("took "):
            _, seconds, memory = line.split()
            return float(seconds), float(memory)
    sys.exit(f"a side ended: {' '.join(map(str, process.args))}")


def compare(algorithm: str, precision: str, chosen: argparse.Namespace) -> float:
    """How many times as many images a second this package makes."""
    sides = {"ours": sys.executable, "trl": chosen.trl}
    options = ["--algorithms", algorithm, "--precision", precision, "--clock", chosen.clock]
    options += ["--samples", str(chosen.samples), "--steps", str(chosen.steps), "--batch", str(chosen.batch)]
    options += ["--device", chosen.device, "--model", chosen.model]
    processes = {
        side: subprocess.Popen(
            [python, __file__, "--side", side, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side, python in sides.items()
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, float] = {}
    try:
        for turn in range(chosen.repeat + 1):
            for side, process in processes.items():
                seconds, memory[side] = ask(process)
                if turn:  # the first one warms up
                    times[side].append(seconds)
    finally:
        for process in processes.values():
            process.kill()
    speeds = {side: chosen.samples / median(found) for side, found in times.items()}
    ratio = speeds["ours"] / speeds["trl"]
    said = ", ".join(f"{side} {speeds[side]:.2f} images/s in {memory[side]:.2f} GiB" for side in sides)
    print(f"{algorithm} {precision}: {said}, ratio {ratio:.2f}", flush=True)
    return ratio


def smallest_ratio(chosen: argparse.Namespace) -> float:
    """Of all algorithms and precisions, on a model that both sides read from one folder."""
    with tempfile.TemporaryDirectory() as folder:
        if chosen.arch != "emoji":
            # by TRL's libraries: the newer ones read what the older ones write
            chosen.model, size = folder, ["--size", str(chosen.size)] if chosen.size else []
            subprocess.run([chosen.trl, __file__, "--side", "build", "--model", folder, *size], check=True)
        return min(
            compare(algorithm, precision, chosen) for precision in chosen.precision for algorithm in chosen.algorithms
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default="/tmp/trl/bin/python", help="the Python that has TRL")  # noqa: S108
    parser.add_argument("--arch", choices=("emoji", "sd15"), default="emoji")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--algorithms", nargs="*", default=["ddpo", "alignprop"])
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, help="images that learn at once; a divisor of the samples; default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="with sd15, pixels of an image's edge; default: 512")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--model", default="emoji", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "trl", "build"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.batch = chosen.batch or chosen.samples
    if chosen.side == "build":
        build(Path(chosen.model), chosen.size)
    elif chosen.side:
        work(chosen.side, chosen)
    else:
        print(f"{smallest_ratio(chosen):.2f}")


if __name__ == "__main__":
    main()
