"""Sentencepiece models of every kind, trained in a moment on made-up English."""

import io
import random

import sentencepiece

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvw"


def corpus(lines: int = 400, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(lines)]


def train(**options: object) -> bytes:
    """A ``.model``; Llama-2 style unless ``options`` say otherwise."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 512,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9999,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        minloglevel=2,
        **(settings | options),
    )
    return model.getvalue()
