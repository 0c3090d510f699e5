from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.foreign import OTHER_NAMES
from diffexp.settings import AlgorithmSettings, AlignPropSettings
from diffexp.toml import parse_override, read_toml, shipped


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        Recipe.load(recipe(tmp_path, text))
    return str(caught.value)


def test_defaults_are_the_papers() -> None:
    ddpo, alignprop = Recipe(), Recipe.parse({"algorithm": {"name": "alignprop"}}, "test")
    assert (ddpo.sampler.steps, ddpo.sampler.guidance, ddpo.samples, ddpo.optimizer.learning_rate) == (
        50,
        5.0,
        64,
        3e-4,
    )
    assert (alignprop.sampler.guidance, alignprop.optimizer.learning_rate) == (7.5, 1e-3)
    assert ddpo.optimizer.betas == alignprop.optimizer.betas == (0.9, 0.99)
    assert ddpo.algorithm.clip == 1e-4
    assert ddpo.exploration.until == 0.75
    assert ddpo.exploration.guidance is None
    assert ddpo.exploration.words is None
    explored = Recipe.parse({"exploration": {"guidance": {}, "words": {}}}, "test").exploration
    assert (explored.guidance.threshold, explored.words.low, explored.words.high) == (900, 1.0, 1.2)


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipes_are_valid_and_short(name: str) -> None:
    assert Recipe.load(name).reward
    assert len(shipped()[name]) > 10


def test_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    for name in shipped():
        resolved = Recipe.load(name, {"prompts": 'text:a "quoted" cät', "sampler.size": [64, 128]})
        assert Recipe.load(recipe(tmp_path, resolved.to_toml())) == resolved


def test_settings_of_other_trainers_are_translated(tmp_path: Path) -> None:
    assert complaint(tmp_path, "sample_num_steps = 20").endswith(
        "unknown key 'sample_num_steps': here that is sampler.steps"
    )


@pytest.mark.parametrize(("theirs", "ours"), OTHER_NAMES.items())
def test_translations_name_settings_that_there_are(theirs: str, ours: str) -> None:
    schema = Recipe.model_json_schema()["properties"]
    assert theirs not in schema
    recipe = Recipe.load("emoji-ddpo").model_dump() | {"algorithm": of_any_algorithm()}
    for name in re.findall(r"[a-z]+\.[a-z_]+|^[a-z]+", ours):
        section, _, key = name.partition(".")
        assert key in recipe[section] if key else section in recipe


def of_any_algorithm() -> dict[str, object]:
    """The settings of every algorithm together."""
    return {key: None for kind in get_args(get_args(AlgorithmSettings)[0]) for key in get_args(kind)[0].model_fields}


def test_overrides_reach_every_depth() -> None:
    changes = ["exploration.guidance.low=0", "seed=3", "lora.targets=['to_q']", "reward=jpeg-compressibility"]
    changed = Recipe.load("emoji-ddpo-diffexp", dict(map(parse_override, changes)))
    assert changed.exploration.guidance.low == 0
    assert changed.exploration.guidance.fraction == 0.1
    assert (changed.seed, changed.lora.targets, changed.reward) == (3, ("to_q",), "jpeg-compressibility")
    assert isinstance(Recipe.load("emoji-ddpo", {"algorithm": {"name": "alignprop"}}).algorithm, AlignPropSettings)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = """
    iterationz = 3
    samples = 0
    reward = "emoji-alignement"
    prompts = "animal"
    [sampler]
    steps = 10
    gidance = 3
    [algorithm]
    name = "alignprop"
    last_steps = 20
    [exploration.words]
    low = 2.0
    high = 1.0
    [exploration.guidance]
    threshold = 1200
    """
    message = complaint(tmp_path, text)
    for part in (
        "unknown key 'iterationz': did you mean 'iterations'?",
        "samples = 0",
        "did you mean 'emoji-alignment'?",
        "did you mean 'animals'?",
        "unknown key 'sampler.gidance': did you mean 'guidance'?",
        "exploration.words: low = 2.0 is above high = 1.0",
        "exploration.guidance.threshold = 1200",
        "algorithm.last_steps = 20 is above sampler.steps = 10",
    ):
        assert part in message, message
    assert len(message.splitlines()) == 8


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("sampler.eta = 0", "needs a density"),
        ('reward = "jpeg-compressibility"\nalgorithm.name = "alignprop"', "no gradient"),
        ("exploration.guidance.low = 9", "above sampler.guidance = 5.0"),
        ("samples = 10\nrollout.images_per_prompt = 4", "no multiple"),
        ('algorithm.name = "alignprop"\nalgorithm.copies = 2', "DRaFT-LV"),
        ("exploration.guidance = {threshold = 800, fraction = 0.2}", "leave one out"),
        ('algorithm.name = "ppo"', "ddpo"),
        ('algorithm.name = "alignprop"\nalgorithm.clip = 1', "unknown key 'algorithm.clip'"),
        ('evaluation.prompts = ["animls"]', "did you mean 'animals'"),
        ('evaluation.rewards = ["picscore"]', "did you mean 'pickscore'"),
        ('evaluation.rewards = ["hpsv2+aesthetic"]', "take 'hpsv2' and 'aesthetic' by itself"),
        ('evaluation.held_out = "2*hpsv2"', "'2*hpsv2' is a sum or has a weight, as only the training reward may"),
        ('iterations = "many"', "iterations"),
        ("[[seed", "no valid TOML"),
        ("model = 3", "model"),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, text: str, part: str) -> None:
    assert part in complaint(tmp_path, text)


