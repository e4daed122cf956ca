import itertools

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import sentences

from data_prep import bpe, tokenizer

SPECIAL = (("<unk>", 2), ("<s>", 3), ("</s>", 3))


def made(pieces):
    """A model of these pieces, the first the best, and of their characters."""
    proto = bpe.schema.ModelProto()
    single = sorted({bpe.SPACE, *"abc", *"".join(pieces)} - set(pieces))
    for text, kind in [*SPECIAL, *((f"<0x{byte:02X}>", 6) for byte in range(256))]:
        proto.pieces.add(piece=text, score=0, type=kind)
    for rank, text in enumerate([*pieces, *single]):
        proto.pieces.add(piece=text, score=-rank, type=bpe.NORMAL)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = bpe.BPE, True
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    return proto


def follow(rules, text):
    """BPE by rules: the best that applies, leftmost first."""
    symbols = list(text)
    while True:
        pairs = list(itertools.pairwise(symbols))
        rule = min((rules[pair] for pair in pairs if pair in rules), default=None)
        if rule is None:
            return symbols
        at = next(i for i, pair in enumerate(pairs) if rules.get(pair) == rule)
        symbols[at : at + 2] = ["".join(pairs[at])]


def assert_followed(proto, *texts):
    rules = {rule: rank for rank, rule in enumerate(bpe.rules(bpe.scores(proto)))}
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in filter(None, texts):
        found = follow(rules, bpe.SPACE + text.replace(" ", bpe.SPACE))
        expected = processor.encode(text, out_type=str)
        assert [piece.replace("z", "<0x7A>") for piece in found] == expected


word = st.text("ab", min_size=2, max_size=6)
pieces = st.lists(st.one_of(word, word.map(bpe.SPACE.__add__)), unique=True, max_size=20)


@settings(max_examples=200, deadline=None)
@given(pieces, st.lists(st.text("aaabbb z", max_size=40), max_size=20))
def test_the_rules_lead_where_sentencepiece_goes_whatever_the_pieces(pieces, texts):
    assert_followed(made(pieces), *texts)


def test_a_piece_has_one_rule_that_of_its_own_text():
    rules = bpe.rules({"ab": -1.0, "bc": -2.0, "abc": -3.0, "a": -4.0, "b": -5.0, "c": -6.0})
    assert rules == [("a", "b"), ("b", "c"), ("ab", "c")]


def test_a_piece_that_is_never_reached_has_none():
    normal = {"bc": -1.0, "ab": -2.0, "abab": -3.0, "abca": -4.0, "a": -5.0, "b": -6.0, "c": -7.0}
    assert ("ab", "ab") in bpe.rules(normal)
    assert not any(left + right == "abca" for left, right in bpe.rules(normal))


def test_our_own_models_are_plain(model):
    assert bpe.departure(bpe.parse(model.content)) == ""
    assert bpe.departure(made(["ab", "abc"])) == ""


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model_type": "unigram"}, "no BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes"),
        ({"add_dummy_prefix": False}, "no space in front"),
        ({"remove_extra_whitespaces": True}, "drops spaces"),
        ({"treat_whitespace_as_suffix": True}, "after words"),
        ({"byte_fallback": False, "vocab_size": 80}, "byte fallback"),
        ({"user_defined_symbols": ["<mask>"]}, "user-defined"),
        ({"split_by_whitespace": False, "vocab_size": 310}, "a space after a word"),
    ],
)
def test_a_model_trained_otherwise_is_not(tmp_path, options, what):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences(100), *["of the sea"] * 999]),
        model_prefix=str(tmp_path / "t"),
        **(tokenizer.LLAMA2 | {"vocab_size": 340} | options),
    )
    assert what in bpe.departure(bpe.parse((tmp_path / "t.model").read_bytes()))


def unmarked(proto):
    proto.normalizer_spec.escape_whitespaces = False


def unused(proto):
    proto.pieces[-1].type = bpe.UNUSED


def without_a_character(proto):
    next(piece for piece in proto.pieces if piece.piece == "c").piece = "z"


def tied(proto):
    proto.pieces[-1].score = proto.pieces[-2].score


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (unmarked, "does not mark"),
        (unused, "unused"),
        (without_a_character, "a character that is no piece"),
        (tied, "equal score"),
    ],
)
def test_a_model_made_otherwise_is_not(change, what):
    proto = made(["ab", "abc"])
    change(proto)
    assert what in bpe.departure(proto)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(2, 12), st.sampled_from([-1e9, -2e9, -0.5]), min_size=2))
def test_a_model_some_of_whose_runs_of_spaces_tie_is_not_plain(runs):
    proto = made(["ab", *(bpe.SPACE * length for length in runs)])
    scored = {bpe.SPACE * length: score for length, score in runs.items()}
    for piece in proto.pieces:
        piece.score = scored.get(piece.piece, piece.score)
    distinct = len(set(runs.values()))
    if distinct not in (1, len(runs)):
        assert bpe.departure(proto) == "only some runs of spaces are of equal score"
    else:
        assert bpe.departure(proto) == ""
        assert_followed(proto, *(f"a{' ' * length}b" for length in range(1, 40)))


def test_runs_of_spaces_may_tie_and_grow_as_in_sentencepiece():
    proto = made(["ab", *(bpe.SPACE * length for length in (2, 3, 4, 5, 7))])
    for piece in proto.pieces:
        if not piece.piece.strip(bpe.SPACE):
            piece.score = -1e9
    assert bpe.departure(proto) == ""
    for length in range(1, 40):
        assert_followed(proto, f"a{' ' * length}b")
