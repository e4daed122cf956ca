"""Data read through a cache on the node."""

import pytest
from attempt_parts import made

from launchers import staging
from titans_pretrain import config as run_config
from titans_pretrain.data.storage import RemoteStorage, open_storage
from titans_pretrain.errors import UserError


def test_data_is_read_through_a_cache_on_the_node(tmp_path):
    config = made(tmp_path, stage_data=True, local_directory=str(tmp_path / "scratch"))
    path = tmp_path / "run.yaml"
    path.write_text(run_config.dump(config))
    staged = run_config.load(path, staging.overrides(config))
    assert staged.data.manifest == f"local://{config.data.manifest}"
    assert staged.data.cache.startswith(str(tmp_path / "scratch" / "titans-"))
    shards = tmp_path / "data"
    shards.mkdir()
    (shards / "a.bin").write_bytes(b"0123456789")
    place = staged.data.manifest.removesuffix("/manifest.json")
    storage = open_storage(place, cache=tmp_path / "scratch", cache_bytes=2**24)
    assert isinstance(storage, RemoteStorage)
    assert storage.sizes(["a.bin", "b.bin"]) == {"a.bin": 10}
    assert bytes(storage.read("a.bin", 2, 5)) == b"234"
    assert any(file.is_file() for file in (tmp_path / "scratch").rglob("*"))


def test_every_part_of_a_mixture_is_staged_and_what_is_remote_stays(tmp_path):
    parts = [{"manifest": "/d/a: #1/manifest.json", "weight": 1.0}]
    parts += [{"manifest": "s3://b/manifest.json", "weight": 2.0}]
    config = made(tmp_path, {"mixture": parts}, stage_data=True, local_directory="/scratch")
    path = tmp_path / "run.yaml"
    path.write_text(run_config.dump(config))
    staged = run_config.load(path, staging.overrides(config))
    wanted = [("local:///d/a: #1/manifest.json", 1.0), ("s3://b/manifest.json", 2.0)]
    assert staged.data.parts == wanted


def test_staging_needs_a_directory_of_the_node(tmp_path):
    with pytest.raises(UserError, match=r"job\.local_directory"):
        staging.overrides(made(tmp_path, stage_data=True, local_directory="here"))
    assert staging.overrides(made(tmp_path, local_directory="/scratch")) == []
