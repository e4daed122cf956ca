import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import sentences

from data_prep import filters
from data_prep.rows import BAD, Row
from data_prep.settings import Settings


def row(text="some text", score=None, language=None):
    return Row(text, "", "", "", "", score, language)


@pytest.mark.parametrize(
    ("document", "settings", "expected"),
    [
        (row(), {}, "kept"),
        (BAD, {}, "bad"),
        (row(""), {}, "empty"),
        (row(" \n\t\u3000"), {}, "empty"),
        (row(score=2.9), {"min_score": 3}, "score"),
        (row(score=3), {"min_score": 3}, "kept"),
        (row(score=None), {"min_score": 0}, "score"),
        (row(score=math.nan), {"min_score": 0}, "score"),
        (row(language="de"), {"language": "en"}, "language"),
        (row(language=None), {"language": "en"}, "language"),
        (row(language="en"), {"language": "en"}, "kept"),
        (row("abc"), {"min_characters": 4}, "short"),
        (row("abcd"), {"min_characters": 4, "max_characters": 4}, "kept"),
        (row("äöüß"), {"max_characters": 4}, "kept"),
        (row("abcde"), {"max_characters": 4}, "long"),
    ],
)
def test_a_document_is_kept_or_dropped_by(document, settings, expected):
    assert filters.verdict(document, Settings(**settings)) == expected


def test_the_first_reason_counts():
    strict = Settings(min_score=3, language="en", min_characters=9)
    assert filters.verdict(row(" ", 1, "de"), strict) == "empty"
    assert filters.verdict(row("text", 1, "de"), strict) == "score"
    assert filters.verdict(row("text", 3, "de"), strict) == "language"
    assert filters.verdict(row("text", 3, "en"), strict) == "short"


def test_about_the_share_is_held_out_and_a_larger_one_holds_out_what_a_smaller_does():
    documents = [json.dumps([text, number]) for number, text in enumerate(sentences(4000))]
    few, many = (
        {text for text in documents if filters.is_held_out(text, share)} for share in (0.01, 0.2)
    )
    assert 20 < len(few) < 65
    assert 680 < len(many) < 920
    assert few < many


@given(st.text(st.characters(codec="utf-8")))
def test_none_of_a_text_is_held_out_at_zero_and_all_at_one(text):
    assert not filters.is_held_out(text, 0.0)
    assert filters.is_held_out(text, 1.0)


def test_equal_answers_to_different_prompts_fall_on_both_sides():
    sides = [filters.is_held_out("yes", 0.5, f"is {number} even?") for number in range(100)]
    assert 30 < sum(sides) < 70
    assert sides == [filters.is_held_out("yes", 0.5, f"is {number} even?") for number in range(100)]


def test_prompt_and_text_are_told_apart_from_their_joint_text():
    pairs = [("a", "bc"), ("ab", "c"), ("", "abc")]
    assert len({filters.digest(text, prompt, b"use", 8) for prompt, text in pairs}) == 3


def test_the_side_of_a_text_never_changes():
    held_out = [number for number in range(40) if filters.is_held_out(str(number), 0.1)]
    assert held_out == [1, 25, 38]
