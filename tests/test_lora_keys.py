"""ComfyUI and A1111 find every layer of our kohya files for Stable Diffusion 1.5 and XL, at their full shapes.

Their rules are re-stated here from what is known of them, not copied: which names they accept for which layer of the
models as Stability's code builds them. Networks come from the published configurations, without memory for weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import write_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffexp.models import TextToImage, lora
from diffexp.models.base import Source
from diffexp.models.lora import writer
from diffexp.models.lora.adapters import adapters
from diffexp.models.lora.keys import places, stems
from diffexp.models.schedulers import ddim_scheduler
from diffexp.models.sdxl import StableDiffusionXL
from diffexp.models.stable_diffusion import StableDiffusion

ALPHA, RANK = 8.0, 4
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv", "conv1", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "linear_1")
TARGETS = (*lora.ATTENTION, *FEED_FORWARD, *CONVOLUTIONS)
TEXT_TARGETS = (*lora.TEXT_ATTENTION, "fc1", "fc2")
PARAMETERS = {  # as published
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


def config(kind: str, part: str) -> dict[str, Any]:
    return json.loads((files("diffexp.models") / "configs" / kind / part / "config.json").read_text())


def build(kind: str, folder: Path) -> TextToImage:
    """The full model, its weights on the meta device."""
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    scheduler = json.loads(
        (files("diffexp.models") / "configs" / kind / "scheduler" / "scheduler_config.json").read_text()
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config(kind, "unet"))
        vae = AutoencoderKL.from_config(config(kind, "vae"))
        encoder = CLIPTextModel(CLIPTextConfig(**config(kind, "text_encoder")))
        common = unet, vae, ddim_scheduler(scheduler), Source(kind)
        if kind != "sdxl":
            return StableDiffusion(*common, tokenizer, encoder)
        second = CLIPTextModelWithProjection(CLIPTextConfig(**config(kind, "text_encoder_2")))
    return StableDiffusionXL(*common, (tokenizer, tokenizer), (encoder, second))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    full = build(kind, tmp_path_factory.mktemp(kind))
    lora.add(full, RANK, ALPHA, targets=TARGETS, text_targets=TEXT_TARGETS)
    return full


@pytest.fixture(scope="module")
def kohya(model: TextToImage) -> dict[str, Tensor]:
    return writer.to_kohya(adapters(model), model.kohya_text_encoders)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_the_bundled_configurations_are_the_published_models(kind: str, tmp_path: Path) -> None:
    model = build(kind, tmp_path)
    parts = {**model.networks(), "vae": model.vae}
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == PARAMETERS[kind]
    assert model.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")
    assert model.latent_shape() == (4, *(2 * [{"sd15": 64, "sd21": 96, "sdxl": 128}[kind]]))
    expected = {
        "sd15": ("sd_v1", "stable-diffusion-v1"),
        "sd21": ("sd_v2_v", "stable-diffusion-v2-768-v"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    }
    assert writer.family(model) == expected[kind]


def stability_blocks(depths: list[int], attention: list[bool]) -> Iterator[tuple[str, str]]:
    """(diffusers' name, Stability's name) of every block of the network, counted as Stability's code builds them.

    It appends to one list of input blocks: the first convolution, then at each level two rows of resnet (and
    attention) and, but for the last level, a downsampling. Output blocks are three rows a level, the upsampling at the
    end of the level's last row.
    """
    yield "conv_in", "input_blocks.0.0"
    counter = 1
    for level in range(len(depths)):
        for row in range(2):
            yield f"down_blocks.{level}.resnets.{row}", f"input_blocks.{counter}.0"
            if attention[level]:
                yield f"down_blocks.{level}.attentions.{row}", f"input_blocks.{counter}.1"
            counter += 1
        if level < len(depths) - 1:
            yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{counter}.0"
            counter += 1
    for place, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{name}", f"middle_block.{place}"
    counter = 0
    for up, level in enumerate(reversed(range(len(depths)))):
        for row in range(3):
            yield f"up_blocks.{up}.resnets.{row}", f"output_blocks.{counter}.0"
            if attention[level]:
                yield f"up_blocks.{up}.attentions.{row}", f"output_blocks.{counter}.1"
            if row == 2 and level > 0:
                yield f"up_blocks.{up}.upsamplers.0", f"output_blocks.{counter}.{2 if attention[level] else 1}"
            counter += 1
    yield from (("conv_out", "out.2"), ("time_embedding.linear_1", "time_embed.0"))
    if len(depths) == 3:  # SDXL
        yield "add_embedding.linear_1", "label_emb.0.0"


INSIDE = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection", "conv": "conv"}


def stability_layers(kind: str, unet: nn.Module) -> dict[str, str]:
    """Every layer of the network with an adapter: its path in diffusers, and in Stability's code."""
    shapes = {"sd15": ([1] * 4, [True, True, True, False]), "sdxl": ([0, 2, 10], [False, True, True])}
    blocks = dict(stability_blocks(*shapes[kind]))
    found = {}
    for path, module in unet.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        block = max((name for name in blocks if path == name or path.startswith(f"{name}.")), key=len)
        rest = path[len(block) :].strip(".")
        inside = "op" if "downsamplers" in block else INSIDE.get(rest, rest)
        found[path] = ".".join(filter(None, (blocks[block], inside)))
    return found


