from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from diffexp import doctor
from diffexp.toml import shipped
from diffexp.version import __version__


def test_it_says_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("DIFFEXP_REWARD_TOKEN", "alsosecret")
    home = tmp_path / "ada.lovelace"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / ".cache" / "hub"))
    found = doctor.examine()
    assert [part for part in found.values() if isinstance(part, dict) and "error" in part] == []
    assert found["diffexp"] == __version__
    assert found["packages"]["torch"] == version("torch")
    assert found["hub"]["cache"] == "~/.cache/hub"
    assert found["rewards"]["emoji-alignment"] == "here"
    assert found["models"]["emoji"] == "here"
    assert found["recipes"].keys() == shipped().keys()
    assert found["recipes"]["demo"] == "runs here"
    text = json.dumps(found) + doctor.describe(found)
    for private in ("hf_verysecret", "alsosecret", "ada.lovelace"):
        assert private not in text
    assert len(doctor.describe(found).splitlines()) == 11


def test_a_broken_part_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("driver mismatch\nsecond line")

    monkeypatch.setattr(doctor, "devices", fail)
    found = doctor.examine()
    assert found["devices"] == {"error": "RuntimeError: driver mismatch second line"}
    assert "devices   RuntimeError: driver mismatch" in doctor.describe(found)
    assert found["recipes"]["demo"] == "runs here"


def test_old_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "nosuch>=1", 'wandb>=0.19; extra == "wandb"'])
    assert doctor.packages()["torch"] == version("torch") + ", but needs >=99"
    assert doctor.packages()["nosuch"] == "missing"
    monkeypatch.setattr(doctor, "version", lambda name: "0.18.1")
    assert doctor.extras() == {"wandb": "not installed"}
    monkeypatch.setattr(doctor, "version", lambda name: "0.20")
    assert doctor.extras() == {"wandb": "installed"}
    monkeypatch.setattr(doctor, "requires", lambda _: [f'{name}; extra == "docs"' for name in ("mkdocs", "nosuch")])
    monkeypatch.setattr(doctor, "state", lambda each: "missing" if each.name == "nosuch" else "1.0")
    assert doctor.extras() == {"docs": "incomplete (packages missing: nosuch)"}


def test_one_is_no_plural() -> None:
    part = {"name": "a CPU", "cores": 2, "threads": 1, "abilities": ["AVX2"]}
    assert doctor.say_cpu(part) == "a CPU, 2 cores, 1 thread; AVX2"


@pytest.mark.parametrize(
    ("kind", "gib", "name", "expected"),
    [
        ("cuda", 8, "sd15-8gb", "runs here"),
        ("cuda", 8, "sdxl-16gb", "needs a GPU with about"),
        ("cuda", 24, "sdxl-16gb", "runs here"),
        ("cpu", 64, "sd15-8gb", "needs a GPU with about"),
        ("cpu", 4, "sd15-8gb", "needs a GPU with about"),  # more memory would not do
        ("cpu", 64, "emoji-ddpo", "runs here"),
        ("cpu", 1, "emoji-ddpo", "needs about 1.5 GiB of memory"),
        ("mps", 36, "sd15-8gb", "runs here"),
    ],
)
def test_what_a_machine_can_run(
    kind: str, gib: float, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffexp.devices.device", lambda _: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: gib * 2**30)
    monkeypatch.setattr(doctor, "memory", lambda: {"gib": gib})
    assert doctor.recipes()[name].startswith(expected)


def test_an_older_gpu_is_told_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffexp.devices.device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = doctor.recipes()
    assert found["sd15-8gb"] == "runs here with --set model.precision=fp16"  # its recipe is in bf16
    assert found["emoji-ddpo"] == "runs here"  # in fp32
