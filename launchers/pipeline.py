"""The chain from text to an evaluated model: which stages are left, and what waits for what."""

import json
from collections.abc import Iterator
from pathlib import Path

from launchers import job as jobs
from launchers import submitted
from launchers.submitted import Stage
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError

DATA = ("plan", "prepare", "merge")
AFTER = ("export", "eval")


def training(config: RunConfig, run: Path) -> Stage:
    """The stage that trains; jobs of one run follow each other, whoever submits them."""
    spec = jobs.training_spec(config, directory=run, config_path=submitted.config_of(run))
    return Stage("train", spec, also=("singleton",))


def stages(config: RunConfig, run: Path) -> list[Stage]:
    """All stages that a configuration has, in order."""
    names = (*(DATA if config.pipeline.data else ()), "train", *AFTER)
    chain: list[Stage] = []
    for name in names:
        before = (chain[-1].name,) if chain else ()
        if name == "train":
            made = training(config, run)
            chain.append(Stage(name, made.spec, before, made.also))
        else:
            spec = jobs.stage_spec(
                name, config, directory=run, config_path=submitted.config_of(run)
            )
            chain.append(Stage(name, spec, before))
    return chain


def evaluation(config: RunConfig, run: Path) -> list[Stage]:
    """The first evaluation of a checkpoint while the run trains, if it is to have any."""
    step = config.pipeline.eval.every
    if not step:
        return []
    spec = jobs.evaluation_spec(
        config, directory=run, config_path=submitted.config_of(run), step=step
    )
    return [Stage(jobs.evaluation(step), spec)]


def left(config: RunConfig, run: Path, chain: list[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages that are still to do, and sentences about those that are not.

    Stages that only look whether all is done, such as the data's, are done again until the run
    trains on it.

    Raises:
        UserError: an export is in the way.
    """
    done = dict(_done(config, run))
    chain = [stage for stage in chain if stage.name not in done]
    return chain, [f"{name}: {what}" for name, what in done.items()]


def finished(config: RunConfig, run: Path) -> Path | None:
    """The checkpoint of the run's last step, if it is there whole."""
    root = run / "checkpoints"
    for step in reversed(layout.steps(root)):
        path = root / layout.step_name(step)
        if step >= config.train.steps and not layout.verify(path, contents=False):
            return path
    return None


def export_of(config: RunConfig, run: Path) -> Path:
    """Where the exported model goes."""
    return Path(config.pipeline.export.directory or run / "model")


def evaluation_of(config: RunConfig, run: Path) -> Path:
    """Where the evaluation goes."""
    return Path(config.pipeline.eval.output or run / "eval")


def _done(config: RunConfig, run: Path) -> Iterator[tuple[str, str]]:
    if config.pipeline.data is not None and _trains_on(config, run):
        yield from ((name, "done, the run trains on it") for name in DATA)
    last, out = finished(config, run), export_of(config, run)
    step = int(last.name.removeprefix("step-")) if last else config.train.steps
    exported = out.exists()
    if exported and _exported_step(out) != step:
        raise UserError(
            f"{out} is there and is no export of step {step}",
            where="pipeline.export.directory",
            fix="move it away, or give another pipeline.export.directory",
        )
    if last is None:
        return
    yield "train", f"finished already: {last.name} of {config.train.steps} steps"
    if exported:
        yield "export", f"done already: {out}"
        told = _json(evaluation_of(config, run) / "heldout.json")
        if told.get("training_step") == step:
            yield "eval", f"done already: {evaluation_of(config, run)}"


def _trains_on(config: RunConfig, run: Path) -> bool:
    """Whether the run has steps and began with the data that is there now."""
    if not layout.steps(run / "checkpoints"):
        return False
    began = _json(run / "data.json").get("fingerprint")
    now = _json(Path(str(config.data.manifest))).get("fingerprint")
    return began is not None and began == now


def _exported_step(out: Path) -> int | None:
    """The step of an exported model, None if it is none."""
    from titans_pretrain.checkpoint import manifest

    try:
        step = manifest.read(out).get("step")
    except TitansError:
        return None
    return step if isinstance(step, int) else None


def _json(path: Path) -> dict[str, object]:
    """A JSON object in a file; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
