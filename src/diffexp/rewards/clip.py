"""A frozen CLIP, shared by every reward that uses the same weights, and the rewards that are a scaled cosine of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffexp.rewards.base import in_chunks
from diffexp.rewards.preprocess import Fit, preprocess
from diffexp.rewards.weights import frozen


class Clip:
    """CLIP's two towers, each ending in features of unit length: (B, D), float32, on the model's device."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.image_size = cast("int", model.vision_model.config.image_size)
        self.context = model.text_model.config.max_position_embeddings

    def image_features(self, images: Tensor, fit: Fit = "crop") -> Tensor:
        """Features of images (B, 3, H, W) in [0, 1]; gradients flow to the images."""
        pixels = preprocess(images, self.image_size, fit)
        pooled = self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).pooler_output
        return _unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts; what exceeds CLIP's context is cut off."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        ).to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return _unit(self.model.text_projection(pooled))


class ClipReward:
    """A function of the cosine between CLIP's image and text features.

    ``scale`` maps cosines (B,) to scores (B,). Images are scored ``batch`` at a time to bound memory.
    """

    differentiable = True

    def __init__(
        self, name: str, clip: Clip, scale: Callable[[Tensor], Tensor], fit: Fit = "crop", batch: int = 16
    ) -> None:
        self.name = name
        self.clip = clip
        self.scale = scale
        self.fit: Fit = fit
        self.batch = batch

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to scores (B,), float32."""
        return in_chunks(self._score, images, prompts, self.batch)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (self.clip.image_features(images, self.fit) * self.clip.text_features(prompts)).sum(dim=-1)
        return self.scale(cosine)


@cache
def load_clip(folder: Path, tokenizer: Path, device: str) -> Clip:
    """The CLIP in ``folder`` with the tokenizer in another; the same object for the same arguments.

    ``folder`` is a hub snapshot, so its name tells repository and commit. ``load_clip.cache_clear()`` frees them all.
    """
    words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return Clip(frozen(CLIPModel, folder, device), words)


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)
