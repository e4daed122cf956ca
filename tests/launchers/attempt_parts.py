"""One attempt in job 7, without SLURM: its run, its records and what SLURM knows of it."""

import json

from tiny import MODEL

from launchers import slurm_utils
from launchers.history import Attempt
from titans_pretrain import config as run_config
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "a[1-2]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_PARTITION": "main",
}


def made(path, data=None, **job):
    tree = {
        "model": MODEL,
        "data": data or {"manifest": str(path / "data" / "manifest.json"), "sequence_length": 64},
        "train": {"steps": 9, "global_batch_size": 4, "learning_rate": 0.1},
        "run": {"directory": str(path)},
        "job": {"nodes": 2, "ranks_per_node": 2} | job,
    }
    if data:
        tree["data"]["sequence_length"] = 64
    return run_config.resolve(tree, source="a test")


def attempt(number=1, job="7", **more):
    return Attempt(number, job, 0, "a1", ("a1", "a2"), begun=100.0, **more)


def checkpoint(run, step):
    path = run.checkpoints / layout.step_name(step)
    path.mkdir(parents=True)
    index = {"format": layout.FORMAT, "files": [], "tensors": {}}
    files = [manifest.write_file(path, layout.TENSORS, json.dumps(index).encode())]
    manifest.write(path, files, {"format": layout.FORMAT, "step": step, "tensors": {}})
    return path


def slurm_job(**more):
    names = list(slurm_utils.Job.__dataclass_fields__)
    return slurm_utils.Job(**dict.fromkeys(names, "") | {"id": "7", "restarts": 0} | more)


def allocation(**more):
    return slurm_utils.allocation(JOB | more)
