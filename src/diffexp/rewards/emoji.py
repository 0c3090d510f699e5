"""The emoji world's rewards, each in the class it stands for: alignment (PickScore), aesthetic (LAION's), judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffexp.emoji import weights_path
from diffexp.quiet import no_progress_bars
from diffexp.rewards.preprocess import resize

SIZE = 64
TOKENS = 16
SCALE = 10.0
KEPT = 10_000  # prompts' features: a reward server may be asked about any number of prompts


def _pixels(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the towers read them: 64×64, in [-1, 1]. Differentiable."""
    images = images.float()
    if images.shape[-2:] != (SIZE, SIZE):
        images = resize(images, (SIZE, SIZE)).clamp(0, 1)
    return 2 * images - 1


class _Similarity(nn.Module):
    """``SCALE`` times the cosine of an image's and a prompt's features, with the prompts' features kept."""

    name: str
    differentiable = True

    def __init__(self, part: str, model: nn.Module, device: str | torch.device) -> None:
        from transformers import CLIPTokenizer

        super().__init__()
        self.model: Any = model.to(device).float().eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(weights_path(part), local_files_only=True)
        self.device = torch.device(device)
        self.texts: dict[str, Tensor] = {}
        self.eval()

    def image_features(self, images: Tensor) -> Tensor:
        """L2-normalised features (B, D) of images (B, 3, H, W) in [0, 1]."""
        features = self.model.get_image_features(pixel_values=_pixels(images.to(self.device))).pooler_output
        return F.normalize(features.flatten(1), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """L2-normalised features (B, D) of prompts; each different prompt is encoded once."""
        if len(self.texts) > KEPT:
            self.texts.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            tokens = self.tokenizer(
                new, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
            ).to(self.device)
            features = self.model.get_text_features(
                tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            self.texts |= dict(zip(new, F.normalize(features, dim=-1), strict=True))
        return torch.stack([self.texts[prompt] for prompt in prompts])

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1] for their prompts, float32 in [-10, 10]."""
        return SCALE * (self.image_features(images) * self.text_features(prompts)).sum(-1)


class EmojiAlignment(_Similarity):
    """How well an image fits its prompt, as PickScore is for Stable Diffusion: 10 × the cosine of the world's CLIP.

    Its text tower is the one that conditions the painter. Random pairs score about 0, fitting ones several points.
    """

    name = "emoji-alignment"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPModel

        with no_progress_bars():
            model = CLIPModel.from_pretrained(weights_path("alignment"), use_safetensors=True, local_files_only=True)
        super().__init__("alignment", model, device)


@cache
def alignment(device: str | torch.device = "cpu") -> EmojiAlignment:
    """The one ``emoji-alignment`` of a device: another reward is a head on its features, and they are told to be."""
    return EmojiAlignment(device)


class EmojiJudge(_Similarity):
    """The held-out judge, as ImageReward is the paper's: another architecture, seed and data split than the CLIP's.

    A ConvNeXt beside a bidirectional BERT; 10 × their cosine. No training ever sees it: use it to evaluate only.
    """

    name = "emoji-judge"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        from transformers import VisionTextDualEncoderModel

        path = weights_path("judge")
        with no_progress_bars():
            model = VisionTextDualEncoderModel.from_pretrained(path, use_safetensors=True, local_files_only=True)
        super().__init__("judge", model, device)

    @torch.no_grad()
    def choose(self, images: Tensor, candidates: Sequence[str]) -> Tensor:
        """The index (B,) of the candidate prompt that fits each image (B, 3, H, W) best."""
        return (self.image_features(images) @ self.text_features(candidates).T).argmax(1)


class EmojiAesthetic(nn.Module):
    """How much the world's synthetic rater likes an image, about 1 … 10, whatever the prompt.

    A head on the alignment CLIP's L2-normalised image features, as LAION's predictor is one on OpenAI's CLIP. The rater
    likes warm, colourful, contrasting pictures whose subject is large and central (``tools/emoji/raters.py``).
    """

    name = "emoji-aesthetic"
    differentiable = True

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.image_features: Callable[[Tensor], Tensor] = alignment(device).image_features
        tensors = load_file(weights_path("aesthetic") / "head.safetensors")
        hidden, width = tensors["0.weight"].shape
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.head.load_state_dict(tensors)
        self.head.to(device).float().requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Ratings (B,) of images (B, 3, H, W) in [0, 1], float32; the prompts do not matter."""
        return self.head(self.image_features(images))[:, 0]
