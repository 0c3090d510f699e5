"""Published weights: pickles only by their hash, hub files at their commit, one clear line where one is missing."""

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffexp import rewards
from diffexp.errors import UserError
from diffexp.rewards import sources, weights
from diffexp.rewards.aesthetic import convert
from diffexp.rewards.base import score
from diffexp.rewards.clip import load_clip


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine of its own: an empty hub cache, no network, nothing vouched for."""
    monkeypatch.setenv("DIFFEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFEXP_TRUST_SHA256", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_clip.cache_clear()
    yield tmp_path
    load_clip.cache_clear()


def snapshot(machine, source):
    folder = machine / "hub" / f"models--{source.repo.replace('/', '--')}" / "snapshots" / source.revision
    folder.mkdir(parents=True)
    return folder


def place(source, content):
    """Put a file where the user may put an original by hand."""
    path = sources.cache_folder() / source.files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


HEAD = {
    "layers.0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "layers.0.bias": torch.tensor([0.5, -0.5]),
    "layers.2.weight": torch.tensor([[2.0, -1.0]]),
    "layers.2.bias": torch.tensor([1.0]),
}
SOURCE = sources.AESTHETIC_HEAD


def unreachable(state, folder):
    raise AssertionError("converted although it must be refused")


# Pickles


def test_a_pickle_of_unknown_hash_is_refused_and_not_opened():
    digest = place(SOURCE, HEAD)
    with pytest.raises(UserError, match=f"SHA-256 {digest}, not the known 21dd590f.*set DIFFEXP_TRUST_SHA256={digest}"):
        weights.unpickled(SOURCE, unreachable)


def test_a_pickle_without_a_published_hash_needs_the_users_word(monkeypatch):
    digest = place(sources.HPS_20, {"state_dict": HEAD})
    with pytest.raises(UserError, match="no published hash"):
        weights.unpickled(sources.HPS_20, unreachable)
    monkeypatch.setenv("DIFFEXP_TRUST_SHA256", f"{'0' * 64}, {digest.upper()}")
    folder = weights.unpickled(sources.HPS_20, convert)
    assert load_file(folder / "head.safetensors")["weight"].tolist() == [-1, 0]


def test_a_known_pickle_is_converted_once(monkeypatch):
    known = dataclasses.replace(SOURCE, sha256=place(SOURCE, HEAD))
    folder = weights.unpickled(known, convert)
    head = load_file(folder / "head.safetensors")
    # (2, -1) [[1, 2], [3, 4]] = (-1, 0), and (2, -1) (0.5, -0.5) + 1 = 2.5.
    assert head["weight"].tolist() == [-1, 0]
    assert head["bias"].item() == 2.5
    (sources.cache_folder() / SOURCE.files[0]).unlink()
    assert weights.unpickled(known, unreachable) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_that_fails_leaves_nothing_behind():
    known = dataclasses.replace(SOURCE, sha256=place(SOURCE, {"other": torch.zeros(1)}))
    with pytest.raises(UserError, match="no head"):
        weights.unpickled(known, convert)
    assert [path.name for path in sources.cache_folder().iterdir()] == [SOURCE.files[0]]


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w')",)


@pytest.mark.parametrize("wrap", ["torch", "pickle"])
def test_a_hostile_pickle_runs_nothing_even_if_trusted(machine, monkeypatch, wrap):
    canary = machine / "canary"
    content = {"state_dict": Hostile(canary)}
    digest = place(SOURCE, content if wrap == "torch" else pickle.dumps(content))
    monkeypatch.setenv("DIFFEXP_TRUST_SHA256", digest)
    with pytest.raises(UserError, match="holds more than tensors"):
        weights.unpickled(SOURCE, unreachable)
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", {"state_dict": {"a": 3}}, [torch.zeros(1)]])
def test_what_is_no_table_of_tensors_is_refused(monkeypatch, content):
    monkeypatch.setenv("DIFFEXP_TRUST_SHA256", place(SOURCE, content))
    with pytest.raises(UserError, match=r"holds more than tensors|no table of tensors"):
        weights.unpickled(SOURCE, unreachable)


def test_a_malformed_trust_setting_is_said(monkeypatch):
    place(SOURCE, HEAD)
    monkeypatch.setenv("DIFFEXP_TRUST_SHA256", "abc")
    with pytest.raises(UserError, match="DIFFEXP_TRUST_SHA256 has 'abc'"):
        weights.unpickled(SOURCE, unreachable)


# The hub


@pytest.mark.parametrize("name", ["aesthetic", "clipscore", "pickscore", "hpsv2", "hpsv2.0", "imagereward"])
def test_missing_weights_are_one_line_that_says_what_to_do(name):
    with pytest.raises(UserError, match=r"not on this machine.*run once with a network, 'hf download") as error:
        rewards.load(name)
    needed = sources.NEEDS[name]
    assert any(source.repo in str(error.value) and source.revision in str(error.value) for source in needed)
    assert "\n" not in str(error.value)


def write_words(folder):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return vocabulary


@pytest.fixture
def tiny_clip(machine):
    """A tiny CLIP in the hub cache under the name and commit of CLIP ViT-L/14."""
    folder = snapshot(machine, sources.CLIP_L)
    vocabulary = write_words(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=2,
        vision_config=sizes | {"image_size": 16, "patch_size": 8, "projection_dim": 2},
        text_config=sizes
        | {
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 8,
            "eos_token_id": vocabulary["<|endoftext|>"],
            "projection_dim": 2,
        },
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_rewards_load_from_the_hub_cache_and_share_their_tower(tiny_clip, monkeypatch):
    monkeypatch.setenv("DIFFEXP_TRUST_SHA256", place(SOURCE, HEAD))
    assert [requirement.present for requirement in rewards.check("aesthetic+clipscore")] == [True, True, True]
    first, second = rewards.load("aesthetic+clipscore").rewards
    assert first.clip is second.clip
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    prompts = ["a cat", "a very long prompt that does not fit into the context", ""]
    features = first.clip.image_features(images)
    expected = features @ torch.tensor([-1.0, 0.0]) + 2.5
    assert torch.allclose(score(first, images, prompts), expected)
    assert score(second, images, prompts).shape == (3,)


def test_a_hub_folder_without_all_weights_is_refused(tiny_clip):
    state = load_file(tiny_clip / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tiny_clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing, as visual_projection"):
        rewards.load("clipscore")


def test_a_pytorch_bin_is_never_read(tiny_clip):
    state = load_file(tiny_clip / "model.safetensors")
    (tiny_clip / "model.safetensors").unlink()
    torch.save(state, tiny_clip / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"needs model\.safetensors"):
        rewards.load("clipscore")


# What is missing


def test_check_lists_what_is_missing_without_torch():
    code = (
        "import sys; from diffexp import rewards; needs = rewards.check('hpsv2+emoji-alignment'); "
        "assert len(needs) == 2, needs; assert needs[0].source.repo == 'xswu/HPSv2'; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_says_what_from_where_how_big_and_under_which_licence():
    model, tokenizer = rewards.check("imagereward")
    assert model.missing == ("ImageReward.pt",)
    assert not model.present
    assert model.source.size == pytest.approx(1.79e9, rel=0.01)
    assert model.source.licence == "Apache-2.0"
    assert tokenizer.source.repo == "google-bert/bert-base-uncased"
    assert rewards.check("jpeg-compressibility") == []
    with pytest.raises(UserError, match="unknown reward"):
        rewards.check("nothing")


def test_check_sees_a_file_that_was_put_there_by_hand():
    place(sources.HPS_20, b"anything")
    assert [requirement.present for requirement in rewards.check("hpsv2.0")] == [True, False]


def test_every_source_is_pinned():
    every = {source for needed in sources.NEEDS.values() for source in needed}
    for source in every:
        assert source.sha256 is None or len(source.sha256) == 64
        if source.pickled:
            assert len(source.files) == 1
        else:
            assert len(source.revision) == 40
            assert all(name.endswith((".json", ".txt", ".safetensors")) for name in source.files)
    assert {source.what for source in every if source.pickled and not source.sha256} == {"HPSv2.0"}
