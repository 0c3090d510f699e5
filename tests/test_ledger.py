from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import recipe

from diffexp import models, rewards, train
from diffexp.diversity import mean_diversity, pairwise_diversity
from diffexp.exploration import ConstantGuidance, Exploration, StepGuidance, WordChoice, WordWeighting
from diffexp.models import TextToImage
from diffexp.preview import Preview
from diffexp.rewards.features import choose, thumbnails
from diffexp.rollout import Batch, Sampler
from diffexp.runs.environment import describe as describe_environment
from diffexp.runs.environment import peak_memory
from diffexp.runs.ledger import describe, guidance_changes, word_columns


def test_guidance_is_kept_as_its_changes() -> None:
    assert guidance_changes((951, 901, 851, 801), (1.0, 1.0, 7.5, 7.5)) == [(951, 1.0), (851, 7.5)]
    assert guidance_changes((951, 901), (5.0, 5.0)) == [(951, 5.0)]


def test_what_a_word_earned() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 7.0])  # mean 4, standard deviation √5
    spelled = [["a", "cat"], ["a", "cat"], ["a", "dog"], []]
    columns = word_columns(WordChoice([1, 0, 1, 0], [1.0, 1.2, 1.1, 1.0]), spelled, rewards)
    assert columns["word"] == ["a", "cat", "dog"]
    assert columns["weighted"] == [1, 1, 1]
    assert columns["other"] == [2, 1, 0]
    assert columns["weight"] == [1.2, 1.0, 1.1]
    assert columns["reward"] == [3.0, 1.0, 5.0]
    assert columns["other_reward"] == [3.0, 3.0, None]
    assert columns["advantage"] == pytest.approx([-1 / 5**0.5, -3 / 5**0.5, 1 / 5**0.5], abs=1e-4)
    assert columns["other_advantage"] == [
        pytest.approx(-1 / 5**0.5, abs=1e-4),
        pytest.approx(-1 / 5**0.5, abs=1e-4),
        None,
    ]


@pytest.mark.parametrize("unit", ["word", "token"])
def test_the_record_names_the_words_that_were_weighted(model: TextToImage, unit: str) -> None:
    prompts = ["a cat", "bike dolphin"]
    sampler = Sampler(model, model.schedule(4), model.latent_shape())
    plain = Batch(prompts * 8, model.encode(prompts * 8), ConstantGuidance(5.0), [(0, 1, k) for k in range(16)])
    words = WordWeighting(2.0, 2.0, unit)
    batch = plain.explored(Exploration(StepGuidance(1.0, 5.0, 700), words))
    rewards = torch.arange(16.0)
    rewards[3] = torch.nan
    record = describe(batch, sampler, words, rewards)
    assert record["guidance"] == [(751, 1.0), (501, 5.0)]
    columns = record["words"]
    # which rows of the embedding changed says which word was weighted, without any draw
    counts = dict.fromkeys(columns["word"], 0)
    spellings = {"word": ["bike", "dolphin"], "token": ["bike", "dol", "ph", "i", "n"]}[unit]
    for row, prompt in enumerate(prompts * 8):
        names = ["a", "cat"] if prompt == "a cat" else spellings
        moved = (batch.text.hidden[row] != plain.text.hidden[row]).any(-1).nonzero().flatten().tolist()
        units = words.units(plain.text.words[row])
        if row != 3:
            counts[names[next(k for k, unit in enumerate(units) if moved[0] in unit)]] += 1
    assert columns["weighted"] == [counts[word] for word in columns["word"]]
    assert sum(columns["weighted"]) == 15
    assert set(columns["word"]) == {"a", "cat", *spellings}
    assert describe(batch, sampler, None) == {"guidance": record["guidance"]}


def test_a_run_records_its_exploration_and_environment(sd_folder: Path, tmp_path: Path) -> None:
    run = train(
        recipe(sd_folder, **{"evaluation.prompts": ["text:a cat riding a bike", "text:a dog"]}), tmp_path / "run"
    )
    lines = [json.loads(line) for line in (run / "exploration.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]  # until = 0.75 of 4
    assert all(line["guidance"][0][1] == 1.0 and line["guidance"][-1][1] == 5.0 for line in lines)
    assert json.loads((run / "environment.json").read_text())["device"].startswith("CPU")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0.05 < line["memory_gib"] < 200 for line in metrics)
    assert json.loads((run / "samples" / "prompts.json").read_text()) == ["a cat riding a bike"] * 2 + ["a dog"] * 2
    sets = json.loads((run / "samples" / "sets.json").read_text())
    assert sets == ["text:a cat riding a bike"] * 2 + ["text:a dog"] * 2
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert all(0 <= line["diversity"] <= 2 and line["encoder"] == "16×16 pixels" for line in evaluations)


def test_the_environment_names_no_person_or_machine(tmp_path: Path) -> None:
    import getpass
    import platform

    described = json.dumps(describe_environment(torch.device("cpu"), 2))
    assert json.loads(described)["processes"] == 2
    assert platform.node() not in described
    assert f"/{getpass.getuser()}" not in described
    assert (peak_memory(torch.device("cpu")) or 1) > 0


def test_previews_show_seen_prompts_and_as_many_unseen(sd_folder: Path) -> None:
    model = models.load(str(sd_folder))
    sampler = Sampler(model, model.schedule(2), model.latent_shape())
    sets = {"seen": ["cat", "bike", "a", "b"], "both": ["cat", "dog", "fox", "owl"]}
    texts = {name: model.encode(prompts) for name, prompts in sets.items()}
    preview = Preview.spread(sampler, 5.0, sets, texts, 2)
    assert list(preview.batch.prompts) == ["cat", "a", "dog", "fox"]
    assert list(preview.sets) == ["seen", "seen", "both", "both"]
    assert [key[-1] for key in preview.batch.keys] == [0, 1, 2, 3]
    assert torch.equal(preview.batch.text.hidden[2], texts["both"].hidden[1])
    alone = Preview.spread(sampler, 5.0, {"seen": ["cat"]}, {"seen": model.encode(["cat"])}, 3)
    assert list(alone.batch.prompts) == ["cat"] * 3


def test_diversity_of_a_set_is_the_mean_over_its_prompts() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 5))
    expected = (pairwise_diversity(rows[:3]) + pairwise_diversity(rows[3:])) / 2
    assert mean_diversity(rows, 3) == pytest.approx(expected)
    assert mean_diversity(rows, 1) == pytest.approx(pairwise_diversity(rows))
    assert mean_diversity(rows[:1], 1) is None


def test_diversity_is_measured_by_an_encoder_that_is_not_trained_on() -> None:
    class Reward:
        def image_features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    own = Reward()
    assert choose({"mine": own, "judge": Reward()}, ("mine",)).name == "judge"
    assert choose({"mine": own}, ("mine",)).features is thumbnails
    assert choose({"mine": own}, ()).name == "mine"
    assert choose({"mine": own, "on the same encoder": own}, ("mine",)).features is thumbnails
    emoji = {name: rewards.load(name) for name in ("emoji-aesthetic", "emoji-alignment", "emoji-judge")}
    assert choose(emoji, ["emoji-aesthetic"]).name == "emoji-judge"  # alignment shares its encoder
    black = torch.zeros(2, 3, 8, 8)
    assert pairwise_diversity(choose({}, ())(black).numpy()) == pytest.approx(0)
