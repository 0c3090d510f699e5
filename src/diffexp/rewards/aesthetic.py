"""LAION's improved aesthetic predictor: how pleasing people find the image, about 1 to 10; the prompt does not matter.

A head of five linear layers without nonlinearities on CLIP ViT-L/14's image features. In evaluation its dropouts do
nothing, so the head is one affine map, and is stored as one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffexp.errors import UserError
from diffexp.rewards.base import in_chunks
from diffexp.rewards.clip import Clip, load_clip
from diffexp.rewards.sources import AESTHETIC_HEAD, CLIP_L
from diffexp.rewards.weights import State, hub_folder, unpickled


class AestheticReward:
    """The affine head on CLIP's image features. ``weight`` is (D,), ``bias`` a scalar."""

    name = "aesthetic"
    differentiable = True

    def __init__(self, clip: Clip, weight: Tensor, bias: Tensor, batch: int = 16) -> None:
        self.clip = clip
        self.weight = weight.detach().to(clip.model.device, torch.float32)
        self.bias = bias.detach().to(clip.model.device, torch.float32)
        self.batch = batch

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to scores (B,), float32."""
        return in_chunks(self._score, images, prompts, self.batch)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.image_features(images) @ self.weight + self.bias


def load(device: torch.device | str) -> AestheticReward:
    """The reward ``aesthetic``; it shares its CLIP with ``clipscore``.

    Raises:
        UserError: if the weights are not to be had, or are not the published file.
    """
    folder = hub_folder(CLIP_L)
    head = load_file(unpickled(AESTHETIC_HEAD, convert) / "head.safetensors")
    return AestheticReward(load_clip(folder, folder, str(device)), head["weight"], head["bias"])


def convert(state: State, folder: Path) -> None:
    """Write LAION's head into ``folder`` as ``head.safetensors``: one weight (D,) and one bias."""
    weight, bias = fold(state, "layers.")
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")


def fold(state: State, prefix: str) -> tuple[Tensor, Tensor]:
    """Linear layers in a row, ``<prefix><index>.weight`` and ``.bias``, as one affine map to a scalar.

    Returns its weight (D,) and its bias, both float32.

    Raises:
        UserError: if the layers do not follow from one another down to one number.
    """
    keys = [re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", key) for key in state]
    indices = sorted(int(match[1]) for match in keys if match)
    try:
        weight, bias = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for index in reversed(indices):
            bias = bias + weight @ state[f"{prefix}{index}.bias"].double()
            weight = weight @ state[f"{prefix}{index}.weight"].double()
        if not indices:
            raise KeyError(f"{prefix}0.weight")
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the file holds no head of linear layers down to one score: {error}") from error
    return weight.squeeze(0).float().contiguous(), bias.squeeze(0).float()
