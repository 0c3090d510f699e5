"""``emoji-xl``: a painter with Stable Diffusion XL's two text encoders and size conditioning, taught by the first one.

It has a quarter of the first painter's parameters, because both have to fit into the package. So it learns from that
painter's predictions rather than from noise alone (distillation, Hinton et al. 2015): they are the mean of what it
would otherwise have to average over. What the teacher knows nothing of, pictures whose original was smaller, it learns
from noise.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffexp.emoji.vocabulary import ALL_ANIMALS
from diffexp.rewards.emoji import EmojiAlignment, EmojiJudge
from tools.emoji import clip, scenes, tokenizer, unet, vae
from tools.emoji.common import ROOT, WEIGHTS, WORK, Budget, Training, save, trained
from tools.emoji.evaluate import World, grid, pipeline
from tools.emoji.export import name_as_originals, open_in_float32
from tools.emoji.groupnorm import speed_up
from tools.emoji.unet import CAPTION_DROPOUT, caption_table, claims, noised, scheduler, snr_weights

BATCH = 64
PEAK = 2e-3
WIDTH = 64  # of the second text encoder
SMALL = 32  # pixels: the original size of the pictures that were scaled up
SMALL_SHARE = 0.15


def build() -> nn.ModuleDict:
    """The untrained UNet and second text encoder; the first encoder and the autoencoder are the first painter's."""
    first = clip.text_config()
    second = CLIPTextConfig(
        **{
            **first.to_dict(),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "projection_dim": WIDTH,
        }
    )
    painter = unet.build(
        deepest=80,
        text=first.hidden_size + WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )
    return nn.ModuleDict({"unet": painter, "text_encoder_2": CLIPTextModelWithProjection(second)})


@torch.no_grad()
def small_latents(painter: StableDiffusionPipeline) -> Tensor:
    """Scaled latents (N, 8, 16, 16) of the painter's scenes as they look when a picture of 32 pixels is scaled up."""
    store = WORK / "latents-small.safetensors"
    if not store.exists():
        pictures, _ = scenes.load("painter")
        shrunk = np.stack([np.asarray(_shrunk(picture)) for picture in pictures])
        save({"latents": (vae.encode(painter.vae, shrunk) * painter.vae.config.scaling_factor).half()}, store)
    return load_file(store)["latents"]


def _shrunk(picture: np.ndarray) -> Image.Image:
    small = Image.fromarray(picture).resize((SMALL, SMALL), Image.Resampling.BICUBIC)
    return small.resize((scenes.SIZE, scenes.SIZE), Image.Resampling.BICUBIC)


