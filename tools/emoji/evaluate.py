"""Measures the exported world: what the judge sees in the painter's samples, and what guidance does to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from diffexp.emoji.vocabulary import ALL_ACTIVITIES, ALL_ANIMALS, prompt
from diffexp.rewards.emoji import EmojiAesthetic, EmojiAlignment, EmojiJudge
from tools.emoji.common import ROOT, WEIGHTS, WORK

STEPS = 20
SCALES = (0.0, 1.0, 2.0, 5.0, 7.5)


def pipeline(path: Path = WEIGHTS / "model", device: str = "cpu") -> StableDiffusionPipeline:
    """The painter as diffusers opens it, in float32, silent."""
    pipe = StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float32)


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], guidance: float, seed: int, batch: int = 64, eta: float = 1.0
) -> Tensor:
    """One picture a prompt, (B, 3, 64, 64) in [0, 1]: DDIM, 20 steps, the k-th with seed ``seed + k``.

    Guidance is written out because the pipeline of diffusers switches it off up to a scale of 1; 0 ignores the prompt.
    """
    return torch.cat(
        [_paint(pipe, prompts[i : i + batch], guidance, seed + i, eta) for i in range(0, len(prompts), batch)]
    )


def _paint(pipe: StableDiffusionPipeline, prompts: Sequence[str], guidance: float, seed: int, eta: float) -> Tensor:
    text, empty = _encode(pipe, prompts), _encode(pipe, [""]).expand(len(prompts), -1, -1)
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
    shape = (pipe.unet.config.in_channels, *(pipe.unet.config.sample_size,) * 2)
    draw = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(pipe.device)  # noqa: E731
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents = draw()
    for t in scheduler.timesteps:
        predicted = pipe.unet(latents, t, text).sample if guidance != 0 else 0.0
        if guidance != 1:
            without = pipe.unet(latents, t, empty).sample
            predicted = without + guidance * (predicted - without)
        latents = scheduler.step(predicted, t, latents, eta=eta, variance_noise=draw()).prev_sample
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def _encode(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    tokens = pipe.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(tokens.to(pipe.device)).last_hidden_state


class World:
    """The exported painter and raters, ready to measure."""

    def __init__(self, device: str = "cpu") -> None:
        self.pipe = pipeline(device=device)
        self.judge, self.alignment, self.aesthetic = EmojiJudge(device), EmojiAlignment(device), EmojiAesthetic(device)

    def alone(self, guidance: float, eta: float, each: int, seed: int = 1000) -> dict[str, Tensor]:
        """Of each single-animal sample whether the judge sees the right one of all 51 animals, and two scores."""
        prompts = [animal for animal in ALL_ANIMALS for _ in range(each)]
        images = sample(self.pipe, prompts, guidance, seed, eta=eta)
        chosen = self.judge.choose(images, ALL_ANIMALS)
        return {
            "alone": torch.tensor([float(ALL_ANIMALS[k] == text) for k, text in zip(chosen, prompts, strict=True)]),
            "alone, alignment": self.alignment(images, prompts),
            "alone, judge": self.judge(images, prompts),
        }

    def halves(self, guidance: float, eta: float, each: int, seed: int = 5000) -> dict[str, Tensor]:
        """Of each animal–activity sample whether the judge finds the animal, the activity, both; and the three scores.

        Every animal appears with each of the six activities, ``each`` times.

        The animal is found when, among the prompts "a X ACTIVITY" over all 51 animals and "X" alone, the best one names
        it; the activity when the best one of "a X ACTIVITY" over the six activities and "X" alone names it.
        """
        pairs = [(animal, activity) for animal in ALL_ANIMALS for activity in ALL_ACTIVITIES for _ in range(each)]
        prompts = [prompt(*pair) for pair in pairs]
        images = sample(self.pipe, prompts, guidance, seed, eta=eta)
        features = self.judge.image_features(images)
        found = [self._found(image, *pair) for image, pair in zip(features, pairs, strict=True)]
        animal, activity = (torch.tensor(half).float() for half in zip(*found, strict=True))
        return {
            "animal": animal,
            "activity": activity,
            "both": animal * activity,
            "alignment": self.alignment(images, prompts),
            "judge": self.judge(images, prompts),
            "aesthetic": self.aesthetic(images, prompts),
            "diversity": self.spread(features, each),
        }

    def _found(self, feature: Tensor, animal: str, activity: str) -> tuple[bool, bool]:
        best = lambda texts: texts[(self.judge.text_features(texts) @ feature).argmax()]  # noqa: E731
        right = prompt(animal, activity)
        animals = [*(prompt(other, activity) for other in ALL_ANIMALS), *ALL_ANIMALS]
        return (
            best(animals) in (right, animal),
            best([*(prompt(animal, other) for other in ALL_ACTIVITIES), animal]) == right,
        )

    @staticmethod
    def spread(features: Tensor, each: int) -> Tensor:
        """Of each prompt 1 − the mean cosine between different samples of it."""
        groups = features.unflatten(0, (-1, each))
        cosines = groups @ groups.mT
        return 1 - (cosines.sum((1, 2)) - each) / (each * (each - 1))


def evaluate(device: str, scales: Sequence[float] = SCALES, etas: Sequence[float] = (0.0, 1.0), each: int = 2) -> None:
    """Measure everything, print it as it comes, and keep it in ``work/emoji/figures.json``.

    Every animal is painted ``each`` times alone and with each activity, from the same noise at every guidance scale:
    what a scale changes has a 95 % interval of paired differences to the scale before it.
    """
    world, figures = World(device), {}
    for eta in etas:
        before: dict[str, Tensor] = {}
        for scale in scales:
            now = world.alone(scale, eta, each) | world.halves(scale, eta, each)
            measured = {
                key: {"mean": values.mean().item()} | (rise(values, before[key]) if before else {})
                for key, values in now.items()
            }
            name, before = f"eta = {eta:g}, w = {scale:g}", now
            figures[name] = measured
            lines = (f"  {key} {described(found)}" for key, found in measured.items())
            print(f"evaluate: {name}", *lines, sep="\n", flush=True)
            (WORK / "figures.json").write_text(json.dumps(figures, indent=1))


def rise(now: Tensor, before: Tensor) -> dict[str, float]:
    """The mean of paired differences, and half the width of its 95 % interval (normal approximation)."""
    difference = (now - before).double()
    return {"rise": difference.mean().item(), "error": 1.96 * (difference.std() / len(difference) ** 0.5).item()}


def described(found: dict[str, float]) -> str:
    """A mean, and what it rose by."""
    change = f" ({found['rise']:+.3f} ± {found['error']:.3f})" if "rise" in found else ""
    return f"{found['mean']:.3f}{change}"


def grid(images: Tensor, columns: int, path: Path, zoom: int = 1) -> None:
    """Write pictures (B, 3, H, W) in [0, 1] as one PNG, row by row."""
    rows = images.mul(255).round().byte().permute(0, 2, 3, 1).unflatten(0, (-1, columns))
    picture = Image.fromarray(torch.cat([torch.cat(list(row), 1) for row in rows], 0).cpu().numpy())
    larger = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    larger.quantize(128).save(path, optimize=True)


def samples(device: str, guidance: float = 5.0, folder: Path = ROOT / "docs" / "images") -> None:
    """The model card's pictures: animals alone, and animals with each activity."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = pipeline(device=device)
    grid(sample(pipe, ALL_ANIMALS[:48], guidance, seed=100), 12, folder / "emoji_animals.png", zoom=2)
    animals = ("cat", "dolphin", "ant", "zebra", "lion", "octopus", "frog", "cow", "bee", "shark")
    prompts = [prompt(animal, activity) for activity in ALL_ACTIVITIES for animal in animals]
    grid(sample(pipe, prompts, guidance, seed=300), len(animals), folder / "emoji_activities.png", zoom=2)
