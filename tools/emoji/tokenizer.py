"""The tokenizer: byte-level BPE in CLIP's manner, trained on the world's captions, so that each word is one token."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from tools.emoji.common import WORK
from tools.emoji.scenes import all_captions

LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train() -> CLIPTokenizer:
    """Learn the merges. The vocabulary is CLIP's: bytes, bytes that end a word, merges, start and end of text."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    tokenizer.train_from_iterator(
        all_captions(), trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in _merges(tokenizer)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=LENGTH,
    )


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


@cache
def load() -> CLIPTokenizer:
    """The world's tokenizer, trained on first use."""
    folder = WORK / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        tokenizer = train()
        tokenizer.save_pretrained(folder)
        save_classic_files(folder, tokenizer)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def save_classic_files(folder: Path, tokenizer: CLIPTokenizer | None = None) -> None:
    """Write vocab.json and merges.txt, CLIP's own format, beside tokenizer.json."""
    (tokenizer or load()).backend_tokenizer.model.save(str(folder))


def tokenize(texts: list[str]) -> torch.Tensor:
    """Token numbers (B, 16), padded with the end-of-text token as Stable Diffusion does."""
    return load()(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
