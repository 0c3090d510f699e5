"""Every reward model against its reference, on tiny models in the published layouts.

``golden/rewards/make.py`` wrote the numbers of hpsv2, image-reward and simple-aesthetics-predictor with those packages.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BatchEncoding,
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
)

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # before Pillow's had a name of its own
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

from diffexp.errors import UserError
from diffexp.rewards import aesthetic, hpsv2, imagereward
from diffexp.rewards.aesthetic import AestheticReward
from diffexp.rewards.base import score
from diffexp.rewards.clip import Clip
from diffexp.rewards.clipscore import clipscore
from diffexp.rewards.pickscore import pickscore
from diffexp.rewards.preprocess import CLIP_MEAN, CLIP_STD, preprocess
from diffexp.rewards.weights import frozen

GOLDEN = Path(__file__).parent / "golden" / "rewards"
sys.path.insert(0, str(GOLDEN))
import formula  # noqa: E402

NUMBERS = json.loads((GOLDEN / "golden.json").read_text())
TOLERANCE = {"rel": 1e-4, "abs": 1e-6}


def golden_state(name):
    shapes = {f"{name}/{key}": tuple(shape) for key, shape in NUMBERS[name]["shapes"].items()}
    return {key.removeprefix(f"{name}/"): torch.tensor(value) for key, value in formula.weights(shapes).items()}


def pictures(*names, height=32, width=32):
    arrays = [formula.image(name, height, width) for name in names]
    return torch.stack([torch.tensor(array).permute(2, 0, 1) / 255 for array in arrays])


class FixedTokens:
    """Stands in for a tokenizer where the golden numbers come with token ids: prompt i has the i-th ids."""

    def __init__(self, ids, mask=None):
        self.ids = torch.tensor(ids)
        self.mask = (self.ids >= 0).long() if mask is None else torch.tensor(mask)

    def __call__(self, prompts, **kwargs):
        rows = [int(prompt) for prompt in prompts]
        return BatchEncoding({"input_ids": self.ids[rows], "attention_mask": self.mask[rows]})


TINY_CLIP = CLIPConfig(
    projection_dim=16,
    vision_config={
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "hidden_act": "gelu",
        "projection_dim": 16,
    },
    text_config={
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "vocab_size": 50,
        "hidden_act": "gelu",
        "eos_token_id": 49,
        "projection_dim": 16,
    },
)
TOKENS = NUMBERS["hpsv2"]["tokens"]


@pytest.fixture
def clip():
    model = CLIPModel(TINY_CLIP)
    shapes = {f"clip/{key}": tuple(value.shape) for key, value in model.state_dict().items()}
    state = {key.removeprefix("clip/"): torch.tensor(value) for key, value in formula.weights(shapes).items()}
    model.load_state_dict(state)
    return Clip(model, FixedTokens(TOKENS))


@pytest.fixture
def blip(tmp_path):
    vision = BlipVisionConfig(
        **imagereward.VISION
        | {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
    )
    text = BlipTextConfig(
        **imagereward.TEXT
        | {
            "vocab_size": 50,
            "hidden_size": 24,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
        }
    )
    imagereward.convert(golden_state("imagereward"), tmp_path, vision, text)
    tokens = FixedTokens(NUMBERS["imagereward"]["ids"], NUMBERS["imagereward"]["mask"])
    return imagereward.open_converted(tmp_path, tokens, "cpu")


@pytest.fixture(params=["clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward"])
def reward(request, clip):
    if request.param == "imagereward":
        return request.getfixturevalue("blip")
    if request.param == "aesthetic":
        weight = torch.tensor(formula.noise("head", (16,)))
        return AestheticReward(clip, weight, torch.tensor(0.5))
    make = {"clipscore": clipscore, "pickscore": pickscore, "hpsv2": hpsv2.hpsv2}[request.param]
    return make(clip)


# Preprocessing


@pytest.mark.parametrize("shape", [(64, 64), (224, 224), (512, 512), (300, 200), (201, 333)])
def test_preprocessing_is_within_a_hundredth_of_pillow(shape):
    image = formula.image("preprocess", *shape)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
    actual = preprocess(torch.tensor(image).permute(2, 0, 1)[None] / 255)
    deviation = torch.tensor(CLIP_STD).view(3, 1, 1)
    assert actual.shape == (1, 3, 224, 224)
    assert ((actual - expected) * deviation).abs().max() <= 1e-2


def test_preprocessing_is_pillows_arithmetic_without_rounding():
    image = formula.image("preprocess", 50, 70)
    channels = [Image.fromarray(image[..., channel].astype("float32")) for channel in range(3)]
    wide = [np.asarray(channel.resize((44, 50), Image.Resampling.BICUBIC)).clip(0, 255) for channel in channels]
    resized = [np.asarray(Image.fromarray(channel).resize((44, 32), Image.Resampling.BICUBIC)) for channel in wide]
    expected = torch.tensor(np.stack(resized).clip(0, 255) / 255)[:, :, 6:38]
    actual = preprocess(torch.tensor(image).permute(2, 0, 1)[None] / 255, 32)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    assert torch.allclose(actual * std + mean, expected.float(), atol=1e-5)


def test_padding_keeps_the_whole_image_on_black():
    pixels = preprocess(torch.ones(1, 3, 20, 40), 32, "pad")
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    assert torch.allclose(pixels[0, :, :8], black.view(3, 1, 1).expand(3, 8, 32))
    assert torch.allclose(pixels[0, :, 24:], black.view(3, 1, 1).expand(3, 8, 32))
    assert (pixels[0, :, 8:24] > 1).all()


def test_preprocessing_passes_gradients_to_what_it_keeps():
    images = torch.full((1, 3, 40, 60), 0.5, requires_grad=True)
    preprocess(images, 16).sum().backward()
    assert (images.grad[..., 25:35] != 0).all()
    assert (images.grad[..., :5] == 0).all()


# Parity


def test_pickscore_is_clip_models_own_logit(clip):
    images = pictures("a", "b")
    pixels = (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        out = clip.model(input_ids=torch.tensor(TOKENS), pixel_values=pixels)
    assert pickscore(clip)(images, ["0", "1"]).tolist() == pytest.approx(
        out.logits_per_image.diag().tolist(), **TOLERANCE
    )


def test_clipscore_is_a_hundred_times_the_cosine_and_never_negative(clip):
    images = pictures("a", "b", "c", "d")
    pixels = (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    prompts = ["0", "1", "1", "0"]
    with torch.no_grad():
        out = clip.model(input_ids=torch.tensor(TOKENS), pixel_values=pixels)
    cosines = (out.text_embeds @ out.image_embeds.T)[[0, 1, 1, 0], range(4)]
    expected = [max(100 * cosine, 0) for cosine in cosines.tolist()]
    assert clipscore(clip)(images, prompts).tolist() == pytest.approx(expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "height", "width"), [("square", 64, 64), ("wide", 40, 72)])
def test_hpsv2_equals_the_published_package(tmp_path, name, height, width):
    hpsv2.convert(golden_state("hpsv2"), tmp_path, TINY_CLIP)
    reward = hpsv2.hpsv2(Clip(frozen(CLIPModel, tmp_path, "cpu"), FixedTokens(TOKENS)))
    images = pictures(f"hpsv2/{name}/0", f"hpsv2/{name}/1", height=height, width=width)
    assert score(reward, images, ["0", "1"]).tolist() == pytest.approx(NUMBERS["hpsv2"]["scores"][name], **TOLERANCE)


def test_aesthetic_equals_the_published_package(tmp_path):
    state = golden_state("aesthetic")
    tower = CLIPConfig(
        projection_dim=16,
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ).to_dict(),
        text_config=TINY_CLIP.text_config.to_dict(),
    )
    model = CLIPModel(tower)
    report = model.load_state_dict(
        {key: value for key, value in state.items() if "layers." not in key[:7]}, strict=False
    )
    assert not report.unexpected_keys
    assert all(key.startswith("text_") or key == "logit_scale" for key in report.missing_keys)
    weight, bias = aesthetic.fold(state, "layers.")
    reward = AestheticReward(Clip(model, FixedTokens(TOKENS)), weight, bias)
    images = pictures("aesthetic/0", "aesthetic/1")
    assert score(reward, images, ["0", "1"]).tolist() == pytest.approx(NUMBERS["aesthetic"]["scores"], **TOLERANCE)


def test_imagereward_equals_the_published_package(blip):
    images = pictures("imagereward/0", "imagereward/1")
    assert score(blip, images, ["0", "1"]).tolist() == pytest.approx(NUMBERS["imagereward"]["scores"], **TOLERANCE)


def test_norms_have_the_published_epsilon(blip):
    # Too small to show in scores of order one, but not in half precision.
    towers = {"imagereward": (blip.vision, blip.text), "hpsv2": (CLIPModel(TINY_CLIP),)}
    for name, models in towers.items():
        found = [{norm.eps for norm in model.modules() if isinstance(norm, torch.nn.LayerNorm)} for model in models]
        assert found == [{eps} for eps in NUMBERS[name]["eps"]]


def test_imagereward_reads_prompts_as_bert_does_padded_to_35_tokens(blip):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    blip.tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    ids = torch.zeros(2, 35, dtype=torch.long)
    ids[0, :4] = torch.tensor([2, 5, 6, 3])
    ids[1] = torch.tensor([2] + [5] * 33 + [3])
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    images = pictures("imagereward/0", "imagereward/1")
    expected = blip.score_pixels(preprocess(images, 32), ids, mask)
    assert torch.allclose(blip(images, ["A cat", "a " * 50]), expected)


def test_the_head_folds_into_one_map():
    layers = torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    )
    state = {f"layers.{key}": value.detach() for key, value in layers.state_dict().items()}
    weight, bias = aesthetic.fold(state, "layers.")
    x = torch.tensor(formula.noise("x", (7, 5)))
    assert torch.allclose(x @ weight + bias, layers.eval()(x).squeeze(1), atol=1e-6)
    del state["layers.2.bias"]
    with pytest.raises(UserError, match="no head"):
        aesthetic.fold(state, "layers.")


def test_a_file_of_another_size_is_refused(tmp_path):
    state = golden_state("hpsv2")
    with pytest.raises(UserError, match="expected size"):
        hpsv2.convert(state, tmp_path)
    del state["visual.proj"]
    with pytest.raises(UserError, match="1 differences, as visual_projection"):
        hpsv2.convert(state, tmp_path, TINY_CLIP)
    with pytest.raises(UserError, match="visual_encoder"):
        imagereward.convert(golden_state("imagereward"), tmp_path)


def published(name):
    """The published file's weights by name, of the right shapes but without numbers."""
    rows = NUMBERS["published"][name]
    keys = {pattern.format(layer): shape for pattern, shape, layers in rows for layer in range(layers or 1)}
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def test_the_published_hpsv2_file_fits():
    weights = hpsv2.rename(published("hpsv2"), CLIPConfig(**hpsv2.VIT_H_14))
    # open_clip's own profile of ViT-H-14: 986.11 M parameters.
    assert sum(value.numel() for value in weights.values()) == pytest.approx(986.11e6, rel=1e-5)