Rule = Callable[[str], str | None]
"""What a name in a file means in the tool's own model; None if nothing."""


def comfyui(kind: str, model: TextToImage) -> Rule:
    """Names that ComfyUI accepts: of the network's layers both in diffusers' and in Stability's spelling.

    Of the text encoders' layers ``lora_te_`` or ``lora_te1_`` where there is one, ``lora_te1_`` and ``lora_te2_`` for
    SDXL's two, with transformers' paths below ``text_model.encoder.layers``.
    """
    accepted = {}
    for ours, theirs in stability_layers(kind, model.unet).items():
        for name in (ours, theirs):
            accepted["lora_unet_" + name.replace(".", "_")] = f"diffusion_model.{theirs}.weight"
    encoders = {"sd15": {"clip_l": (("lora_te", "lora_te1"), 12)}}.get(
        kind, {"clip_l": (("lora_te1",), 12), "clip_g": (("lora_te2",), 32)}
    )
    for encoder, (prefixes, layers) in encoders.items():
        for prefix in prefixes:
            for layer in range(layers):
                for part in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))):
                    path = f"text_model.encoder.layers.{layer}.{part}"
                    accepted[f"{prefix}_{path.replace('.', '_')}"] = f"{encoder}.transformer.{path}.weight"
    return accepted.get


