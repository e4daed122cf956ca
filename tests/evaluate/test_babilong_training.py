"""``titans data babilong``: every document is one training sequence, and its answer the target."""

import json
from types import SimpleNamespace

import pytest
from babi_files import write_background, write_facts
from tiny_model import make_tokenizer

from data_prep.tokenizer import Tokenizer
from titans_pretrain import cli
from titans_pretrain.data.loader import SequenceLoader
from titans_pretrain.data.mixture import Corpus
from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import babilong_facts, babilong_training
from titans_pretrain.evaluate.babilong_context import Background
from titans_pretrain.evaluate.babilong_training import Documents


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    place = tmp_path_factory.mktemp("training")
    return SimpleNamespace(
        facts=write_facts(place / "babi"),
        background=write_background(place / "book.txt"),
        tokenizer=make_tokenizer(place / "tokenizer"),
    )


def _command(given, output, *options, length=256):
    files = ["--facts", given.facts, "--background", given.background]
    files += ["--tokenizer", given.tokenizer, "--output", output]
    words = [*files, "--length", length, "--tasks", "qa1,qa4", "--samples", 9, *options]
    return cli.main(["data", "babilong", *map(str, words)])


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _prepare(given, source, output, *options):
    columns = ["--prompt-column", "prompt", "--text-column", "answer"]
    files = ["--input", str(source), "--tokenizer", str(given.tokenizer), "--output", str(output)]
    assert cli.main(["data", "prepare", *files, *columns, *options]) == 0
    return str(output / "manifest.json")


def test_every_sequence_is_one_sample_and_its_targets_are_the_answer_and_the_eos(given, tmp_path):
    assert _command(given, tmp_path / "a.jsonl") == 0
    corpus = Corpus.open([(_prepare(given, tmp_path / "a.jsonl", tmp_path / "a"), 1.0)])
    loader = SequenceLoader(corpus, sequence_length=256, seed=0, validation_fraction=0.0)
    tokenizer, found = Tokenizer(given.tokenizer), []
    batch = loader.batch(step=0, position=0, sequences=9, rank=0, ranks=1)
    for tokens, mask in zip(batch.tokens[:, 1:], batch.target_mask, strict=True):
        *answer, end = tokens[mask].tolist()
        assert end == corpus.eos_id
        assert mask[-len(answer) - 2 : -1].all()  # the last target begins the next document
        assert int(mask.sum()) == len(answer) + 1
        found.append(tokenizer.decode(answer))
    wanted = [row["answer"] for row in _rows(tmp_path / "a.jsonl")]
    assert sorted(text.strip() for text in found) == sorted(text.strip() for text in wanted)
    starts = batch.tokens[:, 0].unique()
    assert len(starts) == 1  # each begins with "<context>"


def test_with_bos_documents_are_as_long(given, tmp_path):
    assert _command(given, tmp_path / "a.jsonl", "--bos") == 0
    corpus = Corpus.open([(_prepare(given, tmp_path / "a.jsonl", tmp_path / "a", "--bos"), 1.0)])
    assert corpus.sources[0].training.tokens == 9 * 256
    loader = SequenceLoader(corpus, sequence_length=256, seed=0, validation_fraction=0.0)
    batch = loader.batch(step=0, position=0, sequences=9, rank=0, ranks=1)
    assert set(batch.tokens[:, 0].tolist()) == {Tokenizer(given.tokenizer).bos_id}


