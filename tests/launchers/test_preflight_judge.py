"""What is wrong with which node, from what all nodes told."""

import pytest
from preflight_answers import BEGUN, answers, expected

from launchers.fabric import PHASES
from launchers.preflight_judge import judge
from launchers.preflight_types import Heard


def found(told, **changes):
    words = changes.pop("words", {})
    nodes = changes.pop("nodes", None)
    count = nodes or len(told)
    return judge(Heard(told, words), expected(count, **changes))


def blamed(problems):
    return sorted(problem.node for problem in problems)


def spoil_pairs(told, bad, **changes):
    """Changes what is measured over the links between nodes for which ``bad`` holds."""
    for node, answer in enumerate(told.values()):
        for pair in answer["processes"][0]["pairs"]:
            if bad(node, pair["other"]):
                pair |= changes


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 1024])
def test_nodes_that_are_all_well_have_no_problem(count):
    assert found(answers(count)) == ()


def test_a_node_that_does_not_answer_is_named_and_those_that_wait_for_it_are_not():
    told = answers(4, phase="connected")
    del told["n2"]
    (problem,) = found(told, nodes=4)
    assert problem.node == "n2"
    assert "no answer after 20 s" in problem.what


def test_what_the_output_says_of_a_silent_node_is_told():
    told = answers(3, phase="connected")
    del told["n1"]
    (problem,) = found(told, nodes=3, words={"n1": "execve(): python: No such file"})
    assert "execve(): python: No such file" in problem.what


@pytest.mark.parametrize("count", [2, 4, 5])
def test_where_no_node_answers_none_is_blamed(count):
    (problem,) = found({}, nodes=count)
    assert problem.node == ""
    assert f"all {count} nodes" in problem.what


def test_what_a_slow_storage_may_do_is_passing_and_a_difference_is_not():
    told = answers(2)
    told["n1"]["values"]["code"] = "other"
    assert [problem.passing for problem in found({}, nodes=4)] == [True]
    assert [problem.passing for problem in found(answers(4, phase="started"))] == [True]
    assert [problem.passing for problem in found(told)] == [False, False]


def test_the_only_node_is_blamed_for_its_silence():
    assert blamed(found({}, nodes=1)) == ["n0"]


@pytest.mark.parametrize("phase", PHASES[:3])
def test_a_node_that_the_others_wait_for_is_named_with_what_it_does(phase):
    told = answers(4, phase="connected")
    told["n3"] = answers(4, phase=phase)["n3"]
    (problem,) = found(told)
    assert problem.node == "n3"
    assert "where the others wait for it" in problem.what


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_nodes_that_all_stand_at_the_same_place_are_not_blamed(phase):
    (problem,) = found(answers(4, phase=phase))
    assert problem.node == ""
    assert "did not get past" in problem.what


def test_most_nodes_that_are_late_share_a_reason():
    told = answers(4, phase="started")
    told["n0"] = answers(4, phase="connected")["n0"]
    (problem,) = found(told)
    assert problem.node == ""
    assert "3 of 4 nodes" in problem.what


def test_a_frozen_process_is_named_and_those_that_wait_with_it_are_not():
    told = answers(4, phase="joined")
    told["n1"]["processes"][0]["silent"] = 40.0
    (problem,) = found(told)
    assert problem.node == "n1"
    assert "frozen" in problem.what


def test_a_process_that_failed_before_it_joined_is_named_with_its_error():
    told = answers(3, phase="connected")
    told["n2"] = answers(3, phase="started")["n2"]
    told["n2"]["processes"][0] |= {"exit": 1, "error": "ImportError: libcudart.so.12"}
    (problem,) = found(told)
    assert problem.node == "n2"
    assert "ImportError: libcudart.so.12" in problem.what


def test_a_process_that_was_killed_before_it_joined_is_named_with_its_end():
    told = answers(3, phase="connected")
    told["n2"] = answers(3, phase="torch")["n2"]
    told["n2"]["processes"][0]["exit"] = -9
    (problem,) = found(told)
    assert (problem.node, problem.what) == ("n2", "process 0 in starting its GPUs ended with -9")


def test_processes_that_failed_since_another_node_is_silent_are_not_blamed():
    told = answers(4, phase="joined")
    for answer in told.values():
        answer["processes"][0] |= {"exit": 1, "error": "Connection closed by peer"}
    del told["n2"]
    assert blamed(found(told, nodes=4)) == ["n2"]


def test_an_error_of_all_while_joining_is_told_and_blamed_on_none():
    told = answers(3, phase="connected")
    for answer in told.values():
        answer["processes"][0] |= {"exit": 1, "error": "RuntimeError: no interface eth9"}
    (problem,) = found(told)
    assert problem.node == ""
    assert "no interface eth9" in problem.what
    assert "SOCKET_IFNAME" in problem.fix


def test_two_nodes_that_stopped_at_their_exchange_are_both_named():
    told = answers(5)
    for name in ("n2", "n3"):
        told[name] = answers(5, phase="reduced")[name]
    assert blamed(found(told)) == ["n2", "n3"]


