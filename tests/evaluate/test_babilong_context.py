"""Facts between sentences: whose, how many tokens, and where."""

import hashlib
import random

import pytest
from babi_files import words, write_background

from titans_pretrain.errors import UserError
from titans_pretrain.evaluate.babilong_context import Background, _inner_sentences, hide, woven

FACTS = ("Mary went to the garden.", "John went to the office.", "Mary went home.")


@pytest.fixture
def book(tmp_path):
    return write_background(tmp_path / "book.txt")


def _sentences(book):
    return [" ".join(part.split()) + "." for part in book.read_text().split(".") if part.strip()]


def test_facts_stand_before_the_sentence_of_their_position_and_keep_their_order():
    parts = woven(["f0", "f1", "f2", "f3"], [0, 2, 2, 3], ["s0", "s1", "s2"])
    assert parts == ["f0", "s0", "s1", "f1", "f2", "s2", "f3"]
    assert woven(["f0", "f1"], [0, 0], []) == ["f0", "f1"]


def test_facts_and_background_have_exactly_the_size(book):
    tokens = words()
    for size in (30, 31, 137, 600):
        hidden = hide(FACTS, size, Background([book]), tokens, random.Random(size))
        assert hidden.tokens == tokens.count(hidden.context) == size
        assert list(hidden.positions) == sorted(hidden.positions)
        assert 0 <= hidden.positions[0] <= hidden.positions[-1] <= len(hidden.background)
        assert hidden.context == " ".join(woven(FACTS, hidden.positions, hidden.background))


def test_background_is_whole_sentences_of_ten_words_on_in_the_books_order_but_the_last(book):
    hidden = hide(FACTS, 300, Background([book]), words(), random.Random(5))
    *whole, last = [" ".join(sentence.split()) for sentence in hidden.background]
    long = [sentence for sentence in _sentences(book) if len(sentence.split()) >= 10]
    at = long.index(whole[0])
    assert long[at : at + len(whole)] == whole
    assert long[at + len(whole)].startswith(last)


def test_every_position_is_drawn_the_ends_included(book):
    seen = set()
    for seed in range(200):
        hidden = hide(FACTS[:1], 40, Background([book]), words(), random.Random(seed))
        if len(hidden.background) == 2:
            seen.update(hidden.positions)
    assert seen == {0, 1, 2}


def test_facts_that_fill_the_size_stand_alone(book):
    hidden = hide(FACTS, 0, Background([book]), words(), random.Random(0))
    assert hidden.context == " ".join(FACTS)
    assert hidden.tokens == 13


def test_the_dice_decide(book):
    def context(seed):
        return hide(FACTS, 100, Background([book]), words(), random.Random(seed)).context

    assert context(1) == context(1) != context(2)


def test_more_than_a_file_holds_is_taken_from_many_places(book):
    hidden = hide(FACTS, 30_000, Background([book]), words(), random.Random(0))
    assert hidden.tokens == 30_000


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Zero. One is here! Is two? Three", ["One is here!", "Is two?"]),
        ("Zero. “One.” (Two.) Three", ["“One.”", "(Two.)"]),
        ("Zero. It costs 1.50 now. Three", ["It costs 1.50 now."]),
        ("Zero. One\nin two lines.\n\nThree", ["One\nin two lines."]),
        ("Zero. One ... and on. Two", ["One ...", "and on."]),
        ("Nothing ends", []),
    ],
)
def test_a_sentence_ends_with_a_stop_and_white_space(text, sentences):
    assert list(_inner_sentences([text])) == sentences
    assert list(_inner_sentences(text)) == sentences  # a character at a time


def test_the_content_of_the_files_is_told(book):
    assert Background([book]).hashes == [hashlib.sha256(book.read_bytes()).hexdigest()]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b" \n\n", "empty"), (b"A\xff.", "UTF-8"), (b"A\xe2\x80", "UTF-8")],
)
def test_unusable_files_are_refused(tmp_path, content, reason):
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        Background([tmp_path / "b"])
    assert str(tmp_path / "b") in caught.value.where


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        Background([tmp_path / "b"])
    with pytest.raises(UserError, match="no background"):
        Background([])


def test_text_without_sentences_of_ten_tokens_is_refused(tmp_path):
    (tmp_path / "b").write_text("Too short. " * 1000)
    with pytest.raises(UserError, match="no sentence of 10 tokens"):
        Background([tmp_path / "b"]).sentences(50, words(), random.Random(0))
