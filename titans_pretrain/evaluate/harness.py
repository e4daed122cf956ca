"""The benchmarks of the paper's Table 1, by lm-evaluation-harness. No torch until one runs."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.errors import Misfit, TitansError, UserError
from titans_pretrain.evaluate import benchmark_files as files
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.evaluate.tasks import Options, Tell
from titans_pretrain.inference.prompts import check_positions

if TYPE_CHECKING:
    from titans_pretrain.evaluate.harness_model import HarnessModel


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-evaluation-harness.

    Attributes:
        stock: its file below ``lm_eval/tasks``.
        split: of the data set, scored.
        columns: what of a row it reads.
    """

    stock: str
    split: str
    columns: Mapping[str, files.Check]


_HUBS = {"datasets", "huggingface_hub", "httpx", "httpx2", "requests", "fsspec", "aiohttp"}
_ARC = {"question": files.text, "choices": files.choices, "answerKey": files.answer_key}
BENCHMARKS: Mapping[str, Benchmark] = {
    "wikitext": Benchmark("wikitext/wikitext.yaml", "test", {"page": files.text}),
    "lambada_openai": Benchmark("lambada/lambada_openai.yaml", "test", {"text": files.words}),
    "piqa": Benchmark(
        "piqa/piqa.yaml",
        "validation",
        {
            "goal": files.text,
            "sol1": files.text,
            "sol2": files.text,
            "label": files.number(0, 2),
        },
    ),
    "hellaswag": Benchmark(
        "hellaswag/hellaswag.yaml",
        "validation",
        {
            "activity_label": files.text,
            "ctx_a": files.text,
            "ctx_b": files.text,
            "endings": files.texts,
            "label": files.ending,
        },
    ),
    "winogrande": Benchmark(
        "winogrande/default.yaml",
        "validation",
        {
            "sentence": files.gap,
            "option1": files.text,
            "option2": files.text,
            "answer": files.numeral(1, 2),
        },
    ),
    "arc_easy": Benchmark("arc/arc_easy.yaml", "test", _ARC),
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", "test", _ARC),
    "social_iqa": Benchmark(
        "siqa/siqa.yaml",
        "validation",
        {
            "context": files.text,
            "question": files.text,
            "answerA": files.text,
            "answerB": files.text,
            "answerC": files.text,
            "label": files.numeral(1, 3),
        },
    ),
    "boolq": Benchmark(
        "super_glue/boolq/default.yaml",
        "validation",
        {"passage": files.text, "question": files.text, "label": files.number(0, 2)},
    ),
}


def open_tasks(names: Sequence[str], options: Options) -> list["HarnessTask"]:
    """Tasks with their data at hand.

    Args:
        names: of ``BENCHMARKS``.
        options: ``task_data``, ``samples``, ``batch``, and ``max_length`` or ``trained_length``.

    Raises:
        UserError: lm-eval is not installed, no maximal length is known, or data cannot be reached
            or read.
        TitansError: lm-eval does not open a task of its own.
    """
    _check_installed()
    length = options.max_length or options.trained_length
    if length is None:
        raise Misfit(
            "the model does not tell the sequence length of its training",
            where="--max-length",
            fix="give the most tokens it is to read; results depend on them",
        )
    return [HarnessTask(name, _open(name, options.task_data), length, options) for name in names]


class HarnessTask:
    """One benchmark, asked without examples.

    Args:
        name: of ``BENCHMARKS``.
        task: lm-eval's own, with its data.
        max_length: tokens that the model is given at most.
        options: ``samples`` and ``batch``.
    """

    def __init__(self, name: str, task: Any, max_length: int, options: Options) -> None:
        self.name = name
        self._task, self._max_length, self._batch = task, max_length, options.batch
        self._samples = min(options.samples or len(task.eval_docs), len(task.eval_docs))

    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        digest = hashlib.sha256()
        for document in self._task.eval_docs:
            digest.update(json.dumps(document, sort_keys=True).encode() + b"\n")
        return {
            "documents": digest.hexdigest(),
            "lm_eval": _version(),
            "version": str(self._task.VERSION),
            "shots": 0,
            "samples": self._samples,
            "max_length": self._max_length,
        }

    def cells(self) -> list[str]:
        """One."""
        return [""]

    def check(self, longest: int | None) -> None:
        """Refuse a maximal length beyond the model's positions."""
        check_positions("--max-length", self._max_length, longest)

    def fit(self, model: Loaded, cell: str) -> None:
        """Refuse a maximal length that an answer does not go into."""
        _build(self._task, self._samples)
        self._scorer(model).check(self._task.instances)

    def run(self, model: Loaded, cell: str, tell: Tell) -> dict[str, Any]:
        """lm-eval's metrics, and how many samples were cut to the maximal length.

        Raises:
            UserError: the model's positions, or an answer, do not go with the maximal length.
            TitansError: a score is not finite.
        """
        self.check(model.longest)
        scorer = self._scorer(model, tell=tell)
        return score(self._task, scorer, self._samples) | {"truncated": len(scorer.cut)}

    def _scorer(self, model: Loaded, **options: Any) -> "HarnessModel":
        from titans_pretrain.evaluate.harness_model import HarnessModel

        return HarnessModel(model, max_length=self._max_length, batch=self._batch, **options)


