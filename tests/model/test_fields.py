"""The table of the model's fields: bounds, choices, combinations and hints."""

import subprocess
import sys
from typing import Any

import pytest

from titans_pretrain.model import fields
from titans_pretrain.model.fields import FIELDS, TABLE, VARIANTS, Problem, defaults, problems


def only(values: dict[str, Any]) -> Problem:
    found = problems(values)
    assert len(found) == 1, found
    return found[0]


def test_the_defaults_have_no_problem_in_any_variant() -> None:
    for variant in VARIANTS:
        assert problems({"variant": variant}) == []


def test_defaults_are_a_fresh_mapping_of_every_field() -> None:
    defaults()["variant"] = "changed"
    assert defaults() == {field.name: field.default for field in FIELDS}
    assert len(TABLE) == len(FIELDS)


def test_every_field_has_a_meaning_and_known_variants() -> None:
    for field in FIELDS:
        assert field.doc.endswith(".")
        assert field.variants
        assert set(field.variants) <= set(VARIANTS)


BOUNDED = [
    *((f.name, f.low - 1, f.low) for f in FIELDS if f.low is not None),
    *((f.name, f.above, f.above + 1e-3) for f in FIELDS if f.above is not None),
    *((f.name, f.high + 1, f.high) for f in FIELDS if f.high is not None),
]


@pytest.mark.parametrize(("name", "bad", "good"), BOUNDED)
def test_a_number_beyond_its_bound_is_refused_and_the_bound_itself_is_not(
    name: str, bad: float, good: float
) -> None:
    kind = TABLE[name].kind
    problem = only({name: kind(bad)})
    assert problem.field == name
    assert str(kind(bad)) in problem.message
    assert problem.fix.startswith("use ")
    alone = [p for p in problems({name: kind(good)}) if "too " in p.message]
    assert alone == []


def test_the_bias_of_a_gate_that_is_off_is_refused() -> None:
    problem = only({"use_forgetting": False, "forget_bias": -7.0})
    assert problem.field == "forget_bias"
    assert problems({"use_forgetting": False}) == problems({"forget_bias": -7.0}) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f.name for f in FIELDS if f.kind is float])
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    assert only({name: value}).field == name


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_value_of_the_wrong_type_is_refused(field: fields.ModelField) -> None:
    wrong: dict[type, list[Any]] = {
        int: [1.5, "12", True, [1]],
        float: ["0.5", True, [0.5]],
        bool: [1, 0, "true"],
        str: [1, True, ["mac"]],
    }
    for value in wrong[field.kind] + ([] if field.optional else [None]):
        problem = only({field.name: value})
        assert problem.field == field.name
        assert repr(value) in problem.message
        assert field.kind.__name__ in problem.fix


def test_null_is_a_value_of_the_optional_fields_alone() -> None:
    optional = {field.name for field in FIELDS if field.optional}
    assert optional == {
        "attention_window",
        "memory_heads",
        "partial_rotary_factor",
        "surprise_clip",
    }
    for name in optional:
        assert problems({name: None}) == []


def test_a_whole_number_serves_where_a_fraction_is_wanted() -> None:
    assert problems({"max_step": 1, "rope_theta": 10000}) == []


@pytest.mark.parametrize("field", [f for f in FIELDS if f.choices], ids=lambda field: field.name)
def test_an_unknown_choice_is_refused_with_the_choices(field: fields.ModelField) -> None:
    problem = only({field.name: "zebra"})
    assert problem.field == field.name
    assert "'zebra'" in problem.message
    assert all(choice in problem.fix for choice in field.choices)
    for choice in field.choices:
        assert problems({field.name: choice}) == []


def test_a_misspelt_choice_gets_the_nearest_one() -> None:
    assert "did you mean 'transformer'?" in only({"variant": "tranformer"}).fix


