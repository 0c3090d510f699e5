"""Image features to measure diversity on: those of a reward's own encoder, or small pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 16


class Encoder(NamedTuple):
    """A named function from images (B, 3, H, W) in [0, 1] to features (B, D)."""

    name: str
    features: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.features(images).float()


def thumbnails(images: Tensor) -> Tensor:
    """The pixels of 16×16 pictures, (B, 768); a black one is no zero row."""
    return torch.nn.functional.adaptive_avg_pool2d(images, SIDE).flatten(1) + 1e-6


def encoder_of(reward: object) -> Callable[[Tensor], Tensor] | None:
    """The image features behind a reward, where it is made of any."""
    own = getattr(reward, "image_features", None)
    return own or getattr(getattr(reward, "clip", None), "image_features", None)


def choose(rewards: Mapping[str, object], trained: Collection[str]) -> Encoder:
    """The encoder of the first of the rewards that has one and is not ``trained`` on; else thumbnails.

    Training bends images to please its own reward's encoder, whose features then say little about them.
    """
    bent = [encoder_of(reward) for name, reward in rewards.items() if name in trained]  # rewards may share an encoder
    found = ((name, encoder_of(reward)) for name, reward in rewards.items() if name not in trained)
    sound = (Encoder(name, features) for name, features in found if features and features not in bent)
    return next(sound, Encoder("16×16 pixels", thumbnails))
