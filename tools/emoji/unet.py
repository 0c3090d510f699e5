"""The painter: a small UNet that denoises the autoencoder's latents, listening to the alignment CLIP's text tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from diffexp.emoji.vocabulary import ALL_ACTIVITIES, ALL_ANIMALS, with_article
from diffexp.emoji.vocabulary import scenes as all_scenes
from tools.emoji import clip, scenes, tokenizer, vae
from tools.emoji.common import WORK, Budget, Training, rank, save, trained
from tools.emoji.groupnorm import speed_up

BATCH = 32
PEAK = 1e-3
CAPTION_DROPOUT = 0.2
# The share of single animals whose caption promises an activity that the picture does not show, as on the web: it makes
# the painter drop a half of "a dolphin riding a bike" and so leaves a reward something to improve.
LOOSE_CAPTIONS = 0.6
# The share of captions that belong to another picture altogether, of those that name an animal or object alone and of
# those with an activity. Without them a caption settles the picture already at w = 1, and guidance has nothing to add.
WRONG_CAPTIONS = (0.29, 0.5)
# Below this timestep the picture is plain to see and every caption is drawn at random: guidance then decides what is
# painted, and a high scale does not merely exaggerate its contrast.
CAPTIONS_FROM = 300
SNR_CEILING = 5.0


def build(deepest: int = 192, text: int = 128, **further: Any) -> UNet2DConditionModel:
    """An untrained UNet: a cheap first level at 16×16, cross-attention to ``text`` numbers at 8×8 and 4×4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, deepest),
        layers_per_block=1,
        cross_attention_dim=text,
        attention_head_dim=(2, 2, 4),
        norm_num_groups=8,
        **further,
    )


def scheduler() -> DDIMScheduler:
    """The noise schedule and the sampler's settings of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def text_tower() -> CLIPTextModel:
    """The alignment CLIP's text tower as a model of its own, as Stable Diffusion ships it."""
    model = clip.load("alignment")
    tower = CLIPTextModel(model.config.text_config)
    tower.load_state_dict({n: t for n, t in model.text_model.state_dict().items()})
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def prepare() -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents (N, 8, 16, 16) of the scenes, text states (363, 4, 16, 128), the empty caption's (16, 128).

    The four captions of a scene are the forms that :func:`scenes.caption` draws from, each as often as it is drawn.
    """
    store = WORK / "latents.safetensors"
    if not store.exists():
        model = vae.load()
        pictures, _ = scenes.load("painter")
        save({"latents": (vae.encode(model, pictures) * model.config.scaling_factor).half()}, store)
    from safetensors.torch import load_file

    latents = load_file(store)["latents"]
    tower, texts = text_tower(), [text for forms in caption_table() for text in forms]
    states = torch.cat(
        [tower(tokenizer.tokenize(texts[i : i + 363])).last_hidden_state for i in range(0, len(texts), 363)]
    )
    empty = tower(tokenizer.tokenize([""])).last_hidden_state[0]
    return latents, states.view(len(all_scenes()), 4, *empty.shape), empty


def caption_table() -> list[list[str]]:
    """Four captions of every scene, to be drawn from evenly."""
    table = []
    for (animal, _), plain in zip(all_scenes(), scenes.all_captions(), strict=False):
        if plain in ALL_ANIMALS:
            table.append([plain, plain, with_article(animal), f"a photo of {with_article(animal)}"])
        else:
            table.append([plain, plain, plain, f"a photo of {plain}"])
    return table


def snr_weights(alphas: Tensor) -> Tensor:
    """The root of the Min-SNR weights min(SNR, 5) / SNR (Hang et al. 2023), which leave too much grain at few steps."""
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=SNR_CEILING) / snr).sqrt()


def noised(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The latents (B, C, H, W) at the noise level ᾱ_t of each (B,), in the layout that the network is fast in."""
    alpha = alpha_bar.view(-1, 1, 1, 1)
    return (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)


def claims(classes: np.ndarray, of_others: np.ndarray, timesteps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scenes (B,) that the captions claim, of pictures that show the scenes ``classes`` (B,).

    Some animals alone are said to do something (``LOOSE_CAPTIONS``), and some pictures carry the caption of another
    one, ``of_others`` (B,): ``WRONG_CAPTIONS``, and at low noise all (``CAPTIONS_FROM``).
    """
    singles, count = len(ALL_ANIMALS), len(ALL_ACTIVITIES)
    doing = singles + count + classes * count + rng.integers(count, size=len(classes))
    loose = (classes < singles) & (rng.random(len(classes)) < LOOSE_CAPTIONS)
    share = np.where(of_others < singles + count, *WRONG_CAPTIONS)
    wrong = (timesteps < CAPTIONS_FROM) | (rng.random(len(classes)) < share)
    return np.where(wrong, of_others, np.where(loose, doing, classes))


def train(budget: Budget, device: str) -> None:
    """Train the UNet on precomputed latents and text states."""
    torch.manual_seed(40)
    model = build().to(device, memory_format=torch.channels_last)
    model.set_attn_processor(AttnProcessor())
    training = Training("unet", speed_up(model), budget, PEAK, average=0.998)
    latents, states, empty = prepare()
    states, empty = states.to(device), empty.to(device)
    _, classes = scenes.load("painter")
    alphas = scheduler().alphas_cumprod.to(device)
    weights = snr_weights(alphas)
    for step in training:
        rng = np.random.default_rng((40, step, rank()))
        chosen = rng.integers(len(latents), size=BATCH)
        generator = torch.Generator(device).manual_seed(1000 * step + rank())
        clean = latents[chosen].to(device).float().contiguous(memory_format=torch.channels_last)
        times = rng.permutation(BATCH) * 1000 // BATCH + rng.integers(16, size=BATCH)
        claimed = claims(classes[chosen], classes[rng.integers(len(classes), size=BATCH)], times, rng)
        text = states[claimed, rng.integers(4, size=BATCH)].clone()
        text[torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT).to(device)] = empty
        timesteps = torch.from_numpy(times).to(device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = noised(clean, noise, alphas[timesteps])
        with torch.autocast(device, torch.bfloat16):
            predicted = model(noisy, timesteps, text).sample
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        training.update((errors * weights[timesteps]).mean())


def load(device: str = "cpu") -> UNet2DConditionModel:
    """The UNet as trained so far, with averaged weights."""
    return trained(WORK / "unet.train.safetensors", build(), average=True).to(device)