def test_an_unknown_field_gets_the_nearest_name() -> None:
    problem = only({"chunksize": 4})
    assert problem.field == "chunksize"
    assert problem.fix == "did you mean 'chunk_size'?"


def test_a_field_like_no_other_gets_all_names() -> None:
    problem = only({"zzzzqqqq": 4})
    assert all(name in problem.fix for name in TABLE)


def test_every_problem_is_reported_at_once() -> None:
    found = problems({"chunksize": 4, "memory_depth": 9, "gate_per": "word"})
    assert {problem.field for problem in found} == {"chunksize", "memory_depth", "gate_per"}


def test_a_problem_reads_as_field_fault_and_fix() -> None:
    assert str(only({"memory_depth": 9})) == "memory_depth: 9 is too large; use at most 4"


ODD = {"hidden_size": 30, "num_attention_heads": 4}
COMBINATIONS = [
    (ODD | {"variant": "transformer"}, "num_attention_heads"),
    (ODD | {"variant": "lmm"}, "memory_heads"),
    ({"variant": "mag", "hidden_size": 768, "memory_heads": 5}, "memory_heads"),
    ({"variant": "mac", "partial_rotary_factor": 1.0}, "partial_rotary_factor"),
    ({"variant": "mag", "partial_rotary_factor": 1.0}, "partial_rotary_factor"),
    ({"variant": "mac", "chunk_size": 64, "segment_length": 32}, "chunk_size"),
    ({"variant": "mac", "chunk_size": 64, "segment_length": 96}, "segment_length"),
]


@pytest.mark.parametrize(("values", "name"), COMBINATIONS)
def test_fields_that_do_not_go_together_are_refused(values: dict[str, Any], name: str) -> None:
    problem = only(values)
    assert problem.field == name
    assert problem.fix.startswith("use ")


@pytest.mark.parametrize(
    "values",
    [
        {"variant": "lmm", "hidden_size": 32, "num_attention_heads": 5, "memory_heads": 4},
        {"variant": "transformer", "memory_heads": 7},
        {"variant": "transformer", "partial_rotary_factor": 1.0},
        {"variant": "mal", "partial_rotary_factor": 1.0, "num_persistent_tokens": 0},
        {"variant": "mac", "partial_rotary_factor": 1.0, "num_persistent_tokens": 0},
        {"variant": "mag", "chunk_size": 64, "segment_length": 32},
        {"variant": "mac", "chunk_size": 64, "segment_length": 64},
        {"variant": "mac", "chunk_size": 1, "segment_length": 7},
    ],
)
def test_a_rule_between_fields_binds_only_the_variants_that_read_them(
    values: dict[str, Any],
) -> None:
    assert problems(values) == []


def test_a_proposed_number_of_heads_or_width_works() -> None:
    fix = only(ODD | {"variant": "transformer"}).fix
    assert fix == "use 3 heads or hidden_size 32"


def test_a_proposed_segment_length_works() -> None:
    assert only({"variant": "mac", "chunk_size": 64, "segment_length": 100}).fix == "use 128"


def test_fields_that_a_variant_does_not_read_are_told() -> None:
    names = ["window_size", "segment_length", "hidden_size", "memory_depth", "no_field"]
    assert fields.unused("transformer", names) == ["window_size", "segment_length", "memory_depth"]
    assert fields.unused("lmm", names) == ["window_size", "segment_length"]
    assert fields.unused("mac", names) == ["window_size"]
    assert fields.unused("mag", names) == ["segment_length"]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 32, 64, 127])
@pytest.mark.parametrize("factor", [0.0, 0.25, 0.5, 1 / 3, 0.99, 1.0])
def test_the_rotated_width_is_the_largest_even_one_within_the_factor(
    width: int, factor: float
) -> None:
    rotated = fields.rotated_width(width, factor)
    assert rotated % 2 == 0
    assert rotated <= width * factor < rotated + 2


def test_the_table_loads_without_torch() -> None:
    code = "import sys, titans_pretrain.model.fields; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
