"""The aesthetic rater: a documented synthetic taste, and the small head on CLIP features that learns it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.emoji import clip, scenes, vae
from tools.emoji.common import WORK, save

HIDDEN = 64
CENTRE, SPREAD = 5.5, 1.5


def attributes(images: Tensor) -> dict[str, Tensor]:
    """What the synthetic rater looks at, each (B,), for pictures (B, 3, 64, 64) in [0, 1].

    ``warmth``: mean red minus mean blue. ``colour``: mean difference between the largest and the smallest channel.
    ``contrast``: the standard deviation of the brightness. ``size``: the share of pixels that differ from the border's
    median colour. ``centre``: how near the middle of those pixels lies to the picture's, 1 … 0.
    """
    red, _, blue = images.unbind(1)
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], dim=-1)
    background = border.median(dim=-1).values[..., None, None]
    shown = ((images - background).abs().amax(1) > 0.12).float()
    area = shown.mean((1, 2))
    axis = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    weight = shown.sum((1, 2)).clamp(min=1)
    x, y = (shown.sum(1) * axis).sum(1) / weight, (shown.sum(2) * axis).sum(1) / weight
    return {
        "warmth": (red - blue).mean((1, 2)),
        "colour": (images.amax(1) - images.amin(1)).mean((1, 2)),
        "contrast": images.mean(1).flatten(1).std(1),
        "size": area,
        "centre": 1 - (x.square() + y.square()).sqrt().clamp(max=1),
    }


# Mean and standard deviation of each attribute over the painter's scenes, and how much the rater cares.
TASTE = {
    "warmth": (0.05, 0.18, 1.0),
    "colour": (0.25, 0.11, 1.0),
    "contrast": (0.14, 0.06, 0.7),
    "size": (0.32, 0.10, 0.7),
    "centre": (0.82, 0.09, 0.5),
}


def rate(images: Tensor) -> Tensor:
    """The synthetic rater's ratings (B,), about 1 … 10 with mean 5.5: a weighted sum of standardised attributes."""
    seen = attributes(images)
    score = sum(weight * (seen[name] - mean) / std for name, (mean, std, weight) in TASTE.items())
    norm = sum(weight**2 for *_, weight in TASTE.values()) ** 0.5
    return (CENTRE + SPREAD * score / norm).clamp(1, 10)


def build() -> nn.Sequential:
    """An untrained head: L2-normalised CLIP features (B, 128) → rating (B, 1)."""
    return nn.Sequential(nn.Linear(128, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))


@torch.no_grad()
def _examples(device: str, count: int) -> tuple[Tensor, Tensor]:
    """Features and ratings of scenes, half clean and half degraded as in the CLIP's own training."""
    model = clip.load("alignment", device)
    pictures, _ = scenes.load("alignment")
    features, ratings = [], []
    for start in range(0, count, 256):
        images = vae.to_tensor(pictures[start : start + 256], device)
        features.append(clip.image_features(model, clip.degrade(images, np.random.default_rng((50, start)))).cpu())
        ratings.append(rate((images + 1) / 2).cpu())
    return torch.cat(features), torch.cat(ratings)


def train(device: str, count: int = 6_400, epochs: int = 60) -> float:
    """Fit the head, save it, and return its correlation with the rater on the last tenth of the scenes."""
    torch.manual_seed(50)
    features, ratings = _examples(device, count)
    held = count // 10
    head = build()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(count - held).split(256):
            optimizer.zero_grad()
            F.mse_loss(head(features[chosen])[:, 0], ratings[chosen]).backward()
            optimizer.step()
        decay.step()
    with torch.no_grad():
        predicted = head(features[-held:])[:, 0]
    correlation = torch.corrcoef(torch.stack([predicted, ratings[-held:]]))[0, 1].item()
    save(head.state_dict(), WORK / "aesthetic.safetensors")
    print(f"aesthetic: correlation with the rater on {held} held-out scenes {correlation:.3f}", flush=True)
    return correlation
