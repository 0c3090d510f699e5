"""Stable Diffusion 1.5, 2.1 and XL train from folders and from a hub cache, laid out as the originals are."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from plaindiffusers import cat_of_diffusers, our_cat
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_hub_cache, write_original

from diffexp import commands, models, train
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.models import hub, loading
from diffexp.models.base import Source
from diffexp.processes.interruption import Interrupted
from diffexp.terminal.reporter import Reporter

KINDS = ("sd15", "sd21", "sdxl")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALGORITHMS = {"ddpo": {"name": "ddpo", "minibatches": 1}, "alignprop": {"name": "alignprop", "last_steps": 1}}


def recipe(path: str, algorithm: str | dict[str, Any], **changes: Any) -> Recipe:
    """Two iterations on a tiny model, the first with exploration; ``algorithm`` by name, or as a table."""
    settings = {
        "iterations": 2,
        "samples": 2,
        "prompts": "text:a cat riding a bike",
        "reward": f"{Path(__file__).parent / 'brightness.py'}:brightness",
        "device": "cpu",
        "trackers": [],
        "model": {"path": path},
        "sampler": {"steps": 2},
        "algorithm": ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm,
        "exploration": {"until": 0.5, "guidance": {"threshold": 500}, "words": {}},
        "evaluation": {"images": 1, "every": 2},
        "preview": {"images": 0},
    }
    return Recipe.parse(settings, "test", changes)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def base_commit_of(run: Path) -> str:
    """What the LoRA file says that it was trained on."""
    with safe_open(run / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        return file.metadata()["diffexp.base_commit"]


class Stopping(Reporter):
    """Stops the run in its first iteration, as SIGTERM does."""

    def stepped(self, record: Mapping[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("original") / kind, kind)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's, where all kinds are alike."""
    return write_original(tmp_path_factory.mktemp("original") / "one", "sdxl")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no network: whoever asks for one fails."""

    def refuse(*address: Any, **_: Any) -> None:
        raise OSError(f"no network, but asked for {address}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_from_a_folder(kind: str, folder: Path, algorithm: str, tmp_path: Path) -> None:
    size = {"sampler.size": [16, 32]} if kind == "sdxl" else {}  # height and width: other than square
    run = train(recipe(str(folder), algorithm, **size), tmp_path / "run")
    lines = metrics(run)
    assert [line["queries"] for line in lines] == [2, 4]
    assert all(line["grad_norm"] > 0 for line in lines)
    if algorithm == "ddpo":
        assert lines[0]["ratio_deviation"] == 0, "exploration is on, and the update knows of it"
    assert (run / "lora" / "run.kohya.safetensors").is_file()


def test_sizes_other_than_square_are_diffusers(one: Path) -> None:
    """SDXL is told the size; its pipeline at 16 × 32 paints what our sampler does."""
    model = models.load(str(one))
    path = our_cat(model, size=(16, 32))
    assert path.images.shape == (1, 3, 16, 32)
    torch.testing.assert_close(cat_of_diffusers(one, path), path.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_from_the_hubs_cache_without_a_network(
    kind: str, folder: Path, algorithm: str, offline: Path, tmp_path: Path
) -> None:
    write_hub_cache(offline, "someone/model", folder, COMMIT)
    run = train(recipe("someone/model", algorithm, iterations=1), tmp_path / "run")
    assert "diffexp train --like" in (run / "lora" / "README.md").read_text()
    assert COMMIT in (run / "lora" / "README.md").read_text(), "the card names the commit of the base model"
    assert base_commit_of(run) == COMMIT


def test_a_run_goes_on_with_the_commit_that_it_began_with(one: Path, offline: Path, tmp_path: Path) -> None:
    """The hub's branch moves while the run is stopped: to other weights, that the cache has by then."""
    write_hub_cache(offline, "someone/model", one, COMMIT)
    settings, run = recipe("someone/model", "ddpo"), tmp_path / "run"
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after iteration 1"):
        train(settings, run, Stopping())
    other, moved = write_original(tmp_path / "other", "sdxl"), "b" * 40
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    write_hub_cache(offline, "someone/model", other, moved)
    assert hub.locate("someone/model", None)[1].commit == moved
    train(settings, run)
    assert base_commit_of(run) == COMMIT
    assert [line["reward_mean"] for line in metrics(run)] == [line["reward_mean"] for line in metrics(whole)]
    assert commands.open_painter(str(run), ()).sampler.model.source.commit == COMMIT
    assert commands.open_painter(str(run), ["model.revision=main"]).sampler.model.source.commit == moved


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_revision_is_resolved_to_its_commit(revision: str | None, one: Path, offline: Path) -> None:
    write_hub_cache(offline, "someone/model", one, COMMIT)
    found, source = hub.locate("someone/model", revision)
    assert source == Source("someone/model", COMMIT)
    assert (found / "model_index.json").is_file()


