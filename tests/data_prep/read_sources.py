"""Writing sources of every kind and reading them back."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep import inputs, sources
from data_prep.sources import Columns, Reader


def documents(pattern, columns=None):
    """The rows of all units, in input order."""
    with Reader(columns or Columns()) as reader:
        return [
            row
            for item in inputs.find([str(pattern)])
            for shape in [sources.layout(item)]
            for unit in range(shape.units)
            for batch in reader.rows(item, shape, unit)
            for row in batch
        ]


def texts(pattern, columns=None):
    return [row.text for row in documents(pattern, columns)]


def write(path, values, rows=700):
    """A source of the kind that the path's name tells; of ``rows`` a unit where that is free."""
    plain = "".join(json.dumps(row) + "\n" for row in values).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), path, row_group_size=rows)
    elif path.suffix == ".arrow":
        write_arrow(path, values, rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    elif path.suffix == ".zst":
        packer = zstandard.ZstdCompressor()
        path.write_bytes(packer.compress(plain[:5000]) + packer.compress(plain[5000:]))
    else:
        path.write_bytes(plain)
    return path


def write_arrow(path, values, rows=700, writer=pa.ipc.new_stream):
    table = pa.Table.from_pylist(values)
    with pa.OSFile(str(path), "wb") as handle, writer(handle, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)
    return path
