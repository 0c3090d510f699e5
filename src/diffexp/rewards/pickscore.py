"""PickScore (Kirstain et al. 2023): human preference, by a CLIP ViT-H/14 fine-tuned on Pick-a-Pic."""

from __future__ import annotations

import torch

from diffexp.rewards.clip import Clip, ClipReward, load_clip
from diffexp.rewards.sources import CLIP_H_TOKENIZER, PICKSCORE
from diffexp.rewards.weights import hub_folder


def load(device: torch.device | str) -> ClipReward:
    """The reward ``pickscore``.

    Raises:
        UserError: if the weights are not to be had.
    """
    return pickscore(load_clip(hub_folder(PICKSCORE), hub_folder(CLIP_H_TOKENIZER), str(device)))


def pickscore(clip: Clip) -> ClipReward:
    """exp(logit scale) · cosine, about 20; the scale is the model's own."""
    temperature = clip.model.logit_scale.exp().float()
    return ClipReward("pickscore", clip, temperature.mul)
