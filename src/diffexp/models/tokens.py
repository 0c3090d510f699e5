"""Where a prompt's words are among its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import CLIPTokenizer

from diffexp.text import Words

END_OF_WORD = "</w>"  # how CLIP's byte-pair encoding marks the last token of a word


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> tuple[list[list[int]], list[Words]]:
    """Token ids, padded or cut to the encoder's length, and the token positions of every word of every prompt."""
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    ).input_ids
    return ids, [word_positions(tokenizer, row) for row in ids]


def spell(tokenizer: CLIPTokenizer, prompts: Sequence[str], units: Sequence[Words]) -> list[list[str]]:
    """The text of each unit of each prompt; ``units`` are positions among the prompt's tokens."""
    ids, _ = tokenize(tokenizer, prompts)
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    decode = tokenizer.convert_tokens_to_string
    return [
        [decode([row[i] for i in unit]).replace(END_OF_WORD, "").strip() for unit in found]
        for row, found in zip(tokens, units, strict=True)
    ]


def word_positions(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> Words:
    """The positions of each word between BOS and the first EOS. Punctuation alone is no word."""
    words: Words = []
    word: list[int] = []
    letters = ""
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
        if ids[position] == tokenizer.bos_token_id:
            continue
        ends = ids[position] == tokenizer.eos_token_id
        if not ends:
            word.append(position)
            letters += token
        if ends or token.endswith(END_OF_WORD):
            if any(letter.isalnum() for letter in letters.removesuffix(END_OF_WORD)):
                words.append(tuple(word))
            word, letters = [], ""
        if ends:
            break
    return words
