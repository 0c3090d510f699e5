from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import Command, tiny
from conftest import disturb
from plaindiffusers import GUIDANCE, cat_from_noise, cat_of_diffusers, our_cat
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from tiny import write_original

from diffexp import models
from diffexp.errors import UserError
from diffexp.images import to_images
from diffexp.models import TextToImage, lora
from diffexp.models.header import put_in_order
from diffexp.pictures import open_png
from diffexp.randomness import generator
from diffexp.sharing.lora_header import METADATA_KEY


def with_lora(model: TextToImage, text_targets: Sequence[str] = ()) -> TextToImage:
    lora.add(model, rank=2, alpha=6, seed=3, text_targets=text_targets)
    disturb(model)
    return model


@pytest.fixture(scope="module")
def sd21_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v-prediction model with linear projections around its attention."""
    return write_original(tmp_path_factory.mktemp("original") / "sd21", "sd21")


def test_a_new_adapter_changes_nothing_and_its_seed_decides_it(model: TextToImage) -> None:
    text, x = model.encode(["a cat"]), torch.ones(1, 4, 8, 8)
    before, state = model.predict(x, 500, text, 5.0), torch.random.get_rng_state()
    lora.add(model, rank=2, seed=1)
    assert torch.equal(before, model.predict(x, 500, text, 5.0))
    assert torch.equal(state, torch.random.get_rng_state()), "peft's own initialisation must not be seen outside"
    down = torch.cat([p.detach().flatten() for name, p in model.trainable() if ".lora_A." in name])
    assert down.std() == pytest.approx(0.5, rel=0.1), "1 / rank"


def test_only_the_adapter_trains(model: TextToImage) -> None:
    with_lora(model)
    names = [name for name, _ in model.trainable()]
    assert names
    assert all(".lora_" in name for name in names)
    frozen = [*model.vae.parameters(), *(p for e in model.text_encoders().values() for p in e.parameters())]
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("kind", ["sd", "sd21", "xl"])
@pytest.mark.parametrize("file", ["folder", "kohya"])
def test_plain_diffusers_paints_the_same_image(
    kind: str, file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With an adapter on the network and on all text encoders, from either file."""
    folder = request.getfixturevalue(f"{kind}_folder")
    model = with_lora(models.load(str(folder)), lora.TEXT_ATTENTION)
    lora.save(model, tmp_path, "before the folder was renamed")
    _, kohya = lora.save(model, tmp_path, "mine")
    assert [file.name for file in tmp_path.glob("*.kohya.safetensors")] == ["mine.kohya.safetensors"]
    path = our_cat(model, steps=4)
    tolerance = 1e-5 if file == "folder" else 1e-3  # the kohya file is float16
    painted = cat_of_diffusers(folder, path, tmp_path if file == "folder" else kohya)
    torch.testing.assert_close(painted, path.images, rtol=0, atol=tolerance)
    assert (painted - cat_of_diffusers(folder, path)).abs().max() > 10 * tolerance, "the adapter must matter"


def test_what_sample_paints_of_a_run_plain_diffusers_paints_too(
    sd_folder: Path, tmp_path: Path, diffexp: Command
) -> None:
    """From the training to the file and the image, with no code of ours on the other side but the noise's key."""
    run, out, steps = tmp_path / "run", tmp_path / "painted", 4
    changes = {
        "reward": f"{Path(__file__).parent / 'brightness.py'}:brightness",
        "algorithm__last_steps": 1,
        "optimizer__learning_rate": 0.1,
        "sampler__steps": steps,
        "sampler__guidance": GUIDANCE,
        "sampler__eta": 0.0,
    }
    assert diffexp("train", "emoji-alignprop", *tiny(sd_folder, **changes), "--out", str(run)).code == 0
    assert diffexp("sample", str(run), "--prompt", "a cat", "--n", "1", "--seed", "3", "--out", str(out)).code == 0
    ours = torch.from_numpy(np.array(open_png(out / "0.png"))).permute(2, 0, 1)[None] / 255
    noise = torch.randn(1, 4, 8, 8, generator=generator(3, "sample", 0, "noise"))
    painted = cat_from_noise(sd_folder, noise, steps, (16, 16), run / "lora")
    torch.testing.assert_close(painted, ours, rtol=0, atol=1 / 255)
    untouched = cat_from_noise(sd_folder, noise, steps, (16, 16))
    assert (painted - untouched).abs().max() > 10 / 255, "the training must matter"


