"""A text's ids come in parts as they would all at once."""

import json
import random

import pytest
from tokenizer_models import corpus, train
from transformers import PreTrainedTokenizerFast

from titans_pretrain.errors import UserError
from titans_pretrain.export.tokenizer import convert
from titans_pretrain.inference import token_stream
from titans_pretrain.inference.token_stream import Borders, TokenStream

KINDS = {
    "as Llama's": {},
    "unigram": {"model_type": "unigram"},
    "no space in front": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "pieces across spaces": {"split_by_whitespace": False},
    "normalized": {"normalization_rule_name": "nmt_nfkc"},
    "lower case, spaces removed": {
        "normalization_rule_name": "nmt_nfkc_cf",
        "remove_extra_whitespaces": True,
    },
    "the user's pieces": {"user_defined_symbols": ["<sep>", "ba", "é<"]},
    "the user's pieces, normalized": {
        "user_defined_symbols": ["<sep>", "BA", "mevu ro"],
        "normalization_rule_name": "nmt_nfkc_cf",
    },
}
FOREIGN = "Жёлтый чай с ложкой мёда. 漢字とかな交じり文です。 Ελληνικά γράμματα, שלום עולם.\n"  # noqa: RUF001


def tokenizer_of(**options):
    return PreTrainedTokenizerFast(
        tokenizer_object=convert(train(**options)),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def tokenizer(request):
    return tokenizer_of(**request.param)


@pytest.fixture(scope="module")
def plain():
    return tokenizer_of()


def odd_text(seed):
    """Sentences, runs of one letter and of spaces, control pieces spelt out, any characters."""
    rng, lines = random.Random(seed), corpus()
    parts = []
    for _ in range(25):
        parts += rng.choice(
            [
                [rng.choice(lines), rng.choice(["\n", " ", "\n\n", "\t", "\r\n"])],
                ["a" * rng.randint(1, 30), " " * rng.randint(0, 4)],
                ["漢字😀é</s> x ▁▁<unk>e\u0301 ", chr(rng.randrange(0x2000))],
                [chr(rng.randrange(32, 127)) for _ in range(30)],
                [FOREIGN, rng.choice(["<sep>", "ba<sep>", "BA ba", " mevu ro"])],
                ["xa\u0301", "e\u0302", "か\u3099", "\u1112\u1161\u11ab", "ﬁ①", "i\u0307"],
            ]
        )
    return "".join(parts)


def in_parts(stream, text, size):
    ids = []
    for first in range(0, len(text), size):
        ids += stream.feed(text[first : first + size])
    return ids


@pytest.mark.parametrize("size", [1, 7, 300])
def test_parts_of_any_size_give_the_ids_of_the_whole_text(tokenizer, size):
    for seed in range(2 if size == 1 else 12):
        text = odd_text(seed)
        stream = TokenStream(tokenizer)
        ids = in_parts(stream, text, size)
        assert ids + stream.finish() == tokenizer(text)["input_ids"]


def test_another_stream_goes_on_from_what_is_pending(tokenizer):
    text = odd_text(0)
    for cut in range(5, len(text), 97):
        first = TokenStream(tokenizer)
        ids = first.feed(text[:cut])
        second = TokenStream(tokenizer, first.context, first.pending)
        ids += in_parts(second, text[cut:], 50)
        assert ids + second.finish() == tokenizer(text)["input_ids"]


def test_the_end_may_be_asked_for_any_number_of_times(plain):
    stream = TokenStream(plain)
    before = stream.feed("Bo mevu ro")
    for end in ("", "ba", " ba ro."):
        assert before + stream.finish(end) == plain("Bo mevu ro" + end)["input_ids"]


def test_little_waits_for_what_follows(plain):
    stream = TokenStream(plain)
    for line in corpus():
        stream.feed(line + "\n")
        assert 0 < len(stream.pending) < 30


@pytest.mark.parametrize("kind", ["normalized", "lower case, spaces removed", "the user's pieces"])
def test_little_of_another_alphabet_s_text_waits(kind):
    tokenizer = tokenizer_of(**KINDS[kind])
    stream = TokenStream(tokenizer)
    ids = []
    for _ in range(20):
        ids += stream.feed(FOREIGN)
        assert len(stream.pending) < 60
    assert ids + stream.finish() == tokenizer(FOREIGN * 20)["input_ids"]


def test_a_letter_waits_for_the_accent_that_may_follow():
    tokenizer = tokenizer_of(**KINDS["normalized"])
    borders = Borders.of(tokenizer)
    assert borders.between("漢", "字", "漢")
    assert not borders.between("漢", "a", "\u0301")
    assert not borders.between("漢", "字", "")
    assert not borders.between("漢", "ﬁ", "a")


def test_what_waits_too_long_is_refused_by_its_byte(plain):
    stream = TokenStream(plain, pending="é" * token_stream.LONGEST)
    stream.check_waiting("text", 10 + 2 * token_stream.LONGEST)
    stream.pending += "é"
    with pytest.raises(UserError, match="from byte 10 on") as caught:
        stream.check_waiting("text", 12 + 2 * token_stream.LONGEST)
    assert caught.value.where == "text"


def test_a_text_without_a_border_waits_whole(plain):
    stream = TokenStream(plain)
    known = max((piece for piece in plain.get_vocab() if piece.isalpha()), key=len)[:2]
    pair = known[0] * 2
    pieces = "".join(plain.get_vocab())
    text = pair * 20 if pair in pieces else known
    assert stream.feed(text) + stream.finish() == plain(text)["input_ids"]


def _changed(tokenizer, change):
    from tokenizers import Tokenizer

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    changed = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=changed, clean_up_tokenization_spaces=False)


def _splits_words(parts):
    parts["pre_tokenizer"] = {"type": "Whitespace"}


def _drops_merges(parts):
    parts["model"]["dropout"] = 0.1


def _eats_spaces(parts):
    parts["added_tokens"][0]["rstrip"] = True


def _strips(parts):
    parts["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}


def _is_of_another_kind(parts):
    vocab = parts["model"]["vocab"]
    parts["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_splits_words, "it has a pre-tokenizer"),
        (_drops_merges, "it has a dropout"),
        (_eats_spaces, "take in what stands around"),
        (_strips, "a step Strip"),
        (_is_of_another_kind, "it is a WordLevel"),
    ],
)
def test_a_tokenizer_that_works_in_another_way_is_refused(plain, change, reason):
    TokenStream(_changed(plain, lambda parts: None))
    with pytest.raises(UserError, match=reason):
        TokenStream(_changed(plain, change))


def test_a_tokenizer_that_adds_tokens_is_refused(plain):
    from tokenizers.processors import TemplateProcessing

    changed = _changed(plain, lambda parts: None)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    with pytest.raises(UserError, match="adds tokens to a text"):
        TokenStream(changed)


def test_a_tokenizer_without_files_of_the_library_is_refused():
    with pytest.raises(UserError, match="none of the tokenizers library"):
        TokenStream(object())
