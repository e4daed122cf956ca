"""A prepared data set: its manifest checked, its tars memory-mapped."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest
from data_prep.tar import TarStream
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file


class TokenShards:
    """The token streams of a prepared directory; open it with ``TokenShards.open``.

    Attributes:
        fingerprint: names the data's content; equal on every machine.
        vocab_size: ids are below it.
        eos_id: ends every document.
        tokens: in all shards.
        masks: whether some targets are not trained on.
        tokenizer: the model's path.
        lengths: tokens of each shard.
    """

    def __init__(self, directory: Path, content: Mapping[str, Any]) -> None:
        self._directory, self._content = directory, content
        self._streams: dict[int, TarStream] = {}
        self.fingerprint: str = content["fingerprint"]
        self.vocab_size: int = content["vocab_size"]
        self.eos_id: int = content["eos_id"]
        self.tokens: int = content["tokens"]
        self.masks: bool = content["masks"]
        self.tokenizer: Path = directory / manifest.TOKENIZER

    @classmethod
    def open(cls, path: str | Path) -> "TokenShards":
        """Read a ``manifest.json`` and check that every tar is there, whole by its size.

        Args:
            path: the manifest.

        Raises:
            UserError: no manifest, a tar that is missing or cut (named, with the command that
                redoes it), or a tokenizer that is not the data's.
        """
        path = Path(path)
        content = manifest.load(path)
        directory = path.parent
        for shard in content["shards"]:
            tar = directory / shard["name"]
            if problem := manifest.size_problem(tar, shard["bytes"]):
                raise UserError(
                    problem, where=str(tar), fix=manifest.redo(directory, shard["task"])
                )
        tokenizer = directory / manifest.TOKENIZER
        if not tokenizer.exists() or sha256_file(tokenizer) != content["tokenizer_sha256"]:
            raise UserError(
                "the tokenizer is missing or not the one that the data was prepared with",
                where=str(tokenizer),
                fix=f"copy back the model with sha256 {content['tokenizer_sha256']}",
            )
        return cls(directory, content)

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each shard, in the manifest's order."""
        return [shard["tokens"] for shard in self._content["shards"]]

    def read(self, shard: int, start: int, count: int) -> NDArray[np.int64]:
        """``count`` tokens of a shard's stream from position ``start``, (count,)."""
        return self._stream(shard).read(start, count)

    def read_mask(self, shard: int, start: int, count: int) -> NDArray[np.bool_]:
        """Which of them are trained on as targets, (count,)."""
        return self._stream(shard).read_mask(start, count)

    def _stream(self, shard: int) -> TarStream:
        """The shard, its headers walked and its counts checked at first use."""
        if shard not in self._streams:
            self._streams[shard] = self._open(self._content["shards"][shard])
        return self._streams[shard]

    def _open(self, shard: Mapping[str, Any]) -> TarStream:
        path = self._directory / shard["name"]
        stream = TarStream.open(
            path,
            dtype=self._content["dtype"],
            member_tokens=self._content["settings"]["member_tokens"],
        )
        if stream.tokens != shard["tokens"] or stream.masks != self.masks:
            raise UserError(
                f"{path.name} holds {stream.tokens} tokens and {'' if stream.masks else 'no '}"
                f"masks; the manifest tells {shard['tokens']} and {'' if self.masks else 'no '}"
                "masks",
                where=str(path),
                fix=manifest.redo(self._directory, shard["task"]),
            )
        return stream