def test_the_published_imagereward_file_fits():
    state = published("imagereward")
    vision = imagereward.rename_vision(state, BlipVisionConfig(**imagereward.VISION))
    text = imagereward.rename_text(state, BlipTextConfig(**imagereward.TEXT))
    assert len(vision) + len(text) == len([key for key in state if not key.endswith("position_ids")])


# What every reward model must do


def test_gradients_reach_the_images_and_no_weight(reward):
    images = pictures("a", "b", height=48, width=48).requires_grad_()
    scores = score(reward, images, ["0", "1"])
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert images.grad.isfinite().all()
    # CLIPScore is flat where the cosine is negative.
    live = images.grad.flatten(1).abs().amax(dim=1) > 0
    assert (live | (scores == 0)).all()
    assert live.any()
    models = [part.model if isinstance(part, Clip) else part for part in vars(reward).values()]
    modules = [model for model in models if isinstance(model, torch.nn.Module)]
    assert modules
    assert all(not value.requires_grad for module in modules for value in module.parameters())
    assert not any(module.training for module in modules)


def test_chunks_change_nothing(reward):
    images = pictures("a", "b", "c", "d", "e")
    prompts = ["0", "1", "0", "1", "1"]
    whole = reward(images, prompts)
    reward.batch = 2
    assert torch.allclose(reward(images, prompts), whole, rtol=1e-5, atol=1e-6)
    assert reward(images[:0], []).shape == (0,)


def test_scores_depend_on_the_image(reward):
    scores = reward(pictures("a", "b", "c"), ["0", "0", "0"])
    assert len(set(scores.tolist())) > 1
