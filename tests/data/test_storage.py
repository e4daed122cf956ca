import contextlib
import gc
import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from range_server import RangeServer

from data_prep import retry
from titans_pretrain.data import cache, mapping, storage
from titans_pretrain.data.mixture import Corpus
from titans_pretrain.data.storage import open_storage
from titans_pretrain.errors import TitansError, UserError

PIECE = 4096
SIZE = 10 * PIECE + 123
ROOMY = 2**30


def noise(seed, size=SIZE):
    return random.Random(seed).randbytes(size)


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "prepared"
    folder.mkdir()
    for name in ("a.tar", "b.tar"):
        (folder / name).write_bytes(noise(name))
    return folder


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(cache, "PIECE", PIECE)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    files = {name: noise(name) for name in ("a.tar", "b.tar", "c.tar", "d.tar")}
    with RangeServer({**files, "manifest.json": b'{"format": 2}'}) as running:
        yield running


@pytest.fixture
def opened(server, tmp_path):
    def open_one(limit=ROOMY):
        return open_storage(server.url, cache=tmp_path / "cache", cache_bytes=limit)

    return open_one


def cached(tmp_path, name):
    (path,) = (tmp_path / "cache").glob(f"*/*/{name}")
    return path


def disk_used(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class TestALocalDirectory:
    def test_is_read_as_views_of_one_read_only_map(self, directory):
        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        part = reader.read("a.tar", 7, 5000)
        assert part.tobytes() == noise("a.tar")[7:5000]
        assert np.shares_memory(part, reader.read("a.tar", 4000, 6000))
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 1

    def test_may_be_given_as_a_url(self, directory):
        reader = open_storage(f"file://{directory}", cache=None, cache_bytes=0)
        assert reader.read("b.tar", 0, 9).tobytes() == noise("b.tar")[:9]

    def test_tells_the_bytes_of_files_asked_for(self, directory):
        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        assert reader.sizes(["a.tar", "c.tar"]) == {"a.tar": SIZE}

    def test_may_lose_a_file_while_it_is_listed(self, directory, monkeypatch):
        def listing(path):
            entries = list(os.scandir(path))
            (directory / "a.tar").unlink()
            return contextlib.nullcontext(entries)

        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "os", SimpleNamespace(scandir=listing))
            assert reader.sizes(["a.tar", "b.tar"]) == {"b.tar": SIZE}

    def test_gives_the_path_of_a_whole_file(self, directory):
        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        assert reader.local("a.tar") == directory / "a.tar"

    def test_knows_no_other_bytes_than_the_files(self, directory):
        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        assert reader.forget("a.tar", 0, 10) is False

    def test_that_is_missing_is_named(self, tmp_path):
        reader = open_storage(str(tmp_path / "gone"), cache=None, cache_bytes=0)
        with pytest.raises(UserError, match="gone"):
            reader.sizes(["a.tar"])

    @pytest.mark.parametrize("use", [lambda s: s.read("c.tar", 0, 1), lambda s: s.local("c.tar")])
    def test_names_a_file_that_is_missing(self, directory, use):
        with pytest.raises(UserError, match=r"c\.tar") as error:
            use(open_storage(str(directory), cache=None, cache_bytes=0))
        assert error.value.where == str(directory / "c.tar")

    def test_names_a_file_that_ends_early(self, directory):
        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        with pytest.raises(UserError, match=rf"a\.tar ends at byte {SIZE}, before {SIZE + 1}"):
            reader.read("a.tar", SIZE - 5, SIZE + 1)

    def test_of_an_empty_file_is_an_empty_array(self, directory):
        (directory / "empty").touch()
        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        assert len(reader.read("empty", 0, 0)) == 0

    def test_may_have_more_files_than_a_process_may_open(self, directory):
        for index in range(200):
            (directory / f"{index}.tar").write_bytes(bytes([index]) * 10)
        reader = open_storage(str(directory), cache=None, cache_bytes=0)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1])
        )
        try:
            parts = [reader.read(f"{index}.tar", 9, 10) for index in range(200)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert [int(part[0]) for part in parts] == list(range(200))

    def test_stays_mapped_as_long_as_a_view_of_it_lives(self, directory):
        part = open_storage(str(directory), cache=None, cache_bytes=0).read("a.tar", 0, SIZE)
        gc.collect()
        assert part.tobytes() == noise("a.tar")
        assert str(directory) in Path("/proc/self/maps").read_text()
        del part
        gc.collect()
        assert str(directory) not in Path("/proc/self/maps").read_text()


class TestARemoteDirectory:
    @settings(
        max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(places=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=5))
    def test_gives_any_bytes_of_its_files(self, opened, places):
        reader = opened()
        for start, stop in map(sorted, places):
            assert reader.read("a.tar", start, stop).tobytes() == noise("a.tar")[start:stop]

    def test_is_asked_once_for_each_piece(self, server, opened):
        for reader in (opened(), opened()):
            reader.read("a.tar", 5, 3 * PIECE)
            reader.read("a.tar", PIECE, SIZE)
        pieces = [("a.tar", start) for start in range(0, SIZE, PIECE)]
        assert server.asked == pieces

    def test_gives_memory_mapped_views(self, opened):
        reader = opened()
        reader.read("a.tar", 0, SIZE)
        assert np.shares_memory(reader.read("a.tar", 0, 9), reader.read("a.tar", 0, SIZE))

    def test_tells_the_bytes_of_files_asked_for(self, server, opened):
        assert opened().sizes(["a.tar", "e.tar"]) == {"a.tar": SIZE}
        assert server.questions == ["", "e.tar"]

    def test_whose_listing_tells_no_sizes_is_asked_for_many_files_at_once(self, server, opened):
        server.lists_sizes, server.delay = False, 0.02
        names = [f"{number}.tar" for number in range(40)]
        server.files |= dict.fromkeys(names, b"abc")
        reader = opened()
        assert reader.sizes(names) == dict.fromkeys(names, 3)
        assert sorted(server.questions) == sorted(["", *names])
        assert server.most_at_once > 4
        server.questions.clear()
        assert reader.read("7.tar", 0, 3).tobytes() == b"abc"
        assert server.questions == []

    def test_is_known_alike_to_readers_that_asked_for_sizes_and_those_that_did_not(
        self, server, opened
    ):
        first, second = opened(), opened()
        first.sizes(["a.tar"])
        for reader in (first, second):
            reader.read("a.tar", 0, SIZE)
        assert len(server.asked) == SIZE // PIECE + 1

    def test_gives_a_whole_file_as_a_path(self, opened):
        assert opened().local("manifest.json").read_bytes() == b'{"format": 2}'
        assert opened().local("a.tar").read_bytes() == noise("a.tar")

    def test_may_fail_twice_before_it_answers(self, server, opened, capfd):
        server.failures = 2
        assert opened().read("a.tar", 0, 10).tobytes() == noise("a.tar")[:10]
        assert len(server.asked) == 3
        assert "a.tar" in capfd.readouterr().err

    def test_may_send_short_bodies_before_whole_ones(self, server, opened):
        server.short = 2
        assert opened().read("a.tar", 0, SIZE).tobytes() == noise("a.tar")

    def test_that_only_sends_short_bodies_is_an_error_and_leaves_nothing(self, server, opened):
        server.short = 10**6
        with pytest.raises(TitansError, match=f"{PIECE // 2} bytes came instead of {PIECE}"):
            opened().read("a.tar", 0, 10)
        server.short = 0
        assert opened().read("a.tar", 0, 10).tobytes() == noise("a.tar")[:10]

    def test_that_never_answers_is_an_error_to_resume_from(self, server, opened):
        server.failures = 10**6
        with pytest.raises(TitansError, match="503") as error:
            opened().read("a.tar", 0, 10)
        assert not isinstance(error.value, UserError)
        assert len(server.asked) == retry.TRIES

    def test_that_refuses_is_the_users_error_and_tells_no_secret(self, server, opened):
        server.failures, server.status = 1, 403
        with pytest.raises(UserError, match="403") as error:
            opened().read("a.tar", 0, 10)
        assert "secret" not in str(error.value)

    def test_that_knows_no_ranges_is_refused(self, server, opened):
        server.ranges = False
        with pytest.raises(UserError, match="range requests"):
            opened().read("a.tar", 0, 10)

    def test_names_a_file_that_is_missing_or_ends_early(self, opened):
        with pytest.raises(UserError, match=r"no\.tar"):
            opened().read("no.tar", 0, 1)
        with pytest.raises(UserError, match=f"ends at byte {SIZE}, before {SIZE + 1}"):
            opened().read("a.tar", 0, SIZE + 1)

    def test_that_is_slow_is_asked_once_by_threads_that_want_the_same(self, server, opened):
        server.delay = 0.2
        reader, found = opened(), []
        threads = [
            threading.Thread(target=lambda: found.append(reader.read("a.tar", 9, 99).tobytes()))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [noise("a.tar")[9:99]] * 8
        assert len(server.asked) == 1

    def test_may_change_between_two_openings(self, server, opened):
        for seed in ("a.tar", "other"):
            server.files["a.tar"] = noise(seed)
            reader = opened()
            assert reader.read("a.tar", 0, SIZE).tobytes() == noise(seed)
            assert reader.local("a.tar").read_bytes() == noise(seed)

    def test_that_tells_no_versions_is_asked_anew_for_small_files(self, server, opened):
        server.versions = False
        for content in (b"one", b"two"):
            server.files["manifest.json"] = content
            assert opened().local("manifest.json").read_bytes() == content

    def test_of_an_unknown_kind_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no-such-kind"):
            open_storage("no-such-kind://a/b", cache=tmp_path, cache_bytes=ROOMY)


class TestProcessesThatShareACache:
    def start(self, server, tmp_path, name, places, limit=ROOMY):
        command = [sys.executable, Path(__file__).with_name("read_through_cache.py"), server.url]
        command += [tmp_path / "cache", limit, PIECE, name]
        command += [f"{start}-{stop}" for start, stop in places]
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        return process

    def test_ask_once_for_what_both_want_at_once(self, server, tmp_path):
        server.delay = 0.02
        both = [self.start(server, tmp_path, "a.tar", [(0, SIZE)]) for _ in range(2)]
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        right = hashlib.sha256(noise("a.tar")).hexdigest() + "\n"
        assert [process.communicate()[0] for process in both] == [right] * 2
        assert sorted(server.asked) == [("a.tar", start) for start in range(0, SIZE, PIECE)]

    def test_may_be_killed_at_any_moment(self, server, opened, tmp_path):
        server.delay = 0.005
        for moment in (0, 0.004, 0.009, 0.02, 0.04):
            process = self.start(server, tmp_path, "a.tar", [(0, SIZE)])
            process.stdin.write("\n")
            process.stdin.flush()
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert opened().read("a.tar", 0, SIZE).tobytes() == noise("a.tar")
        assert len(server.asked) <= 5 + 11, "at most the piece in flight is fetched again"

    def test_keep_together_to_the_bound(self, server, tmp_path):
        limit = 16 * PIECE
        places = [(start, start + 100) for start in range(0, SIZE - 100, PIECE)] * 2
        pair = [self.start(server, tmp_path, n, places, limit) for n in ("a.tar", "b.tar")]
        for process in pair:
            process.stdin.write("\n")
            process.stdin.flush()
        for name, process in zip(("a.tar", "b.tar"), pair, strict=True):
            hashes = [hashlib.sha256(noise(name)[start:stop]).hexdigest() for start, stop in places]
            assert process.communicate()[0].split() == hashes
        assert disk_used(tmp_path / "cache") <= limit


class TestABoundedCache:
    LIMIT = 40 * PIECE

    def test_lets_the_longest_unused_shard_go(self, server, opened, tmp_path):
        reader = opened(self.LIMIT)
        for name in ("a.tar", "b.tar", "a.tar", "c.tar", "a.tar", "d.tar"):
            reader.read(name, 0, SIZE)
            reader._refresh()
            time.sleep(0.01)
            assert disk_used(tmp_path / "cache") <= self.LIMIT
        server.asked.clear()
        reader = opened(self.LIMIT)
        reader.read("a.tar", 0, SIZE)
        reader.read("d.tar", 0, SIZE)
        assert server.asked == []

    def test_keeps_small_files_whose_paths_are_in_use(self, opened):
        reader = opened(self.LIMIT)
        path = reader.local("manifest.json")
        for name in ("a.tar", "b.tar", "c.tar", "d.tar"):
            reader.read(name, 0, SIZE)
        assert path.exists()

    def test_lets_small_files_go_that_nobody_used_for_a_day(self, opened):
        reader = opened(self.LIMIT)
        path = reader.local("manifest.json")
        for entry in path.parent.iterdir():
            os.utime(entry, (0, 0))
        for name in ("a.tar", "b.tar", "c.tar", "d.tar"):
            reader.read(name, 0, SIZE)
        assert not path.exists()

    def test_full_of_small_files_is_an_error_that_tells_the_size_to_give(self, opened):
        with pytest.raises(UserError, match="no room") as error:
            opened(8 * PIECE).local("a.tar")
        assert "at least" in error.value.fix

    def test_leaves_views_of_a_shard_that_went(self, opened):
        reader = opened(20 * PIECE)
        part = reader.read("a.tar", 0, 9 * PIECE)
        for name in ("b.tar", "c.tar"):
            reader.read(name, 0, SIZE)
        assert part.tobytes() == noise("a.tar")[: 9 * PIECE]

    def test_may_be_smaller_than_one_read(self, opened):
        assert opened(8 * PIECE).read("a.tar", 5, SIZE - 5).tobytes() == noise("a.tar")[5:-5]

    def test_that_another_reader_emptied_is_noticed(self, opened, tmp_path, monkeypatch):
        first = opened(16 * PIECE)
        first.read("a.tar", 0, SIZE)
        opened(16 * PIECE).read("b.tar", 0, SIZE)
        assert not list((tmp_path / "cache").rglob("a.tar"))
        gone = f"{tmp_path}.*a.tar .deleted"
        assert re.search(gone, Path("/proc/self/maps").read_text())
        monkeypatch.setattr(first, "_next_refresh", 0)
        assert first.read("a.tar", 0, SIZE).tobytes() == noise("a.tar")
        assert not re.search(gone, Path("/proc/self/maps").read_text())

    def test_of_less_than_two_pieces_is_refused(self, opened):
        with pytest.raises(UserError, match="two pieces"):
            opened(2 * PIECE - 1)

    def test_that_cannot_be_written_is_refused(self, server, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write the cache"):
            open_storage(server.url, cache=tmp_path / "file", cache_bytes=ROOMY)

    def test_lies_in_a_folder_of_ones_own_unless_told(self, server, tmp_path, monkeypatch):
        monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
        open_storage(server.url, cache=None, cache_bytes=ROOMY).read("a.tar", 0, 1)
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="another user"):
            open_storage(server.url, cache=None, cache_bytes=ROOMY)

    def test_makes_room_on_a_full_disk(self, opened, tmp_path, monkeypatch):
        reader, real, left = opened(), os.pwrite, [1]
        reader.read("a.tar", 0, SIZE)

        def pwrite(descriptor, body, place):
            if left[0] and len(body) > 1000:
                left[0] -= 1
                raise OSError(28, "No space left on device")
            return real(descriptor, body, place)

        monkeypatch.setattr(cache.os, "pwrite", pwrite)
        assert reader.read("b.tar", 0, 10).tobytes() == noise("b.tar")[:10]
        assert not list((tmp_path / "cache").rglob("a.tar"))
        left[0] = 10
        with pytest.raises(TitansError, match="No space left"):
            reader.read("c.tar", 0, 10)


class TestADamagedCache:
    DAMAGE = {  # noqa: RUF012
        "a flipped byte": lambda data, table: overwrite(data, 3 * PIECE + 5),
        "a cut file": lambda data, table: os.truncate(data, 2 * PIECE + 7),
        "an empty file": lambda data, table: os.truncate(data, 0),
        "a file too long": lambda data, table: os.truncate(data, 20 * PIECE),
        "a lost file": lambda data, table: data.unlink(),
        "a lost table": lambda data, table: table.unlink(),
        "a cut table": lambda data, table: os.truncate(table, 21),
        "a flipped byte in the table": lambda data, table: overwrite(table, 17),
        "lost both": lambda data, table: (data.unlink(), table.unlink(), data.parent.rmdir()),
    }

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    @pytest.mark.parametrize("whole", [False, True])
    def test_is_mended(self, opened, tmp_path, damage, whole):
        def content(reader):
            if whole:
                return reader.local("a.tar").read_bytes()
            return reader.read("a.tar", 0, SIZE).tobytes()

        content(opened())
        data = cached(tmp_path, "a.tar")
        damage(data, data.with_name(".pieces"))
        assert content(opened()) == noise("a.tar")
        assert data.read_bytes() == noise("a.tar")

    def test_is_fetched_again_where_a_reader_forgets(self, server, opened, tmp_path):
        reader = opened()
        reader.read("a.tar", 0, SIZE)
        overwrite(cached(tmp_path, "a.tar"), 3 * PIECE + 5)
        server.asked.clear()
        assert reader.forget("a.tar", 3 * PIECE + 1, 3 * PIECE + 9) is True
        assert reader.read("a.tar", 0, SIZE).tobytes() == noise("a.tar")
        assert server.asked == [("a.tar", 3 * PIECE)]

    def test_is_fetched_again_whole_where_a_reader_forgets(self, server, opened):
        reader = opened()
        path = reader.local("a.tar")
        overwrite(path, 5)
        reader.forget("a.tar", 0, SIZE)
        assert reader.local("a.tar").read_bytes() == noise("a.tar")

    def test_may_vanish_under_its_reader(self, opened, tmp_path):
        reader = opened()
        reader.read("a.tar", 0, PIECE)
        (tmp_path / "cache").rename(tmp_path / "gone")
        assert reader.read("a.tar", 0, SIZE).tobytes() == noise("a.tar")

    @pytest.mark.parametrize("count", [b"", bytes(16), b"\1" * 16])
    def test_whose_count_is_lost_counts_again(self, opened, tmp_path, count):
        limit = 14 * PIECE
        reader = opened(limit)
        reader.read("a.tar", 0, SIZE)
        (tmp_path / "cache/locks/usage").write_bytes(count)
        for start in range(0, SIZE, PIECE):
            reader.read("b.tar", start, start + 1)
            assert disk_used(tmp_path / "cache") <= limit


class TestACorpusAtAUrl:
    TOKEN = 2 * 2048 + 640  # a byte of a token: the first of the third member

    @pytest.fixture
    def remote(self, server, made, tmp_path):
        server.files = {path.name: path.read_bytes() for path in made.parent.iterdir()}
        place = f"{server.url}/manifest.json"
        return Corpus.open([(place, 1.0)], cache=str(tmp_path / "cache"))

    def read(self, corpus):
        training = corpus.sources[0].training
        return training.read(0, training.tokens).tolist()

    def test_has_the_tokens_of_its_directory(self, remote, made_corpus):
        assert remote.fingerprint == made_corpus.fingerprint
        assert self.read(remote) == self.read(made_corpus)

    def test_is_mended_where_the_cache_is_damaged_while_it_is_read(
        self, remote, made_corpus, tmp_path
    ):
        self.read(remote)
        overwrite(cached(tmp_path, "00000-00001.tar"), self.TOKEN)
        assert self.read(remote) == self.read(made_corpus)

    def test_holds_few_maps_at_once(self, remote, made_corpus, monkeypatch, tmp_path):
        monkeypatch.setattr(mapping, "KEPT", 2)
        for _ in range(2):
            assert self.read(remote) == self.read(made_corpus)
            with open("/proc/self/maps") as maps:
                assert sum(str(tmp_path / "cache") in line for line in maps) <= 3

    def test_whose_cached_index_is_damaged_is_mended(self, remote, made_corpus, tmp_path):
        self.read(remote)
        for shard in remote.sources[0].training.shards:
            shard.release()
        overwrite(cached(tmp_path, "00000-00001.index.npy"), 130)
        assert self.read(remote) == self.read(made_corpus)

    def test_that_is_damaged_itself_is_an_error_that_names_the_shard(self, server, remote):
        damaged = bytearray(server.files["00000-00001.tar"])
        damaged[self.TOKEN] ^= 1
        server.files["00000-00001.tar"] = bytes(damaged)
        with pytest.raises(UserError, match=r"00000-00001\.tar is damaged"):
            self.read(remote)


def overwrite(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    with open(path, "r+b") as handle:
        handle.write(content)
