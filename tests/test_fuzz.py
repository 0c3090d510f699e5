"""Whatever recipes, overrides, prompts, rewards and headers hold: it is taken, or it is the user's mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.numpy import save_file

from diffexp import models, prompts, rewards
from diffexp.config import Recipe
from diffexp.errors import UserError, printable
from diffexp.exploration import WordWeighting
from diffexp.models import TextToImage
from diffexp.prompts.files import UNCLEAN
from diffexp.randomness import generator
from diffexp.sharing.lora_header import LoraHeader, like
from diffexp.toml import loads, parse_override

# always the same examples: what fails here must fail everywhere
fuzz = settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
every_letter = st.text(st.characters(), max_size=40)  # halves of pairs and control characters too
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([2**63, -(10**30), 10**400, float("nan")]))
scalars = st.one_of(st.none(), st.booleans(), numbers, every_letter, st.dates(), st.datetimes())
names = st.sampled_from(["animals", "text:a cat", "a.txt", "x:y", "__main__:f", "2*hpsv2+", "auto", "ddpo", "x" * 5000])
values = st.recursive(
    st.one_of(scalars, names),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(every_letter, inner)),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, every_letter, names),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(every_letter, inner, max_size=3)),
)


def members(annotation: Any) -> Iterator[type[BaseModel]]:
    # for Python 3.10 tuple[int, int] is a type, too
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from members(part)


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, sections and what is in them."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for section in members(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


KEYS = sorted(set(keys(Recipe)))


def one_line_each(error: UserError, start: str = "") -> None:
    """Asserts that every line of a complaint says where it is from."""
    assert all(line.startswith(start) for line in str(error).split("\n"))


@fuzz
@given(st.dictionaries(st.sampled_from(KEYS), st.one_of(values, names), max_size=4))
def test_any_value_of_any_key(changes: dict[str, Any]) -> None:
    assert len(KEYS) > 50
    try:
        recipe = Recipe.parse({}, "fuzz", changes)
    except UserError as error:
        one_line_each(error)
    else:
        assert Recipe.parse(json.loads(json.dumps(recipe.model_dump(mode="json"))), "fuzz") == recipe


@fuzz
@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from("[]{}=.\"'\n#, ab1"), max_size=40).map("".join)))
def test_any_text_as_a_recipe(text: str, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text, encoding="utf-8", newline="")
    try:
        Recipe.load(file)
    except UserError as error:
        one_line_each(error)
        assert "my.toml" in str(error)


@fuzz
@given(content=st.binary(max_size=60))
def test_any_bytes_as_a_recipe(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(content)
    try:
        Recipe.load(tmp_path / "my.toml")
    except UserError as error:
        assert "my.toml" in str(error)


@fuzz
@given(st.one_of(every_letter, st.builds("{}={}".format, st.sampled_from(KEYS), every_letter)))
def test_any_override(text: str) -> None:
    try:
        Recipe.parse({}, "fuzz", dict([parse_override(text)]))
    except UserError as error:
        one_line_each(error)


@fuzz
@given(value=st.one_of(scalars, every_letter.map("text:{}".format)), key=st.sampled_from(KEYS))
def test_an_accepted_recipe_reads_back_from_its_toml(key: str, value: Any) -> None:
    try:
        recipe = Recipe.parse({}, "fuzz", {key: value})
    except UserError:
        return
    assert Recipe.parse(loads(recipe.to_toml().encode().decode()), "fuzz") == recipe


@fuzz
@given(content=st.one_of(st.binary(max_size=80), every_letter.map(lambda text: text.encode("utf-8", "surrogatepass"))))
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_any_prompt_file(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"p{suffix}"
    file.write_bytes(content)
    clean_prompts(file)


@fuzz
@given(entries=st.lists(st.one_of(json_values, st.fixed_dictionaries({"prompt": json_values})), max_size=4))
def test_any_json_lines_as_prompts(entries: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    clean_prompts(file)


@fuzz
@given(every_letter)
def test_any_name_of_prompts(name: str) -> None:
    clean_prompts(name)


def clean_prompts(name: str | Path) -> None:
    try:
        found = prompts.load(name)
    except UserError as error:
        assert "\n" not in printable(str(error))
    else:
        assert found
        assert all(prompt.strip() == prompt and prompt and not UNCLEAN.search(prompt) for prompt in found)


@fuzz
@given(st.one_of(every_letter, names, st.builds("{}*{}+{}:{}".format, every_letter, names, every_letter, every_letter)))
def test_any_name_of_a_reward(name: str) -> None:
    try:
        rewards.check_name(name)
        rewards.is_differentiable(name)
    except UserError as error:
        assert "\n" not in printable(str(error))


@fuzz
@given(recipe=json_values, reward=every_letter)
def test_any_header(recipe: Any, reward: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    metadata = {"diffexp.recipe": json.dumps(recipe), "diffexp.reward": reward.encode("utf-8", "replace").decode()}
    save_file({"unet.to_q.lora_A.weight": np.zeros((1, 1))}, file, metadata)
    header = LoraHeader.read(file)
    assert header.describe().replace("\n", "").isprintable()
    assert json.loads(header.to_json())
    try:
        like(file, {"device": "cpu"})
    except UserError as error:
        assert printable(str(error))


@pytest.fixture(scope="module")
def model(sd_folder: Path) -> TextToImage:
    return models.load(str(sd_folder))


@fuzz
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=3), unit=st.sampled_from(["word", "token"]))
def test_any_text_is_embedded_and_its_words_weighted(model: TextToImage, texts: list[str], unit: str) -> None:
    text = model.encode(texts)
    length = text.hidden.shape[1]
    for words in text.words:
        places = [place for word in words for place in word]
        assert places == sorted(set(places))
        assert all(0 < place < length - 1 for place in places), "BOS and EOS are no words"
    weighting = WordWeighting(1.5, 2.0, unit)
    choice = weighting.draw(text, [generator("fuzz", k) for k in range(len(texts))])
    weighted = weighting.apply(text, choice)
    for row, words in enumerate(text.words):
        units = weighting.units(words)
        chosen = set(units[choice.word[row]]) if units else set()
        moved = (weighted.hidden[row] - text.hidden[row]).abs().amax(1) > 0
        assert set(torch.nonzero(moved).flatten().tolist()) <= chosen
        assert torch.isfinite(weighted.hidden[row]).all()
