"""One rank of a loader that is stopped and resumed; see elastic_resume.py.

``build LOADER FOLDER`` makes the loader's files of SAMPLES samples that are their own number;
``run JOB RANK PORT`` prints the samples of each of this rank's batches.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

SAMPLES = 2048
BATCH = 32  # samples of a step, over all ranks
LENGTH = 8  # tokens of a sample of ours
FILES = 16
BUFFER = 128  # samples that datasets shuffles among


@dataclass(frozen=True)
class Job:
    """A run of a loader.

    Attributes:
        loader: its name.
        folder: its files.
        steps: to be taken.
        ranks: processes.
        workers: of each rank's loader.
        load: prefix of the states to begin with, one a rank; None begins at the start.
        save: prefix of the states to leave; None leaves none.
    """

    loader: str
    folder: str
    steps: int
    ranks: int
    workers: int
    load: str | None = None
    save: str | None = None


class Mosaic:
    @staticmethod
    def build(folder):
        from mosaic import MDSWriter

        with MDSWriter(out=str(folder), columns={"i": "int"}, size_limit=4200) as writer:
            for i in range(SAMPLES):
                writer.write({"i": i})

    def __init__(self, job, rank, state):
        from mosaic import StreamingDataLoader, StreamingDataset

        data = StreamingDataset(
            local=job.folder,
            shuffle=True,
            shuffle_seed=7,
            batch_size=BATCH // job.ranks,
            num_canonical_nodes=2,
        )
        self.loader = StreamingDataLoader(
            data, batch_size=BATCH // job.ranks, num_workers=job.workers
        )
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self):
        return (batch["i"].tolist() for batch in self.loader)

    def state(self):
        return self.loader.state_dict()


class Litdata:
    @staticmethod
    def build(folder):
        from litdata import optimize

        optimize(
            fn=as_sample,
            inputs=list(range(SAMPLES)),
            output_dir=str(folder),
            chunk_size=128,
            num_workers=1,
        )

    def __init__(self, job, rank, state):
        from litdata import StreamingDataLoader, StreamingDataset

        data = StreamingDataset(job.folder, shuffle=True, seed=7, drop_last=True)
        self.loader = StreamingDataLoader(
            data, batch_size=BATCH // job.ranks, num_workers=job.workers
        )
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self):
        return (batch["i"].tolist() for batch in self.loader)

    def state(self):
        return self.loader.state_dict()


class Datasets:
    buffer = 0

    @staticmethod
    def build(folder):
        import pyarrow
        from pyarrow import parquet

        folder.mkdir()
        each = SAMPLES // FILES
        for file in range(FILES):
            column = list(range(file * each, (file + 1) * each))
            parquet.write_table(pyarrow.table({"i": column}), folder / f"{file:03d}.parquet")

    def __init__(self, job, rank, state):
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node
        from torchdata.stateful_dataloader import StatefulDataLoader

        files = sorted(map(str, Path(job.folder).glob("*.parquet")))
        data = load_dataset("parquet", data_files=files, split="train", streaming=True)
        if self.buffer:
            data = data.shuffle(seed=7, buffer_size=self.buffer)
        self.loader = StatefulDataLoader(
            split_dataset_by_node(data, rank, job.ranks),
            batch_size=BATCH // job.ranks,
            num_workers=job.workers,
        )
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self):
        return (batch["i"].tolist() for batch in self.loader)

    def state(self):
        return self.loader.state_dict()


class DatasetsShuffled(Datasets):
    buffer = BUFFER


class Webdataset:
    @staticmethod
    def build(folder):
        from webdataset import TarWriter

        folder.mkdir()
        each = SAMPLES // FILES
        for file in range(FILES):
            with TarWriter(str(folder / f"{file:03d}.tar")) as tar:
                for i in range(file * each, (file + 1) * each):
                    tar.write({"__key__": f"{i:06d}", "cls": i})

    def __init__(self, job, rank, state):
        import webdataset

        tars = sorted(map(str, Path(job.folder).glob("*.tar")))
        data = webdataset.WebDataset(
            tars, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=False
        )
        data = data.decode().to_tuple("cls").batched(BATCH // job.ranks)
        self.loader = webdataset.WebLoader(data, batch_size=None, num_workers=job.workers)
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self):
        return (list(map(int, batch[0])) for batch in self.loader)

    def state(self):
        return self.loader.state_dict()


class Ours:
    def __init__(self, job, rank, state):
        from titans_pretrain.data.loader import SequenceLoader
        from titans_pretrain.data.mixture import Corpus
        from titans_pretrain.data.prefetch import ReadAhead

        corpus = Corpus.open([(f"{job.folder}/manifest.json", 1.0)])
        self.position = state["position"] if state else 0
        self.loader = SequenceLoader(corpus, sequence_length=LENGTH, seed=7, validation_fraction=0)

        def batch(step, position):
            return self.loader.batch(
                step=step, position=position, sequences=BATCH, rank=rank, ranks=job.ranks
            )

        tokens = BATCH * LENGTH
        self.ahead = ReadAhead(batch, tokens=tokens, steps=10**9, workers=job.workers)

    def __iter__(self):
        while True:
            tokens = self.ahead.take(self.position // (BATCH * LENGTH), self.position).tokens
            self.position += BATCH * LENGTH
            yield tokens[:, 0].tolist()

    def state(self):
        return {"position": self.position}


def as_sample(i):
    return {"i": i}


LOADERS = {
    "mosaic": Mosaic,
    "litdata": Litdata,
    "datasets": Datasets,
    "datasets-shuffled": DatasetsShuffled,
    "webdataset": Webdataset,
    "ours": Ours,
}


def run(job, rank, port):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_WORLD_SIZE": str(job.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TQDM_DISABLE": "1",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    state = torch.load(f"{job.load}.{rank}", weights_only=True) if job.load else None
    loader = LOADERS[job.loader](job, rank, state)
    batches = iter(loader)
    found = [next(batches) for _ in range(job.steps)]
    if job.save:
        torch.save(loader.state(), f"{job.save}.{rank}")
    torch.distributed.barrier()
    print(json.dumps(found), flush=True)
    os._exit(0)  # workers of some loaders would keep it waiting


if __name__ == "__main__":
    if sys.argv[1] == "build":
        LOADERS[sys.argv[2]].build(Path(sys.argv[3]))
    else:
        run(Job(**json.loads(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4]))
