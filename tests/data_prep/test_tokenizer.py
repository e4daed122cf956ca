import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from made_up import sentences

from data_prep import tokenizer
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two  spaces ",
        "line\n\n  indented\r\n",
        "\u2581 \U0001f600 é\x00",
        "</s><s><unk>",
        "",
        "x" * 9000,
    ],
)
def test_any_text_comes_back_and_never_holds_a_special_id(model, text):
    (ids,) = model.encode([text])
    assert model.decode(ids) == text.replace("\u2581", " ")
    assert not {0, 1, 2} & set(ids) - ({0} if "<unk>" in text else set())


def test_the_model_is_of_llama_2s_kind(model):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.content)
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (
        0,
        1,
        2,
        -1,
    )
    assert model.vocab_size == 350
    pieces = [processor.id_to_piece(i) for i in range(350)]
    assert sum(processor.is_byte(i) for i in range(350)) == 256
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 and not p.startswith("<0x")]


def test_equal_text_trains_equal_bytes(model, tmp_path):
    assert tokenizer.train(sentences(300), 350, tmp_path / "again.model").content == model.content


def test_only_the_first_sample_bytes_are_read(tmp_path):
    def text():
        yield from sentences(300)
        raise AssertionError("read too far")

    assert tokenizer.train(text(), 300, tmp_path / "t.model", sample_bytes=2000).vocab_size == 300


MEASURED = """
import resource, sys
from pathlib import Path
from data_prep import tokenizer
from made_up import sentences
texts = sentences(int(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenizer.train((text * 10 for text in texts), 300, Path(sys.argv[2]), sample_bytes=500_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_memory_of_training_grows_with_the_sample_not_with_the_input(tmp_path):
    def grown(documents):
        arguments = ["-c", MEASURED, str(documents), str(tmp_path / "t.model")]
        folder = Path(__file__).parent
        done = subprocess.run([sys.executable, *arguments], cwd=folder, stdout=subprocess.PIPE)
        return int(done.stdout) * 1024

    small, large = grown(500), grown(20_000)
    assert small < 75 * 500_000
    assert large - small < 4_000_000


def test_a_vocabulary_too_large_is_refused_with_the_largest_that_fits(tmp_path):
    with pytest.raises(UserError, match="50000 pieces is too large") as caught:
        tokenizer.train(sentences(20), 50_000, tmp_path / "t.model")
    largest = int(caught.value.fix.split()[3].strip(","))
    assert tokenizer.train(sentences(20), largest, tmp_path / "t.model").vocab_size == largest


def test_a_vocabulary_too_small_is_refused(tmp_path):
    with pytest.raises(UserError, match="100 pieces is too small"):
        tokenizer.train(sentences(20), 100, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", " \n "]])
def test_an_empty_corpus_is_refused(tmp_path, texts):
    with pytest.raises(UserError, match="no text"):
        tokenizer.train(texts, 300, tmp_path / "t.model")


def test_a_model_is_imported_byte_for_byte(model, tmp_path):
    made = tokenizer.import_model(model.path, tmp_path / "copy/t.model")
    assert made.content == model.content


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no sentencepiece model"):
        tokenizer.import_model(tmp_path / "bad.model", tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()
    with pytest.raises(UserError, match="No such file"):
        Tokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("change", [{"eos_id": -1}, {"user_defined_symbols": ["</s>"]}])
def test_a_model_without_eos_or_whose_eos_text_could_forge_is_refused(tmp_path, change):
    options = tokenizer.LLAMA2 | change
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(100)),
        model_prefix=str(tmp_path / "odd"),
        vocab_size=320,
        **options,
    )
    with pytest.raises(UserError, match="no EOS piece"):
        Tokenizer(tmp_path / "odd.model")


@pytest.mark.parametrize("prompt", ["", "Question: é? ", "\U0001f600"])
def test_a_prompts_tokens_are_masked(model, prompt):
    text = "memory learns \U0001f600"
    ids, mask = model.encode_after(prompt, text)
    assert ids == model.encode([prompt + text])[0]
    trained = [i for i, keep in zip(ids, mask, strict=True) if keep]
    assert model.decode(trained).strip() in (prompt + text)
    assert model.decode(trained).strip().endswith("learns \U0001f600")
    assert (mask.sum() == len(ids)) == (prompt == "")
