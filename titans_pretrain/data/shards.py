"""A prepared data set: its manifest and files checked, its shards ready to be read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import manifest as manifests
from titans_pretrain.data.storage import MissingFile, Storage, intact, open_storage, shown
from titans_pretrain.data.stream import Shard, Stream, TarLayout
from titans_pretrain.errors import UserError

NAMED = 100


class TokenShards:
    """A prepared directory, here or at a URL; open it with ``TokenShards.open``.

    Attributes:
        manifest: its path or URL, without passwords.
        place: the directory or its URL, likewise.
        storage: its files.
        fingerprint: names the data's content; equal on every machine.
        vocab_size: ids are below it.
        eos_id: ends every document.
        bos: whether BOS begins every document.
        held_out_share: of the documents, that the preparation was told to hold out.
        tokenizer: the model's path.
        tokenizer_sha256: of the model.
        training: the stream of the training shards.
        held_out: the stream of the held-out ones; empty where the preparation held none out.
    """

    def __init__(
        self,
        manifest: str,
        storage: Storage,
        content: Mapping[str, Any],
        *,
        check: bool,
        sizes: bool,
    ) -> None:
        self.manifest, self.place = shown(manifest), shown(split(manifest)[0])
        self.storage, self._content, self._check = storage, content, check
        self.fingerprint: str = content["fingerprint"]
        self.vocab_size: int = content["vocab_size"]
        self.eos_id: int = content["eos_id"]
        self.bos: bool = content["bos"]
        self.held_out_share: float = content["settings"]["held_out"]
        self.tokenizer_sha256: str = content["tokenizer_sha256"]
        if sizes:
            self._check_files()
        self.tokenizer = self._tokenizer()
        self.training = self._stream(content["shards"])
        self.held_out = self._stream(content["held_out"])

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        check: bool = True,
        sizes: bool = True,
        cache: str | Path | None = None,
        cache_bytes: int = 2**36,
    ) -> "TokenShards":
        """Read a ``manifest.json`` and check that every shard is there, whole by its size.

        Args:
            path: the manifest, or its URL.
            check: compare every block read with its checksum.
            sizes: look now whether all shards are there and whole, not only at their first read.
            cache: see ``open_storage``.
            cache_bytes: see ``open_storage``.

        Raises:
            UserError: no manifest, shards that are missing or cut (named, with the command that
                redoes them), or a tokenizer that is not the data's.
        """
        given = str(path).removeprefix("file://")
        place, name = split(given)
        storage = open_storage(place, cache=Path(cache) if cache else None, cache_bytes=cache_bytes)
        file = storage.local(name) if "://" in given else Path(given)
        return cls(given, storage, manifests.load(file), check=check, sizes=sizes)

    def redo(self, tasks: Sequence[int]) -> str:
        """What makes damaged shards of these tasks whole."""
        if "://" in self.place:
            return "copy the files again from where they were prepared"
        if len(set(tasks)) == 1:
            return manifests.redo(Path(self.place), tasks[0])
        return f"run `titans data verify {self.place}`, which prints the commands that redo them"

    def _check_files(self) -> None:
        """Compare the sizes of all files that are read with the manifest."""
        shards = [*self._content["shards"], *self._content["held_out"]]
        files = [
            (shard["task"], file)
            for shard in shards
            for file in ((shard, shard["index"]) if self._check else (shard,))
        ]
        found = self.storage.sizes([file["name"] for _, file in files])
        missing: list[str] = []
        cut: list[str] = []
        tasks: list[int] = []
        for task, file in files:
            name, size = file["name"], found.get(file["name"])
            if size == file["bytes"]:
                continue
            tasks.append(task)
            if size is None:
                missing.append(name)
            else:
                cut.append(f"{name} has {size} bytes instead of {file['bytes']}")
        if tasks:
            told = [f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing"]
            what = "; ".join(told * bool(missing) + [_listed(cut)] * bool(cut))
            raise UserError(what, where=self.place, fix=self.redo(tasks))

    def _tokenizer(self) -> Path:
        where = f"{self.place}/{manifests.TOKENIZER}"
        fix = f"copy back the model with sha256 {self.tokenizer_sha256}"
        try:
            path = intact(self.storage, manifests.TOKENIZER, self.tokenizer_sha256)
        except MissingFile:
            raise UserError("the tokenizer is missing", where=where, fix=fix) from None
        if path is None:
            what = "the tokenizer is not the one that the data was prepared with"
            raise UserError(what, where=where, fix=fix)
        return path

    def _stream(self, entries: Sequence[Mapping[str, Any]]) -> Stream:
        content = self._content
        layout = TarLayout(
            np.dtype(content["dtype"]), content["settings"]["member_tokens"], content["masks"]
        )
        return Stream([self._shard(entry, layout) for entry in entries])

    def _shard(self, entry: Mapping[str, Any], layout: TarLayout) -> Shard:
        def damaged(name: str, what: str) -> UserError:
            return UserError(
                f"{name} is damaged: {what}",
                where=f"{self.place}/{name}",
                fix=self.redo([entry["task"]]),
            )

        return Shard(self.storage, entry, layout, check=self._check, damaged=damaged)


def split(manifest: str) -> tuple[str, str]:
    """The directory of a manifest, and its name."""
    place, slash, name = manifest.rpartition("/")
    return place or slash or ".", name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