def train(budget: Budget, device: str) -> None:
    """Train the UNet and the second text encoder together."""
    torch.manual_seed(50)
    model = build().to(device, memory_format=torch.channels_last)
    learner, second = model["unet"], model["text_encoder_2"]
    training = Training("xl", speed_up(model), budget, PEAK, average=0.998)
    painter = pipeline(device=device)
    teacher = speed_up(painter.unet.to(memory_format=torch.channels_last))
    for network in (learner, teacher):
        network.set_attn_processor(AttnProcessor())
    sizes = {scenes.SIZE: load_file(WORK / "latents.safetensors")["latents"], SMALL: small_latents(painter)}
    _, classes = scenes.load("painter")
    texts = caption_table()
    tokens = tokenizer.tokenize([text for forms in texts for text in forms]).view(len(texts), 4, -1).to(device)
    empty = painter.text_encoder(tokenizer.tokenize([""]).to(device)).last_hidden_state[0].detach()
    alphas = scheduler().alphas_cumprod.to(device)
    weights = snr_weights(alphas)
    for step in training:
        rng = np.random.default_rng((50, step))
        generator = torch.Generator(device).manual_seed(step)
        chosen = rng.integers(len(classes), size=BATCH)
        small = rng.random(BATCH) < SMALL_SHARE
        clean = torch.stack([sizes[SMALL if s else scenes.SIZE][k] for k, s in zip(chosen, small, strict=True)])
        clean = clean.to(device).float()
        times = rng.permutation(BATCH) * 1000 // BATCH + rng.integers(1000 // BATCH + 1, size=BATCH)
        claimed = claims(classes[chosen], classes[rng.integers(len(classes), size=BATCH)], times, rng)
        ids = tokens[claimed, rng.integers(4, size=BATCH)]
        dropped = torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT).to(device)
        timesteps = torch.from_numpy(times).to(device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = noised(clean, noise, alphas[timesteps])
        is_small = torch.from_numpy(small).to(device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                states = painter.text_encoder(ids, output_hidden_states=True)
                heard = torch.where(dropped[:, None, None], empty, states.last_hidden_state)
                taught = teacher(noisy, timesteps, heard).sample.float()
            own = second(ids, output_hidden_states=True)
            kept = ~dropped[:, None]  # Stable Diffusion XL's empty prompt is all zeros
            hidden = torch.cat([states.hidden_states[-2], own.hidden_states[-2]], -1) * kept[..., None]
            added = {"text_embeds": own.text_embeds * kept, "time_ids": time_ids(is_small)}
            predicted = learner(noisy, timesteps, hidden, added_cond_kwargs=added).sample
        target = torch.where(is_small.view(-1, 1, 1, 1), noise, taught)
        errors = (predicted.float() - target).square().mean((1, 2, 3))
        training.update((errors * weights[timesteps]).mean())


def time_ids(small: Tensor) -> Tensor:
    """Stable Diffusion XL's six numbers (B, 6) of each picture: original size, crop corner, size of the picture."""
    size = torch.full((len(small), 1), float(scenes.SIZE), device=small.device)
    original = torch.where(small[:, None], float(SMALL), size)
    corner = torch.zeros_like(size)
    return torch.cat([original, original, corner, corner, size, size], 1)


def load() -> nn.ModuleDict:
    """What is trained so far, with averaged weights."""
    model: Any = trained(WORK / "xl.train.safetensors", build(), average=True)
    return model


def export(target: Path = WEIGHTS / "model-xl") -> None:
    """Write an ordinary diffusers folder of a ``StableDiffusionXLPipeline`` in fp16."""
    staging, parts, painter = WORK / "export-xl", load(), pipeline()
    shutil.rmtree(staging, ignore_errors=True)
    xl = StableDiffusionXLPipeline(
        vae=painter.vae,
        text_encoder=painter.text_encoder,
        text_encoder_2=parts["text_encoder_2"],
        tokenizer=painter.tokenizer,
        tokenizer_2=painter.tokenizer,
        unet=parts["unet"],
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    xl.to(torch.float16).save_pretrained(staging, safe_serialization=True)
    name_as_originals(staging / "text_encoder")
    open_in_float32(staging / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_classic_files(staging / name)
    # the classic files hold the same, and the package has no room for both twice
    (staging / "tokenizer_2" / "tokenizer.json").unlink()
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(staging, target)
    print(f"export: {sum(f.stat().st_size for f in WEIGHTS.rglob('*') if f.is_file()) / 1e6:.1f} MB in all", flush=True)


@torch.no_grad()
def report(scales: Sequence[float] = (1.0, 2.0, 5.0, 7.5)) -> None:
    """What the judge sees in two samples of each animal alone, over guidance scales; and the model card's picture."""
    pipe = StableDiffusionXLPipeline.from_pretrained(WEIGHTS / "model-xl", local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge, alignment = EmojiJudge(), EmojiAlignment()
    prompts = [animal for animal in ALL_ANIMALS for _ in range(2)]
    for scale in scales:
        noise = [torch.Generator().manual_seed(1000 + k) for k in range(len(prompts))]
        sampling: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": scale, "eta": 1.0}
        images = pipe(prompts, **sampling, height=64, width=64, generator=noise, output_type="pt").images
        right = [ALL_ANIMALS[k] == name for k, name in zip(judge.choose(images, ALL_ANIMALS), prompts, strict=True)]
        spread = World.spread(judge.image_features(images), 2).mean().item()
        scores = {"alignment": alignment(images, prompts).mean().item(), "judge": judge(images, prompts).mean().item()}
        figures = {"right animal": np.mean(right), **scores, "diversity": spread}
        print(f"xl: w = {scale}", {key: round(float(value), 3) for key, value in figures.items()}, flush=True)
        if scale == 5:
            grid(images[:96:2], 12, ROOT / "docs" / "images" / "emoji_xl_animals.png", zoom=2)
