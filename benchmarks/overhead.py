"""A training iteration over the bare network calls in it: what everything else costs.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--clock cpu] [--samples 64 --steps 20 --repeat 5]

One process times, in turns, an iteration of the emoji model (rollout, reward, update) and the same number of forward
and backward passes of UNet, VAE and reward, called directly at the same batch shapes. Prints the medians, and last the
larger of both algorithms' ratios; the goal is 1.05. ``--clock cpu`` counts the process's own time: for busy machines.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from diffexp import Recipe, assembly, rewards
from diffexp.algorithms import DDPO
from diffexp.algorithms.ddpo import minibatches
from diffexp.exploration import ConstantGuidance
from diffexp.rollout import Batch

PROMPT = "a dolphin riding a bike"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Case:
    """An algorithm on the emoji model, and the bare calls that it can't do without."""

    def __init__(self, name: str, samples: int, steps: int, precision: str) -> None:
        changes = {
            "samples": samples,
            "sampler.steps": steps,
            "model.precision": precision,
            "update.checkpoint": [],  # the bare calls compute nothing twice
            "device": "cpu",
        }
        if name == "alignprop":
            changes |= {"algorithm.truncation": "fixed", "algorithm.last_steps": min(3, steps)}
        self.recipe = Recipe.load(f"emoji-{name}", changes)
        self.model = assembly.model(self.recipe)
        assembly.make_trainable(self.recipe, self.model)
        sampler, learner = assembly.sampler(self.recipe, self.model), assembly.learner(self.recipe, self.model)
        self.reward = rewards.load("emoji-alignment")
        self.algorithm = assembly.algorithm(self.recipe, sampler, learner, self.reward)
        self.text = self.model.encode([PROMPT] * samples)
        self.iterations = 0

    def iteration(self) -> None:
        """What training does."""
        self.iterations += 1
        keys = [(0, self.iterations, k) for k in range(self.recipe.samples)]
        self.algorithm.step(Batch([PROMPT] * self.recipe.samples, self.text, ConstantGuidance(5.0), keys))

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
        scales = self.algorithm.sampler.scales(ConstantGuidance(5.0))
        for part in minibatches(self.recipe.samples, self.algorithm.minibatches, torch.Generator()):
            for count in pieces(len(part), self.recipe.update.batch):
                for steps in self.algorithm.passes(scales, count):
                    self.unet(self.latents(count * len(steps))).sum().backward()

    def bare_alignprop(self) -> None:
        learned = sum(self.algorithm.learned_steps(Batch([PROMPT], self.text, ConstantGuidance(5.0), [(0,)])))
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
        """One pass for both halves of the guidance."""
        hidden = torch.cat([text.expand(len(x), -1, -1) for text in (self.text.hidden[0], self.text.uncond_hidden)])
        inputs = torch.cat([x, x]).to(self.model.dtype), torch.tensor(500), hidden.to(self.model.dtype)
        return self.model.unet(*inputs, return_dict=False)[0][: len(x)].float()

    def score(self, x: Tensor) -> Tensor:
        return self.reward(self.model.decode(x), [PROMPT] * len(x))

    def latents(self, count: int) -> Tensor:
        return torch.zeros(count, *self.model.latent_shape())


def pieces(count: int, size: int) -> list[int]:
    """The sizes of the batches that ``count`` samples are cut into."""
    return [min(size, count - start) for start in range(0, count, size)]


def timed(clock: Callable[[], float], work: Callable[[], None]) -> float:
    start = clock()
    work()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="*", default=["ddpo", "alignprop"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    chosen, worst = parser.parse_args(), 0.0
    for name in chosen.algorithms:
        case, times = Case(name, chosen.samples, chosen.steps, chosen.precision), ([], [])
        works = case.iteration, case.bare
        for turn in range(chosen.repeat + 1):
            for work, found in zip(works, times, strict=True):
                seconds = timed(CLOCKS[chosen.clock], work)
                if turn:  # the first one warms up
                    found.append(seconds)
        whole, bare = map(median, times)
        worst = max(worst, whole / bare)
        print(f"{name}: iteration {whole:.2f} s, bare calls {bare:.2f} s, ratio {whole / bare:.3f}", flush=True)
    print(f"{worst:.3f}")


if __name__ == "__main__":
    main()
