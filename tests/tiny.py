"""Random pipelines of the real layout and a few kilobytes: every class that matters, nothing learned."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
MERGES = [
    ("c", "a"),
    ("ca", "t</w>"),
    ("b", "i"),
    ("k", "e</w>"),
    ("bi", "ke</w>"),
    ("d", "o"),
    ("do", "l"),
    ("p", "h"),
]
LENGTH = 16
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows letters, "cat" and "bike" as single tokens, and splits every other word."""
    folder.mkdir(parents=True)
    units = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *("".join(merge) for merge in MERGES)]
    vocabulary = {unit: index for index, unit in enumerate([*units, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**special, "pad_token": "<|endoftext|>", "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(LETTERS) * 2 + len(MERGES) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=len(LETTERS) * 2 + len(MERGES),
        eos_token_id=len(LETTERS) * 2 + len(MERGES) + 1,
        pad_token_id=len(LETTERS) * 2 + len(MERGES) + 1,
    )


def unet(width: int, **more: object) -> UNet2DConditionModel:
    common = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**common, **more})


def write_pipeline(folder: Path, xl: bool = False, **scheduler: object) -> Path:
    """A whole diffusers folder of Stable Diffusion's or SDXL's layout, 16×16 images, random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_tokenizer(folder / "tokenizer")
        CLIPTextModel(text_config(16)).save_pretrained(folder / "text_encoder")
        if xl:
            write_tokenizer(folder / "tokenizer_2")
            CLIPTextModelWithProjection(text_config(16)).save_pretrained(folder / "text_encoder_2")
            added = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 8 + 6 * 4,
            }
            unet(32, **added).save_pretrained(folder / "unet")
        else:
            unet(16).save_pretrained(folder / "unet")
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.5,
        ).save_pretrained(folder / "vae")
        DDIMScheduler(**{**SCHEDULER, **scheduler}).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index(xl)))
    return folder


def index(xl: bool) -> dict[str, object]:
    parts: dict[str, object] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    if xl:
        more = {
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "force_zeros_for_empty_prompt": True,
        }
        return {"_class_name": "StableDiffusionXLPipeline", **parts, **more}
    none = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {"_class_name": "StableDiffusionPipeline", **parts, **none}


def write_original(folder: Path, kind: str) -> Path:
    """A pipeline as the repositories of "sd15", "sd21" and "sdxl" have it: their schedulers and tensors' names."""
    write_pipeline(folder, xl=kind == "sdxl")
    originals = files("diffexp.models") / "configs" / kind
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        (folder / name).write_text((originals / name).read_text())
    if kind == "sd21":  # v-prediction, linear projections, another number of heads in each block, another activation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            unet(16, use_linear_projection=True, attention_head_dim=(2, 4)).save_pretrained(folder / "unet")
        config = folder / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    # the originals have their tensors below this name, as older versions of transformers still do
    file, root = folder / "text_encoder" / "model.safetensors", "text_model."
    tensors = {key if key.startswith(root) else root + key: tensor for key, tensor in load_file(file).items()}
    if kind == "sd15":
        tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(tensors, file, {"format": "pt"})
    return folder


def write_hub_cache(cache: Path, repo: str, folder: Path, commit: str, branch: str = "main") -> Path:
    """Puts a folder into a cache as the hub's client lays it out; returns the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for file in (path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return snapshot
