from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffexp import models
from diffexp.exploration import (
    ConstantGuidance,
    Exploration,
    StepGuidance,
    WordChoice,
    WordWeighting,
    last_iteration,
)
from diffexp.randomness import generator, randn
from diffexp.text import TextEmbedding

# 50 "leading" steps with an offset of 1, as Stable Diffusion samples: 981, 961, … 1
TIMESTEPS_50 = tuple(range(981, 0, -20))
TIMESTEPS_20 = tuple(range(951, 0, -50))


def text(words: list[list[tuple[int, ...]]], length: int = 5, width: int = 2) -> TextEmbedding:
    hidden = torch.arange(len(words) * length * width, dtype=torch.float32).view(len(words), length, width)
    null = -torch.ones(length, width)
    return TextEmbedding(hidden, words, null, null)


def test_eq7_is_low_only_above_the_threshold() -> None:
    w = StepGuidance(low=1.0, high=5.0, threshold=900)
    assert [w(t) for t in (981, 901, 900, 899, 1)] == [1.0, 1.0, 5.0, 5.0, 5.0]
    assert [t for t in TIMESTEPS_50 if w(t) == 1.0] == [981, 961, 941, 921, 901]


@pytest.mark.parametrize(("fraction", "low_steps"), [(0.0, 0), (0.1, 2), (0.25, 5), (1.0, 20)])
def test_threshold_as_a_fraction_of_the_steps(fraction: float, low_steps: int) -> None:
    w = StepGuidance.over_first(fraction, TIMESTEPS_20, low=0.0, high=7.5)
    assert [w(t) for t in TIMESTEPS_20] == [0.0] * low_steps + [7.5] * (20 - low_steps)


def test_a_tenth_of_the_steps_is_the_papers_threshold_at_50_steps() -> None:
    by_fraction = StepGuidance.over_first(0.1, TIMESTEPS_50, 1.0, 5.0)
    by_timestep = StepGuidance(1.0, 5.0, threshold=900)
    assert [by_fraction(t) for t in TIMESTEPS_50] == [by_timestep(t) for t in TIMESTEPS_50]


def test_eq8_by_hand_with_a_word_of_two_tokens() -> None:
    # tokens: BOS, "a", "dol", "phin", EOS; the word at positions 2 and 3 is weighted by 1.5
    before = text([[(1,), (2, 3)]])
    after = WordWeighting().apply(before, WordChoice(word=[1], weight=[1.5]))
    # c_null + 1.5 (c − c_null) = 1.5 c + 0.5 for c_null = −1
    assert after.hidden[0].tolist() == [[0, 1], [2, 3], [6.5, 8.0], [9.5, 11.0], [8, 9]]
    assert before.hidden[0, 2].tolist() == [4, 5], "the plain text must survive, for evaluation"


def test_eq8_by_token_weights_one_token_of_the_word() -> None:
    weighting = WordWeighting(unit="token")
    after = weighting.apply(text([[(1,), (2, 3)]]), WordChoice(word=[2], weight=[1.5]))
    assert after.hidden[0].tolist() == [[0, 1], [2, 3], [4, 5], [9.5, 11.0], [8, 9]]


def test_eq8_moves_a_word_in_both_encoders_of_sdxl_and_not_the_pooled_embedding(xl_folder: Path) -> None:
    """Eq. 8 by hand on what transformers' own encoders say: c_null + 1.5 (c − c_null) in each half's columns."""
    prompt, position, w = "a cat riding a bike", 2, 1.5  # BOS, "a", "cat"
    halves = []
    for number, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(xl_folder / f"tokenizer{number}")
        ids = tokenizer([prompt, ""], padding="max_length", return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0, position]) == "cat"
        encoder = cls.from_pretrained(xl_folder / f"text_encoder{number}")
        with torch.no_grad():
            encoded = encoder(ids, output_hidden_states=True)
        states, null = encoded.hidden_states[-2]
        moved = states.clone()
        moved[position] = null[position] + w * (states[position] - null[position])
        assert (moved - states).abs().max() > 0.1, "the weight must matter in this half"
        halves.append(moved)
    text = models.load(str(xl_folder)).encode([prompt])
    after = WordWeighting().apply(text, WordChoice(word=[1], weight=[w]))
    torch.testing.assert_close(after.hidden[0], torch.cat(halves, dim=-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.pooled[0], encoded.text_embeds[0], rtol=0, atol=1e-5)


def test_weight_one_changes_nothing_and_wordless_prompts_survive() -> None:
    before = text([[(1,)], []])
    assert torch.equal(WordWeighting().apply(before, WordChoice([0, 0], [1.0, 7.0])).hidden, before.hidden)


@given(low=st.floats(0, 2), width=st.floats(0, 2), seed=st.integers(0, 2**31))
def test_draws_stay_in_range(low: float, width: float, seed: int) -> None:
    weighting = WordWeighting(low, low + width)
    choice = weighting.draw(text([[(1,), (2,), (3,)]]), [generator(seed)])
    assert 0 <= choice.word[0] < 3
    assert low <= choice.weight[0] <= low + width


def test_draws_are_uniform_over_words_and_weights() -> None:
    many = text([[(1,), (2,), (3,), (4,)]] * 2000)
    choice = WordWeighting(1.0, 1.2).draw(many, [generator(0, k) for k in range(2000)])
    counts = torch.bincount(torch.tensor(choice.word))
    assert counts.sub(500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    weights = torch.tensor(choice.weight)
    assert abs(weights.mean() - 1.1) < 5 * 0.2 / 12**0.5 / 2000**0.5
    assert abs(weights.std() - 0.2 / 12**0.5) < 0.003


def test_exploration_ends_after_three_fourths_and_needs_a_strategy() -> None:
    explores = Exploration(guidance=ConstantGuidance(1.0))
    assert [k for k in range(1, 9) if explores.active(k, 8)] == [1, 2, 3, 4, 5, 6]
    assert not any(Exploration().active(k, 8) for k in range(1, 9))


@pytest.mark.parametrize("percent", range(0, 101))
def test_exploration_ends_at_the_percent_that_was_asked_for(percent: int) -> None:
    explore = Exploration(words=WordWeighting(), until=percent / 100)
    assert sum(explore.active(iteration, 100) for iteration in range(1, 101)) == percent
    assert last_iteration(percent / 100, 100) == percent
    assert last_iteration(percent / 100, 7) == percent * 7 // 100


def test_noise_has_a_name_and_touches_no_global_generator() -> None:
    before = torch.random.get_rng_state()
    a = randn([generator(0, 1, k, "noise") for k in range(3)], (2, 2), torch.device("cpu"))
    b = randn([generator(0, 1, k, "noise") for k in (2, 0)], (2, 2), torch.device("cpu"))
    assert torch.equal(a[[2, 0]], b), "a sample's noise depends on nothing but its key"
    assert not torch.equal(a[0], randn([generator(0, 1, 0, "words")], (2, 2), torch.device("cpu"))[0])
    assert torch.equal(before, torch.random.get_rng_state())
