"""What is printed token by token is what all tokens decode to."""

import random

import pytest
import torch
from test_token_stream import tokenizer_of

from titans_pretrain.inference.streamer import Streamer


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of()


def streamed(tokenizer, prompt, tokens, hidden=0):
    streamer = Streamer(tokenizer, prompt, hidden)
    streamer.put(torch.tensor([prompt]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return streamer.text


def test_it_prints_what_all_tokens_decode_to(tokenizer, capsys):
    """Random tokens: bytes that make no character, spaces, control pieces among them."""
    rng = random.Random(0)
    for _ in range(40):
        tokens = tokenizer("Bo mevu")["input_ids"] + [rng.randrange(512) for _ in range(60)]
        text = streamed(tokenizer, tokens[:2], tokens[2:])
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert capsys.readouterr().out == text + "\n"


def test_a_character_of_several_bytes_comes_whole(tokenizer, capsys):
    tokens = tokenizer("Bo 漢字 mevu")["input_ids"]
    streamer = Streamer(tokenizer, tokens[:1])
    seen = []
    for token in tokens[1:]:
        streamer.add([token])
        seen.append(capsys.readouterr().out)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(seen)
    assert any("漢字" in part for part in seen)


def test_a_space_in_front_of_the_first_token_after_control_pieces_is_not_lost(tokenizer, capsys):
    words = tokenizer("bo mevu")["input_ids"]
    tokens = [*words, *[2] * 12, *words]
    first = len(words) + 10
    assert streamed(tokenizer, tokens[:first], tokens[first:]) == "bo mevu bo mevu"


def test_the_hidden_beginning_is_not_printed(tokenizer, capsys):
    tokens = tokenizer("Bo mevu ro")["input_ids"]
    assert streamed(tokenizer, tokens, tokenizer(" ba")["input_ids"], hidden=3) == "mevu ro  ba"


def test_a_token_costs_the_same_after_any_number_of_tokens(tokenizer, monkeypatch, capsys):
    words = tokenizer("bo mevu ro ba " * 300)["input_ids"]
    decoded = []
    decode = tokenizer.decode

    def counted(tokens, **options):
        decoded.append(len(tokens))
        return decode(tokens, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    streamer = Streamer(tokenizer, words[:1000])
    decoded.clear()
    for token in words[1000:]:
        streamer.add([token])
    assert len(words) > 1500
    assert max(decoded) < 30
