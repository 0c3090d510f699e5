"""A training iteration over the bare network calls in it: what everything else costs.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--clock cpu] [--samples 64 --steps 20 --repeat 5]
    python benchmarks/overhead.py --arch sdxl --device cuda --precision bf16 --samples 8 --batch 2 --peak 989

One process times, in turns, an iteration (rollout, reward, update) and the same number of forward and backward passes
of UNet, VAE and reward, called directly at the same batch shapes. Prints the medians, the arithmetic that an iteration
gets done in a second, with ``--peak`` as a share of the device's, and last the larger of both algorithms' ratios; the
goal is 1.05. ``--clock cpu`` counts the process's own time: for busy machines. Stable Diffusion has random weights, and
needs no download.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffexp import Recipe
from diffexp.algorithms import DDPO
from diffexp.algorithms.ddpo import minibatches
from diffexp.bench import Meter
from diffexp.exploration import ConstantGuidance
from diffexp.models.blank import ARCHITECTURES
from diffexp.rollout import Batch
from diffexp.text import concatenate

PROMPT = "a dolphin riding a bike"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GUIDANCE = ConstantGuidance(5.0)


class Case:
    """An algorithm on a model, and the bare calls that it can't do without."""

    def __init__(self, name: str, arch: str, changes: dict[str, Any]) -> None:
        # Stable Diffusion XL has no recipe for DDPO
        base = f"emoji-{name}" if arch == "emoji" else f"sd15-{name}"
        changes = {"update.checkpoint": [], **changes}  # the bare calls compute nothing twice
        if name == "alignprop":
            changes |= {"algorithm.truncation": "fixed", "algorithm.last_steps": min(3, changes["sampler.steps"])}
        self.recipe = Recipe.load(base, changes)
        self.meter = Meter(self.recipe, arch)
        self.model, self.algorithm = self.meter.model, self.meter.algorithm
        self.reward = self.meter.rewards[self.recipe.reward]
        self.text = self.meter.text(self.recipe.samples)
        self.iterations = 0

    def iteration(self) -> None:
        """What training does."""
        self.iterations += 1
        keys = [(0, self.iterations, k) for k in range(self.recipe.samples)]
        self.algorithm.step(Batch([PROMPT] * self.recipe.samples, self.text, GUIDANCE, keys))

    def bare(self) -> None:
        """The same calls, of networks alone, and nothing computed twice."""
        (self.bare_ddpo if isinstance(self.algorithm, DDPO) else self.bare_alignprop)()
        for _, parameter in self.model.trainable():
            parameter.grad = None

    def bare_ddpo(self) -> None:
        with torch.no_grad():
            for count in pieces(self.recipe.samples, self.recipe.rollout.batch):
                for _ in range(self.recipe.sampler.steps):
                    self.unet(self.latents(count))
                self.score(self.latents(count))
        scales = self.algorithm.sampler.scales(GUIDANCE)
        for part in minibatches(self.recipe.samples, self.algorithm.minibatches, torch.Generator()):
            for count in pieces(len(part), self.recipe.update.batch):
                for steps in self.algorithm.passes(scales, count):
                    self.unet(self.latents(count * len(steps))).sum().backward()

    def bare_alignprop(self) -> None:
        learned = sum(self.algorithm.learned_steps(Batch([PROMPT], self.text, GUIDANCE, [(0,)])))
        with torch.no_grad():
            for count in pieces(self.recipe.samples, self.recipe.rollout.batch):
                for _ in range(self.recipe.sampler.steps - learned):
                    self.unet(self.latents(count))
        for count in pieces(self.recipe.samples, self.recipe.update.batch):
            x = self.latents(count)
            for _ in range(learned):
                x = self.unet(x)
            self.score(x).sum().backward()

    def unet(self, x: Tensor) -> Tensor:
        """One pass, in as many calls as the sampler makes of it."""
        calls = self.algorithm.sampler.calls(len(x))
        return torch.cat([self.call(x if len(rows) == len(x) else x[rows])[:count] for rows, count in calls])

    def call(self, x: Tensor) -> Tensor:
        """The network, for both halves of the guidance."""
        t, hidden, added = self.conditions(len(x))
        inputs = torch.cat([x, x]).to(self.model.dtype)
        return self.model.unet(inputs, t, hidden, added_cond_kwargs=added, return_dict=False)[0][: len(x)].float()

    @cache  # noqa: B019
    def conditions(self, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """What a pass takes besides its latents: ready on the device and in the network's precision."""
        dtype, device, text = self.model.dtype, self.model.device, self.text.select([0] * count)
        both = concatenate([text, text.unconditional()])
        height, width = (side * self.model.pixels for side in self.meter.plain.latent[1:])
        added = None
        if both.pooled is not None:
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=device)
            added = {"text_embeds": both.pooled.to(dtype), "time_ids": sizes.expand(2 * count, -1)}
        return torch.tensor(500, device=device), both.hidden.to(dtype), added

    def score(self, x: Tensor) -> Tensor:
        return self.reward(self.model.decode(x), [PROMPT] * len(x))

    def latents(self, count: int) -> Tensor:
        return torch.zeros(count, *self.meter.plain.latent, device=self.model.device)

    def seconds(self, work: Callable[[], None], clock: Callable[[], float]) -> float:
        """What a work takes, until the device has done it."""
        start = clock()
        self.meter.synchronised(work)
        return clock() - start

    def operations(self) -> int:
        """Products and sums of an iteration's convolutions, matrices and attention, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.bare()
        return counter.get_total_flops()


def pieces(count: int, size: int) -> list[int]:
    """The sizes of the batches that ``count`` samples are cut into."""
    return [min(size, count - start) for start in range(0, count, size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("emoji", *ARCHITECTURES), default="emoji")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--algorithms", nargs="*", default=["ddpo", "alignprop"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="pixels of an image's edge; default: the model's own")
    parser.add_argument("--batch", type=int, help="images in a call, sampling and learning; default: the recipe's")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--peak", type=float, help="TFLOP/s that the device can do in this precision")
    chosen, worst = parser.parse_args(), 0.0
    changes = {
        "device": chosen.device,
        "samples": chosen.samples,
        "sampler.steps": chosen.steps,
        "model.precision": chosen.precision,
    }
    if chosen.size:
        changes["sampler.size"] = [chosen.size, chosen.size]
    if chosen.batch:
        changes |= {"rollout.batch": chosen.batch, "update.batch": chosen.batch}
    for name in chosen.algorithms:
        case, times = Case(name, chosen.arch, changes), ([], [])
        works, operations = (case.iteration, case.bare), case.operations()
        for turn in range(chosen.repeat + 1):
            for work, found in zip(works, times, strict=True):
                seconds = case.seconds(work, CLOCKS[chosen.clock])
                if turn:  # the first one warms up
                    found.append(seconds)
        whole, bare = map(median, times)
        worst = max(worst, whole / bare)
        speed = operations / whole / 1e12
        share = f", {speed / chosen.peak:.0%} of the peak" if chosen.peak else ""
        said = f"iteration {whole:.2f} s, bare calls {bare:.2f} s, ratio {whole / bare:.3f}"
        print(f"{name}: {said}; {speed:.3g} TFLOP/s{share}", flush=True)
    print(f"{worst:.3f}")


if __name__ == "__main__":
    main()