def test_of_a_commit_in_the_cache_nobody_is_asked(one: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library tries for 23 seconds where there is no network."""
    snapshot = write_hub_cache(offline, "someone/model", one, COMMIT)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "snapshot_download", None)
        assert hub.locate("someone/model", COMMIT) == (snapshot, Source("someone/model", COMMIT))
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert hub.cached("someone/model", COMMIT, None) is None, "what lacks a part is not all there"


def test_what_is_not_cached_is_one_clear_line(one: Path, offline: Path) -> None:
    write_hub_cache(offline, "someone/model", one, COMMIT)
    with pytest.raises(UserError, match="hub or its cache has at revision 'another'"):
        models.load("someone/model", revision="another")
    with pytest.raises(UserError, match="neither a folder nor"):
        models.load("someone/else")
    with pytest.raises(UserError, match=r"can't open unet: .*diffusion_pytorch_model.fp16.safetensors"):
        models.load("someone/model", variant="fp16")


def test_a_variant_is_read_from_its_own_files(kind: str, folder: Path, offline: Path, tmp_path: Path) -> None:
    """The fp16 weights, and only they: the others are not even there."""
    halved = tmp_path / "fp16"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        target = halved / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
            save_file(tensors, target.with_suffix(".fp16.safetensors"), {"format": "pt"})
        else:
            target.write_bytes(file.read_bytes())
    write_hub_cache(offline, "someone/model", halved, COMMIT)
    model, exact = models.load("someone/model", variant="fp16"), models.load(str(folder))
    assert model.dtype == torch.float32
    for mine, theirs in zip(model.unet.parameters(), exact.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs.half().float())


REPOSITORY = (
    "model_index.json",
    "README.md",
    "v1-5-pruned-emaonly.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "unet/script.py",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "safety_checker/model.safetensors",
)


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        (
            None,
            {
                "unet/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors",
                "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
            },
        ),
        (
            "fp16",
            {
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "text_encoder/model.fp16.safetensors",
                "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            },
        ),
    ],
)
def test_only_what_is_needed_is_downloaded(
    variant: str | None, wanted: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **more: asked.update(more) or str(tmp_path / COMMIT))
    _, source = hub.locate("someone/model", "main", variant)
    assert (source.commit, asked["revision"]) == (COMMIT, "main"), "the cache remembers which commit that was"
    fetched = {file for file in REPOSITORY if any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])}
    assert {file for file in fetched if file.endswith(".safetensors")} == wanted
    assert {Path(file).suffix for file in fetched} == {".json", ".txt", ".safetensors"}
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt"} <= fetched


@pytest.mark.parametrize(("precision", "vae"), [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_the_vae_is_never_fp16(one: Path, precision: str, vae: torch.dtype) -> None:
    model = models.load(str(one), precision)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (model.vae.dtype, model.decode(latents).dtype) == (vae, torch.float32)
    exact = models.load(str(one)).decode(latents)
    assert (model.decode(latents) - exact).abs().max() < (1e-6 if precision == "fp16" else 0.05)


def test_a_weight_that_lacks_is_no_random_number(one: Path, tmp_path: Path) -> None:
    for part, lost in (("text_encoder", "text_model.final_layer_norm.weight"), ("unet", "conv_out.bias")):
        broken = tmp_path / part
        for file in (path for path in one.rglob("*") if path.is_file()):
            target = broken / file.relative_to(one)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        weights = next((broken / part).glob("*.safetensors"))
        tensors = load_file(weights)
        del tensors[lost]
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(UserError, match=f"{part} is no whole .*: 1 weights lack"):
            models.load(str(broken))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "9 channels"),
        ({"time_cond_proj_dim": 8}, "guidance scale as an input"),
        ({"addition_embed_type": "text_image"}, "'text_image' besides the text"),
    ],
)
def test_networks_of_another_kind_are_refused(
    change: dict[str, Any], message: str, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(str(one))
    for key, value in change.items():
        monkeypatch.setitem(model.unet_config, key, value)
        monkeypatch.setattr(model, "unet_config", type(model.unet_config)({**model.unet_config, **change}))
    with pytest.raises(UserError, match=message):
        loading.check_network(model, "mine")
