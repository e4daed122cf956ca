"""Exports know no mesh: any grid's checkpoint gives the bytes that one process's gives."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from resume_cases import sections
from saved_model import save_model
from tiny import prepare

from titans_pretrain import config
from titans_pretrain.checkpoint.format import read_state
from titans_pretrain.checkpoint.save import save
from titans_pretrain.export import huggingface
from titans_pretrain.parallel import devices, mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train.build import open_data
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import StopRequest
from titans_pretrain.train.trainer import Trainer

MESH_FACTS = {"README.md", "manifest.json"}  # they tell the configuration, and the checkpoint


def trainer(settings):
    directory = RunDirectory(Path(settings.run.directory))
    devices.from_first(directory.create)
    grid = mesh.plan(devices.ranks(), settings.mesh, settings.train)
    return Trainer(
        settings,
        Parallel(grid, devices.rank()),
        torch.device("cpu"),
        open_data(settings),
        directory,
        StopRequest(),
        lambda sentence: None,
    )


def train_from(settings, weights):
    """Begin with exported weights, save them, and train to the end."""
    run = trainer(settings)
    run.initialise(weights, {"name": weights.name})
    run.run()
    devices.gather_objects(None)


def save_again(settings, source):
    """Load a checkpoint, and save it as this mesh does."""
    run = trainer(settings)
    run.restore(source)
    names = ("config.yaml", "tokenizer.model")
    save(
        Path(settings.run.directory) / "checkpoints",
        int(source.name.removeprefix("step-")),
        run._engine.shards(),
        state=read_state(source),
        files={name: (source / name).read_bytes() for name in names},
        keep=3,
    )


def different_files(one, other):
    """Names of files of two exports that differ, but for what tells the mesh."""
    names = {path.name for path in (*one.iterdir(), *other.iterdir())} - MESH_FACTS
    return [n for n in sorted(names) if (one / n).read_bytes() != (other / n).read_bytes()]


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 1),
        pytest.param((2, 2, 2), marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_an_export_is_the_same_from_any_mesh_and_begins_a_run_on_it_to_the_bit(
    tmp_path, monkeypatch, sizes
):
    monkeypatch.setattr(huggingface.verification, "verify", lambda *_: None)
    manifest = prepare(tmp_path / "corpus")
    tokenizer = manifest.parent.parent / "tokenizer.model"

    def settings(name, sizes):
        parts = sections(manifest, tmp_path / name, "mac", sizes, steps=2)
        parts["guard"] = {"policy": "rollback"}  # which saves what a run begins with
        return config.resolve(parts, source="test")

    def export(checkpoint, name):
        huggingface.export(checkpoint, tmp_path / name, max_shard_size="30KB")
        return tmp_path / name

    first = sections(manifest, tmp_path / "first", "mac", steps=2)
    began = export(save_model(first, tmp_path / "first", tokenizer), "began")
    count = sizes[0] * sizes[1] * sizes[2]
    run_ranks(train_from, count, settings("mesh", sizes), began, timeout=900)
    saved = tmp_path / "mesh" / "checkpoints"
    assert different_files(export(saved / "step-0", "unchanged"), began) == []

    run_ranks(save_again, 1, settings("one", (1, 1, 1)), saved / "step-2", timeout=900)
    one = tmp_path / "one" / "checkpoints" / "step-2"
    assert len(list((saved / "step-2").glob("rank-*"))) == count
    assert len(list(one.glob("rank-*"))) == 1
    trained = export(saved / "step-2", "of the mesh")
    assert different_files(trained, export(one, "of one")) == []
    assert len(list(trained.glob("model-*.safetensors"))) > 1
    assert set(different_files(trained, began)) == {p.name for p in trained.glob("model-*")}