@pytest.mark.parametrize("column", ["python", "torch", "deepspeed"])
def test_a_node_with_another_version_is_named_with_both_versions(column):
    told = answers(4)
    told["n1"]["values"]["versions"][column] = "0.0.1"
    (problem,) = found(told)
    assert problem.node == "n1"
    assert f"{column} 0.0.1; the others have" in problem.what


def test_two_nodes_with_different_versions_are_both_named():
    told = answers(2)
    told["n1"]["values"]["versions"]["torch"] = "2.6.0"
    problems = found(told)
    assert blamed(problems) == ["n0", "n1"]
    assert all("2.13.0 on n0, 2.6.0 on n1" in problem.what for problem in problems)


def test_a_node_with_other_code_is_named():
    told = answers(3)
    told["n0"]["values"]["code"] = "bad0" * 16
    (problem,) = found(told)
    assert problem.node == "n0"
    assert "bad0bad0bad0; the others have 5eed5eed5eed" in problem.what


def test_a_node_that_sees_another_directory_is_named():
    told = answers(3)
    told["n2"]["values"]["nonce"] = "xyz"
    (problem,) = found(told)
    assert problem.node == "n2"
    assert "not the batch host's" in problem.what


def test_a_node_that_reads_another_configuration_is_named():
    told = answers(3)
    told["n2"]["values"]["config"] = "feed"
    assert blamed(found(told)) == ["n2"]


@pytest.mark.parametrize("off", [-7.0, 6.0, 4000.0])
def test_a_node_whose_clock_is_off_is_named_with_how_much(off):
    told = answers(4)
    told["n3"]["processes"][0]["clock"] += off
    (problem,) = found(told)
    assert problem.node == "n3"
    assert f"{off:+.1f} s" in problem.what


def test_clocks_within_five_seconds_are_well():
    told = answers(4)
    told["n3"]["processes"][0]["clock"] += 4.9
    assert found(told) == ()


def test_two_clocks_that_differ_are_both_named():
    told = answers(2)
    told["n1"]["processes"][0]["clock"] += 8
    assert blamed(found(told)) == ["n0", "n1"]


def test_where_the_nodes_never_joined_clocks_are_held_against_the_batch_hosts():
    told = answers(4, phase="connected")
    told["n1"] |= {"first": BEGUN - 60, "last": BEGUN - 46}
    told["n2"] |= {"first": BEGUN + 70, "last": BEGUN + 84}
    clocks = [problem for problem in found(told) if "clock" in problem.what]
    assert [(problem.node, problem.what) for problem in clocks] == [
        ("n1", "its clock is -60.0 s or more off the batch host's"),
        ("n2", "its clock is +64.0 s or more off the batch host's"),
    ]


def test_a_late_start_is_no_wrong_clock():
    told = answers(4, phase="connected")
    told["n1"] |= {"first": BEGUN + 18, "last": BEGUN + 20}
    assert not [problem for problem in found(told) if "clock" in problem.what]


def test_too_little_free_space_is_told_with_both_sizes_and_blamed_on_none():
    (problem,) = found(answers(3), needed_bytes=2 * 10**12)
    assert problem.node == ""
    assert "931.3 GiB free" in problem.what
    assert "1862.6 GiB" in problem.what


def test_a_fault_of_one_node_is_its_own():
    told = answers(3)
    told["n1"]["faults"].append({"what": "GPU 3 had 2 errors", "fix": "mend it"})
    (problem,) = found(told)
    assert (problem.node, problem.what) == ("n1", "GPU 3 had 2 errors")


def test_a_fault_of_most_nodes_is_told_once_and_blamed_on_none():
    told = answers(5)
    for name in ("n0", "n1", "n4"):
        told[name]["faults"].append({"what": "local scratch: Read-only", "fix": "mend it"})
    (problem,) = found(told)
    assert problem.node == ""
    assert problem.what == "3 of 5 nodes: local scratch: Read-only"


def test_a_check_that_hangs_on_a_node_is_told():
    told = answers(3)
    told["n1"]["doing"] = "run directory"
    (problem,) = found(told)
    assert (problem.node, problem.what) == ("n1", "the check of its run directory did not end")


def test_a_node_with_less_memory_than_the_job_asks_for_is_named():
    told = answers(3)
    told["n2"]["values"]["memory_bytes"] = 32 * 2**30
    (problem,) = found(told, memory_bytes=60 * 2**30)
    assert problem.node == "n2"
    assert "32.0 GiB of memory; job.memory_per_node is 60.0 GiB" in problem.what


@pytest.mark.parametrize("asked", [{"memory_bytes": 8 * 2**30}, {"all_memory": True}])
def test_a_node_whose_memory_others_hold_is_named(asked):
    told = answers(3)
    told["n2"]["values"]["memory_free_bytes"] = 5 * 2**30
    (problem,) = found(told, **asked)
    assert problem.node == "n2"
    assert "5.0 GiB of memory free; most nodes have 60.0 GiB" in problem.what


