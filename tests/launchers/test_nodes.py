"""Which nodes are to spare, and which are lost."""

from launchers import nodes


def test_nodes_to_spare_are_those_that_slurm_would_use():
    states = {"a1": "idle", "a2": "allocated", "a3": "down", "a4": "idle*", "a5": "drained"}
    assert nodes.spare(states | {"a6": "mixed-"}, 2, []) == 1
    assert nodes.spare(states | {"a6": "mixed-"}, 2, ["a1"]) == 0
    assert nodes.spare(states, 4, []) == 0
    assert nodes.lost(["a1", "a3", "a4", "b9"], states) == ("a3", "a4")
