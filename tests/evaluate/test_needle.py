"""Needles in haystacks by RULER's rules, and what counts as found."""

import hashlib
import random
import uuid

import pytest

from titans_pretrain.errors import Misfit, UserError
from titans_pretrain.evaluate import needle, needle_text, needle_words
from titans_pretrain.evaluate.needle import NeedleTask
from titans_pretrain.evaluate.needle_text import KINDS, Needle, draw, haystack, largest, prompt
from titans_pretrain.evaluate.tasks import Options

LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ESSAY = "One came. Two went! Did three stay? " * 40


@pytest.fixture
def essay(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text(ESSAY)
    return path


class WordTokenizer:
    """A token a word."""

    def __call__(self, text, **_):
        return {"input_ids": list(range(len(text.split())))}


class Model:
    tokenizer = WordTokenizer()


@pytest.fixture
def asked(monkeypatch):
    """Prompts of a model that says what it is told to, here the value of every other needle."""
    prompts = []

    def greedy(model, texts, *, max_new_tokens, batch):
        assert (max_new_tokens, len(texts) <= batch) == (128, True)
        prompts.extend(texts)
        first = len(prompts) - len(texts)
        return [
            f" {hidden(text).upper()}. And" if (first + at) % 2 else " 1234567"
            for at, text in enumerate(texts)
        ]

    monkeypatch.setattr(needle, "greedy", greedy)
    return prompts


def hidden(text):
    """The value that a prompt's needle tells."""
    (_, told) = text.split(" is: ")
    return told[: told.index(".")]


def test_a_pass_key_prompt_is_rulers_to_the_letter():
    made = prompt(haystack("niah_pk", ()), 3, Needle("strong-lake", "3188131", 0.4))
    assert made == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"{LINE}\nOne of the special magic numbers for strong-lake is: 3188131.\n{LINE}\n{LINE}\n"
        "What is the special magic number for strong-lake mentioned in the provided text? "
        "The special magic number for strong-lake mentioned in the provided text is"
    )


@pytest.mark.parametrize(
    ("depth", "before"),
    [(0, 0), (33, 1), (34, 2), (100, 6)],
    ids=["start", "a third", "more", "end"],
)
def test_an_essays_needle_stands_after_its_share_of_the_sentences(depth, before, essay):
    hay = haystack("niah_uuid", (essay,))
    context = hay.around(13, Needle("k", "v", depth / 100))  # 13 words are 6 sentences
    sentences = ["One came.", "Two went!", "Did three stay?", "One came.", "Two went!", "Did three"]
    sentences.insert(before, "One of the special magic uuids for k is: v.")
    assert context == " ".join(sentences)


def test_a_short_essay_is_repeated(essay):
    words = haystack("niah_number", (essay,)).around(700, Needle("k", "v", 0)).split()
    assert len(words) == 700 + 10
    assert words[10:] == (ESSAY.split() * 3)[:700]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_rulers_order_and_ranges(kind):
    rng, same = random.Random(5), random.Random(5)
    made = [draw(rng, KINDS[kind], "evaluation") for _ in range(200)]

    def on_side(value):
        while needle_text.side(text := value()) != "evaluation":
            pass
        return text

    values = {
        "numbers": lambda: str(same.randint(1_000_000, 9_999_999)),
        "uuids": lambda: str(uuid.UUID(int=same.getrandbits(128), version=4)),
        "words": lambda: same.choice(needle_words.PAIRS),
    }
    depths = [round(100 * step / 39) for step in range(40)]
    for one in made:
        assert one.key == on_side(values["words"])
        assert one.value == on_side(values[KINDS[kind].values])
        noise = KINDS[kind].haystack == "noise"
        assert one.place == (same.random() if noise else same.choice(depths) / 100)


def test_training_shares_no_key_and_no_value_with_evaluation():
    pairs = {draw(random.Random(n), KINDS["niah_words"], "training") for n in range(3000)}
    others = {draw(random.Random(n), KINDS["niah_words"], "evaluation") for n in range(3000)}
    told = [{text for one in some for text in (one.key, one.value)} for some in (pairs, others)]
    assert not told[0] & told[1]
    halves = [needle_text.side(pair) for pair in needle_words.PAIRS]
    assert 0.45 < halves.count("training") / len(halves) < 0.55


