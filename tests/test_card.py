from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffexp.config import Recipe
from diffexp.images import save_images
from diffexp.models.base import Source
from diffexp.sharing import card

PROMPTS = ['a "quoted" cat: 3', "a bike", "a dog", "an ant", "a bee", "a cow"]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run folder as training leaves it, without the training."""
    (tmp_path / "mine.py").write_text("")
    folder = tmp_path / "first"
    for iteration, colour in ((0, "navy"), (5, "gray"), (10, "gold")):
        pictures = [Image.new("RGB", (16, 16), colour) for _ in PROMPTS]
        save_images(pictures, folder / "samples" / f"iteration-{iteration:04d}")
    (folder / "samples" / "prompts.json").write_text(json.dumps(PROMPTS))
    (folder / "lora").mkdir()
    reward = f"{tmp_path / 'mine.py'}:f"
    rows = [
        {"iteration": at, "queries": at * 64, "prompts": prompts, "reward": name, "mean": mean + at, "std": 1, "n": 45}
        for at in (0, 5, 10)
        for prompts, name, mean in [("animals", reward, 1.0), ("animals", "clipscore", 20.0)]
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"reward": reward, "iterations": 10, "exploration": {"guidance": {}}}
    (folder / "config.toml").write_text(Recipe.parse(settings, "test").to_toml())
    return folder


def write(folder: Path, name: str, commit: str | None, xl: bool = False) -> tuple[dict[str, Any], str]:
    """The card's YAML and its text."""
    recipe = Recipe.load(folder / "config.toml")
    text = card.write(folder, recipe, Source(name, commit), xl).read_text(encoding="utf-8")
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), text


def test_what_the_hub_reads(finished: Path) -> None:
    data, text = write(finished, "stable-diffusion-v1-5/stable-diffusion-v1-5", "c0ffee")
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (data["library_name"], data["license"]) == ("diffusers", "creativeml-openrail-m")
    assert {"template:sd-lora", "lora", "text-to-image", "stable-diffusion", "ddpo"} <= set(data["tags"])
    after = data["widget"][0]
    assert after == {"text": PROMPTS[0], "output": {"url": "images/after-0.png"}}
    assert len(data["widget"]) == 2 * 4
    assert "<Gallery />" in text


def test_every_link_leads_to_a_file(finished: Path) -> None:
    data, text = write(finished, "emoji", None)
    links = {*re.findall(r"!\[.*?\]\((.*?)\)", text), *(item["output"]["url"] for item in data["widget"])}
    assert {"images/curve.svg", "images/before-after.png"} <= links
    assert all((finished / "lora" / link).stat().st_size > 0 for link in links)
    with Image.open(finished / "lora" / "images" / "after-0.png") as image:
        assert image.getpixel((0, 0)) == (255, 215, 0), "gold: of the last iteration"


def test_the_scores_before_and_after(finished: Path) -> None:
    _, text = write(finished, "emoji", None)
    assert "| animals | mine.py:f | 1 | 11 | 45 |" in text
    assert "| animals | clipscore, held out | 20 | 30 | 45 |" in text
    assert "640 reward queries" in text
    assert "guidance 1 for t > 900, then 5; in the first 75% of the iterations" in text
    assert "diffexp train --like pytorch_lora_weights.safetensors" in text


def test_a_card_names_no_folder_of_this_machine(finished: Path, tmp_path: Path) -> None:
    data, text = write(finished, str(tmp_path / "models" / "mine"), None, xl=True)
    assert str(tmp_path) not in text
    assert not any(str(tmp_path) in file.read_text() for file in (finished / "lora" / "images").glob("*.svg"))
    assert "base_model" not in data, "a folder is no model of the hub"
    assert "license" not in data
    assert "stable-diffusion-xl" in data["tags"]
    assert 'StableDiffusionXLPipeline.from_pretrained("path/to/the/base/model")' in text
    assert "The base model is a folder of the author's own" in text


def test_the_example_opens_its_base_model(finished: Path) -> None:
    """The card's own Python, on the emoji world, whose name means nothing to diffusers; a hub id is as it is."""
    _, text = write(finished, "emoji", None)
    (code,) = re.findall(r"```python\n(.*?)\npipeline.load_lora_weights", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)  # noqa: S102
    assert type(found["pipeline"]).__name__ == "StableDiffusionPipeline"
    assert "folder of the author's own" not in text
    _, text = write(finished, "someone/model", "c0ffee")
    assert 'StableDiffusionPipeline.from_pretrained("someone/model", revision="c0ffee")' in text
    assert "folder of the author's own" not in text


@pytest.mark.parametrize("train", ["lora", "unet"])
@pytest.mark.parametrize("base", ["emoji", "/models/mine"])
def test_a_blank_line_is_before_every_heading_and_around_every_block(train: str, base: str, finished: Path) -> None:
    config = finished / "config.toml"
    config.write_text(Recipe.load(config, {"model.train": train}).to_toml())
    (finished / "unet").mkdir()
    _, text = write(finished, base, None)
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line.startswith("## "):
            assert (lines[number - 1], lines[number + 1]) == ("", ""), line
    assert "\n\n\n" not in text
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert all(lines[number - 1] == "" for number in fences[::2])
    assert all(lines[number + 1] == "" for number in fences[1::2])


def test_without_previews_there_is_no_gallery(finished: Path) -> None:
    for file in sorted((finished / "samples").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    data, text = write(finished, "emoji", None)
    assert "widget" not in data
    assert "<Gallery />" not in text