def test_unknown_recipes_and_files() -> None:
    with pytest.raises(UserError, match="did you mean 'emoji-ddpo'"):
        Recipe.load("emoji-dppo")
    with pytest.raises(UserError, match="can't read the recipe"):
        Recipe.load("nowhere.toml")
    with pytest.raises(UserError, match=r"section\.key=value"):
        parse_override("seed")


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)
sections = st.sampled_from([*Recipe.model_fields, "nonsense"])
inner = st.dictionaries(
    st.sampled_from(["steps", "guidance", "name", "low", "words", "every", "x"]), values, max_size=3
)


@given(st.dictionaries(sections, st.one_of(values, inner), max_size=5))
def test_any_tables_are_a_recipe_or_a_clear_error(data: dict[str, object]) -> None:
    try:
        Recipe.parse(data, "fuzz")
    except UserError as error:
        assert all(line.startswith("fuzz: ") for line in str(error).splitlines())


def test_a_recipe_stands_on_its_base(tmp_path: Path) -> None:
    recipe(tmp_path, 'base = "emoji-ddpo-diffexp"\nsamples = 8\n[exploration.words]\nhigh = 1.5')
    (tmp_path / "child.toml").write_text('base = "my.toml"\niterations = 7\n[sampler]\nsteps = 5')
    child, base = Recipe.load(tmp_path / "child.toml"), Recipe.load("emoji-ddpo-diffexp")
    assert (child.iterations, child.samples, child.sampler.steps) == (7, 8, 5)
    assert (child.exploration.words.high, child.exploration.guidance) == (1.5, base.exploration.guidance)
    assert child.evaluation == base.evaluation


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ('"my.toml"', "is its own base"),
        ('"emoji-dddpo"', "unknown recipe"),
        ('"other.toml"', "can't read the recipe"),
        ("3", "give the name of a recipe"),
    ],
)
def test_a_base_that_is_none(base: str, message: str, tmp_path: Path) -> None:
    assert message in complaint(tmp_path, f"base = {base}")


@pytest.mark.parametrize("way", ["override", "base"])
def test_another_algorithm_takes_nothing_of_the_first_one(way: str, tmp_path: Path) -> None:
    """Neither K = 5 of AlignProp, which DDPO does not know, nor 5 for ReFL's own default; but the rest."""
    for name in ("ddpo", "rwr", "refl"):
        if way == "base":
            file = tmp_path / f"{name}.toml"
            file.write_text(f'base = "demo"\nalgorithm.name = "{name}"')
            changed = Recipe.load(file)
        else:
            changed = Recipe.load("demo", {"algorithm.name": name})
        assert changed.algorithm == type(changed.algorithm)()
        assert changed.prompts == Recipe.load("demo").prompts
    kept = Recipe.load("demo", {"algorithm.name": "alignprop", "algorithm.copies": 1})
    assert kept.algorithm == Recipe.load("demo").algorithm
    assert Recipe.parse({"algorithm": {"clip": 0.5}}, "", {"algorithm.name": "ddpo"}).algorithm.clip == 0.5
    assert Recipe.parse({"algorithm": {"clip": 0.5}}, "", {"seed": 1}).algorithm.clip == 0.5


def test_the_threshold_is_given_one_way_or_the_other() -> None:
    known = Recipe.load("demo-diffexp").exploration.guidance
    other = "threshold" if known.threshold is None else "fraction"
    value = {"threshold": 800, "fraction": 0.2}[other]
    guidance = Recipe.load("demo-diffexp", {f"exploration.guidance.{other}": value}).exploration.guidance
    assert getattr(guidance, other) == value
    assert (guidance.threshold is None) != (guidance.fraction is None)
    assert guidance.low == known.low
    both = {"exploration.guidance.threshold": 800, "exploration.guidance.fraction": 0.2}
    with pytest.raises(UserError, match="leave one out"):
        Recipe.load("demo-diffexp", both)


def test_a_list_whose_quotes_the_shell_took() -> None:
    with pytest.raises(UserError, match=r"""write a list: '\["pickscore", "imagereward"\]', in single quotes"""):
        Recipe.load("demo", {"evaluation.rewards": "[pickscore,imagereward]"})


@pytest.mark.parametrize("value", [float("inf"), [{"a": 1}], {"a key": 1}])
def test_settings_of_an_own_algorithm_survive_the_runs_folder(value: object, tmp_path: Path) -> None:
    own = {"name": "examples/reinforce.py:Reinforce", "batch": 4, "rates": (0.5, 1.0), "more": {"deep": ["x"]}}
    kept = Recipe.parse({"algorithm": own}, "test")
    (tmp_path / "config.toml").write_text(kept.to_toml())
    assert read_toml(tmp_path / "config.toml")["algorithm"] == {**own, "rates": [0.5, 1.0]}
    with pytest.raises(UserError, match=r"its settings can't be kept in a run's config\.toml"):
        Recipe.parse({"algorithm": {**own, "limit": value}}, "test")


def test_what_a_recipe_evaluates() -> None:
    """The evaluator, ``diffexp bench``, and the study's counts and figures ask the recipe."""

    def evaluated(**settings: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
        recipe = Recipe.parse({"prompts": "animals", "reward": "2*hpsv2+aesthetic", "evaluation": settings}, "test")
        return recipe.evaluated_prompts, recipe.evaluated_rewards

    assert evaluated() == (("animals",), ("hpsv2", "aesthetic"))
    assert evaluated(held_out="clipscore") == (("animals",), ("hpsv2", "aesthetic", "clipscore"))
    assert evaluated(prompts=["text:a cat", "animals", "text:a cat"], rewards=["clipscore"], held_out="clipscore") == (
        ("text:a cat", "animals"),
        ("clipscore",),
    )
