"""One encoder or pipeline over a corpus, in a process of its own; the last line is its result.

It runs in the interpreter that has the library: nothing of this project is imported here.
"""

import argparse
import glob
import json
import time

import numpy as np
import pyarrow.parquet

ROWS = 1000


def texts(pattern):
    """All texts of the files, in order, as lists of at most ROWS."""
    for path in sorted(glob.glob(pattern)):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS, columns=["text"]):
            yield batch.column(0).to_pylist()


def bare(encode, pattern):
    """Processor and wall seconds of encoding texts that are in memory, and what came out.

    The first text of all is encoded once before, unmeasured: what happens once is start-up.
    """
    batches = list(texts(pattern))
    encode(batches[0][:1])
    cpu, wall = time.process_time(), time.perf_counter()
    encoded = [encode(batch) for batch in batches]
    cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return cost, encoded


def sentencepiece(options):
    """The ids of every document by the reference; saved, they are what others are compared with."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=options.model)
    cost, encoded = bare(
        lambda batch: [processor.encode_as_numpy(text) for text in batch], options.corpus
    )
    documents = [ids for batch in encoded for ids in batch]
    lengths = np.array([len(ids) for ids in documents])
    if options.output:
        np.savez(options.output, ids=np.concatenate(documents).astype(np.uint32), lengths=lengths)
    return cost | {"tokens": int(lengths.sum()), "version": sentencepiece.__version__}


def gigatoken(options):
    """The fast encoder as it is, without any guard."""
    from importlib.metadata import version

    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_sentencepiece(options.model)
    cost, encoded = bare(
        lambda batch: tokenizer.encode_batch(batch, parallel=False), options.corpus
    )
    if options.output:
        documents = [np.asarray(ids) for batch in encoded for ids in batch]
        lengths = np.array([len(ids) for ids in documents])
        np.savez(options.output, ids=np.concatenate(documents).astype(np.uint32), lengths=lengths)
    return cost | {"version": version("gigatoken")}


def datatrove(options):
    """datatrove's own pipeline with its defaults: one task, one worker, documents shuffled."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    folder, _, pattern = options.corpus.rpartition("/")
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(folder, glob_pattern=pattern),
            DocumentTokenizer(
                options.output,
                tokenizer_name_or_path=options.model,
                eos_token=options.eos,
                seed=options.seed,
            ),
        ],
        tasks=1,
        workers=1,
        logging_dir=options.logs,
    ).run()
    return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=("sentencepiece", "gigatoken", "datatrove"))
    parser.add_argument("--corpus", required=True, help="glob of parquet files")
    parser.add_argument("--model", required=True, help="what the library loads")
    parser.add_argument("--output", help="file or directory of what it makes")
    parser.add_argument("--logs", help="directory of datatrove's logs")
    parser.add_argument("--eos", help="datatrove: the piece that ends documents")
    parser.add_argument("--seed", type=int, default=0, help="datatrove: of the order")
    options = parser.parse_args()
    print(json.dumps(globals()[options.contender](options)))


if __name__ == "__main__":
    main()
