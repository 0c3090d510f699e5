"""Fine-tuning of the whole denoising network: saved as diffusers does it, resumed exactly, refused where it can't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from test_real_layouts import metrics, recipe
from test_training import Stop

from diffexp import assembly, models, train
from diffexp.commands import open_painter
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.models import full
from diffexp.sharing.lora_header import LoraHeader, like

WHOLE = {"model.train": "unet", "optimizer.learning_rate": 1e-3}


@pytest.mark.parametrize(("kind", "algorithm"), [("sd", "ddpo"), ("xl", "alignprop")])
def test_diffusers_loads_the_network(kind: str, algorithm: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    settings = recipe(str(folder), algorithm, **WHOLE)
    run = train(settings, tmp_path / "run")
    assert {path.name for path in (run / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
        "images",
    }
    network = UNet2DConditionModel.from_pretrained(run / "unet", local_files_only=True, use_safetensors=True)
    before = models.load(str(folder)).unet.state_dict()
    assert sum(not torch.equal(after, before[key]) for key, after in network.state_dict().items()) > len(before) / 2
    painted = open_painter(str(run), None).sampler.model
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), painted.unet.parameters(), strict=True))


def test_its_header_shows_and_repeats_the_run(sd_folder: Path, tmp_path: Path) -> None:
    run = train(recipe(str(sd_folder), "ddpo", **WHOLE, reward="jpeg-compressibility"), tmp_path / "run")
    shown = LoraHeader.read(run).describe()
    assert "a whole denoising network" in shown
    assert "rank" not in shown.partition("# the recipe")[0]
    again, _ = like(run, {"model.path": str(sd_folder), "device": "cpu", "trackers": []})
    assert again == Recipe.load(run / "config.toml")
    card = (run / "unet" / "README.md").read_text()
    assert "UNet2DConditionModel.from_pretrained" in card
    assert "template:sd-lora" not in card
    assert "diffexp train --like diffusion_pytorch_model.safetensors" in card


def test_resume_is_exact(sd_folder: Path, tmp_path: Path) -> None:
    settings = recipe(str(sd_folder), "ddpo", **WHOLE)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "resumed", Stop(after=2))
    runs = train(settings, tmp_path / "whole"), train(settings, tmp_path / "resumed")
    one, other = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in runs)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_in_bf16_the_weights_stay_float32(xl_folder: Path, tmp_path: Path) -> None:
    settings = recipe(str(xl_folder), "ddpo", **WHOLE, **{"model.precision": "bf16", "rollout.batch": 1})
    line = metrics(train(settings, tmp_path / "run"))[0]
    assert (line["ratio_deviation"], line["clip_fraction"]) == (0, 0)
    model = assembly.model(settings)
    assert (model.dtype, model.autocast, model.vae.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    computed: list[torch.dtype] = []
    model.unet.conv_out.register_forward_hook(lambda *call: computed.append(call[2].dtype))
    model.predict(torch.zeros(1, *model.latent_shape()), 500, model.encode(["a cat"]), 5.0)
    assert computed == [torch.bfloat16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.precision": "fp16"}, "model.precision = 'fp16' can't train the whole network"),
        ({"lora.start": "x.safetensors"}, "lora.start is set, but model.train = 'unet' trains no LoRA"),
        ({"lora.text_encoders": True}, "lora.text_encoders is set, but"),
        ({"algorithm.kl": 0.1}, "algorithm.kl = 0.1 needs the untouched network"),
    ],
)
def test_what_does_not_go_together(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe("emoji", "ddpo", **WHOLE, **change)


def test_another_models_network_is_refused(sd_folder: Path, xl_folder: Path, tmp_path: Path) -> None:
    small, large = models.load(str(sd_folder)), models.load(str(xl_folder))
    full.save(large, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    with pytest.raises(UserError, match="does not fit this model"):
        full.load(small, tmp_path)
    with pytest.raises(UserError, match="can't read the network"):
        full.load(small, tmp_path / "nowhere")
