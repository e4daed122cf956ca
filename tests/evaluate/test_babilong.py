"""The BABILong task: which questions, how long, and how they are scored."""

import hashlib
import random
import re
from types import SimpleNamespace

import pytest
from babi_files import Words, write_background, write_facts

from titans_pretrain.errors import Misfit, UserError
from titans_pretrain.evaluate import babilong, babilong_facts
from titans_pretrain.evaluate.babilong_context import Background, hide
from titans_pretrain.evaluate.tasks import Options
from titans_pretrain.evaluate.text_tokens import TextTokens

MODEL = SimpleNamespace(tokenizer=Words())


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    place = tmp_path_factory.mktemp("babilong")
    background = write_background(place / "book.txt", 3000)
    return {"facts": write_facts(place / "babi"), "background": (background,)}


@pytest.fixture
def asked(monkeypatch):
    """Every call for answers; they are right where the question is about Mary."""
    calls = []

    def greedy(model, texts, *, max_new_tokens, batch):
        prompts = list(texts)
        assert model is MODEL
        assert max_new_tokens == 20
        calls.append(prompts)
        assert len(prompts) <= batch
        return ["garden" if "Mary?" in text.rsplit("\n", 1)[1] else "" for text in prompts]

    monkeypatch.setattr(babilong, "greedy", greedy)
    return calls


class Letters(Words):
    """A tokenizer whose tokens are letters."""

    def _ids(self, text):
        return super()._ids(" ".join(text.replace(" ", "_")))

    def decode(self, ids, **_):
        return super().decode(ids).replace(" ", "").replace("_", " ")


def _open(given, task="qa1", **options):
    (made,) = babilong.open_tasks([f"babilong_{task}"], Options(**given, **options))
    return made


def _quiet(_):
    pass


def test_accuracy_is_the_share_of_right_answers(given, asked):
    task = _open(given, batch=5)
    result = task.run(MODEL, "0k", _quiet)
    every = babilong_facts.read(given["facts"] / "qa1_single-supporting-fact_test.txt")
    right = sum(one.question == "Where is Mary?" and one.answer == "garden" for one in every)
    assert right
    assert result["accuracy"] == right / len(every)
    assert result["samples"] == len(every) == 24
    assert sorted(map(len, asked)) == [4, 5, 5, 5, 5]


def test_at_0k_a_prompt_holds_the_facts_alone(given, asked):
    _open(given, shots=0).run(MODEL, "0k", _quiet)
    every = babilong_facts.read(given["facts"] / "qa1_single-supporting-fact_test.txt")
    wanted = [
        f"<context>\n{' '.join(one.facts)}\n</context>\n\nQuestion: {one.question}" for one in every
    ]
    assert sorted(text for call in asked for text in call) == sorted(wanted)


def test_a_context_is_the_length_less_300_tokens(given, asked):
    task = _open(given, lengths=("1k", "700"), samples=3)
    assert task.cells() == ["1k", "700"]
    assert task.run(MODEL, "1k", _quiet)["context_tokens"] == 700
    assert task.run(MODEL, "700", _quiet)["context_tokens"] == 400
    for texts, size in zip((asked[:3], asked[3:]), (700, 400), strict=True):
        for (text,) in texts:
            context = text.split("</context>")[0].rsplit("<context>\n", 1)[1]
            assert len(context.split()) == size
            assert text.startswith("I will give you context with the facts about positions")


def test_a_tokenizer_that_makes_more_of_the_prompt_gets_a_shorter_context(given, asked):
    model = SimpleNamespace(tokenizer=Letters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(babilong, "greedy", lambda model, texts, **_: ["" for _ in texts])
        result = _open(given, lengths=("4k",), samples=1).run(model, "4k", _quiet)
    prompt = babilong_facts.prompt("qa1", "", "Where is Sandra?", bare=False)
    rest = TextTokens.of(Letters()).count(prompt)
    assert rest > 300
    assert result["context_tokens"] == 4000 - rest


@pytest.mark.parametrize("length", ["300", "301"])
def test_lengths_without_room_for_context_or_facts_are_told_before_anything_is_asked(
    given, asked, length
):
    _open(given, lengths=("1k",)).fit(MODEL, "1k")
    with pytest.raises(Misfit, match=rf"error: {length}: "):
        _open(given, lengths=("1k", length)).fit(MODEL, length)
    assert asked == []


def test_equal_seeds_give_equal_prompts_and_lengths_ask_the_same_questions(given, asked):
    for seed in (0, 0, 1):
        _open(given, samples=4, seed=seed).run(MODEL, "1k", _quiet)
    first, again, other = asked[:4], asked[4:8], asked[8:]
    assert first == again != other
    _open(given, samples=4).run(MODEL, "2k", _quiet)
    last = [text.rsplit("\n", 1)[1] for (text,) in first]
    assert [text.rsplit("\n", 1)[1] for (text,) in asked[12:]] == last


def test_questions_with_more_facts_than_an_eighth_of_the_context_are_left_out(given, asked):
    told = []
    task = _open(given, lengths=("324", "316", "300"))
    result = task.run(MODEL, "324", told.append)  # 24 tokens: two facts and the question
    assert result["samples"] == 12
    assert "babilong_qa1 324: 12 questions, not 1000" in told
    with pytest.raises(UserError, match="more facts than 16 tokens"):
        task.run(MODEL, "316", _quiet)
    with pytest.raises(UserError, match="300 tokens are for the rest of the prompt"):
        task.run(MODEL, "300", _quiet)


def test_questions_whose_facts_are_more_tokens_than_the_context_are_left_out_and_counted(
    given, asked, monkeypatch
):
    monkeypatch.setattr(MODEL, "tokenizer", Letters())
    prompt = babilong_facts.prompt("qa1", "", "Where is Sandra?", bare=False)
    length = TextTokens.of(Letters()).count(prompt) + 70  # letters of two facts, not of four
    told = []
    task = _open(given, lengths=(str(length),), samples=12)
    result = task.run(MODEL, str(length), told.append)
    assert (result["samples"], result["context_tokens"]) == (12, 70)
    lengths = [len(Letters()(text)["input_ids"]) for (text,) in asked]
    assert max(lengths) <= length
    assert all(text.split("</context>")[0].count(" went to the ") >= 2 for (text,) in asked)
    (line,) = [line for line in told if "left out" in line]
    assert re.search(r"12 questions; \d+ left out, whose facts are more than 70 tokens$", line)


def test_the_tokenizers_special_tokens_and_its_longest_question_count_to_the_rest(given):
    task = _open(given, lengths=("2k",))
    task._all = [
        babilong_facts.Question((), text, "") for text in ("Where a b c d", "Wheeeeeeeeeeere")
    ]
    tokens = TextTokens.of(Words())
    monstrous = "w " * 400
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            babilong.facts, "prompt", lambda task, context, asked, bare: monstrous + asked
        )
        assert task._context_size("2k", tokens, 2) == 2000 - 405 - 2


