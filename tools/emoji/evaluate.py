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

    def animals_named(self, guidance: float, each: int, seed: int = 1000) -> float:
        """The share of single-animal samples in which the judge sees the right one of all 51 animals."""
        prompts = [animal for animal in ALL_ANIMALS for _ in range(each)]
        chosen = self.judge.choose(sample(self.pipe, prompts, guidance, seed), ALL_ANIMALS)
        return sum(ALL_ANIMALS[k] == text for k, text in zip(chosen, prompts, strict=True)) / len(prompts)

    def halves(self, guidance: float, each: int, share: int = 6, seed: int = 5000) -> dict[str, float]:
        """What the judge finds in animal–activity samples: the animal, the activity, both; and the three scores.

        Every animal appears with ``share`` of the six activities (1, 2, 3 or 6), ``each`` times.

        The animal is found when, among the prompts "a X ACTIVITY" over all 51 animals and "X" alone, the best one names
        it; the activity when the best one of "a X ACTIVITY" over the six activities and "X" alone names it.
        """
        count = len(ALL_ACTIVITIES)
        chosen = [
            (k, (k + shift) % count) for k in range(len(ALL_ANIMALS)) for shift in range(0, count, count // share)
        ]
        pairs = [(ALL_ANIMALS[k], ALL_ACTIVITIES[j]) for k, j in chosen for _ in range(each)]
        prompts = [prompt(*pair) for pair in pairs]
        images = sample(self.pipe, prompts, guidance, seed)
        found = [
            self._found(image, *pair) for image, pair in zip(self.judge.image_features(images), pairs, strict=True)
        ]
        animal, activity = (torch.tensor(half).float() for half in zip(*found, strict=True))
        features = self.judge.image_features(images)
        return {
            "animal": animal.mean().item(),
            "activity": activity.mean().item(),
            "both": (animal * activity).mean().item(),
            "alignment": self.alignment(images, prompts).mean().item(),
            "judge": self.judge(images, prompts).mean().item(),
            "aesthetic": self.aesthetic(images, prompts).mean().item(),
            "diversity": self.spread(features, each) if each > 1 else float("nan"),
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
    def spread(features: Tensor, each: int) -> float:
        """1 − the mean cosine between different samples of one prompt, averaged over prompts."""
        groups = features.unflatten(0, (-1, each))
        cosines = groups @ groups.mT
        return 1 - ((cosines.sum((1, 2)) - each) / (each * (each - 1))).mean().item()


def evaluate(device: str, scales: Sequence[float] = SCALES) -> dict:
    """Measure everything, print it as it comes, and keep it in ``work/emoji/figures.json``.

    The table over guidance scales has every animal once alone and twice with one activity; at guidance 5 every animal
    is painted twice alone and once with each activity besides.
    """
    world, figures = World(device), {}
    rounds = [("all, w = 5", 5.0, 2, 1, 6)] + [(f"w = {scale}", scale, 1, 2, 1) for scale in scales]
    for name, scale, singles, each, share in rounds:
        figures[name] = {"single": world.animals_named(scale, singles), **world.halves(scale, each, share)}
        print(f"evaluate: {name}", {key: round(value, 3) for key, value in figures[name].items()}, flush=True)
        (WORK / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


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