def a1111(kind: str, model: TextToImage) -> Rule:
    """Names that A1111 accepts: it rewrites diffusers' block names by number, and looks the result up in its model.

    Its second text encoder of SDXL is OpenCLIP's, whose attention has one layer for q, k and v: there the name without
    ``_q_proj`` counts.
    """
    rows = 3

    def in_the_model(key: str) -> str:
        if match := re.fullmatch(r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
            place = 1 + int(match[1]) * rows + int(match[3])
            return f"diffusion_model_input_blocks_{place}_{int(match[2] == 'attentions')}_{inside(match[4])}"
        if match := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key):
            place = 1 if match[1] == "attentions" else int(match[2]) * 2
            return f"diffusion_model_middle_block_{place}_{inside(match[3])}"
        if match := re.fullmatch(r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
            place = int(match[1]) * rows + int(match[3])
            return f"diffusion_model_output_blocks_{place}_{int(match[2] == 'attentions')}_{inside(match[4])}"
        if match := re.fullmatch(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", key):
            return f"diffusion_model_input_blocks_{rows + int(match[1]) * rows}_0_op"
        if match := re.fullmatch(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", key):
            level = int(match[1])
            has_attention = level > 0 if kind == "sd15" else level < 2
            return f"diffusion_model_output_blocks_{2 + level * rows}_{1 + has_attention}_conv"
        fixed = {
            "lora_unet_conv_in": "diffusion_model_input_blocks_0_0",
            "lora_unet_conv_out": "diffusion_model_out_2",
            "lora_unet_time_embedding_linear_1": "diffusion_model_time_embed_0",
        }
        if key in fixed:
            return fixed[key]
        if match := re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", key):
            return f"transformer_text_model_encoder_layers_{match[1]}_{match[2]}"
        if match := re.fullmatch(r"lora_te1_text_model_encoder_layers_(\d+)_(.+)", key):
            return f"0_transformer_text_model_encoder_layers_{match[1]}_{match[2]}"
        if match := re.fullmatch(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", key):
            rest = match[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
            return f"1_model_transformer_resblocks_{match[1]}_{re.sub('_[qkv]_proj$', '', rest)}"
        return key

    def inside(rest: str) -> str:
        return {name: theirs.replace(".", "_") for name, theirs in INSIDE.items()}.get(rest, rest)

    layers = {"diffusion_model_" + theirs.replace(".", "_") for theirs in stability_layers(kind, model.unet).values()}
    encoder = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")))
    first = "transformer" if kind == "sd15" else "0_transformer"
    layers |= {f"{first}_text_model_encoder_layers_{i}_{part}" for i in range(12) for part in encoder}
    if kind == "sdxl":
        openclip = ("attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj")
        layers |= {f"1_model_transformer_resblocks_{i}_{part}" for i in range(32) for part in openclip}
    return lambda key: in_the_model(key) if in_the_model(key) in layers else None


@pytest.mark.parametrize("tool", [comfyui, a1111])
def test_no_key_is_left_over(
    tool: Callable[[str, TextToImage], Rule], kind: str, model: TextToImage, kohya: dict[str, Tensor]
) -> None:
    meaning = tool(kind, model)
    names = {key.partition(".")[0] for key in kohya}
    if tool is a1111:  # whether it has a name for this one of SDXL's layers is not known here
        names -= {"lora_unet_add_embedding_linear_1"}
    assert [name for name in names if meaning(name) is None] == []
    attention = [name for name in names if re.search(r"attn[12]_to_", name)]
    assert len(attention) == {"sd15": 128, "sdxl": 560}[kind], "known from ComfyUI's own key map"
    encoders = [name for name in names if name.startswith("lora_te")]
    assert len(encoders) == 6 * {"sd15": 12, "sdxl": 12 + 32}[kind]
    unets = {meaning(name) for name in names if name.startswith("lora_unet")}
    assert len(unets) == len(names) - len(encoders), "no two layers meet under one name"


def test_every_layer_has_its_matrices_and_its_alpha(model: TextToImage, kohya: dict[str, Tensor]) -> None:
    """lora_down (rank, in, k, k), lora_up (out, rank, 1, 1), alpha the true one; float16."""
    weights = places(model)
    shapes = {stem: weights[place] for stem, place in stems(model).items()}
    names = {key.partition(".")[0] for key in kohya}
    assert set(kohya) == {f"{name}.{end}" for name in names for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    for name in names:
        out, *into = shapes[name]
        down, up, alpha = (kohya[f"{name}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert (down.shape, up.shape) == ((RANK, *into), (out, RANK, *(1 for _ in into[1:]))), name
        assert (down.dtype, alpha.shape, float(alpha)) == (torch.float16, (), ALPHA), name


def test_kohyas_own_names_are_read_too(kind: str, model: TextToImage) -> None:
    known = stems(model)
    for ours, theirs in stability_layers(kind, model.unet).items():
        assert known["lora_unet_" + theirs.replace(".", "_")].path == ours


def test_diffusers_keys_are_todays(kind: str, model: TextToImage) -> None:
    tensors = writer.to_diffusers(adapters(model))
    stated = writer.diffusers_config(model, adapters(model))
    assert {key.split(".")[0] for key in tensors} == set(model.networks())
    for folder in model.networks():
        assert (stated[f"{folder}.r"], stated[f"{folder}.lora_alpha"]) == (RANK, ALPHA)
        if folder != "unet":
            assert all(key.startswith(f"{folder}.text_model.") for key in tensors if key.startswith(f"{folder}."))
    assert set(lora.ATTENTION) < set(stated["unet.target_modules"]), "short names, where they mean the same layers"
    assert stated["text_encoder.target_modules"] == sorted(TEXT_TARGETS)
