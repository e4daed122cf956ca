"""Telling bad nodes from bad links, and odd ones from the rest."""

import pytest

from launchers.fabric import partner, turns
from launchers.preflight_network import apart, behind, locate, minority, slow_links, usual


def ring(count):
    names = [f"n{number}" for number in range(count)]
    return [(names[i], names[(i + 1) % count]) for i in range(count)]


@pytest.mark.parametrize("count", range(2, 40))
def test_every_node_meets_two_neighbours_and_each_pair_agrees(count):
    met = {node: [] for node in range(count)}
    for turn in range(turns(count)):
        for node in range(count):
            other = partner(node, count, turn)
            if other is not None:
                assert other != node
                assert partner(other, count, turn) == node
                met[node].append(other)
    assert all(len(set(others)) == len(others) == min(2, count - 1) for others in met.values())


def test_one_node_meets_none():
    assert turns(1) == 0


def test_a_node_bad_on_both_sides_is_told_and_its_links_are_not():
    links = ring(6)
    bad = locate(links, {("n2", "n3"), ("n3", "n4")})
    assert (bad.nodes, bad.links) == (("n3",), ())


def test_one_bad_link_is_no_bad_node():
    bad = locate(ring(6), {("n2", "n3")})
    assert (bad.nodes, bad.links) == ((), (("n2", "n3"),))


def test_the_only_link_of_two_nodes_is_a_bad_link():
    bad = locate([("n0", "n1")], {("n0", "n1")})
    assert (bad.nodes, bad.links) == ((), (("n0", "n1"),))


@pytest.mark.parametrize("seconds", [[1.0], [1.0, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0], [1.0] * 9])
def test_the_usual_is_not_what_one_bad_node_makes_it(seconds):
    assert usual(seconds) == 1.0


def test_no_links_are_slow_where_there_are_none():
    assert slow_links({}, factor=3, least=0, most=1) == set()


def test_what_is_fast_enough_is_not_slow_however_fast_the_others_are():
    seconds = dict.fromkeys(ring(5), 0.001) | {("n1", "n2"): 0.05}
    assert slow_links(seconds, factor=3, least=0.1, most=9) == set()
    assert slow_links(seconds, factor=3, least=0.01, most=9) == {("n1", "n2")}


def test_what_is_too_slow_is_slow_even_where_all_are():
    seconds = dict.fromkeys(ring(5), 10.0)
    assert slow_links(seconds, factor=3, least=0.1, most=9) == set(ring(5))


def test_values_near_most_others_are_not_apart():
    assert apart({"a": 0.0, "b": 1.0, "c": 2.0, "d": 50.0}, 5) == ["d"]
    assert apart({"a": 0.0}, 5) == []
    assert apart({"a": 0.0, "b": 6.0}, 5) == ["a", "b"]


def test_the_minority_is_told_and_without_a_majority_all():
    assert minority({"a": 1, "b": 1, "c": 2}) == (1, ["c"])
    assert minority({"a": 1, "b": 2}) == (None, ["a", "b"])
    assert minority({}) == (None, [])


def test_behind_is_who_has_not_reached_where_the_others_wait():
    assert behind({"a": (3, 0), "b": (3, 0), "c": (1, 0)}, waits_from=3) == ["c"]
    assert behind({"a": (1, 0), "b": (1, 0)}, waits_from=3) == []
    assert behind({"a": (5, 2), "b": (5, 0), "c": (5, 0), "d": (6, 2)}, waits_from=3) == ["b", "c"]
    assert behind({}, waits_from=3) == []
