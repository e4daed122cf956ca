"""A run saved on one mesh goes on at another, and comes back, as if it had never moved."""

import pytest
import torch
from resume_cases import Steps
from tiny import prepare

from titans_pretrain.train.build import open_data

STEPS, SAVED, RETURNED = 6, 3, 4
TOLERANCE = 1e-6
MESHES = [(1, 1, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 8, 1)]
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]
PATIENCE = 900


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def straight(manifest, tmp_path_factory):
    """``straight(variant, mesh)``: a run never stopped, and what its model read in each step."""
    known = {}

    def run(variant, sizes):
        if (variant, sizes) not in known:
            steps = Steps(manifest, tmp_path_factory.mktemp("straight") / "run", variant, STEPS)
            known[variant, sizes] = steps, steps.train(sizes, timeout=PATIENCE)
        return known[variant, sizes]

    return run


def worst_difference(found, expected):
    """The largest difference of the losses, once all else that is told is the same."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    worst = 0.0
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() & {"loss", "validation_loss"}:
            worst = max(worst, abs(row[name] - other[name]))
        for name in row.keys() & {"tokens", "learning_rate"}:
            assert row[name] == other[name]
    return worst


def read_the_same(found, expected, after):
    """Whether exactly the steps after ``after`` read their documents, in order."""
    assert sorted(found) == list(range(after + 1, STEPS + 1))
    return all(torch.equal(tokens, expected[step]) for step, tokens in found.items())


def move_and_return(straight, directory, first, other):
    """Go on from one mesh at another, go back from there; the largest difference of the losses."""
    run, expected = straight
    moved = run.copied_at(SAVED, directory)
    assert read_the_same(moved.train(other, resume=True, timeout=PATIENCE), expected, SAVED)
    there = worst_difference(moved.rows(), run.rows())
    moved.forget_after(RETURNED)
    assert read_the_same(moved.train(first, resume=True, timeout=PATIENCE), expected, RETURNED)
    back = worst_difference(moved.rows(), run.rows())
    print(f"{first} -> {other}: {there:.1e}, and back: {back:.1e}")
    return max(there, back)


@pytest.mark.parametrize(
    ("variant", "first", "other"),
    [
        ("mac", (2, 1, 2), (1, 2, 1)),
        ("lmm", (1, 2, 2), (2, 2, 1)),
        *(
            pytest.param(variant, (2, 2, 2), other, marks=SLOW)
            for variant in ("mac", "mal")
            for other in MESHES
        ),
    ],
)
def test_a_run_goes_on_at_another_mesh_and_returns_with_the_losses_it_would_have_had(
    straight, tmp_path, variant, first, other
):
    moved = move_and_return(straight(variant, first), tmp_path / "moved", first, other)
    assert moved <= TOLERANCE


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("mac", (2, 1, 2)),
        *(pytest.param(variant, (2, 2, 2), marks=SLOW) for variant in ("mac", "mal")),
    ],
)
def test_a_run_that_goes_on_at_the_same_mesh_is_the_run_never_stopped_to_the_bit(
    straight, tmp_path, variant, sizes
):
    run, read = straight(variant, sizes)
    broken = run.copied_at(SAVED, tmp_path / "broken")
    assert read_the_same(broken.train(sizes, resume=True, timeout=PATIENCE), read, SAVED)
    assert broken.rows() == run.rows()
    expected, found = run.tensors(STEPS), broken.tensors(STEPS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_reads_the_documents_that_the_loader_hands_to_a_single_rank(manifest, straight):
    run, read = straight("mac", (2, 1, 2))
    loader = open_data(run.configuration((1, 1, 1))).loader
    assert sorted(read) == list(range(1, STEPS + 1))
    for step, tokens in read.items():
        place = {"step": step - 1, "position": (step - 1) * tokens.numel()}
        handed_out = loader.batch(**place, sequences=len(tokens), rank=0, ranks=1)
        assert torch.equal(tokens, handed_out.tokens[:, :-1])
    rows = torch.cat(list(read.values()))
    assert len(rows.unique(dim=0)) == len(rows)