def test_shorter_documents_fill_the_same_sequences_and_no_stage_of_a_schedule_cuts_one(
    given, tmp_path
):
    manifests = []
    for length in (256, 512):
        source = tmp_path / f"{length}.jsonl"
        assert _command(given, source, length=length) == 0
        manifests.append(_prepare(given, source, tmp_path / str(length)))
    corpus = Corpus.open([(manifest, 1.0) for manifest in manifests])
    loader = SequenceLoader(corpus, sequence_length=512, seed=0, validation_fraction=0.0)
    tokens = loader.batch(step=0, position=0, sequences=10, rank=0, ranks=1).tokens[:, 1:]
    ends = (tokens == corpus.eos_id) & (tokens.roll(1, 1) != corpus.eos_id)  # pads are EOS, too
    places = {tuple(row.nonzero().flatten().tolist()) for row in ends}
    assert {(510,), (254, 510)} <= places <= {(510,), (254, 510), (254,)}
    short = SequenceLoader(
        Corpus.open([(manifests[0], 1.0)]),
        sequence_length=512,
        seed=0,
        validation_fraction=0.0,
        length_schedule=[SimpleNamespace(from_step=0, length=256)],
    )
    rows = short.batch(step=0, position=0, sequences=4, rank=0, ranks=1).tokens
    assert rows.shape == (8, 257)
    ends = (rows[:, 1:] == corpus.eos_id) & (rows[:, :-1] != corpus.eos_id)
    assert ends.nonzero()[:, 1].unique().tolist() == [254]


def test_a_document_holds_a_training_question_with_its_facts_in_order(given, tmp_path):
    assert _command(given, tmp_path / "a.jsonl") == 0
    every = babilong_facts.read(given.facts / "qa1_single-supporting-fact_train.txt")
    rows = _rows(tmp_path / "a.jsonl")
    assert [row["id"] for row in rows[:2]] == ["babilong-qa1-256-0-0", "babilong-qa4-256-0-1"]
    for row in rows[::2]:
        context, question = row["prompt"].split("\n</context>\n\nQuestion: ")
        assert any(
            one.question == question
            and f" {one.answer}" == row["answer"]
            and _in_order(one.facts, context)
            for one in every
        )


def _in_order(facts, text):
    place = 0
    for fact in facts:
        place = text.find(fact, place)
        if place < 0:
            return False
        place += len(fact)
    return True


def test_equal_seeds_give_equal_bytes(given, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert _command(given, tmp_path / name, "--seed", seed) == 0
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other


def test_no_question_comes_twice_before_all_have_come(given, tmp_path):
    assert _command(given, tmp_path / "a", "--tasks", "qa1", "--samples", "24") == 0
    every = babilong_facts.read(given.facts / "qa1_single-supporting-fact_train.txt")
    asked = sorted(row["prompt"].rsplit(": ", 1)[1] for row in _rows(tmp_path / "a"))
    assert asked == sorted(one.question for one in every)


def test_a_length_that_holds_no_question_is_refused_with_the_least(given, tmp_path, capsys):
    assert _command(given, tmp_path / "a", length=10) == 2
    least = int(capsys.readouterr().err.split("use at least ")[1].split(",")[0])
    assert not (tmp_path / "a").exists()
    assert _command(given, tmp_path / "a", "--tasks", "qa1", length=least) == 0


def test_what_does_not_fit_is_told(given, tmp_path, capsys):
    _command(given, tmp_path / "a", length=10)
    least = int(capsys.readouterr().err.split("use at least ")[1].split(",")[0])
    assert _command(given, tmp_path / "a", "--tasks", "qa1", length=least + 12) == 0
    assert "of 24 questions fit" in capsys.readouterr().err


def test_unknown_tasks_and_a_tokenizer_without_bos_are_refused(given, tmp_path, capsys):
    assert _command(given, tmp_path / "a", "--tasks", "qa1,q4") == 2
    assert "did you mean 'qa4'?" in capsys.readouterr().err
    tokenizer = Tokenizer(given.tokenizer)
    tokenizer.bos_id = None
    wanted = Documents(["qa1"], 256, 1, bos=True)
    with pytest.raises(UserError, match="no BOS"):
        babilong_training.write(
            tmp_path / "a", tokenizer, given.facts, Background([given.background]), wanted, print
        )


def test_a_length_that_no_cut_gives_is_an_error(given, tmp_path, monkeypatch):
    monkeypatch.setattr(babilong_training._Maker, "_first", lambda *_: None)
    wanted = Documents(["qa1"], 256, 1)
    with pytest.raises(UserError, match="no document of exactly 256 tokens"):
        babilong_training.write(
            tmp_path / "a",
            Tokenizer(given.tokenizer),
            given.facts,
            Background([given.background]),
            wanted,
            print,
        )
    assert not (tmp_path / "a").exists()