def test_words_are_many_and_each_comes_once():
    assert len(set(needle_words.PAIRS)) == len(needle_words.PAIRS) > 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_fills_its_length_but_for_the_answers_128(kind, essay, asked):
    essays = () if kind == "niah_pk" else (essay,)
    task = NeedleTask(kind, Options(lengths=("400", "1k"), samples=9, essays=essays, batch=4))
    assert task.cells() == ["400", "1k"]
    for cell, room in (("400", 272), ("1k", 872)):
        asked.clear()
        result = task.run(Model(), cell, lambda line: None)
        sizes = [len(text.split()) for text in asked]
        assert len(sizes) == result["samples"] == 9
        unit = len(LINE.split()) if kind == "niah_pk" else 1
        assert all(room - unit < size <= room for size in sizes)
        assert result["context_tokens"] == round(sum(sizes) / 9)


def test_the_score_is_the_share_of_answers_that_hold_the_value_in_any_case(asked, essay):
    task = NeedleTask("niah_uuid", Options(lengths=("400",), samples=5, essays=(essay,), batch=2))
    result = task.run(Model(), "400", lambda line: None)
    assert result["accuracy"] == 2 / 5
    assert result["accuracy_stderr"] == pytest.approx((0.4 * 0.6 / 5) ** 0.5)


def test_samples_are_a_function_of_seed_length_and_number(asked):
    def texts(**options):
        asked.clear()
        task = NeedleTask("niah_pk", Options(**{"lengths": ("400",), "samples": 3} | options))
        task.run(Model(), task.cells()[0], lambda line: None)
        return list(asked)

    first = texts()
    assert texts() == first
    assert texts(samples=2) == first[:2]
    assert not set(texts(seed=1)) & set(first)
    assert {hidden(text) for text in texts(lengths=("500",))}.isdisjoint(map(hidden, first))


def test_the_identity_holds_what_decides_the_result(essay):
    one = NeedleTask("niah_number", Options(essays=(essay,))).identity()
    assert (one["samples"], one["seed"], one["max_new_tokens"]) == (500, 0, 128)
    essay.write_text(ESSAY + "More.")
    other = NeedleTask("niah_number", Options(essays=(essay,))).identity()
    assert one != other
    assert one["essays"] != other["essays"]
    assert NeedleTask("niah_pk", Options(essays=(essay,))).identity()["essays"] == []


def test_definition_1_is_of_these_prompts(asked, essay):
    for kind in KINDS:
        essays = () if kind == "niah_pk" else (essay,)
        task = NeedleTask(kind, Options(lengths=("400",), samples=3, essays=essays))
        task.run(Model(), "400", lambda line: None)
        assert task.identity()["definition"] == 1
    golden = "0fd0032af9aaedabe8fbd40c3a31ecf026e8ff023ae1032b0dfee414d2cac6f1"
    assert hashlib.sha256("\0".join(asked).encode()).hexdigest() == golden


def test_lengths_beyond_a_models_positions_are_refused():
    task = NeedleTask("niah_pk", Options(lengths=("400", "500")))
    task.check(500)
    with pytest.raises(UserError, match="500 tokens are more than the model's 499") as caught:
        task.check(499)
    assert caught.value.where == "--lengths"


def test_essays_that_no_task_reads_are_refused(tmp_path):
    wanted = Options(essays=(tmp_path / "missing",))
    with pytest.raises(UserError, match="niah_pk reads no essays"):
        needle.open_tasks(["niah_pk"], wanted)
    with pytest.raises(UserError, match="cannot read the essay"):
        needle.open_tasks(["niah_pk", "niah_uuid"], wanted)


def test_the_usual_lengths_are_the_papers():
    assert NeedleTask("niah_pk", Options()).cells() == ["2048", "4096", "8192", "16384"]


def test_a_length_that_holds_no_haystack_is_refused(asked):
    task = NeedleTask("niah_pk", Options(lengths=("150",), samples=2))
    with pytest.raises(Misfit, match="150 tokens, of which 128 are for the answer") as caught:
        task.fit(Model(), "150")
    assert caught.value.fix == "use at least 205"


def test_essays_have_to_be_there(tmp_path):
    with pytest.raises(Misfit, match="niah_number hides needles in essays"):
        NeedleTask("niah_number", Options())
    with pytest.raises(UserError, match="cannot read the essay") as caught:
        NeedleTask("niah_uuid", Options(essays=(tmp_path / "none.txt",)))
    assert not isinstance(caught.value, Misfit)  # it may be there another time
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(Misfit, match="no words"):
        NeedleTask("niah_uuid", Options(essays=(empty,)))
    with pytest.raises(Misfit, match="niah_pk reads no essays"):
        haystack("niah_pk", (empty,))


@pytest.mark.parametrize("start", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("limit", [0, 1, 7, 8, 63])
def test_the_largest_size_that_fits_is_found_from_anywhere(start, limit):
    assert largest(lambda size: size <= limit, start) == limit