@pytest.mark.parametrize("asked", [0, 8 * 2**30])
def test_memory_of_a_shared_node_that_other_jobs_hold_is_theirs(asked):
    told = answers(3)
    told["n2"]["values"]["memory_free_bytes"] = 25 * 2**30
    assert found(told, memory_bytes=asked) == ()


def with_gpus(count, number, name="H200"):
    told = answers(count)
    for answer in told.values():
        answer["values"]["gpus"] = [name] * number
        answer["processes"] = [dict(answer["processes"][0], gpus=number) for _ in range(number)]
    return told


def test_gpus_that_are_all_there_and_alike_are_well():
    assert found(with_gpus(4, 8), gpus=8) == ()


def test_a_node_that_lacks_a_gpu_is_named():
    told = with_gpus(4, 8)
    told["n2"]["values"]["gpus"].pop()
    (problem,) = found(told, gpus=8)
    assert (problem.node, problem.what) == ("n2", "7 GPUs; job.gpus_per_node is 8")


def test_gpus_are_counted_by_torch_where_there_is_no_nvidia_smi():
    told = with_gpus(4, 8)
    for answer in told.values():
        del answer["values"]["gpus"]
    assert found(told, gpus=8) == ()
    told["n2"]["processes"][0]["gpus"] = 7
    assert blamed(found(told, gpus=8)) == ["n2"]


def test_a_node_whose_gpus_torch_does_not_see_is_named():
    told = with_gpus(4, 8)
    told["n2"]["processes"][0]["gpus"] = 0
    assert blamed(found(told, gpus=8)) == ["n2"]


def test_a_node_with_other_gpus_is_named():
    told = with_gpus(4, 8)
    told["n1"]["values"]["gpus"][3] = "A100"
    (problem,) = found(told, gpus=8)
    assert problem.node == "n1"
    assert "GPU A100, H200; the others have H200" in problem.what


@pytest.mark.parametrize("count", [3, 4, 5, 8, 1023, 1024])
def test_a_node_that_is_slow_with_both_neighbours_is_named_alone(count):
    told = answers(count)
    bad = count // 2
    spoil_pairs(told, lambda node, other: bad in (node, other), seconds=0.4)
    (problem,) = found(told)
    assert problem.node == f"n{bad}"
    assert "21 MB/s; usual here is" in problem.what


@pytest.mark.parametrize("count", [3, 4, 5, 8, 1024])
def test_a_slow_link_names_the_two_nodes_that_it_joins(count):
    told = answers(count)
    spoil_pairs(told, lambda node, other: {node, other} == {0, 1}, seconds=0.4)
    problems = found(told)
    assert blamed(problems) == ["n0", "n1"]
    assert all("alone" in problem.what for problem in problems)


def test_a_slow_link_between_two_nodes_names_both():
    told = answers(2)
    spoil_pairs(told, lambda node, other: True, seconds=2.0)
    assert blamed(found(told)) == ["n0", "n1"]


def test_a_network_that_is_slow_everywhere_is_blamed_on_none():
    told = answers(8)
    spoil_pairs(told, lambda node, other: True, seconds=2.0)
    (problem,) = found(told)
    assert problem.node == ""
    assert "all 8 nodes" in problem.what


def test_two_slow_nodes_that_are_neighbours_are_both_named():
    told = answers(8)
    spoil_pairs(told, lambda node, other: {node, other} & {3, 4}, seconds=0.4)
    assert blamed(found(told)) == ["n3", "n4"]


def test_the_factor_decides_what_is_slow():
    told = answers(8)
    spoil_pairs(told, lambda node, other: 3 in (node, other), seconds=0.4)
    assert found(told, slow_factor=200.0) == ()


def test_a_node_with_long_delays_is_named():
    told = answers(8)
    spoil_pairs(told, lambda node, other: 3 in (node, other), latency=0.2)
    (problem,) = found(told)
    assert problem.node == "n3"
    assert "200.0 ms" in problem.what


def test_a_node_that_changes_data_on_their_way_is_named():
    told = answers(8)
    spoil_pairs(told, lambda node, other: 3 in (node, other), right=False)
    (problem,) = found(told)
    assert problem.node == "n3"
    assert "data arrives changed" in problem.what


def test_a_node_that_adds_wrongly_is_named():
    told = answers(8)
    told["n5"]["processes"][0]["right"] = False
    (problem,) = found(told)
    assert problem.node == "n5"


def test_a_sum_that_is_wrong_everywhere_is_blamed_on_none():
    told = answers(8)
    for answer in told.values():
        answer["processes"][0]["right"] = False
    (problem,) = found(told)
    assert problem.node == ""


def test_every_problem_of_a_job_is_told():
    told = answers(8)
    told["n1"]["processes"][0]["clock"] += 100
    told["n2"]["values"]["versions"]["torch"] = "2.6.0"
    spoil_pairs(told, lambda node, other: 5 in (node, other), seconds=0.4)
    assert blamed(found(told)) == ["n1", "n2", "n5"]
