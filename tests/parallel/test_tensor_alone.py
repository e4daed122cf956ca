"""Tensor parallelism on one tensor rank, and where parts of parameters lie."""

import subprocess
import sys
from types import SimpleNamespace

import torch
from torch import nn

from titans_pretrain.parallel import tensor
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.replay import Replay

ALONE = """
import sys
from types import SimpleNamespace
import torch
from titans_pretrain.parallel import loss_head, tensor
from titans_pretrain.parallel.mesh import Mesh
groups = SimpleNamespace(mesh=Mesh(), tensor_rank=0)
tensor.split(torch.nn.Linear(2, 2), "anything", groups, None)
head = torch.nn.Linear(2, 3, bias=False)
loss_head.place(head, "lm_head")
with head.answering(torch.zeros(1, 2, dtype=torch.long)):
    head(torch.zeros(1, 2, 2))
sys.exit("megatron" in sys.modules)
"""


def groups_of(mesh, tensor_rank):
    return SimpleNamespace(mesh=mesh, tensor_rank=tensor_rank)


def test_a_run_without_tensor_ranks_never_imports_megatron():
    subprocess.run([sys.executable, "-c", ALONE], check=True, timeout=120)


def test_on_one_tensor_rank_layers_stay_as_they_are():
    layer = nn.Linear(3, 5)
    before = layer.weight.clone()
    tensor.split(layer, "unknown", groups_of(Mesh(data=2), 0), Replay(False))
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, before)


def test_the_window_of_a_part_follows_from_its_axis_and_the_rank():
    part = nn.Parameter(torch.zeros(6, 2))
    part.tensor_model_parallel, part.partition_dim = True, 1
    assert tensor.logical(part, groups_of(Mesh(tensor=4), 3)) == ((6, 8), (0, 6), (6, 2))


def test_the_window_of_a_parameter_all_ranks_hold_is_all_of_it():
    whole = nn.Parameter(torch.zeros(6, 2))
    assert tensor.logical(whole, groups_of(Mesh(tensor=4), 3)) == ((6, 2), (0, 0), (6, 2))


def test_the_window_of_a_sharded_part_is_that_of_its_unsharded_shape():
    part = nn.Parameter(torch.zeros(0))
    part.ds_shape = torch.Size([5, 7])
    part.tensor_model_parallel, part.partition_dim = True, 0
    assert tensor.logical(part, groups_of(Mesh(tensor=2), 1)) == ((10, 7), (5, 0), (5, 7))
