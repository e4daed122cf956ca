import pytest

from titans_pretrain.errors import UserError
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


@pytest.mark.usefixtures("no_scontrol")
def test_the_host_of_each_rank_is_known_in_a_step_and_nowhere_else():
    given = launch.given_ranks(STEP)
    nodes = ["gpu003", "gpu003", "gpu004", "gpu004", "gpu005", "gpu005"]
    assert launch.hosts_of_ranks(STEP | given) == nodes
    assert launch.hosts_of_ranks(STEP | given | {"RANK": "0"}) == []  # torchrun's
    assert launch.hosts_of_ranks({"RANK": "0"}) == []


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}
OWN_STEP = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "1"}
OLD = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
INTERACTIVE = OWN_STEP | {"SLURM_STEP_ID": "4294967290"}


@pytest.mark.parametrize(
    "environment",
    [
        JOB,
        JOB | {"SLURM_PROCID": "0"},
        JOB | INTERACTIVE,
        {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},
    ],
    ids=["salloc", "batch script", "interactive step", "old names"],
)
def test_several_nodes_without_srun_are_refused(environment):
    with pytest.raises(UserError, match="has 2 nodes, but without srun only this one would train"):
        launch.refuse_several_nodes(environment)


@pytest.mark.parametrize(
    "environment",
    [{}, JOB | {"SLURM_JOB_NUM_NODES": "1"}, JOB | OWN_STEP],
    ids=["no SLURM", "one node", "a step on one node"],
)
def test_local_ranks_start_where_no_other_node_stands_idle(environment):
    launch.refuse_several_nodes(environment)
