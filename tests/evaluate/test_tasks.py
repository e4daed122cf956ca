"""Names of tasks, and the options that they take."""

from pathlib import Path

import pytest

from titans_pretrain.errors import Misfit, UserError
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


MISSING = Path("missing")


@pytest.mark.parametrize(
    ("text", "given", "task", "needed"),
    [
        ("piqa,niah", {}, "niah_number", "--essays"),
        ("babilong_qa1", {"background": (MISSING,)}, "babilong_qa1", "--facts"),
        ("babilong", {"facts": MISSING}, "babilong_qa1", "--background"),
        ("babilong_qa7", {}, "babilong_qa7", "--facts and --background"),
        ("position", {}, "position", "--text or --data"),
    ],
)
def test_a_task_whose_data_no_option_names_is_refused_before_any_is_read(text, given, task, needed):
    for refuse in (tasks.check, tasks.parse):
        with pytest.raises(Misfit, match="needs") as caught:
            refuse(text, Options(**given))
        assert caught.value.what == f"{task} needs {needed}"
        assert caught.value.where == f"--tasks {task}"


def test_only_tasks_that_read_the_users_own_data_need_it_named():
    def refused(name):
        try:
            tasks.check(name, Options())
        except Misfit:
            return True

    essays = {name for name, kind in needle_text.KINDS.items() if kind.haystack == "essay"}
    every = {name for family in tasks.FAMILIES for name in family.names}
    assert set(filter(refused, every)) == {*essays, *babilong.NAMES, position.NAME}
    tasks.check("niah_uuid", Options(essays=(MISSING,)))
    tasks.check("babilong_qa1", Options(facts=MISSING, background=(MISSING,)))
    tasks.check("position", Options(data="missing"))
    tasks.check("position", Options(text=(MISSING,)))


def test_every_task_of_every_kind_has_a_name():
    names = {family.names for family in tasks.FAMILIES}
    assert names == {
        tuple(harness.BENCHMARKS),
        tuple(needle_text.KINDS),
        babilong.NAMES,
        (position.NAME,),
    }


def test_tasks_are_opened_by_their_modules(monkeypatch):
    for module, name, options in (
        (harness, "piqa", {}),
        (needle, "niah_pk", {}),
        (babilong, "babilong_qa1", {"facts": MISSING, "background": (MISSING,)}),
        (position, "position", {"data": "missing"}),
    ):
        monkeypatch.setattr(module, "open_tasks", open_named)
        assert names(name, **options) == [name]


def test_the_groups_are_the_papers():
    assert len(tasks.GROUPS["paper"]) == 9
    assert tasks.GROUPS["niah"] == ("niah_pk", "niah_number", "niah_uuid")
    assert tasks.GROUPS["babilong"] == tuple(f"babilong_qa{number}" for number in range(1, 6))
    assert set(tasks.GROUPS["paper"]) - set(tasks.GROUPS["commonsense"]) == {"wikitext"}
    every = {name for family in tasks.FAMILIES for name in family.names}
    assert all(set(group) <= every for group in tasks.GROUPS.values())
