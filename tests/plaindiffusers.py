"""One image of a cat, by our sampler and by diffusers' own pipeline from the same noise."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffexp.exploration import ConstantGuidance
from diffexp.models import TextToImage
from diffexp.rollout import Batch, Sampler, Trajectory

GUIDANCE = 5.0


def our_cat(model: TextToImage, steps: int = 2, size: tuple[int, int] | None = None) -> Trajectory:
    """What our sampler paints."""
    sampler = Sampler(model, model.schedule(steps), model.latent_shape(size), eta=0.0)
    return sampler.rollout(Batch(["a cat"], model.encode(["a cat"]), ConstantGuidance(GUIDANCE), [(0,)]), 1)


def cat_of_diffusers(folder: Path, path: Trajectory, lora: Path | None = None) -> torch.Tensor:
    """The images (1, 3, H, W) that diffusers paints from the noise of ``path``, with the LoRA in a file or folder."""
    *_, height, width = path.images.shape
    return cat_from_noise(folder, path.latents[0], len(path.latents) - 1, (height, width), lora)


def cat_from_noise(
    folder: Path, noise: torch.Tensor, steps: int, size: tuple[int, int], lora: Path | None = None
) -> torch.Tensor:
    """The same from ``noise`` (1, 4, h, w) in so many steps; ``size`` is height and width in pixels."""
    xl = json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    pipeline = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(
        folder, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    if lora:
        pipeline.load_lora_weights(lora)
    painted = pipeline(
        "a cat",
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        latents=noise,
        output_type="np",
    )
    return torch.from_numpy(painted.images).permute(0, 3, 1, 2)
