"""What a run is made of, as far as it can be told without a model."""

from types import SimpleNamespace

import pytest

from titans_pretrain import config
from titans_pretrain.errors import UserError
from titans_pretrain.train import build


@pytest.fixture
def resolved(tmp_path):
    return config.resolve(
        {
            "model": {"vocab_size": 1000},
            "data": {"manifest": "s3://me:secret@host/manifest.json", "sequence_length": 8},
            "train": {"steps": 4, "global_batch_size": 1, "learning_rate": 1.0},
            "run": {"directory": str(tmp_path)},
        },
        source="test",
    )


@pytest.fixture
def loader(monkeypatch):
    """Stands in for the loader that is opened; ``asked`` tells how."""
    loader = SimpleNamespace(
        corpus=SimpleNamespace(vocab_size=1000, fingerprint="f"), check_step=lambda sequences: None
    )

    def open_loader(data, **options):
        loader.asked = options
        return loader

    monkeypatch.setattr(build, "open_loader", open_loader)
    return loader


@pytest.mark.parametrize(("rank", "looks"), [(None, True), ("0", True), ("1", False), ("7", False)])
def test_one_rank_a_node_looks_at_the_sizes_of_all_files(
    resolved, loader, monkeypatch, rank, looks
):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    build.open_data(resolved)
    assert loader.asked["sizes"] is looks


def test_a_tokenizer_of_more_pieces_than_the_model_has_is_refused_without_passwords(
    resolved, loader
):
    loader.corpus.vocab_size = 1001
    with pytest.raises(UserError, match="is less than the tokenizer's 1001 pieces") as caught:
        build.open_data(resolved)
    assert caught.value.where == "s3://host/manifest.json"


def test_other_data_than_the_checkpoint_s_is_refused(resolved, loader):
    data = build.open_data(resolved)
    build.check_data(data, {"fingerprint": "f"}, resolved)
    with pytest.raises(UserError, match="the data has fingerprint f, the run began with g"):
        build.check_data(data, {"fingerprint": "g"}, resolved)
