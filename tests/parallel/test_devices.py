"""Which GPU a rank takes."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from titans_pretrain.errors import UserError
from titans_pretrain.parallel import devices

TASK = {"LOCAL_RANK": "1", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "5"}


@pytest.fixture
def host(monkeypatch):
    """``host(gpus, **variables)``: a host that shows so many GPUs."""

    def make(gpus, **variables):
        for name in TASK:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return make


def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_cpu(host):
    host(4, **TASK)
    assert devices.local_device() == torch.device("cuda", 1)
    host(0, **TASK)
    assert devices.local_device() == torch.device("cpu")


def test_a_task_that_sees_its_own_gpu_only_takes_it(host):
    host(1, **TASK)
    assert devices.local_device() == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "change",
    [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "0,9"},
        {"SLURM_LOCALID": "0"},
        {"SLURM_LOCALID": ""},
    ],
    ids=["not restricted", "restricted to several", "torchrun in a task", "no task"],
)
def test_ranks_that_would_share_a_gpu_are_refused(host, change):
    host(1, **(TASK | change))
    with pytest.raises(UserError, match="local rank 1 has no GPU: this host shows 1") as caught:
        devices.local_device()
    assert "srun --gpus-per-task=1" in caught.value.fix


def test_deepspeed_is_given_the_gpu_that_was_taken(host, monkeypatch):
    host(1, **TASK)
    for name in (*devices.RANK_VARIABLES, "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(devices.rendezvous, "meet", lambda hosts, patience: dist.HashStore())
    with devices.process_group(devices.local_device()):
        assert os.environ["LOCAL_RANK"] == "0"


def test_the_store_waits_as_long_as_the_ranks_do_whatever_the_patience_at_the_start(
    host, monkeypatch
):
    host(0)
    for name in (*devices.RANK_VARIABLES, "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "0")
    store, given = dist.HashStore(), []

    def meet(hosts, patience):
        given.append(patience)
        store.set_timeout(patience)
        return store

    monkeypatch.setattr(devices.rendezvous, "meet", meet)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: given.append(how))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with devices.process_group(devices.local_device(), tuple, timedelta(seconds=7)):
        assert given[0] == timedelta(seconds=7)
        assert given[1]["store"] is store
        assert store.timeout == devices.TIMEOUT
