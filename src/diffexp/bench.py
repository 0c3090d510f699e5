"""What a recipe would cost on this machine: a few micro-steps at its batch shapes, and the arithmetic from there.

Nothing is downloaded: Stable Diffusion of the hub gets random weights, and so do rewards that would have to be fetched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from diffexp import assembly, models, prompts, rewards
from diffexp.algorithms import DDPO, AlignProp, ReFL, RewardWeightedRegression
from diffexp.config import Recipe, times
from diffexp.devices import device
from diffexp.durations import duration
from diffexp.emoji import MODELS
from diffexp.errors import UserError
from diffexp.exploration import ConstantGuidance
from diffexp.models import TextToImage
from diffexp.models.blank import ARCHITECTURES, blank, text, vision_tower
from diffexp.rewards.address import is_remote
from diffexp.rewards.preprocess import resize
from diffexp.rewards.spec import parse
from diffexp.rollout import Sampler
from diffexp.runs.environment import GIB, device_name, peak_memory
from diffexp.text import TextEmbedding
from diffexp.training import KL_IMAGES

clock = time.perf_counter
ENOUGH, LEAST, MOST = 1.0, 2, 5  # seconds, and repetitions, after which a measurement is good enough
LARGE = ("pickscore", "hpsv2", "hpsv2.0")  # rewards on ViT-H/14; the other ones that are fetched are on ViT-L/14

Work = Callable[[], object]


@dataclass(frozen=True)
class Estimate:
    """What a run costs: seconds an iteration and in all, images a second while training, GiB at most."""

    recipe: str
    architecture: str
    device: str
    images_per_second: float
    seconds_per_iteration: float
    evaluation_seconds: float  # all evaluations and previews together
    total_seconds: float
    memory_gib: float | None

    def lines(self) -> list[str]:
        """For people."""
        memory = "unknown" if self.memory_gib is None else f"{self.memory_gib:.1f} GiB"
        speed, iteration = f"{self.images_per_second:.3g}", f"{self.seconds_per_iteration:.3g}"
        return [
            f"{self.recipe} ({self.architecture}) on {self.device}",
            f"training     {speed} images a second, {iteration} s an iteration",
            f"evaluations  {duration(self.evaluation_seconds)} in all",
            f"total        {duration(self.total_seconds)}",
            f"memory       {memory}",
        ]


class Meter:
    """Seconds an image of what a recipe's iterations are made of; each is measured once."""

    def __init__(self, recipe: Recipe, architecture: str) -> None:
        self.recipe, self.architecture = recipe, architecture
        self.model = opened(recipe, architecture)
        assembly.make_trainable(recipe, self.model)
        self.model.park_text_encoders()
        self.plain = assembly.sampler(recipe, self.model)
        names = dict.fromkeys((recipe.reward, *recipe.evaluated_rewards))
        self.rewards = {name: stand_in(name, self.model.device) for name in names}
        learner = assembly.learner(recipe, self.model)
        self.algorithm: Any = assembly.algorithm(recipe, self.plain, learner, self.rewards[recipe.reward])
        self.known: dict[tuple[Any, ...], float] = {}

    def seconds(self, key: tuple[Any, ...], count: int, work: Work) -> float:
        """The median time of ``work`` on ``count`` images, an image."""
        if key not in self.known:
            self.synchronised(work)
            times: list[float] = []
            while len(times) < LEAST or (sum(times) < ENOUGH and len(times) < MOST):
                times.append(self.synchronised(work))
            self.known[key] = median(times) / count
        return self.known[key]

    def synchronised(self, work: Work) -> float:
        """Seconds until the device has done it."""
        start = clock()
        work()
        if self.model.device.type != "cpu":
            getattr(torch, self.model.device.type).synchronize()
        return clock() - start

    def text(self, count: int) -> TextEmbedding:
        if self.architecture in ARCHITECTURES:
            return text(self.model, count)
        return self.model.encode(["a dolphin riding a bike"]).select([0] * count)

    def latents(self, count: int) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        return torch.randn((count, *self.plain.latent), generator=noise).to(self.model.device)

    def step(self, sampler: Sampler, count: int, w: float, learn: bool = False) -> float:
        """A denoising step of ``count`` images under guidance ``w``; with its backward pass where it learns."""
        x, embedded = self.latents(count).requires_grad_(learn), self.text(count)
        scale = 1.0 if w in (0, 1) else 5.0

        def work() -> None:
            with torch.set_grad_enabled(learn):
                mean = sampler.transition(x, 0, embedded, scale).mean
                if learn:
                    mean.square().mean().backward()

        return self.seconds(("step", sampler is self.plain, count, scale, learn), count, work)

    def picture(self, count: int, rewards: Sequence[str] = (), learn: bool = False) -> float:
        """Decoding of ``count`` images once, and each reward's scoring; with the backward pass where it learns."""
        x, texts = self.latents(count).requires_grad_(learn), ["a dolphin riding a bike"] * count

        def work() -> None:
            with torch.set_grad_enabled(learn):
                images = self.model.decode(x)
                for name in rewards:
                    scores = self.rewards[name](images, texts)
                    if learn:
                        scores.sum().backward()

        return self.seconds(("picture", count, *rewards, learn), count, work)

    def iteration(self, scales: Sequence[float]) -> float:
        """Seconds of an iteration that samples under the guidance ``scales``."""
        make = next((plan for kind, plan in PLANS.items() if isinstance(self.algorithm, kind)), None)
        if make is None:
            raise UserError(
                f"diffexp bench knows nothing of the algorithm {self.recipe.algorithm.name!r}: measure a run"
            )
        return self.recipe.samples * make(self, scales)

    def rollout(self, sampler: Sampler, scales: Sequence[float]) -> float:
        """Sampling and scoring without gradients."""
        count = min(self.recipe.rollout.batch, self.recipe.samples)
        return sum(self.step(sampler, count, w) for w in scales) + self.picture(count, (self.recipe.reward,))

    def evaluation(self) -> float:
        """Seconds of one evaluation: all sets and rewards, and the divergence from the untouched model."""
        recipe, total = self.recipe, 0.0
        for name in recipe.evaluated_prompts:
            images = len(prompts.load(name)) * recipe.evaluation.images
            count = min(images, recipe.rollout.batch)
            total += images * self.plain.steps * self.step(self.plain, count, recipe.sampler.guidance)
            total += images * self.picture(count, recipe.evaluated_rewards)
            if recipe.model.train == "lora" and self.plain.random_steps:
                few = min(images, KL_IMAGES)
                step = self.step(self.plain, min(few, recipe.rollout.batch), recipe.sampler.guidance)
                total += few * self.plain.steps * 2 * step
        return total

    def preview(self) -> float:
        """Seconds of one preview: of the prompts that train, and of others."""
        recipe = self.recipe
        if not recipe.preview.images:
            return 0.0
        images = recipe.preview.images * min(2, len({recipe.prompts, *recipe.evaluated_prompts}))
        count = min(images, recipe.rollout.batch)
        step = self.plain.steps * self.step(self.plain, count, recipe.sampler.guidance)
        return images * (step + self.picture(count))

    def memory(self) -> float | None:
        """GiB at most: what was used so far, decoding among it, and the graphs of AlignProp's steps beside that."""
        found = peak_memory(self.model.device)
        if found is None or not isinstance(self.algorithm, AlignProp):
            return found
        count = min(self.recipe.update.batch, self.recipe.samples)
        x, embedded, kept = self.latents(count).requires_grad_(), self.text(count), {}
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.unet.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.algorithm.sampler.transition(x, 0, embedded, self.recipe.sampler.guidance)
        graph = sum(tensor.untyped_storage().nbytes() for where, tensor in kept.items() if where not in own)
        more = self.plain.steps if self.algorithm.truncation == "each-step" else self.algorithm.last_steps
        return found + more * graph / GIB


