import importlib.metadata
import re
import sys
from itertools import chain

import numpy as np
import pytest
import sentencepiece
from made_up import sentences

from data_prep import bpe, encoder, fast, proof, tokenizer
from titans_pretrain.errors import TitansError, UserError


@pytest.fixture
def quick(model):
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    return encoder.make("fast", model)


def trained(folder, texts, vocab_size, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "t"),
        vocab_size=vocab_size,
        **(tokenizer.LLAMA2 | options),
    )
    return tokenizer.Tokenizer(folder / "t.model")


def documents(count=2000):
    return [f"{i} {text}" for i, text in enumerate(sentences(count, seed=5))]


@pytest.mark.parametrize("kind", encoder.KINDS)
def test_ids_are_flat_and_of_the_vocabularys_type(model, kind):
    if kind == "fast":
        pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    texts = ["memory learns", "", "attention\n", " "]
    ids, lengths = encoder.make(kind, model).encode(texts)
    expected = model.encode(texts)
    assert (ids.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert ids.tolist() == list(chain(*expected))
    assert lengths.tolist() == [len(text) for text in expected]
    assert encoder.make(kind, model).encode([]).ids.tolist() == []


def test_a_vocabulary_of_many_pieces_has_wider_ids(model, monkeypatch):
    monkeypatch.setattr(model, "vocab_size", 70_000)
    assert encoder.make("sentencepiece", model).encode(["memory"]).ids.dtype == np.uint32


def test_an_unknown_kind_is_refused_with_the_nearest(model):
    with pytest.raises(UserError, match="no encoder 'sentencepice'") as caught:
        encoder.make("sentencepice", model)
    assert "'sentencepiece'" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["word " * 500, "  a" * 900 + " ", "x" * 999, "x" * 200 + " ", " " * 999, "a\n" * 400]
)
def test_a_long_text_is_cut_after_words_only_and_loses_nothing(text):
    parts = encoder.cut(text)
    assert " ".join(parts) == text
    assert "" not in parts
    assert not any(part.endswith((" ", bpe.SPACE)) for part in parts[:-1])
    assert (len(parts) > 1) == (" " in text.strip())


def test_a_model_that_is_not_plain_is_given_whole_texts(tmp_path):
    model = trained(tmp_path, ["of the sea of the sky"] * 99, 290, split_by_whitespace=False)
    long = "of the sea " * 100
    ids = encoder.make("sentencepiece", model).encode([long]).ids.tolist()
    assert ids == model.encode([long])[0]
    assert ids != list(chain(*model.encode(encoder.cut(long))))


class Lying:
    """The library, but for the second token of every text."""

    def __init__(self, honest):
        self.honest = honest

    def encode(self, text):
        ids = self.honest.encode(text)
        ids[1] += 1
        return ids


def test_a_difference_in_the_sample_stops_the_work_and_is_named(quick, monkeypatch):
    monkeypatch.setattr(quick, "_library", Lying(quick._library))
    with pytest.raises(TitansError, match="the fast encoder gives") as caught:
        quick.encode(documents())
    assert caught.value.exit_code == 1
    place = re.fullmatch(
        r"token 1, at '(.+)', of the document that begins '(.+)'", caught.value.where
    )
    assert place
    assert f"'{place[2]}'" in {repr(text[:60]) for text in documents()}
    assert "--encoder sentencepiece" in caught.value.fix


def test_the_sample_is_the_same_texts_in_any_batches(quick, monkeypatch):
    seen = []
    expected = quick._expected
    monkeypatch.setattr(quick, "_expected", lambda x: seen.extend(x) or expected(x))
    texts = documents(20_000)
    quick.encode(texts)
    once, seen[:] = list(seen), []
    for start in range(0, len(texts), 700):
        quick.encode(texts[start : start + 700])
    assert seen == once
    assert 20_000 / 256 / 2 < len(once) < 20_000 / 256 * 2


@pytest.mark.parametrize("kind", encoder.KINDS)
def test_the_sample_is_compared_with_whole_texts(model, monkeypatch, kind):
    if kind == "fast":
        pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    made, asked = encoder.make(kind, model), []
    real = model.encode_arrays
    monkeypatch.setattr(model, "encode_arrays", lambda x: asked.extend(x) or real(x))
    texts = [f"{number} {' '.join(sentences(20))}" for number in range(400)]
    made.encode(texts)
    whole = [text for text in asked if len(text) > 400]
    assert whole == [text for text in texts if proof.is_sampled(text)]
    assert whole


def test_parts_that_change_a_documents_ids_stop_the_work_and_the_document_is_named(
    model, monkeypatch
):
    made = encoder.make("sentencepiece", model)
    monkeypatch.setattr(encoder, "cut", lambda text, least: [text[:300], text[300:]])
    texts = [f"{number} {' '.join(sentences(20))}" for number in range(400)]
    with pytest.raises(TitansError, match="in parts, sentencepiece itself gives") as caught:
        made.encode(texts)
    assert "of the document that begins" in caught.value.where


