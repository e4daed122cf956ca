"""What is printed token by token is what all tokens decode to."""

import random

import pytest
import torch
from test_token_stream import tokenizer_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from titans_pretrain.inference import token_stream
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


def spelt(tokenizer, *values):
    """Tokens of single bytes."""
    return tokenizer.convert_tokens_to_ids([f"<0x{value:02X}>" for value in values])


def random_tokens(tokenizer, rng):
    """Pieces, control pieces, characters spelt byte by byte, and bytes that are no text."""
    characters = ["漢", "é", "😀", " ", "A", "\u200b", "\n"]
    tokens = []
    for _ in range(20):
        run = "".join(rng.choices(characters, k=rng.randrange(4))).encode()
        if rng.random() < 0.3:
            run = bytes([rng.choice([0xFF, 0x80, 0xC0]), *rng.choices(range(256), k=3)])
        for token in spelt(tokenizer, *run):
            tokens += [token, *([2] * (rng.random() < 0.1))]
        tokens += [rng.randrange(259, 512) for _ in range(rng.randrange(1, 4))]
    return tokens


def test_it_prints_what_all_tokens_decode_to(tokenizer, capsys):
    assert spelt(tokenizer, 255) < [259]  # the ids from there on are no bytes
    rng = random.Random(0)
    for first in (0, 1, 2, 7) * 10:
        tokens = random_tokens(tokenizer, rng)
        text = streamed(tokenizer, tokenizer("Bo mevu")["input_ids"][:first], tokens)
        whole = [*tokenizer("Bo mevu")["input_ids"][:first], *tokens]
        assert text == tokenizer.decode(whole, skip_special_tokens=True)
        assert capsys.readouterr().out == text + "\n"


def test_a_character_spelt_by_bytes_is_printed_with_its_last_byte(tokenizer, capsys):
    for before in ("", "Bo"):
        known = tokenizer(before)["input_ids"]
        streamer = Streamer(tokenizer, known)
        bytes_so_far = b""
        for value in "漢字 é😀A".encode():
            streamer.add(spelt(tokenizer, value))
            bytes_so_far += bytes([value])
            assert streamer.text == before + bytes_so_far.decode(errors="ignore")
        streamer.end()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0xE6, 0xBC, 0xA2, 0xE6, 0xBC), "漢��"),
        ((0xE6, 0xBC, 0xA2, 0xFF, 0x41), "漢��"),
        ((0xE6, 0xBC, 0x41, 0x41), "����"),
    ],
)
@pytest.mark.parametrize("more", ["", "bo"])
def test_what_was_printed_stays_if_a_byte_fits_nowhere(values, text, more, tokenizer, capsys):
    tokens = [*spelt(tokenizer, *values), *tokenizer(more)["input_ids"]]
    wanted = f"mevu{text}{' ' * bool(more)}{more}"
    assert streamed(tokenizer, tokenizer("mevu")["input_ids"], tokens) == wanted
    streamer = Streamer(tokenizer, tokenizer("mevu")["input_ids"])
    streamer.add(tokens)
    streamer.end()
    assert streamer.text == wanted


def test_a_piece_that_only_looks_like_a_byte_is_text(capsys):
    words = {piece: place for place, piece in enumerate(["x", *token_stream.BYTE_PIECES])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "x")))
    assert streamed(tokenizer, [0], [1 + 0x41, 0]) == "x <0x41> x"


def test_a_replacement_that_is_a_piece_stands_before_the_bytes_behind_it(capsys):
    pieces = ["x", *token_stream.BYTE_PIECES, "\N{REPLACEMENT CHARACTER}"]
    words = {piece: place for place, piece in enumerate(pieces)}
    made = Tokenizer(models.WordLevel(words, "x"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert streamed(tokenizer, [0], [257, 1 + 0x41, 257, 0]) == "x�A�x"


def test_a_space_in_front_of_the_first_token_after_control_pieces_is_not_lost(tokenizer, capsys):
    words = tokenizer("bo mevu")["input_ids"]
    tokens = [*words, *[2] * 12, *words]
    first = len(words) + 10
    assert streamed(tokenizer, tokens[:first], tokens[first:]) == "bo mevu bo mevu"


def test_the_hidden_beginning_is_not_printed(tokenizer, capsys):
    tokens = tokenizer("Bo mevu ro")["input_ids"]
    assert streamed(tokenizer, tokens, tokenizer(" ba")["input_ids"], hidden=3) == "mevu ro  ba"


@pytest.mark.parametrize("text", ["bo mevu ro ba " * 300, "漢字" * 300 + " bo"])
def test_a_token_costs_the_same_after_any_number_of_tokens(text, tokenizer, monkeypatch, capsys):
    words = tokenizer(text)["input_ids"]
    decoded = counted(tokenizer, monkeypatch)
    streamer = Streamer(tokenizer, words[:1000])
    decoded.clear()
    for token in words[1000:]:
        streamer.add([token])
    assert len(words) > 1500
    assert max(decoded) < 30


def counted(tokenizer, monkeypatch):
    """Numbers of tokens of each call of ``decode``, as they come."""
    found, decode = [], tokenizer.decode

    def count(tokens, **options):
        found.append(len(tokens))
        return decode(tokens, **options)

    monkeypatch.setattr(tokenizer, "decode", count)
    return found


SPELT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPELT = SPELT.pre_tokenize_str("a😀漢😀😀é 字b😀")[0][0]  # a letter for each byte


@pytest.fixture(scope="module")
def byte_level():
    """Pieces of up to three bytes, as GPT-2's: one may end a character and begin the next."""
    pieces = {SPELT[n : n + size] for n in range(len(SPELT)) for size in (1, 2, 3)}
    words = {piece: place for place, piece in enumerate(["x", *sorted(pieces)])}
    made = Tokenizer(models.WordLevel(words, "x"))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_replacements_that_are_pieces_are_printed_as_they_come(monkeypatch, capsys):
    tokenizer = tokenizer_of(user_defined_symbols=["\N{REPLACEMENT CHARACTER}"])
    replacement = tokenizer.convert_tokens_to_ids("\N{REPLACEMENT CHARACTER}")
    streamer, decoded = Streamer(tokenizer, []), counted(tokenizer, monkeypatch)
    for number in range(1, 50):
        streamer.add([replacement])
        assert streamer.text.strip() == "\N{REPLACEMENT CHARACTER}" * number
    assert max(decoded) < 20


def test_bytes_that_never_make_a_character_are_printed_soon(byte_level, monkeypatch, capsys):
    first = byte_level.convert_tokens_to_ids(SPELT[1])  # of four
    streamer, decoded = Streamer(byte_level, []), counted(byte_level, monkeypatch)
    for number in range(1, 50):
        streamer.add([first])
        assert len(streamer.text) >= number - 3
    assert max(decoded) < 20
    streamer.end()
    assert streamer.text == byte_level.decode([first] * 49)


def test_characters_that_share_tokens_are_printed_as_all_tokens_decode(byte_level, capsys):
    rng = random.Random(0)
    for _ in range(200):
        place, pieces = 0, []
        while place < len(SPELT):
            size = rng.randint(1, 3)
            pieces.append(SPELT[place : place + size])
            place += size
        tokens = byte_level.convert_tokens_to_ids(pieces)
        assert streamed(byte_level, [], tokens) == "a😀漢😀😀é 字b😀"
        rng.shuffle(tokens)
        assert streamed(byte_level, [], tokens) == byte_level.decode(tokens)
