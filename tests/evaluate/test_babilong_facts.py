"""bAbI's questions, BABILong's prompts and its scoring, against samples made from its rules."""

import pytest
from babi_files import STORY

from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import babilong_facts as facts
from titans_pretrain.evaluate.babilong_facts import Question


def _file(tmp_path, text):
    (tmp_path / "qa1_x_test.txt").write_text(text)
    return tmp_path / "qa1_x_test.txt"


def test_a_question_comes_with_every_fact_of_its_story_so_far_and_no_other_question(tmp_path):
    mary, john = "Mary moved to the bathroom.", "John went to the hallway."
    assert facts.read(_file(tmp_path, STORY)) == [
        Question((mary, john), "Where is Mary?", "bathroom"),
        Question((mary, john, "Daniel went back to the hallway."), "Where is Daniel?", "hallway"),
        Question(("Sandra moved to the garden.",), "Where is Sandra?", "garden"),
    ]


def test_the_question_counts_among_the_sentences_of_which_there_may_be_few(tmp_path):
    questions = facts.read(_file(tmp_path, STORY))
    assert [len(one.facts) for one in facts.with_few_facts(questions, 3)] == [2, 1]


@pytest.mark.parametrize(
    "line", ["Mary moved.", "0 Mary moved.", "1 Where?\tgarden", "1 Where?\tgarden\tx", "", "\t"]
)
def test_a_line_in_another_format_is_named(tmp_path, line):
    with pytest.raises(UserError, match="line 2") as caught:
        facts.read(_file(tmp_path, f"1 Mary moved.\n{line}\n3 Where?\tgarden\t1"))
    assert "qa1_x_test.txt" in caught.value.where


def test_files_without_questions_or_in_other_encodings_are_refused(tmp_path):
    with pytest.raises(UserError, match="no question"):
        facts.read(_file(tmp_path, "1 Mary moved."))
    (tmp_path / "b").write_bytes(b"1 M\xff.")
    with pytest.raises(UserError, match="not UTF-8"):
        facts.read(tmp_path / "b")
    with pytest.raises(UserError, match="No such file"):
        facts.read(tmp_path / "c")


def test_the_one_file_of_a_task_is_found(tmp_path):
    tmp_path = tmp_path / "all/en-10k"
    tmp_path.mkdir(parents=True)
    _file(tmp_path, STORY)
    (tmp_path / "qa11_y_test.txt").write_text(STORY)
    assert facts.find(tmp_path, "qa1", "test").name == "qa1_x_test.txt"
    with pytest.raises(UserError, match=r"0 files named qa1_\*_train\.txt"):
        facts.find(tmp_path, "qa1", "train")
    with pytest.raises(UserError) as caught:
        facts.find(tmp_path.parent, "qa1", "test")
    assert caught.value.fix == f"give {tmp_path}"
    (tmp_path / "qa1_y_test.txt").write_text(STORY)
    with pytest.raises(UserError, match="2 files"):
        facts.find(tmp_path, "qa1", "test")


def test_the_prompt_of_qa4_is_babilongs():
    assert facts.prompt("qa4", " A. B. ", "What is the kitchen south of?", bare=False) == (
        "I will give you context with the facts about different people, their location and "
        "actions, hidden in some random text and a question. You need to answer the question "
        "based only on the information from the facts.\n\n"
        "<example>\nThe hallway is south of the kitchen. The bedroom is north of the kitchen. "
        "What is the kitchen south of?\nAnswer: bedroom\n</example>\n"
        "<example>\nThe garden is west of the bedroom. The bedroom is west of the kitchen. "
        "What is west of the bedroom?\nAnswer: garden\n</example>\n\n"
        "Your answer should contain only one word - location. Do not write anything else after "
        "that.\n\n"
        "<context>\nA. B.\n</context>\n\nQuestion: What is the kitchen south of?"
    )


def test_a_bare_prompt_is_context_and_question():
    text = facts.prompt("qa1", "A.", "Where?", bare=True)
    assert text == "<context>\nA.\n</context>\n\nQuestion: Where?"


def test_every_task_has_a_prompt_with_examples_and_labels():
    for task in facts.TASKS:
        text = facts.prompt(task, "The facts.", "Where?", bare=False)
        assert text.count("<example>") == (3 if task in _THREE else 2)
        assert facts.official()["tasks"][task]["labels"]


_THREE = {"qa5", "qa7", "qa8", *(f"qa{number}" for number in range(10, 21))}


@pytest.mark.parametrize(
    ("task", "question", "answer", "output", "right"),
    [
        ("qa1", "Where is Mary?", "garden", "The most recent location of Mary is garden.", True),
        ("qa1", "Where is Mary?", "garden", "GARDEN", True),
        ("qa1", "Where is Mary?", "garden", "", False),
        ("qa1", "Where is Mary?", "garden", "the kitchen", False),
        ("qa1", "Where is Mary?", "garden", "garden or kitchen", False),
        ("qa1", "Where is Mary?", "garden", "garden. Then the kitchen", True),
        ("qa1", "Where is Mary?", "garden", "I see. garden", False),
        ("qa1", "Where is Mary?", "garden", "garden\n<context>\nkitchen", True),
        ("qa1", "Where is Mary?", "garden", "garden <example> office", True),
        ("qa1", "Where is Mary?", "garden", "<context>garden", False),
        ("qa1", "Where is Mary?", "garden", "gardener", True),
        ("qa3", "Where was it before the kitchen?", "garden", "Before the kitchen: garden", True),
        ("qa4", "What is north of the garden?", "office", "The garden is south of office", True),
        ("qa4", "What is north of the garden?", "garden", "garden", False),
        ("qa5", "Who gave the milk to Jeff?", "Bill", "bill gave the milk to jeff", True),
        ("qa5", "Who gave the milk to Jeff?", "Bill", "bill gave the apple to jeff", False),
        ("qa7", "How many?", "none", "none", False),  # "one" is in it, and a label
        ("qa8", "What is Mary carrying?", "apple,milk", "milk and apple", True),
        ("qa8", "What is Mary carrying?", "apple,milk", "apple", False),
        ("qa8", "What is Mary carrying?", "apple,milk", "apple,milk,football", False),
        ("qa19", "How do you go?", "n,w", "n,w", True),
        ("qa19", "How do you go?", "n,w", "n, w", False),
    ],
)
def test_an_answer_counts_as_babilong_counts_it(task, question, answer, output, right):
    assert facts.is_right(task, Question((), question, answer), output) is right