def _build(task: Any, samples: int) -> None:
    """Make the requests of the first samples of an lm-eval task, unless they wait already."""
    made = getattr(task, "instances", None) or []  # a fresh task has none yet
    if len({one.doc_id for one in made}) == samples and not any(one.resps for one in made):
        return
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        task.build_all_requests(limit=samples, rank=0, world_size=1)


def score(task: Any, scorer: Any, samples: int) -> dict[str, Any]:
    """Metrics of the first samples of an lm-eval task.

    Args:
        task: lm-eval's.
        scorer: an ``lm_eval.api.model.LM``.
        samples: how many.

    Raises:
        TitansError: a metric is not finite.
    """
    _build(task, samples)
    by_kind = defaultdict(list)
    for request in task.instances:
        by_kind[request.request_type].extend([request] * request.repeats)
    for kind, requests in by_kind.items():
        for request, response in zip(requests, getattr(scorer, kind)(requests), strict=True):
            request.resps.append(response)
    task.apply_filters()
    values: dict[str, list[Any]] = defaultdict(list)
    answers_of = defaultdict(list)
    for request in sorted(task.instances, key=lambda request: request.idx):
        answers_of[request.doc_id].append(request.filtered_resps["none"])
    for number, document in task.doc_iterator(rank=0, limit=samples, world_size=1):
        for metric, value in task.process_results(document, answers_of[number]).items():
            values[metric].append(value)
    return {**_aggregate(task, values), "samples": samples}


def _aggregate(task: Any, values: Mapping[str, list[Any]]) -> dict[str, Any]:
    from lm_eval.api.metrics import mean, mean_stderr

    found = {}
    for metric, several in values.items():
        aggregate: Callable[[list[Any]], float] = task.aggregation()[metric]
        try:
            found[metric] = float(aggregate(several))
        except OverflowError:
            found[metric] = float("inf")
        if aggregate is mean and len(several) > 1:
            found[f"{metric}_stderr"] = float(mean_stderr(several))
    bad = [metric for metric, value in found.items() if not abs(value) < float("inf")]
    if bad:
        raise TitansError(
            f"{bad[0]} is {found[bad[0]]}",
            where="the model's logits",
            fix="export another checkpoint; in bfloat16, try float32",
        )
    return found


def _check_installed() -> None:
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not there: {error}",
            where="--tasks",
            fix="pip install 'titans-pretrain[eval]'",
        ) from None


def _open(name: str, directory: Path | None) -> Any:
    """lm-eval's task with its data, from the Hub or from ``directory``."""
    import datasets
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells defaults of its own tasks
    datasets.disable_progress_bars()
    benchmark = BENCHMARKS[name]
    stock = Path(lm_eval.tasks.__file__).parent / benchmark.stock
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        changes: dict[str, Any] = {"include": str(stock)}
        if directory is not None:
            rows = files.read(directory / f"{name}.jsonl", benchmark.columns)
            changes |= _local(name, rows, room)
        file = room / f"{name}.yaml"
        file.write_text(json.dumps(changes), encoding="utf-8")  # JSON is YAML
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        try:
            return manager.load([str(file)])["tasks"][name]
        except Exception as error:  # the Hub's client raises of many kinds
            reason = (str(error).splitlines() or [""])[0]
            if directory is not None or not _is_of_the_hub(error):
                raise TitansError(
                    f"lm-eval {_version()} could not open its own task {name}: "
                    f"{type(error).__name__}: {reason}",
                    where=str(stock),
                    fix="pip install 'titans-pretrain[eval]' brings the version that is tested",
                ) from error
            raise UserError(
                f"the data of {name} cannot be reached: {type(error).__name__}: {reason}",
                where=_source(stock),
                fix=f"mend the connection, or give a directory with {name}.jsonl: --task-data DIR",
            ) from None


def _is_of_the_hub(error: Exception) -> bool:
    """Whether an error tells of connections, files, or the Hub's own client, or comes from that."""
    modules = [kind.__module__ for kind in type(error).__mro__]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules += [str(frame.f_globals.get("__name__")) for frame in frames[-1:]]  # the innermost
    packages = {module.partition(".")[0] for module in modules}
    return isinstance(error, OSError) or bool(packages & _HUBS)


def _version() -> str:
    return importlib.metadata.version("lm-eval")


def _local(name: str, rows: Sequence[Mapping[str, Any]], room: Path) -> dict[str, Any]:
    """Changes of a stock task that reads ``rows`` and nothing else."""
    split = BENCHMARKS[name].split
    file = room / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    absent = {f"{one}_split": None for one in ("training", "validation", "test") if one != split}
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file)},
            "cache_dir": str(room / "cache"),
            "keep_in_memory": True,
        },
        **absent,
    }


def _source(stock: Path) -> str:
    """What a stock task's file names as its data set."""
    found = [
        line.split(":", 1)[1].strip()
        for line in stock.read_text(encoding="utf-8").splitlines()
        if line.startswith(("dataset_path:", "dataset_name:"))
    ]
    return " ".join(name for name in found if name != "null") or str(stock)
