import pytest

from titans_pretrain.errors import TitansError
from titans_pretrain.train import launch

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
}


@pytest.fixture
def no_scontrol(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_srun_s_ranks_are_taken(no_scontrol):
    assert launch.given_ranks(STEP) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": str(10000 + (4711 * 16 + 2) % 20000),
    }


def test_torchrun_s_ranks_come_before_srun_s():
    given = launch.given_ranks(STEP | {"RANK": "1", "WORLD_SIZE": "2"})
    assert given == {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["no SLURM", "batch script", "step of one task"],
)
def test_without_several_tasks_no_ranks_are_given(environment):
    assert launch.given_ranks(environment) == {}


def test_scontrol_names_the_first_host(monkeypatch, tmp_path):
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\ntest "$3" = "odd[1-2]" && printf "odd-one\\nodd-two\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert launch.first_host("odd[1-2]") == "odd-one"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("login1,gpu[3-4]", "login1"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("r[1-2]n[03-04]", "r1n03"),
    ],
)
def test_without_scontrol_the_list_is_read(no_scontrol, nodes, first):
    assert launch.first_host(nodes) == first


def test_an_unreadable_list_is_an_error_and_no_localhost(no_scontrol):
    with pytest.raises(TitansError, match="no host in SLURM_STEP_NODELIST ''"):
        launch.first_host("")


def test_tasks_per_node_are_expanded():
    assert launch.tasks_per_node("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]
