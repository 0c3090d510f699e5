"""Training goes on from LoRA files of others: whatever their keys, ranks and scales; what does not fit is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import disturb
from plaindiffusers import cat_of_diffusers, our_cat
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_real_layouts import metrics, recipe

from diffexp import models
from diffexp.errors import UserError
from diffexp.models import TextToImage, lora
from diffexp.sharing.lora_header import METADATA_KEY
from diffexp.training import Training

HALF = (1e-2, 2e-3)
"""Relative and absolute tolerance: kohya files are float16."""

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def predicted(model: TextToImage) -> torch.Tensor:
    with torch.no_grad():
        return model.predict(X, 500, model.encode(["a cat"]), 3.0)


@pytest.fixture(params=["sd", "xl"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def theirs(folder: Path) -> TextToImage:
    """A model with somebody's LoRA of rank 3 and alpha 5 in all networks."""
    model = models.load(str(folder))
    lora.add(model, 3, 5, targets=("to_q", "ff.net.2", "proj_in", "conv1"), text_targets=lora.TEXT_ATTENTION)
    disturb(model)
    return model


@pytest.mark.parametrize("file", [0, 1], ids=["diffusers", "kohya"])
def test_what_is_loaded_acts_the_same(folder: Path, theirs: TextToImage, file: int, tmp_path: Path) -> None:
    path = lora.save(theirs, tmp_path, "theirs")[file]
    mine = models.load(str(folder))
    before = predicted(mine)
    lora.start(mine, path, text_targets=lora.TEXT_ATTENTION)
    tolerance = (0, 0) if file == 0 else HALF
    torch.testing.assert_close(predicted(mine), predicted(theirs), rtol=tolerance[0], atol=tolerance[1])
    assert (predicted(mine) - before).abs().max() > 0.01, "the adapter must matter"
    assert {name for name, _ in mine.trainable()} == {name for name, _ in theirs.trainable()}
    # written again, it is the same file: ranks, scales and names survive
    again = lora.save(mine, tmp_path / "again", "theirs")[file]
    one, other = load_file(path), load_file(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_ranks_and_scales_may_differ_between_layers(sd_folder: Path, tmp_path: Path) -> None:
    """kohya files with another rank for convolutions; and a layer without alpha, which counts as its rank."""
    source = models.load(str(sd_folder))
    lora.add(source, 2, 4, targets=("to_q", "to_k", "conv1"))
    disturb(source)
    tensors = load_file(lora.save(source, tmp_path, "mixed")[1])
    narrow = [key for key in tensors if "conv1" in key and key.endswith("lora_down.weight")]
    for key in narrow:  # rank 2 to rank 1, with an alpha of its own
        up = key.replace("lora_down", "lora_up")
        tensors[key], tensors[up] = tensors[key][:1].clone(), tensors[up][:, :1].clone()
        tensors[key.replace("lora_down.weight", "alpha")] = torch.tensor(0.25)
    removed = next(key for key in tensors if "to_k" in key and key.endswith("alpha"))
    del tensors[removed]
    save_file(tensors, tmp_path / "mixed.safetensors")
    mine = models.load(str(sd_folder))
    lora.load(mine, tmp_path / "mixed.safetensors")
    found = {
        name.replace(".", "_"): (module.r["default"], module.scaling["default"])
        for name, module in mine.unet.named_modules()
        if hasattr(module, "lora_A")
    }
    bare = removed.removeprefix("lora_unet_").removesuffix(".alpha")
    for name, scale in found.items():
        assert scale == ((1, 0.25) if "conv1" in name else (2, 1.0) if name == bare else (2, 2.0)), name
    saved = lora.save(mine, tmp_path / "again", "mixed")
    for file in saved:
        once_more = models.load(str(sd_folder))
        lora.load(once_more, file)
        torch.testing.assert_close(predicted(once_more), predicted(mine), rtol=HALF[0], atol=HALF[1])
    with safe_open(saved[1], "pt") as opened:
        header = opened.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def stability_names(key: str) -> str:
    """kohya's own names for the tiny SDXL, block by block: one row of resnet and attention a block."""
    for ours, name in (
        ("down_blocks_0_attentions_0", "input_blocks_1_1"),
        ("mid_block_attentions_0", "middle_block_1"),
        ("up_blocks_1_attentions_0", "output_blocks_2_1"),
        ("up_blocks_1_attentions_1", "output_blocks_3_1"),
        ("down_blocks_0_resnets_0_conv1", "input_blocks_1_0_in_layers_2"),
        ("down_blocks_1_resnets_0_conv1", "input_blocks_3_0_in_layers_2"),
        ("mid_block_resnets_0_conv1", "middle_block_0_in_layers_2"),
        ("mid_block_resnets_1_conv1", "middle_block_2_in_layers_2"),
        ("up_blocks_0_resnets_0_conv1", "output_blocks_0_0_in_layers_2"),
        ("up_blocks_0_resnets_1_conv1", "output_blocks_1_0_in_layers_2"),
        ("up_blocks_1_resnets_0_conv1", "output_blocks_2_0_in_layers_2"),
        ("up_blocks_1_resnets_1_conv1", "output_blocks_3_0_in_layers_2"),
    ):
        if key.startswith(f"lora_unet_{ours}"):
            return key.replace(ours, name)
    assert key.startswith("lora_te"), key
    return key


def test_kohyas_own_names_for_sdxl(xl_folder: Path, tmp_path: Path) -> None:
    source = models.load(str(xl_folder))
    lora.add(source, 2, 6, targets=("to_q", "to_out.0", "conv1"), text_targets=lora.TEXT_ATTENTION)
    disturb(source)
    tensors = {stability_names(key): tensor for key, tensor in load_file(lora.save(source, tmp_path, "x")[1]).items()}
    save_file(tensors, tmp_path / "kohya.safetensors")
    mine = models.load(str(xl_folder))
    lora.load(mine, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(predicted(mine), predicted(source), rtol=HALF[0], atol=HALF[1])
    # and diffusers reads that file as we do
    path = our_cat(mine)
    painted = cat_of_diffusers(xl_folder, path, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(painted, path.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("pattern", "old"),
    [
        (r"\.lora_([AB])\.weight", {"A": ".lora.down.weight", "B": ".lora.up.weight"}),
        (r"\.lora_([AB])\.weight", {"A": "_lora.down.weight", "B": "_lora.up.weight"}),
    ],
    ids=["2023", "first"],
)
def test_older_forms_of_diffusers(sd_folder: Path, tmp_path: Path, pattern: str, old: dict[str, str]) -> None:
    """Without a header: alpha is the rank. The first form named attention's layers by their processor."""
    source = models.load(str(sd_folder))
    lora.add(source, 2, 2, text_targets=lora.TEXT_ATTENTION)
    disturb(source)

    def rename(key: str) -> str:
        renamed = re.sub(pattern, lambda match: old[match[1]], key)
        if "_lora." in renamed:
            renamed = re.sub(r"(attn[12])\.(to_[qkv]|to_out)(\.0)?_lora", r"\1.processor.\2_lora", renamed)
            renamed = re.sub(r"self_attn\.(q|k|v|out)_proj_lora", r"self_attn.to_\1_lora", renamed)
        return renamed

    tensors = load_file(lora.save(source, tmp_path, "x")[0])
    save_file({rename(key): tensor for key, tensor in tensors.items()}, tmp_path / "old.safetensors")
    mine = models.load(str(sd_folder))
    lora.load(mine, tmp_path / "old.safetensors")
    assert torch.equal(predicted(mine), predicted(source))


def test_a_new_adapter_for_encoders_that_the_file_says_nothing_about(xl_folder: Path, tmp_path: Path) -> None:
    source = models.load(str(xl_folder))
    lora.add(source, rank=3, alpha=6)
    disturb(source)
    file, _ = lora.save(source, tmp_path, "x")
    mine = models.load(str(xl_folder))
    lora.start(mine, file, text_targets=lora.TEXT_ATTENTION)
    assert torch.equal(predicted(mine), predicted(source)), "a new adapter changes nothing yet"
    assert mine.learns_text
    shapes = {p.shape for name, p in mine.trainable() if name.startswith("text_encoder") and ".lora_A." in name}
    assert shapes == {(3, 16)}


@pytest.mark.parametrize("folder", ["sd", "xl"], indirect=True)
def test_a_run_goes_on_from_a_file(folder: Path, theirs: TextToImage, tmp_path: Path) -> None:
    """Rank, alpha and layers are the file's, and its effect is there before the first update."""
    file = lora.save(theirs, tmp_path, "theirs")[1]
    algorithm = "alignprop" if len(theirs.text_encoders()) == 2 else "ddpo"
    changes = {"lora.start": str(file), "lora.text_encoders": True, "iterations": 1}
    settings = recipe(str(folder), algorithm, **changes)
    assert (settings.lora.rank, settings.lora.targets) == (None, None)
    training = Training(settings, tmp_path / "run")
    torch.testing.assert_close(predicted(training.model), predicted(theirs), rtol=HALF[0], atol=HALF[1])
    run = training.run()
    assert metrics(run)[0]["grad_norm"] > 0
    with safe_open(run / "lora" / "pytorch_lora_weights.safetensors", "pt") as opened:
        header = opened.metadata()
    stated = json.loads(header[METADATA_KEY])
    assert (stated["unet.r"], stated["unet.lora_alpha"], stated["text_encoder.r"]) == (3, 5, 3)
    assert len(header["diffexp.start_sha256"]) == 64
    assert str(tmp_path) not in header["diffexp.recipe"]
    assert "rank 3, alpha 5" in (run / "lora" / "README.md").read_text()


def test_settings_that_contradict_the_file(sd_folder: Path, tmp_path: Path) -> None:
    source, mine = models.load(str(sd_folder)), models.load(str(sd_folder))
    lora.add(source, 3, 5, targets=("to_q", "conv1"), text_targets=lora.TEXT_ATTENTION)
    _, file = lora.save(source, tmp_path, "theirs")
    for settings, message in (
        ({"rank": 8}, r"lora.rank = 8: the LoRA .*theirs.kohya.safetensors has 3; leave lora.rank out"),
        ({"alpha": 3.0}, r"lora.alpha = 3: the LoRA .* has 5; leave lora.alpha out"),
        ({"targets": ("to_q",)}, r"lora.targets = \['to_q'\]: the LoRA .* has .*; leave lora.targets out"),
        ({"text_targets": ()}, r"lora.text_encoders = false: the LoRA .* is one of the text encoders too"),
    ):
        with pytest.raises(UserError, match=message):
            lora.start(mine, file, **{"text_targets": lora.TEXT_ATTENTION, **settings})
        assert not list(mine.trainable()), "nothing was added"
    lora.start(mine, file, 3, 5, ("to_q", "conv1"), lora.TEXT_ATTENTION)


def test_files_of_other_models_and_other_kinds(sd_folder: Path, xl_folder: Path, tmp_path: Path) -> None:
    xl, sd, file = models.load(str(xl_folder)), models.load(str(sd_folder)), tmp_path / "x.safetensors"
    lora.add(xl, rank=2, text_targets=lora.TEXT_ATTENTION)
    both = lora.save(xl, tmp_path, "xl")
    for theirs in both:
        with pytest.raises(
            UserError, match=r"does not fit this model: \d+ of its \d+ layers are not in it, (text_enc|lora_te2)"
        ):
            lora.load(sd, theirs)
    wide = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.ones(2, 32)}
    wide["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight"] = torch.ones(8, 2)
    save_file(wide, file)
    with pytest.raises(UserError, match=r"to_k does not fit this model: it is for a layer of 8×32, this one is 8×16"):
        lora.load(sd, file)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for foreign in ("hada_w1_a", "lokr_w1", "dora_scale", "lora_mid.weight", "diff"):
        save_file({f"{name}.{foreign}": torch.ones(1)}, file)
        with pytest.raises(UserError, match=f"no LoRA that can be read here .* it has {name}.{foreign}"):
            lora.load(sd, file)
    save_file({f"{name}.lora_down.weight": torch.ones(2, 16)}, file)
    with pytest.raises(UserError, match="no LoRA that can be read here"):
        lora.load(sd, file)
    with pytest.raises(UserError, match=r"can't read the LoRA .*nowhere"):
        lora.load(sd, tmp_path / "nowhere.safetensors")


def test_a_header_of_another_kind_of_adapter(sd_folder: Path, tmp_path: Path) -> None:
    source = models.load(str(sd_folder))
    lora.add(source, 4, 8)
    disturb(source)
    tensors = load_file(lora.save(source, tmp_path, "x")[0])
    file = tmp_path / "y.safetensors"
    save_file(tensors, file, {METADATA_KEY: json.dumps({"unet.use_dora": True})})
    with pytest.raises(UserError, match="use_dora is set"):
        lora.load(models.load(str(sd_folder)), file)
    save_file(tensors, file, {METADATA_KEY: "{"})
    with pytest.raises(UserError, match="is damaged"):
        lora.load(models.load(str(sd_folder)), file)
    # rank-stabilised LoRA scales by alpha / √rank: with alpha 4 and rank 4 by 2, as alpha 8 does without
    save_file(tensors, file, {METADATA_KEY: json.dumps({"unet.lora_alpha": 4, "unet.use_rslora": True})})
    mine = models.load(str(sd_folder))
    lora.load(mine, file)
    assert torch.equal(predicted(mine), predicted(source))
