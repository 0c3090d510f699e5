"""CLIPScore (Hessel et al. 2021): how well the image matches the prompt, by OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

import torch
from torch import Tensor

from diffexp.rewards.clip import Clip, ClipReward, load_clip
from diffexp.rewards.sources import CLIP_L
from diffexp.rewards.weights import hub_folder


def load(device: torch.device | str) -> ClipReward:
    """The reward ``clipscore``; it shares its CLIP with ``aesthetic``.

    Raises:
        UserError: if the weights are not to be had.
    """
    folder = hub_folder(CLIP_L)
    return clipscore(load_clip(folder, folder, str(device)))


def clipscore(clip: Clip) -> ClipReward:
    """100 max(cosine, 0), as torchmetrics scales it."""
    return ClipReward("clipscore", clip, _scale)


def _scale(cosine: Tensor) -> Tensor:
    return 100 * cosine.clamp(min=0)