def test_kohya_keys_are_complete_and_carry_the_true_alpha(model: TextToImage, tmp_path: Path) -> None:
    with_lora(model)
    _, kohya = lora.save(model, tmp_path, "mine")
    tensors = load_file(kohya)
    # the rule of ComfyUI and A1111: lora_unet_ + the module's path with underscores
    modules = {name for name, module in model.unet.named_modules() if hasattr(module, "lora_A")}
    expected = {
        "lora_unet_" + name.replace(".", "_") + suffix
        for name in modules
        for suffix in (".lora_down.weight", ".lora_up.weight", ".alpha")
    }
    assert set(tensors) == expected
    assert {float(t) for name, t in tensors.items() if name.endswith(".alpha")} == {6.0}
    with safe_open(kohya, "pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "6.0")


def test_both_headers_have_what_tools_show(model: TextToImage, tmp_path: Path) -> None:
    """A1111 tells the kind of model by ss_base_model_version and ss_v2; ModelSpec has its own fields for the same."""
    xl = len(model.text_encoders()) == 2
    for file in lora.save(with_lora(model), tmp_path, "mine", {"diffexp.queries": "7"}):
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        assert header["ss_base_model_version"].startswith("sdxl_") == xl
        assert (header["ss_v2"], header["ss_output_name"], header["diffexp.queries"]) == ("False", "mine", "7")
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "6.0")
        kind = "stable-diffusion-xl-v1-base/lora" if xl else "stable-diffusion-v1/lora"
        assert header["modelspec.architecture"] == kind
        assert (header["modelspec.resolution"], header["modelspec.prediction_type"]) == ("16x16", "epsilon")
        # kohya's hash: of everything after the header, so that notes in it don't change it
        content = file.read_bytes()
        tensors = content[8 + int.from_bytes(content[:8], "little") :]
        assert header["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()
        assert header["modelspec.hash_sha256"] == f"0x{header['sshs_model_hash']}"
        again = lora.save(model, tmp_path / "again", "mine", {"diffexp.queries": "7"})
        assert content in [path.read_bytes() for path in again], "the same adapter makes the same file"


def test_headers_are_in_order_and_tensors_aligned(tmp_path: Path) -> None:
    """The library writes metadata in an order that differs from process to process."""
    tensors = {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.float16), "c": torch.tensor(2.0), "d": torch.ones(0)}
    metadata = {key: f"ü \n\x01 {key}" for key in "qwertyuiopasdfghjklzxcvbnm"}
    content = io.BytesIO(save(tensors, metadata))
    before = content.getvalue()
    put_in_order(content)
    after = content.getvalue()
    size = int.from_bytes(after[:8], "little")
    header = json.loads(after[8 : 8 + size])
    assert list(header) == ["__metadata__", "b", "c", "d", "a"]
    assert list(header["__metadata__"].items()) == sorted(metadata.items())
    assert (size % 8, after[8 + size :], len(after)) == (0, before[8 + size :], len(before))
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load(after).items())


def test_load_restores_what_save_wrote(sd_folder: Path, tmp_path: Path) -> None:
    saved, _ = lora.save(with_lora(models.load(str(sd_folder))), tmp_path, "mine", {"diffexp.reward": "brightness"})
    loaded = models.load(str(sd_folder))
    lora.load(loaded, saved)
    reference = with_lora(models.load(str(sd_folder)))
    text, x = loaded.encode(["a cat"]), torch.ones(1, 4, 8, 8)
    assert torch.equal(loaded.predict(x, 500, text, 5.0), reference.predict(x, 500, text, 5.0))
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    assert header["diffexp.reward"] == "brightness"
    assert json.loads(header[METADATA_KEY])["unet.lora_alpha"] == 6


def test_foreign_files_are_refused(sd_folder: Path, tmp_path: Path) -> None:
    model = models.load(str(sd_folder))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="can't read the LoRA"):
        lora.load(model, bad)
    save_file({"weight": torch.ones(1)}, bad)
    with pytest.raises(UserError, match="no LoRA"):
        lora.load(model, bad)
    lora.add(model, rank=2)
    with pytest.raises(UserError, match="does not fit"):
        model.set_state({"weight": torch.ones(1)})


def test_images_are_rounded_not_cut() -> None:
    picture = to_images(torch.full((1, 3, 2, 2), 0.999))[0]
    assert picture.getpixel((0, 0)) == (255, 255, 255)
