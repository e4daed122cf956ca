"""Names of tasks, and the options that they take."""

import pytest

from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import babilong, harness, needle, needle_text, position, tasks
from titans_pretrain.evaluate.tasks import Family, Options


class Named:
    def __init__(self, name):
        self.name = name


def open_named(names, options):
    return [Named(name) for name in names]


@pytest.fixture
def families(monkeypatch):
    """Two families whose tasks need nothing."""
    several = (
        Family(("apple", "pear"), frozenset({"samples"}), open_named),
        Family(("plum",), frozenset({"lengths", "batch"}), open_named),
    )
    monkeypatch.setattr(tasks, "FAMILIES", several)
    monkeypatch.setattr(tasks, "GROUPS", {"fruit": ("apple", "plum")})


def names(text, **options):
    return [task.name for task in tasks.parse(text, Options(**options))]


def test_names_and_groups_keep_their_order_and_come_once(families):
    assert names("plum, pear,plum") == ["plum", "pear"]
    assert names("pear,fruit,apple") == ["pear", "apple", "plum"]


@pytest.mark.parametrize(
    ("text", "fix"), [("aple", "did you mean 'apple'?"), ("fruits", "did you mean 'fruit'?")]
)
def test_a_typo_names_the_nearest(text, fix, families):
    with pytest.raises(UserError, match=f"'{text}' is no task") as caught:
        names(f"plum,{text}")
    assert caught.value.fix == fix


def test_an_empty_name_is_refused(families):
    with pytest.raises(UserError, match="a task without a name"):
        names("plum,")


def test_an_option_that_no_task_takes_is_refused(families):
    assert names("plum,apple", samples=3, lengths=("4k",), batch=2, trained_length=8)
    with pytest.raises(UserError, match="none of the tasks reads --samples") as caught:
        names("plum", samples=3)
    assert caught.value.fix == "leave it out, or add one of apple, pear"
    with pytest.raises(UserError, match="none of the tasks reads --batch"):
        names("apple", batch=2)


def test_every_task_of_every_kind_has_a_name():
    names = {family.names for family in tasks.FAMILIES}
    assert names == {
        tuple(harness.BENCHMARKS),
        tuple(needle_text.KINDS),
        babilong.NAMES,
        (position.NAME,),
    }


def test_tasks_are_opened_by_their_modules(monkeypatch):
    for module, name in (
        (harness, "piqa"),
        (needle, "niah_pk"),
        (babilong, "babilong_qa1"),
        (position, "position"),
    ):
        monkeypatch.setattr(module, "open_tasks", open_named)
        assert names(name) == [name]


def test_the_groups_are_the_papers():
    assert len(tasks.GROUPS["paper"]) == 9
    assert tasks.GROUPS["niah"] == ("niah_pk", "niah_number", "niah_uuid")
    assert tasks.GROUPS["babilong"] == tuple(f"babilong_qa{number}" for number in range(1, 6))
    assert set(tasks.GROUPS["paper"]) - set(tasks.GROUPS["commonsense"]) == {"wikitext"}
    every = {name for family in tasks.FAMILIES for name in family.names}
    assert all(set(group) <= every for group in tasks.GROUPS.values())
