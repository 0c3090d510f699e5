"""ImageReward (Xu et al. 2023): human preference, by BLIP: a text encoder that sees the image, and a linear head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diffexp.errors import UserError
from diffexp.rewards.aesthetic import fold
from diffexp.rewards.base import in_chunks
from diffexp.rewards.preprocess import preprocess
from diffexp.rewards.sources import BERT_TOKENIZER, IMAGEREWARD
from diffexp.rewards.weights import State, frozen, hub_folder, unpickled
from diffexp.weights import misfits

# The published model's standardisation and prompt length.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
TOKENS = 35

# BLIP large: ViT-L/16, and BERT base with cross-attention and two more words than BERT's.
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "is_decoder": True,  # in transformers' BLIP, this is what gives the layers their cross-attention
}

_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)


class ImageReward:
    """BLIP's reading of the prompt while it looks at the image, at the first token, through an affine head."""

    name = "imagereward"
    differentiable = True

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        tokenizer: BertTokenizer,
        weight: Tensor,
        bias: Tensor,
        batch: int = 16,
    ) -> None:
        self.vision = vision.requires_grad_(False).eval()
        self.text = text.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.image_size = cast("int", vision.config.image_size)
        self.weight = weight.detach().to(text.device, torch.float32)
        self.bias = bias.detach().to(text.device, torch.float32)
        self.batch = batch

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to scores (B,), float32."""
        return in_chunks(self._score, images, prompts, self.batch)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = preprocess(images, self.image_size).to(self.vision.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.text.device)
        return self.score_pixels(pixels, tokens.input_ids, tokens.attention_mask)

    def score_pixels(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Preprocessed pixels (B, 3, S, S) and tokens (B, L) with their mask to scores (B,)."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=patches)
        raw = read.last_hidden_state[:, 0].float() @ self.weight + self.bias
        return (raw - MEAN) / STD


def load(device: torch.device | str) -> ImageReward:
    """The reward ``imagereward``.

    Raises:
        UserError: if the weights are not to be had, or are not the published file.
    """
    tokenizer = BertTokenizer.from_pretrained(hub_folder(BERT_TOKENIZER), local_files_only=True)
    return open_converted(unpickled(IMAGEREWARD, convert), tokenizer, device)


def open_converted(folder: Path, tokenizer: BertTokenizer, device: torch.device | str) -> ImageReward:
    """The reward from the folder that ``convert`` wrote."""
    vision = frozen(BlipVisionModel, folder / "vision", device)
    text = frozen(BlipTextModel, folder / "text", device, add_pooling_layer=False)
    head = load_file(folder / "head.safetensors")
    return ImageReward(vision, text, tokenizer, head["weight"], head["bias"])


def convert(
    state: State, folder: Path, vision: BlipVisionConfig | None = None, text: BlipTextConfig | None = None
) -> None:
    """Write the published state into ``folder`` as transformers' two BLIP towers and ``head.safetensors``.

    Raises:
        UserError: if the weights are not those of the configurations (the published ones unless given).
    """
    vision = vision or BlipVisionConfig(**VISION)
    text = text or BlipTextConfig(**TEXT)
    for config, weights in ((vision, rename_vision(state, vision)), (text, rename_text(state, text))):
        part = folder / ("vision" if config is vision else "text")
        config.save_pretrained(part)
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    weight, bias = fold(state, "mlp.layers.")
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")


def rename_vision(state: State, config: BlipVisionConfig) -> State:
    """BLIP's image encoder under the names of transformers' BlipVisionModel.

    Raises:
        UserError: if the weights are not those of ``config``.
    """
    with torch.device("meta"):
        return _part(state, "blip.visual_encoder.", _VISION_NAMES, BlipVisionModel(config))


def rename_text(state: State, config: BlipTextConfig) -> State:
    """BLIP's text encoder under the names of transformers' BlipTextModel.

    Raises:
        UserError: if the weights are not those of ``config``.
    """
    with torch.device("meta"):
        return _part(state, "blip.text_encoder.", (), BlipTextModel(config, add_pooling_layer=False))


def _part(state: State, prefix: str, names: Sequence[tuple[str, str]], model: torch.nn.Module) -> State:
    part = {}
    for key, value in state.items():
        # The position ids are 0, 1, 2, …, which transformers does not save.
        if key.startswith(prefix) and not key.endswith("position_ids"):
            key = key.removeprefix(prefix)
            for pattern, replacement in names:
                key = re.sub(pattern, replacement, key)
            part[key] = value.contiguous()
    if wrong := misfits(model.state_dict(), part):
        raise UserError(f"the ImageReward file's {prefix}* has {len(wrong)} differences, as {wrong[0]}")
    return part
