"""HPSv2 (Wu et al. 2023): human preference, by a CLIP ViT-H/14 in open_clip's layout, run as a CLIPModel."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from diffexp.errors import UserError
from diffexp.rewards.clip import Clip, ClipReward, load_clip
from diffexp.rewards.sources import CLIP_H_TOKENIZER, HPS_20, HPS_21, Source
from diffexp.rewards.weights import State, hub_folder, unpickled
from diffexp.weights import misfits

# open_clip's ViT-H-14: exact GELU, the rest as in CLIP.
VIT_H_14 = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
        "projection_dim": 1024,
    },
}

_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def load(device: torch.device | str) -> ClipReward:
    """The reward ``hpsv2``: version 2.1, as the authors recommend.

    Raises:
        UserError: if the weights are not to be had, or are not the published file.
    """
    return _load("hpsv2", HPS_21, device)


def load_v20(device: torch.device | str) -> ClipReward:
    """The reward ``hpsv2.0``: the first version, which the user has to vouch for (no hash of it is published).

    Raises:
        UserError: if the weights are not to be had, or nobody vouches for them.
    """
    return _load("hpsv2.0", HPS_20, device)


def hpsv2(clip: Clip, name: str = "hpsv2") -> ClipReward:
    """The cosine itself, about 0.28.

    Images that are not square are padded, as the authors do. Resizing is antialiased, as the authors' code is with
    torchvision 0.17 and later; with earlier ones it was not, so old numbers may differ.
    """
    return ClipReward(name, clip, lambda cosine: cosine, fit="pad")


def convert(state: State, folder: Path, config: CLIPConfig | None = None) -> None:
    """Write a CLIP in open_clip's layout into ``folder`` as a transformers CLIPModel: config.json, model.safetensors.

    Raises:
        UserError: if the weights are not those of ``config`` (ViT-H-14 unless given).
    """
    config = config or CLIPConfig(**VIT_H_14)
    save_file(rename(state, config), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def rename(state: State, config: CLIPConfig) -> State:
    """The weights of a CLIP in open_clip's layout under the names of transformers' CLIPModel.

    Raises:
        UserError: if they are not those of ``config``.
    """
    renamed = {name: tensor.contiguous() for key, value in state.items() for name, tensor in _rename(key, value)}
    with torch.device("meta"):
        wanted = CLIPModel(config).state_dict()
    if wrong := misfits(wanted, renamed):
        raise UserError(f"the HPSv2 file is no CLIP of the expected size: {len(wrong)} differences, as {wrong[0]}")
    return renamed


def _load(name: str, source: Source, device: torch.device | str) -> ClipReward:
    clip = load_clip(unpickled(source, convert), hub_folder(CLIP_H_TOKENIZER), str(device))
    return hpsv2(clip, name)


def _rename(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """One tensor of open_clip as transformers' tensors: the fused query, key and value become three."""
    if key == "logit_scale":
        return [(key, value)]
    if key in ("visual.proj", "text_projection"):
        name = "visual_projection" if key == "visual.proj" else key
        return [(f"{name}.weight", value.T)]
    if ".resblocks." in key or key.startswith("transformer.resblocks."):
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        index, _, rest = key.partition("resblocks.")[2].partition(".")
        layer = f"{tower}.encoder.layers.{index}"
        if rest.startswith("attn.in_proj_"):
            parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
            kind = rest.removeprefix("attn.in_proj_")
            return [(f"{layer}.self_attn.{part}.{kind}", tensor) for part, tensor in parts]
        return [(f"{layer}.{_replace(rest, _BLOCK)}", value)]
    return [(_replace(key, _TOP), value)]


def _replace(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key