def ddpo(meter: Meter, scales: Sequence[float]) -> float:
    """Seconds an image of DDPO's rollout, and of the updates on all steps that have a density."""
    algorithm, recipe = meter.algorithm, meter.recipe
    rows, update = min(recipe.update.batch, -(-recipe.samples // algorithm.minibatches)), 0.0
    for steps in algorithm.passes(scales, rows):
        count, w = rows * len(steps), scales[steps[0]]
        update += len(steps) * meter.step(algorithm.sampler, count, w, learn=True)
        if algorithm.kl:
            update += len(steps) * meter.step(algorithm.sampler, count, w)
    return meter.rollout(algorithm.sampler, scales) + algorithm.inner_epochs * update


def alignprop(meter: Meter, scales: Sequence[float]) -> float:
    """Seconds an image of AlignProp, the mean over the K that it draws."""
    algorithm, steps = meter.algorithm, len(scales)
    count = min(meter.recipe.update.batch, meter.recipe.samples)
    if algorithm.truncation == "each-step":
        share = [(i + 1) / (steps + 1) for i in range(steps)]
    elif algorithm.truncation == "fixed":
        share = [float(i >= steps - algorithm.last_steps) for i in range(steps)]
    else:
        share = [max(0.0, 1 - (steps - 1 - i) / algorithm.last_steps) for i in range(steps)]
    # what comes before the first step that learns is sampled in larger batches
    before = count if algorithm.truncation == "each-step" else min(meter.recipe.rollout.batch, meter.recipe.samples)
    plain = [meter.step(algorithm.sampler, before, w) for w in scales]
    learned = [meter.step(algorithm.sampler, count, w, learn=True) for w in scales]
    denoising = sum((1 - p) * a + p * b for p, a, b in zip(share, plain, learned, strict=True))
    copies = (algorithm.copies - 1) * learned[-1]
    return denoising + copies + algorithm.copies * meter.picture(count, (meter.recipe.reward,), learn=True)


def refl(meter: Meter, scales: Sequence[float]) -> float:
    """Seconds an image of ReFL, the mean over the step that it draws."""
    algorithm, steps = meter.algorithm, len(scales)
    count = min(meter.recipe.update.batch, meter.recipe.samples)
    plain = [meter.step(algorithm.sampler, count, w) for w in scales]
    before = mean(sum(plain[:i]) for i in range(steps - algorithm.last_steps, steps))
    learned = meter.step(algorithm.sampler, count, scales[-1], learn=True)
    return before + learned + meter.picture(count, (meter.recipe.reward,), learn=True)


def rwr(meter: Meter, scales: Sequence[float]) -> float:
    """Seconds an image of reward-weighted regression's rollout and update."""
    algorithm, recipe = meter.algorithm, meter.recipe
    count = min(recipe.update.batch, recipe.samples)
    update = algorithm.draws * meter.step(algorithm.sampler, count, 1.0, learn=True)
    return meter.rollout(algorithm.sampler, scales) + update


PLANS: dict[type, Callable[[Meter, Sequence[float]], float]] = {
    DDPO: ddpo,
    AlignProp: alignprop,
    ReFL: refl,
    RewardWeightedRegression: rwr,
}


def opened(recipe: Recipe, architecture: str) -> TextToImage:
    """A model of random weights, or one that is on this machine."""
    settings, where, whole = recipe.model, device(recipe.device), recipe.model.train == "unet"
    if architecture in ARCHITECTURES:
        return blank(architecture, settings.precision, where, whole)
    return models.load(architecture, settings.precision, str(where), None, settings.variant, whole)


def stand_in(reward: str, where: torch.device) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """The reward where it needs no download; otherwise a vision transformer of its size for each that does."""
    names = [member.name for member in parse(reward)]
    if not any(fetched(name) for name in names):
        return rewards.load(reward, where)
    towers = [tower(name, where) for name in names if fetched(name)]
    ready = [rewards.load(name, where) for name in names if not fetched(name) and not is_remote(name)]

    def score(images: Tensor, texts: Sequence[str]) -> Tensor:
        pixels = resize(images, (224, 224))
        total = sum((one(pixels).pooler_output.sum(1) for one in towers), images.new_zeros(len(images)))
        return sum((reward(images, texts) for reward in ready), total)

    return score


@cache  # a reward and a sum that it is a member of share its network, as the real ones do
def tower(reward: str, where: torch.device) -> nn.Module:
    """A vision transformer of a reward's size."""
    return vision_tower("H" if reward in LARGE else "L", where)


def fetched(reward: str) -> bool:
    """Whether a reward is no part of this package and no function of the user's."""
    return is_remote(reward) or not (":" in reward or re.match("emoji-|jpeg-", reward))


def architecture_of(recipe: Recipe) -> str:
    """The recipe's model itself where it is on this machine; else what it most likely is, by its name."""
    path, name = recipe.model.path, recipe.model.path.lower()
    if path in MODELS or Path(path).is_dir():
        return path
    return "sdxl" if "xl" in name else "sd21" if re.search("stable-diffusion-2|sd2", name) else "sd15"


def bench(recipe: Recipe, name: str, architecture: str | None = None) -> Estimate:
    """Measures what the recipe's parts take here, and tells what all of it will.

    ``architecture`` is a model of the emoji world or one of :data:`diffexp.models.blank.ARCHITECTURES`; by default the
    recipe's model, if it is on this machine, or what it is called says which. The text encoders' own training, where a
    recipe has it, is left out.

    Raises:
        UserError: for another architecture, an algorithm of the user's own, or what does not fit into memory.
    """
    if architecture not in (None, *MODELS, *ARCHITECTURES):
        raise UserError(f"--arch = {architecture!r}: take one of {', '.join(('emoji', *ARCHITECTURES))}")
    changes = {"text_encoders": False, "start": None}
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update=changes)})
    started, architecture = clock(), architecture or architecture_of(recipe)
    meter = Meter(recipe, architecture)
    loading = clock() - started
    constant, explored = ConstantGuidance(recipe.sampler.guidance), assembly.exploration(recipe, meter.plain)
    plain = meter.iteration(meter.plain.scales(constant))
    exploring = meter.iteration(meter.plain.scales(explored.guidance or constant))
    active = sum(explored.active(k, recipe.iterations) for k in range(1, recipe.iterations + 1))
    training = active * exploring + (recipe.iterations - active) * plain
    observing = times(recipe.iterations, recipe.evaluation.every) * meter.evaluation()
    observing += times(recipe.iterations, recipe.preview.every) * meter.preview()
    seconds = training / recipe.iterations
    return Estimate(
        name,
        architecture,
        device_name(meter.model.device),
        recipe.samples / seconds,
        seconds,
        observing,
        loading + training + observing,
        meter.memory(),
    )
