"""The shipped emoji world: its shape, its size, and thresholds that its networks must reach on held-out scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from diffexp import prompts as prompt_sets
from diffexp.emoji import MODELS, model_path, vocabulary, weights_path
from diffexp.errors import UserError
from diffexp.rewards.emoji import EmojiAesthetic, EmojiAlignment, EmojiJudge

SHEET = Path(__file__).parent / "data" / "emoji_scenes.png"
WEIGHTS = Path(vocabulary.__file__).parent / "weights"


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(model_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)


@pytest.fixture(scope="module")
def xl():
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path("emoji-xl"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)


@pytest.fixture(scope="module")
def sheet():
    """72 held-out scenes (72, 3, 64, 64) in [0, 1] and their prompts: every fifth scene of the world."""
    pixels = torch.from_numpy(np.array(Image.open(SHEET).convert("RGB"))).float() / 255
    tiles = pixels.unflatten(0, (6, 64)).unflatten(2, (12, 64)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return tiles, vocabulary.prompts()[::5][:72]


@pytest.mark.parametrize(
    ("name", "kind"), [("emoji", StableDiffusionPipeline), ("emoji-xl", StableDiffusionXLPipeline)]
)
def test_plain_diffusers_paints_with_nothing_set(name: str, kind: type) -> None:
    """Its parts open in one precision, whatever that of the files."""
    plain = kind.from_pretrained(model_path(name), local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    assert plain("a cat", height=64, width=64, num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_text_encoders_are_named_as_stable_diffusions(name: str) -> None:
    """Older versions of transformers read no other names; newer ones read both."""
    for file in model_path(name).glob("text_encoder*/model.safetensors"):
        names = [key for key in load_file(file) if key != "text_projection.weight"]
        assert names
        assert all(key.startswith("text_model.") for key in names), file


def test_the_vocabulary_is_the_papers():
    assert len(vocabulary.ANIMALS) == 45
    assert len(vocabulary.UNSEEN_ANIMALS) == 6
    assert len(set(vocabulary.prompts())) == 51 + 6 + 51 * 6
    assert "an ant washing the dishes" in vocabulary.prompts()
    known = set(vocabulary.prompts())
    for name in ("animals", "animal-activities"):
        assert set(prompt_sets.load(name)) <= known


def test_unknown_part_is_a_users_mistake():
    with pytest.raises(UserError, match="judge"):
        weights_path("judges")


def test_weights_are_small_half_precision_and_safe():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40_000_000
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    tensors = [file for file in files if file.suffix == ".safetensors"]
    # text encoder, VAE, UNet; the same and a second text encoder in XL's shape; alignment, aesthetic, judge
    assert len(tensors) == 3 + 4 + 3
    for file in tensors:
        with safe_open(file, "pt") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, file


def test_attribution_travels_with_the_weights():
    text = (WEIGHTS / "README.md").read_text()
    for name in ("fluent-emoji-flat", "twemoji", "MIT", "CC BY 4.0"):
        assert name in text


def test_scheduler_is_stable_diffusions():
    config = json.loads((model_path() / "scheduler" / "scheduler_config.json").read_text())
    expected = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    expected |= {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    assert expected.items() <= config.items()
    assert config["prediction_type"] == "epsilon"


def test_unet_costs_at_most_half_a_gigaflop(pipeline):
    unet = pipeline.unet
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(1, unet.config.in_channels, 16, 16), 1, torch.zeros(1, 16, 128))
    assert 0.1e9 < counter.get_total_flops() <= 0.5e9


def test_text_encoder_is_the_alignment_clips(pipeline):
    ids = pipeline.tokenizer(["a cat riding a bike"], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 16)
    with torch.no_grad():
        ours = pipeline.text_encoder(ids).last_hidden_state
        clips = EmojiAlignment().model.text_model(ids).last_hidden_state
    torch.testing.assert_close(ours, clips)


def test_autoencoder_reconstructs_held_out_scenes(pipeline, sheet):
    images, _ = sheet
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * images - 1).latent_dist.mean
        output = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (output - images).square().flatten(1).mean(1).log10()
    assert psnr.mean() >= 28
    assert 0.7 < (latents * pipeline.vae.config.scaling_factor).std() < 1.4


@pytest.mark.parametrize("reward", [EmojiAlignment, EmojiJudge])
def test_clips_find_the_prompt_among_all(reward, sheet):
    images, own = sheet
    model, every = reward(), vocabulary.prompts()
    with torch.no_grad():
        chosen = (model.image_features(images) @ model.text_features(every).T).argmax(1)
    right = sum(every[k] == text for k, text in zip(chosen, own, strict=True))
    assert right / len(own) >= 0.8  # 72 scenes leave ±0.07; the model card has the rate over all 2,904: above 0.9


@pytest.mark.parametrize("reward", [EmojiAlignment, EmojiJudge, EmojiAesthetic])
def test_rewards_are_frozen_and_give_gradients(reward, sheet):
    model = reward()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    images = sheet[0][:3].clone().requires_grad_()
    scores = model(images, ["a cat", "lion", "a bike"])
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert all(gradient.abs().max() > 0 for gradient in images.grad)


def test_rewards_take_other_sizes(sheet):
    images = sheet[0][:2]
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    model = EmojiAlignment()
    torch.testing.assert_close(model(larger, sheet[1][:2]), model(images, sheet[1][:2]), atol=0.5, rtol=0)


@pytest.mark.parametrize("name", ["pipeline", "xl"])
def test_prompts_steer_the_painter(name, request):
    """Of four animals, the judge finds most of those asked for; without guidance's text it could find one in four."""
    animals = ["cow", "frog", "octopus", "zebra"]
    images = request.getfixturevalue(name)(
        animals * 3,
        num_inference_steps=10,
        guidance_scale=5.0,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(k) for k in range(12)],
        output_type="pt",
    ).images
    chosen = EmojiJudge().choose(images.float(), animals)
    assert sum(animals[k] == text for k, text in zip(chosen, animals * 3, strict=True)) >= 8


def test_the_xl_painter_hears_the_original_size(xl):
    """Asked for a picture that was once smaller, it paints one with less detail, as Stable Diffusion XL does."""
    detail = []
    for original in (32, 64):
        noise = [torch.Generator().manual_seed(k) for k in range(8)]
        sizes = {"original_size": (original, original), "target_size": (64, 64), "height": 64, "width": 64}
        images = xl(["cow", "frog"] * 4, num_inference_steps=10, generator=noise, output_type="pt", **sizes).images
        detail.append(images.diff(dim=-1).abs().mean())
    assert detail[0] < 0.95 * detail[1]


def test_the_xl_painter_has_two_text_encoders(xl):
    assert (
        xl.text_encoder.config.hidden_size + xl.text_encoder_2.config.hidden_size == xl.unet.config.cross_attention_dim
    )
    assert xl.unet.config.addition_embed_type == "text_time"