def test_our_own_models_texts_are_encoded_in_parts(model, monkeypatch):
    made, asked = encoder.make("sentencepiece", model), []
    real = model.encode_arrays
    monkeypatch.setattr(model, "encode_arrays", lambda x: asked.extend(x) or real(x))
    made.encode([" ".join(sentences(50))])
    assert len(asked) > 10


def test_a_model_whose_texts_cannot_be_cut_is_given_whole_texts(model, monkeypatch):
    def inside_words(text, least):
        return [text[:3], text[3:]] if len(text) > 3 else [text]

    monkeypatch.setattr(encoder, "cut", inside_words)
    made = encoder.make("sentencepiece", model)
    text = " ".join(sentences(50))
    assert made.encode([text]).ids.tolist() == model.encode([text])[0]


def test_wrong_rules_do_not_pass_the_self_test(model, monkeypatch):
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    rules = bpe.rules
    monkeypatch.setattr(bpe, "rules", lambda scores: rules(scores)[:-1])
    with pytest.raises(UserError, match=r"not proven for this model: .* it gives") as caught:
        encoder.make("fast", model)
    assert caught.value.where == str(model.path)
    assert caught.value.fix == "use --encoder sentencepiece"


def test_a_model_that_is_not_plain_is_refused(tmp_path):
    model = trained(tmp_path, sentences(100), 340, user_defined_symbols=["<mask>"])
    with pytest.raises(UserError, match="not proven for this model: it has user-defined") as caught:
        encoder.make("fast", model)
    assert caught.value.fix == "use --encoder sentencepiece"


def test_a_missing_library_is_named_with_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    with pytest.raises(UserError, match=r"needs gigatoken 0\.10\.0, installed is none") as caught:
        encoder.make("fast", model)
    assert "titans-pretrain[fast]" in caught.value.fix


def test_another_version_of_the_library_is_refused(model, monkeypatch):
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    with pytest.raises(UserError, match=r"installed is 0\.11\.0"):
        encoder.make("fast", model)


@pytest.fixture
def memory(monkeypatch):
    """What the process seems to hold, set by the test: the real figure hangs on other tests."""
    seen = {"bytes": 2**30}
    monkeypatch.setattr(fast, "_resident_bytes", lambda: seen["bytes"])
    return seen


def test_the_librarys_cache_is_dropped_when_it_has_grown(memory, quick, model):
    texts = [" ".join(sentences(20))]
    first = quick._library
    memory["bytes"] += fast.CACHE_BYTES
    quick.encode(texts)
    assert quick._library is first
    memory["bytes"] += 1
    ids = quick.encode(texts).ids
    assert quick._library is not first
    assert ids.tolist() == model.encode(texts)[0]


def test_the_librarys_cache_is_measured_from_the_least_memory_seen(memory, quick):
    first = quick._library
    memory["bytes"] -= 2**20
    quick.encode(["one"])
    memory["bytes"] += fast.CACHE_BYTES + 1
    quick.encode(["one"])
    assert quick._library is not first


def test_the_librarys_cache_is_bounded_within_a_batch_too(memory, quick, model, monkeypatch):
    monkeypatch.setattr(fast, "CHECK_CHARACTERS", 2**10)
    texts = [f"{number} {' '.join(sentences(20))}" for number in range(50)]
    renewed, renew, library = [], quick._renew, quick._library

    def grown(held):
        renewed.append(held)
        renew(held)

    class Growing:
        def encode(self, text):
            memory["bytes"] += fast.CACHE_BYTES // 8
            return library.encode(text)

    monkeypatch.setattr(quick, "_make", lambda description: Growing())
    monkeypatch.setattr(quick, "_library", Growing())
    monkeypatch.setattr(quick, "_renew", grown)
    ids, lengths = quick.encode(texts)
    assert len(renewed) > 2
    assert renewed == sorted(renewed)
    assert renewed[-1] < ids.size * 4
    assert ids[: lengths[0]].tolist() == model.encode(texts[:1])[0]
    assert ids[-lengths[-1] :].tolist() == model.encode(texts[-1:])[0]


def test_memory_is_read_from_the_system():
    before = fast._resident_bytes()
    held = np.ones(2**24, np.uint8)
    assert fast._resident_bytes() - before > held.nbytes // 2


def test_very_long_texts_of_the_sample_are_compared_in_parts(quick, monkeypatch):
    monkeypatch.setattr(proof, "WHOLE_CHARACTERS", 100)
    lengths, real = [], quick._reference.encode
    monkeypatch.setattr(
        quick._reference, "encode", lambda x: lengths.extend(map(len, x)) or real(x)
    )
    texts = [f"{number} {' '.join(sentences(20))}" for number in range(400)]
    quick.encode(texts)
    assert lengths == [len(text) for text in texts if proof.is_sampled(text)]
    monkeypatch.setattr(quick, "_library", Lying(quick._library))
    with pytest.raises(TitansError, match="the fast encoder gives"):
        quick.encode(texts)