@pytest.mark.parametrize(("cell", "samples"), [("32k", 1000), ("32001", 100), ("64k", 100)])
def test_a_thousand_questions_up_to_32k_and_a_hundred_beyond(given, cell, samples, monkeypatch):
    task = _open(given, lengths=(cell,))
    question = babilong_facts.Question(("A b.",), "Where is Mary?", "garden")
    task._all = [question] * 2000
    assert len(task._questions(cell, 10**4, TextTokens.of(Words()), _quiet)) == samples


def test_the_identity_tells_what_decides_the_result_but_the_length(given, tmp_path):
    task = _open(given)
    assert task.identity() == _open(given, lengths=("4k",)).identity()
    other = write_background(tmp_path / "b.txt", 100)
    for changed in (
        _open(given, seed=1),
        _open(given, samples=5),
        _open(given, shots=0),
        _open(given, task="qa4"),
        _open(given | {"background": (other,)}),
        _open(given | {"facts": write_facts(tmp_path / "babi", 3)}),
    ):
        assert changed.identity() != task.identity()


def test_definition_2_is_of_these_prompts(given, asked):
    for task in ("qa1", "qa4"):
        opened = _open(given, task=task, lengths=("1k",), samples=2)
        opened.run(MODEL, "1k", _quiet)
        assert opened.identity()["definition"] == 2
    texts = "\0".join(text for call in asked for text in call)
    golden = "dd5d1e72605a3b71ca70363dc355614082781780fab53239914e6d404c46ff27"
    assert hashlib.sha256(texts.encode()).hexdigest() == golden


def test_other_prompts_or_labels_are_another_identity(given, tmp_path, monkeypatch):
    before = _open(given).identity()
    other = tmp_path / "prompts.json"
    other.write_text(babilong_facts._OFFICIAL.read_text() + "\n")
    monkeypatch.setattr(babilong_facts, "_OFFICIAL", other)
    assert _open(given).identity() != before


def test_lengths_that_with_an_answer_exceed_a_models_positions_are_refused(given):
    task = _open(given, lengths=("1k", "2k"))
    task.check(2020)
    with pytest.raises(UserError, match="2000 tokens and 20 new ones are more than") as caught:
        task.check(2019)
    assert (caught.value.where, caught.value.fix) == ("--lengths", "use at most 1999")


@pytest.mark.parametrize(
    ("text", "tokens"), [("0k", 0), ("1k", 1000), ("1M", 10**6), ("10M", 10**7), ("2048", 2048)]
)
def test_lengths_are_thousands_and_millions(text, tokens):
    assert babilong.length(text) == tokens


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"facts": None}, "--facts"),
        ({"background": ()}, "--background"),
        ({"shots": 2}, "--few-shot"),
        ({"lengths": ("4K",)}, "--lengths"),
        ({"lengths": ("-1",)}, "--lengths"),
    ],
)
def test_wrong_options_are_refused_before_any_work(given, options, where):
    with pytest.raises(UserError) as caught:
        _open(given | options)
    assert where in caught.value.where


def test_positions_follow_the_dice_of_the_sample(given, asked):
    _open(given, samples=1, seed=3, shots=0).run(MODEL, "1k", _quiet)
    every = babilong_facts.read(given["facts"] / "qa1_single-supporting-fact_test.txt")
    question = random.Random("3 qa1").sample(every, len(every))[0]
    hidden = hide(
        question.facts,
        700,
        Background(given["background"]),
        TextTokens.of(MODEL.tokenizer),
        random.Random("3 qa1 700 0"),
    )
    assert hidden.context in asked[0][0]
