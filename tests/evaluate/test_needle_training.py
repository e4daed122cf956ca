"""Needle samples to train on: exact lengths, targets at the answers alone."""

import io
import json
import random
import tarfile

import numpy as np
import pytest

from data_prep.tokenizer import Tokenizer, train
from titans_pretrain import cli
from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import needle_text, needle_training
from titans_pretrain.evaluate.needle_text import KINDS

LENGTH = 256


def command(capsys, *words):
    """Exit code and what is said of ``titans data needle``."""
    code = cli.main(["data", "needle", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("needles")


@pytest.fixture(scope="module")
def tokenizer(place):
    """A sentencepiece model trained on needle prompts."""
    hay = needle_text.haystack("niah_pk", ())
    dice = random.Random(0)
    needles = [needle_text.draw(dice, KINDS["niah_pk"], "training") for _ in range(100)]
    texts = [needle_text.prompt(hay, 1, one) for one in needles]
    return train(texts, 600, place / "tokenizer.model").path


@pytest.fixture(scope="module")
def essay(place):
    path = place / "essay.txt"
    path.write_text("Nobody knew why the boat had come. It lay in the bay! " * 20)
    return path


@pytest.fixture(scope="module")
def samples(place, tokenizer):
    """Rows of 40 documents."""
    out = place / "samples.jsonl"
    options = ["--tokenizer", tokenizer, "--length", LENGTH, "--samples", 40, "--output", out]
    assert not cli.main(["data", "needle", *map(str, options)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_sample_asks_for_the_value_that_its_haystack_tells(samples):
    assert len({row["id"] for row in samples}) == len({row["answer"] for row in samples}) == 40
    for row in samples:
        key = row["prompt"].split(" magic numbers for ")[1].split(" is: ")[0]
        assert f"magic numbers for {key} is:{row['answer']}.\n" in row["prompt"]
        assert row["prompt"].endswith(f" for {key} mentioned in the provided text is")
        assert {needle_text.side(key), needle_text.side(row["answer"][1:])} == {"training"}


def test_needles_lie_anywhere(samples):
    told = [row["prompt"].split("afterwards.\n")[1].split("\n") for row in samples]
    assert {lines.index(next(x for x in lines if "magic" in x)) for lines in told} >= {0, 1, 2, 3}


def test_prepared_each_is_one_sequence_with_targets_at_its_answer(samples, tokenizer, place):
    words = ["--prompt-column", "prompt", "--text-column", "answer", "--tokenizer", str(tokenizer)]
    source = ["--input", str(place / "samples.jsonl"), "--output", str(place / "data")]
    assert not cli.main(["data", "prepare", *source, *words])
    with tarfile.open(next((place / "data").glob("*.tar"))) as tar:
        arrays = {one.name: np.load(io.BytesIO(tar.extractfile(one).read())) for one in tar}
    masks = {name: arrays.pop(name) for name in list(arrays) if name.endswith(".mask.npy")}
    rows = np.concatenate(list(arrays.values())).reshape(40, LENGTH)
    masks = np.concatenate(list(masks.values())).reshape(40, LENGTH)
    model = Tokenizer(tokenizer)
    assert set(rows[:, -1]) == {model.eos_id}
    answers = {
        model.decode(row[mask > 0][:-1]).strip() for row, mask in zip(rows, masks, strict=True)
    }
    assert answers == {row["answer"].strip() for row in samples}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [250, 251, 252, 253])
def test_every_kind_has_any_length_exactly(kind, length, tokenizer, essay, tmp_path, capsys):
    essays = [] if kind == "niah_pk" else ["--essays", essay]
    options = ["--kind", kind, *essays, "--tokenizer", tokenizer, "--samples", 5]
    out = tmp_path / "a.jsonl"
    code, told, _ = command(capsys, *options, "--length", length, "--bos", "--output", out)
    assert code == 0
    assert told == f"{out}: 5 documents of {length} tokens\n"
    model = Tokenizer(tokenizer)
    for row in map(json.loads, out.read_text().splitlines()):
        assert 1 + len(model.encode([row["prompt"] + row["answer"]])[0]) + 1 == length


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_sample_is_the_haystack_and_the_answers_beginning(
    kind, tokenizer, essay, tmp_path, capsys
):
    essays = [] if kind == "niah_pk" else ["--essays", essay]
    options = ["--bare", "--kind", kind, *essays, "--tokenizer", tokenizer, "--samples", 20]
    out = tmp_path / "new" / "a.jsonl"
    assert command(capsys, *options, "--length", 160, "--output", out)[0] == 0
    model, places = Tokenizer(tokenizer), set()
    for row in map(json.loads, out.read_text().splitlines()):
        hay, question = row["prompt"].rsplit("\n", 1)
        before, needle = hay.split("One of the special magic ")
        key, value = needle.split(" for ", 1)[1].split(": ", 1)
        assert question == f" The special magic {KINDS[kind].values.removesuffix('s')} for " + (
            f"{key.removesuffix(' is')} mentioned in the provided text is"
        )
        assert value.startswith(f"{row['answer'].strip()}.")
        assert len(model.encode([row["prompt"] + row["answer"]])[0]) + 1 == 160
        places.add(before)
    assert len(places) >= 3


def test_samples_are_a_function_of_the_seed(tokenizer, tmp_path, capsys):
    made = []
    for seed in (0, 0, 1):
        out = tmp_path / "a.jsonl"
        options = ["--tokenizer", tokenizer, "--length", 250, "--samples", 3, "--output", out]
        assert command(capsys, *options, "--seed", seed)[0] == 0
        made.append(out.read_text())
    assert made[0] == made[1] != made[2]


def test_samples_of_another_length_kind_or_size_have_other_ids_and_needles(
    tokenizer, essay, tmp_path, capsys
):
    made = []
    length = ["--tokenizer", tokenizer, "--length"]
    for words in (
        [*length, 250],
        [*length, 260],
        [*length, 250, "--kind", "niah_number", "--essays", essay],
        [*length, 250, "--bare"],
        ["--haystack", 3],
        ["--haystack", 4],
    ):
        out = tmp_path / "a.jsonl"
        assert command(capsys, *words, "--samples", 3, "--output", out)[0] == 0
        made += [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in made}) == len(made) == 18
    assert len({row["answer"] for row in made}) == 18
    assert made[0]["id"] == "needle-noise-numbers-250-0-0"


def test_a_haystack_of_lines_needs_no_tokenizer(tmp_path, capsys):
    out = tmp_path / "text.jsonl"
    assert command(capsys, "--haystack", 3, "--samples", 2, "--output", out)[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"].count(needle_text.NOISE) for row in rows] == [3, 3]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ([], "no length"),
        (["--length", 250, "--haystack", 3], "--length and --haystack are both given"),
        (["--length", 250], "a length is tokens of a tokenizer's"),
        (["--haystack", 3, "--tokenizer", "a.model"], "a length is tokens of a tokenizer's"),
        (["--haystack", 3, "--bos"], "--bos without --length"),
        (["--haystack", 3, "--kind", "niah_uuid"], "niah_uuid hides needles in essays"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, what, tmp_path, capsys):
    code, _, err = command(capsys, *options, "--output", tmp_path / "a.jsonl")
    assert code == 2
    assert what in err
    assert not list(tmp_path.iterdir())


def test_a_length_that_holds_no_haystack_is_refused(tokenizer, tmp_path, capsys):
    options = ["--tokenizer", tokenizer, "--output", tmp_path / "a.jsonl"]
    code, _, err = command(capsys, *options, "--length", 40)
    least = int(err.split("use about ")[1].split()[0])
    assert code == 2
    assert "40 tokens hold no haystack" in err
    assert command(capsys, *options, "--length", least - 20, "--samples", 1)[0] == 2
    assert command(capsys, *options, "--length", least + 20, "--samples", 1)[0] == 0


def test_a_tokenizer_that_joins_line_ends_is_refused(monkeypatch):
    def joined(prompt, answer):
        while "\n\n" in prompt:
            prompt = prompt.replace("\n\n", "\n")
        return len(prompt) + len(answer)

    hay = needle_text.Haystack(KINDS["niah_words"], ["a", "longword."])
    needle = needle_training._draw(hay, "0", 0, 0)
    monkeypatch.setattr(needle_training, "_draw", lambda *_: needle)
    document = needle_training._Document(hay, needle, joined)
    wanted = needle_training.Documents(length=document.tokens(1) + 4, samples=1)
    with pytest.raises(UserError, match="the tokenizer joins line ends"):
        list(needle_training._exact(hay, joined, wanted))
