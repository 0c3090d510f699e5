"""The two image–text models: ``alignment``, whose text tower conditions the painter too, and the held-out ``judge``."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from diffexp.emoji.vocabulary import scenes as all_scenes
from tools.emoji import scenes, tokenizer, vae
from tools.emoji.common import WORK, Budget, Training, trained

BATCH = 128
PEAK = 1e-3
SEEDS = {"alignment": 20, "judge": 30}


def text_config() -> CLIPTextConfig:
    """The text tower that the painter listens to: 3 layers of width 128, 16 tokens."""
    words = tokenizer.load()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=tokenizer.LENGTH,
        projection_dim=128,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def build(name: str) -> CLIPModel | VisionTextDualEncoderModel:
    """An untrained model: a CLIP with a vision transformer, or the judge, a ConvNeXt beside a bidirectional BERT."""
    text = text_config()
    if name == "alignment":
        vision = CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=6,
            hidden_act="gelu",
            image_size=scenes.SIZE,
            patch_size=16,
            projection_dim=128,
        )
        return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    vision = ConvNextConfig(
        patch_size=8,
        num_stages=3,
        hidden_sizes=[128, 192, 256],
        depths=[2, 2, 1],
        layer_scale_init_value=0.0,
        image_size=scenes.SIZE,
        hidden_size=256,  # what the dual encoder's projection reads
    )
    bert = BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=tokenizer.LENGTH,
        pad_token_id=text.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,  # BERT's 0.02 is for eight times the width: all captions would start alike
    )
    return VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(vision, bert, projection_dim=96)
    )


def image_features(model: torch.nn.Module, images: Tensor) -> Tensor:
    """L2-normalised features (B, D) of pictures in [-1, 1]; the pixels go in as they are."""
    return F.normalize(model.get_image_features(pixel_values=images).pooler_output.flatten(1).float(), dim=-1)


def text_features(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """L2-normalised features (B, D) of token numbers (B, 16), as far as the first end of text."""
    ends = ids.eq(tokenizer.load().eos_token_id).int()
    mask = (ends.cumsum(1) - ends).eq(0).long()
    return F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output.float(), dim=-1)


@cache
def caption_forms() -> Tensor:
    """Token numbers (363, 8, 16): eight drawn captions of every scene, the plain prompt first."""
    rng = np.random.default_rng(5)
    plain = scenes.all_captions()[: len(all_scenes())]
    texts = [
        [text, *(scenes.caption(*scene, rng) for _ in range(7))]
        for scene, text in zip(all_scenes(), plain, strict=True)
    ]
    return tokenizer.tokenize([text for forms in texts for text in forms]).view(len(texts), 8, -1)


def degrade(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of a batch as generated pictures look: a lower resolution, a blur, noise. The other half stays clean."""
    half = images[: len(images) // 2]
    small = F.interpolate(half, size=int(rng.integers(20, 60)), mode="bilinear", antialias=True)
    half = F.interpolate(small, size=images.shape[-1], mode="bicubic")
    generator = torch.Generator(images.device).manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(half.shape, generator=generator, device=images.device)
    half = (half + rng.uniform(0, 0.2) * noise).clamp(-1, 1)
    return torch.cat([half, images[len(images) // 2 :]])


def contrastive_loss(images: Tensor, texts: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss; pictures of the same scene share the mass of their one text.

    Args:
        images: (B, D) normalised features; texts: (T, D), one for each different scene of the batch; targets: (B,), the
            text each picture belongs to; scale: the learnt temperature.
    """
    logits = scale * images @ texts.T
    matches = F.one_hot(targets, len(texts)).float()
    text_to_image = -(logits.log_softmax(dim=0) * matches).sum(0).div(matches.sum(0)).mean()
    return (F.cross_entropy(logits, targets) + text_to_image) / 2


def train(name: str, budget: Budget, device: str) -> None:
    """Train one of the two models on its own scenes, half of each batch degraded."""
    torch.manual_seed(SEEDS[name])
    model = build(name).to(device, memory_format=torch.channels_last).train()
    low_precision = name == "alignment"  # depthwise convolutions are slower in bf16
    model.set_attn_implementation("eager")  # the fused kernel's backward pass is slow on the CPU at these sizes
    training = Training(name, model, budget, PEAK, weight_decay=0.05, average=0.99)
    pictures, classes = scenes.load(name)
    forms = caption_forms().to(device)
    longest = int((forms == tokenizer.load().eos_token_id).int().argmax(-1).max()) + 1
    for step in training:
        rng = np.random.default_rng((SEEDS[name], step))
        chosen = rng.integers(len(pictures), size=BATCH)
        images = vae.to_tensor(pictures[chosen], device)
        present, targets = torch.from_numpy(classes[chosen]).to(device).unique(return_inverse=True)
        drawn = torch.from_numpy(rng.integers(forms.shape[1], size=len(present))).to(device)
        images = degrade(images, rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=low_precision):
            seen = image_features(model, images)
            read = text_features(model, forms[present, drawn, :longest])
        training.update(contrastive_loss(seen, read, targets, model.logit_scale.clamp(max=4.6).exp()))


def sharpen(budget: Budget, device: str) -> None:
    """Train the alignment CLIP's vision tower on, a quarter of each batch reconstructed by the autoencoder.

    The text tower stays what the painter listens to, so that its outputs can be computed once.
    """
    torch.manual_seed(25)
    model = trained(WORK / "alignment.train.safetensors", build("alignment"), average=True).to(device).train()
    forms = caption_forms().to(device)
    with torch.no_grad():
        pooled = torch.stack([model.text_model(forms[:, k]).pooler_output for k in range(forms.shape[1])], dim=1)
    model.requires_grad_(True).text_model.requires_grad_(False)
    model.set_attn_implementation("eager")
    training = Training("alignment-vision", model, budget, PEAK / 2, weight_decay=0.05, average=0.99)
    pictures, classes = scenes.load("alignment")
    rebuilt = vae.reconstructions("alignment").to(device)
    for step in training:
        rng = np.random.default_rng((25, step))
        chosen = rng.integers(len(pictures), size=BATCH)
        chosen[: BATCH // 4] %= len(rebuilt)
        images = vae.to_tensor(pictures[chosen], device)
        images[: BATCH // 4] = rebuilt[torch.from_numpy(chosen[: BATCH // 4]).to(device)].float() / 127.5 - 1
        images = torch.cat([images[: BATCH // 4], degrade(images[BATCH // 4 :], rng)])
        present, targets = torch.from_numpy(classes[chosen]).to(device).unique(return_inverse=True)
        drawn = torch.from_numpy(rng.integers(forms.shape[1], size=len(present))).to(device)
        with torch.autocast(device, torch.bfloat16):
            seen = image_features(model, images)
            read = F.normalize(model.text_projection(pooled[present, drawn]).float(), dim=-1)
        training.update(contrastive_loss(seen, read, targets, model.logit_scale.clamp(max=4.6).exp()))


def load(name: str, device: str = "cpu") -> CLIPModel | VisionTextDualEncoderModel:
    """One of the two models as trained so far."""
    sharpened = WORK / f"{name}-vision.train.safetensors"
    path = sharpened if sharpened.exists() else WORK / f"{name}.train.safetensors"
    return trained(path, build(name), average=True).to(device)


@torch.no_grad()
def top1(model: torch.nn.Module, images: Tensor, classes: np.ndarray) -> float:
    """The share of pictures (N, 3, 64, 64) in [-1, 1] whose own prompt, of all 363, is the nearest."""
    texts = text_features(model, caption_forms()[:, 0].to(model.device))
    seen = torch.cat([image_features(model, chunk.to(model.device)) for chunk in images.split(256)])
    return (seen @ texts.T).argmax(1).cpu().eq(torch.from_numpy(classes)).float().mean().item()


def report(name: str, device: str) -> float:
    """Print and return the top-1 rate on held-out real scenes."""
    pictures, classes = scenes.load("heldout")
    value = top1(load(name, device), vae.to_tensor(pictures), classes)
    print(f"{name}: top-1 among {len(all_scenes())} prompts on {len(pictures)} held-out scenes {value:.3f}", flush=True)
    return value
