"""Ids equal sentencepiece's own, on text made to break them."""

import argparse
import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from made_up import sentences
from torture import SCRIPTS, texts

from data_prep import bpe, encoder, tokenizer

KINDS = ["sentencepiece", "fast"]
MISTRAL = "mistral_common/data/tokenizer.model.v1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model of our own training, with runs of spaces and pieces of many scripts."""
    path = tmp_path_factory.mktemp("torture") / "t.model"
    text = [inspect.getsource(argparse), inspect.getsource(json), *sentences(200), *SCRIPTS * 20]
    return tokenizer.train(text, 1500, path)


@pytest.fixture(scope="session")
def mistral(request):
    """Mistral 7B's tokenizer: 32,000 pieces of Llama-2's kind, out of a wheel of 0.7 MB."""
    folder = Path(request.config.cache.mkdir("mistral"))
    command = ["pip", "download", "--quiet", "--no-deps", "mistral-common==1.0.0", "--dest"]
    if not (folder / MISTRAL).exists():
        done = subprocess.run([sys.executable, "-m", *command, folder], capture_output=True)
        if done.returncode:
            pytest.skip("mistral-common==1.0.0 cannot be downloaded")
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extract(MISTRAL, folder)
    return tokenizer.Tokenizer(folder / MISTRAL)


def differing(kind, model, texts):
    """The texts whose ids are not those that sentencepiece gives when asked one by one."""
    if kind == "fast":
        pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.content)
    ids, lengths = encoder.make(kind, model).encode(texts)
    assert len(ids) == lengths.sum()
    given = np.split(ids, np.cumsum(lengths)[:-1])
    pairs = zip(texts, given, strict=True)
    return [text for text, found in pairs if processor.encode(text) != found.tolist()]


def all_texts(model):
    return texts(list(bpe.scores(bpe.parse(model.content))))


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_of_the_set_has_sentencepieces_ids(trained, kind):
    wrong = {name: differing(kind, trained, group) for name, group in all_texts(trained).items()}
    assert not any(wrong.values()), {name: group[:2] for name, group in wrong.items() if group}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_with_a_vocabulary_of_llama_2s_size(mistral, kind):
    wrong = {name: differing(kind, mistral, group) for name, group in all_texts(mistral).items()}
    assert not any(wrong.values()), {name: group[:2] for name, group in wrong.items() if group}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", [" ", ""])
def test_so_it_is_with_one_document_of_10_mb(trained, kind, between):
    words = inspect.getsource(argparse).split(" ")
    text = between.join(words * (10_000_000 // len(between.join(words)) + 1))
    assert not differing(kind, trained, [text])


def test_a_model_with_user_defined_pieces_is_encoded_as_it_is(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(100)),
        model_prefix=str(tmp_path / "t"),
        vocab_size=330,
        user_defined_symbols=["<mask>", "at test", " "],
        **tokenizer.LLAMA2,
    )
    model = tokenizer.Tokenizer(tmp_path / "t.model")
    long = " ".join(sentences(50)).replace("memory", "<mask>")
    groups = all_texts(model)
    assert not differing("sentencepiece", model, [long, *groups["runs of spaces"]])
