"""A process that reads places of a remote file through a shared cache and prints their hash."""

import hashlib
import sys
from pathlib import Path

import range_server  # noqa: F401 - registers the filesystem

from titans_pretrain.data import cache, storage

url, folder, limit, piece, name = sys.argv[1:6]
cache.PIECE = int(piece)
reader = storage.open_storage(url, cache=Path(folder), cache_bytes=int(limit))
print("ready", flush=True)
sys.stdin.readline()
for place in sys.argv[6:]:
    start, stop = map(int, place.split("-"))
    print(hashlib.sha256(reader.read(name, start, stop)).hexdigest(), flush=True)
