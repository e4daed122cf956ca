"""The ways from text to ids that prepare_data.py compares, and what one run of each costs."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import contender_ids
import peers
from corpus import Corpus
from peers import Measured

SCRIPT = Path(__file__).with_name("contenders.py")
TITANS = Path(sys.executable).with_name("titans")
EOS, EOS_PIECE = 2, "</s>"
SEED = 0
ENCODERS = ("sentencepiece", "fast")
ALONE = {"sentencepiece": "sentencepiece alone", "fast": "gigatoken alone"}
DATATROVE = "datatrove DocumentTokenizer"


@dataclass(frozen=True)
class Materials:
    """What every contender gets.

    Attributes:
        text: what is prepared.
        document: a corpus of two documents.
        model: the sentencepiece tokenizer.
        hugging_face: directory of the same tokenizer in Hugging Face's format.
        python: the interpreter of the peers.
    """

    text: Corpus
    document: Corpus
    model: Path
    hugging_face: Path
    python: Path


@dataclass(frozen=True)
class Trial:
    """One run: its seconds, those of them before the work, its peak resident bytes."""

    cpu: float
    wall: float
    start_cpu: float
    start_wall: float
    main_peak: int
    child_peak: int


@dataclass(frozen=True)
class Contender:
    """A way from text to ids.

    Attributes:
        name: as in the tables.
        run: makes ids of a corpus in an empty directory.
        read: the ids of each document in that directory, with EOS.
        cores: that it may use.
        encoder: ours alone: which.
        timed: the command says what the work cost; else a run on two documents is taken off.
    """

    name: str
    run: Callable[[Corpus, Path], Measured]
    read: Callable[[Path], list[contender_ids.Ids]]
    cores: int = 1
    encoder: str = ""
    timed: bool = False

    def trial(self, materials: Materials, directory: Path) -> Trial:
        """Run it once; ``directory`` then holds what it made of the whole text."""
        start = None if self.timed else self.run(materials.document, empty(directory))
        done = self.run(materials.text, empty(directory))
        if start:
            before = start.cpu, start.wall
        else:
            work = done.result()
            before = done.cpu - work["cpu"], done.wall - work["wall"]
        return Trial(done.cpu, done.wall, *before, done.main_peak, done.child_peak)


def contenders(
    materials: Materials, megatron: Path | None, megatron_python: Path
) -> list[Contender]:
    """All that run here; sentencepiece alone, whose ids are the reference, is the first."""
    return [
        *(_alone(materials, encoder) for encoder in ENCODERS),
        _datatrove(materials),
        *(_megatron(materials, megatron, megatron_python) if megatron else ()),
        *(_ours(materials, encoder, cores) for encoder in ENCODERS for cores in (1, 2)),
    ]


def plan(text: Corpus, model: Path, directory: Path, *settings: object) -> Measured:
    """Freeze a plan of one task in ``directory``."""
    words = [TITANS, "data", "plan", "--input", text.glob, "--tokenizer", model, "--tasks", 1]
    return peers.measure([*words, "--output", directory, *settings])


def prepare(directory: Path, encoder: str, workers: int) -> Measured:
    """Carry out a frozen plan."""
    words = [TITANS, "data", "prepare", "--output", directory, "--encoder", encoder]
    return peers.measure([*words, "--workers", workers], cores=workers)


def empty(directory: Path) -> Path:
    """The directory, with nothing in it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _alone(materials: Materials, encoder: str) -> Contender:
    library = {"sentencepiece": "sentencepiece", "fast": "gigatoken"}[encoder]

    def run(text: Corpus, directory: Path) -> Measured:
        words = [sys.executable, SCRIPT, library, "--corpus", text.glob]
        words += ["--model", materials.model, "--output", directory / "ids.npz"]
        return peers.measure(words, cores=1)

    def read(directory: Path) -> list[contender_ids.Ids]:
        return contender_ids.with_eos(contender_ids.saved(directory / "ids.npz"), EOS)

    return Contender(ALONE[encoder], run, read, timed=True)


def _datatrove(materials: Materials) -> Contender:
    def run(text: Corpus, directory: Path) -> Measured:
        words = [materials.python, SCRIPT, "datatrove", "--corpus", text.glob]
        words += ["--model", materials.hugging_face / "tokenizer.json", "--seed", SEED]
        words += ["--output", directory / "ids", "--logs", directory / "logs", "--eos", EOS_PIECE]
        return peers.measure(words, cores=1)

    return Contender(DATATROVE, run, lambda made: contender_ids.datatrove(made / "ids", SEED))


def _megatron(materials: Materials, sources: Path, python: Path) -> list[Contender]:
    """Its two scripts, with sentencepiece and with gigatoken; both read jsonl."""

    def contender(name: str, script: str, *words: object) -> Contender:
        def run(text: Corpus, directory: Path) -> Measured:
            begin = [python, "-W", "ignore", sources / "tools" / script, "--append-eod"]
            begin += ["--input", text.jsonl(), "--output-prefix", directory / "out"]
            return peers.measure([*begin, *words], cores=1)

        return Contender(name, run, lambda made: contender_ids.megatron(made / "out"))

    return [
        contender(
            "Megatron-LM preprocess_data",
            "preprocess_data.py",
            *("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", materials.model),
            *("--workers", 1),
        ),
        contender(
            "Megatron-LM preprocess_data_fast (gigatoken)",
            "preprocess_data_fast.py",
            *("--tokenizer-type", "HuggingFaceTokenizer", "--use-gigatoken"),
            *("--tokenizer-model", materials.hugging_face),
        ),
    ]


def _ours(materials: Materials, encoder: str, cores: int) -> Contender:
    def run(text: Corpus, directory: Path) -> Measured:
        plan(text, materials.model, directory)
        return prepare(directory, encoder, cores)

    def read(directory: Path) -> list[contender_ids.Ids]:
        return contender_ids.ours(directory, materials.text.files)

    name = f"titans data prepare, {encoder}, {cores} worker{'s' * (cores > 1)}"
    return Contender(name, run, read, cores=cores, encoder=encoder)
