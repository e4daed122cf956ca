"""The run configuration: typed, frozen, documented sections, read from YAML and ``key=value``.

An unknown key, a wrong type or an impossible combination is a ``UserError`` that names the line,
the value and the fix. No torch here.
"""

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, Field, ValidationError

from titans_pretrain import config_rules
from titans_pretrain.baselines import foreign
from titans_pretrain.config_job import JobSection, PipelineSection
from titans_pretrain.config_section import Section
from titans_pretrain.errors import UserError, nearest
from titans_pretrain.model import fields

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PRESETS = CONFIGS / "model"
CLUSTERS = CONFIGS / "cluster"


class LengthStage(Section):
    """From which optimizer step on sequences have which length."""

    from_step: int = Field(ge=0)
    """First optimizer step (counted from 0) of the stage."""
    length: int = Field(ge=1)
    """Tokens per sequence; divides data.sequence_length."""


class MixturePart(Section):
    """One data set of a mixture."""

    manifest: str
    """Path or URL of its manifest.json."""
    weight: float = Field(gt=0)
    """Its share of the sequences, over the sum of all weights."""


class DataSection(Section):
    """What is read, and in which order."""

    manifest: str | None = None
    """Path or URL of the manifest.json that ``titans data prepare`` wrote."""
    mixture: list[MixturePart] = []
    """Instead of one manifest, several: a list of {manifest, weight}."""
    sequence_length: int = Field(ge=1)
    """Tokens per training sequence; also the span that the global order permutes."""
    length_schedule: list[LengthStage] = []
    """Shorter sequences at first; a step holds the same number of tokens throughout."""
    seed: int = Field(default=0, ge=0)
    """Seed of the global order."""
    validation_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Share of the tokens, the last, never trained on; null: 0.01, or 0 with held-out shards."""
    workers: int = Field(default=1, ge=0)
    """Threads that read coming batches; 0 reads within the step. Batches are the same."""
    check: bool = True
    """Compare every block read with its checksum."""
    cache: str | None = None
    """Directory for what is read of URLs, shared by a node's ranks; null: one in TMPDIR."""
    cache_bytes: int = Field(default=2**36, ge=2**20)
    """Most that the cache holds."""

    @property
    def parts(self) -> list[tuple[str, float]]:
        """The manifests that are read, with their weights."""
        if self.manifest is not None:
            return [(self.manifest, 1.0)]
        return [(part.manifest, part.weight) for part in self.mixture]


class MeshSection(Section):
    """How ranks divide the work; data ranks = ranks / (tensor * sequence)."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share a layer: heads, channels and vocabulary are divided among them."""
    sequence: int = Field(default=1, ge=1)
    """Ranks that share a sequence: each holds a span of it and hands memory states on."""
    interleave: bool = True
    """Sequence ranks work on several micro-batches at once instead of one after another."""
    shard: Literal["data"] = "data"
    """Ranks over which ZeRO-3 shards parameters."""


class TrainSection(Section):
    """The optimization."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(ge=1)
    """Sequences of full length per optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences of full length per rank and forward pass."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step over the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up; the first step already has learning_rate / warmup_steps."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; vectors, gates and norms are not decayed."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second-moment decay."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Bound on the global gradient norm; 0 turns clipping off."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bfloat16 weights and activations, float32 master, gradients summed in float32."""
    activation_checkpointing: bool = False
    """Keep block inputs and what other ranks sent into blocks; recompute blocks in backward."""
    memory_kernels: Literal["torch", "triton"] = "torch"
    """triton: the memory's scan in kernels on GPUs, if they agree with torch at the start."""
    offload_optimizer: bool = False
    """Keep float32 master weights and Adam moments in host memory and update them there."""
    validation_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates after the last step only."""
    validation_sequences: int = Field(default=0, ge=0)
    """Sequences of a validation; 0 takes all held-out ones."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights."""
    init_from: str = ""
    """Directory that titans export wrote: initial weights. No effect once a checkpoint is there."""


class CheckpointSection(Section):
    """When the run is saved."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints whose step is a multiple of this stay for good; 0 keeps none for good."""
    asynchronous: bool = True
    """Write checkpoints while training goes on."""


class GuardSection(Section):
    """What happens at a step whose loss or gradient is not finite, or spikes."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """stop the run, skip the step, or go back to an earlier one and leave its batches out."""
    loss_spike: float = Field(default=0, ge=0)
    """Largest loss over the running median, as a factor above 1; 0 turns this bound off."""
    gradient_spike: float = Field(default=0, ge=0)
    """Largest gradient norm over the running median, as a factor above 1; 0 turns it off."""
    window: int = Field(default=64, ge=1)
    """Accepted steps of which the running median is taken."""
    rollback_steps: int = Field(default=0, ge=0)
    """Steps that rollback goes back at least; 0 goes back to the newest checkpoint."""
    limit: int = Field(default=3, ge=1)
    """Bad steps in a row that stop the run, whatever the policy."""


class RunSection(Section):
    """Where the run lives and who is told."""

    directory: str
    """Directory of the run's files."""
    name: str = ""
    """Name in reports and wandb; empty takes the directory's."""
    wandb_project: str | None = None
    """wandb project; null logs to metrics.jsonl only. Offline when no key is set."""
    hang_seconds: int = Field(default=0, ge=0)
    """Seconds a step may take; 0 allows ten times the slowest recent one, at least 35 s."""
    trace_step: int = Field(default=0, ge=0)
    """Optimizer step, from 1, whose trace is written; 0 writes none."""


class RunConfig(Section):
    """A whole run."""

    model: dict[str, Any]
    """Resolved fields of TitansConfig (titans_pretrain/model/fields.py), or ``hf`` and its keys."""
    data: DataSection
    mesh: MeshSection = MeshSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    run: RunSection
    job: JobSection = JobSection()
    pipeline: PipelineSection = PipelineSection()


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply ``section.key=value`` overrides, resolve the preset, check it all.

    Raises:
        UserError: unreadable file, unknown key, wrong type or impossible combination.
    """
    path = Path(path)
    raw, lines = _read(path)
    for override in overrides:
        _override(raw, override, lines)
    _make_absolute(raw)
    return resolve(raw, source=str(path), lines=lines)


def resolve(
    raw: Mapping[str, Any], *, source: str, lines: Mapping[tuple[str, ...], str] | None = None
) -> RunConfig:
    """Check a mapping of sections and fill in what is not given.

    Args:
        raw: sections as read from YAML.
        source: where it came from, for messages.
        lines: key paths to positions, for messages.
    """
    where = _Where(source, lines or {})
    values = dict(raw)
    if not isinstance(values.get("model", {}), dict):
        where.fail(
            ("model",), f"model: {values['model']!r} is no mapping", "give keys of the model"
        )
    values["model"] = resolve_model(values.get("model", {}), where)
    if isinstance(values.get("job"), dict):
        values["job"] = resolve_job(values["job"], where)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        _explain(error, where)
    for problem in config_rules.problems(config):
        where.fail(problem.key, f"{'.'.join(problem.key)}: {problem.what}", problem.fix)
    return config


def dump(config: RunConfig) -> str:
    """The configuration as YAML that ``load`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def resolve_model(section: Mapping[str, Any], where: "_Where | None" = None) -> dict[str, Any]:
    """All fields of the model from a preset's name and the fields that differ from it."""
    where = where or _Where("model", {})
    given = dict(section)
    for name in given:
        if not isinstance(name, str):
            where.fail(("model",), f"model: {name!r} is no name of a field", "give names of fields")
    preset = given.pop("preset", None)
    base = load_preset(preset, where) if preset is not None else {}
    if foreign.is_foreign(base | given):
        return _resolve_foreign(preset, base, given, where)
    if given.get("variant", base.get("variant")) != base.get("variant") and base:
        where.fail(
            ("model", "variant"),
            f"model.variant: {given['variant']!r} is not the variant of preset {preset!r}",
            "choose the preset of that variant",
        )
    values = fields.defaults() | base | given
    for problem in fields.problems(base | given):
        key = ("model", problem.field)
        where.fail(key, f"model.{problem.field}: {problem.message}", problem.fix)
    for name in fields.unused(values["variant"], given):
        if given[name] != fields.TABLE[name].default:
            where.fail(
                ("model", name),
                f"model.{name}: variant {values['variant']!r} does not use it",
                "take it out, or choose a variant out of " + ", ".join(fields.TABLE[name].variants),
            )
    return values


def _resolve_foreign(
    preset: Any, base: Mapping[str, Any], given: Mapping[str, Any], where: "_Where"
) -> dict[str, Any]:
    """The keys of another library's model."""
    key = ("model", foreign.KEY)
    name = given.get(foreign.KEY, base.get(foreign.KEY))
    if base and name != base.get(foreign.KEY):
        what = f"model.hf: {name!r} is not the model of preset {preset!r}"
        where.fail(key, what, "take out one of the two")
    try:
        return foreign.resolve({**base, **given})
    except UserError as error:
        where.fail(tuple(error.where.split(".")), error.what, error.fix)


def resolve_job(section: Mapping[str, Any], where: "_Where | None" = None) -> dict[str, Any]:
    """The keys of a job: those of its cluster's profile, and those given that differ."""
    where = where or _Where("job", {})
    if set(section) >= set(JobSection.model_fields):
        return dict(section)  # written by dump: a profile that changed since does not count
    name = section.get("cluster", "")
    return (load_profile(name, where) if name else {}) | dict(section)


def load_profile(name: Any, where: "_Where | None" = None) -> dict[str, Any]:
    """The keys of ``job`` that a profile in ``configs/cluster``, or a file of one's own, sets."""
    where = where or _Where("job.cluster", {})
    known = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
    key, path = ("job", "cluster"), Path(str(name))
    if path.suffix not in (".yaml", ".yml"):
        if name not in known:
            where.fail(key, f"job.cluster: no profile {name!r}", nearest(str(name), known))
        path = CLUSTERS / f"{name}.yaml"
    raw, lines = _read(path)
    try:
        JobSection.model_validate(raw)
    except ValidationError as error:
        _explain(
            error, _Where(str(path), {("job", *at): line for at, line in lines.items()}), "job"
        )
    return raw


def load_preset(name: Any, where: "_Where | None" = None) -> dict[str, Any]:
    """The fields of a preset in ``configs/model``."""
    where = where or _Where("model.preset", {})
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if not known:
        where.fail(
            ("model", "preset"),
            f"model.preset: {PRESETS} holds no presets",
            "install from a checkout with pip install --editable, or give the fields",
        )
    if name not in known:
        where.fail(
            ("model", "preset"), f"model.preset: no preset {name!r}", nearest(str(name), known)
        )
    loaded: dict[str, Any] = yaml.load((PRESETS / f"{name}.yaml").read_text(), Loader=_Loader)  # noqa: S506 - a SafeLoader
    return loaded


class _Where:
    """Positions of keys in the file they came from."""

    def __init__(self, source: str, lines: Mapping[tuple[str, ...], str]) -> None:
        self.source = source
        self.lines = lines

    def at(self, key: tuple[str, ...]) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return self.lines[key[:length]]
        return self.source

    def fail(self, key: tuple[str, ...], what: str, fix: str) -> NoReturn:
        raise UserError(what, where=self.at(key), fix=fix)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = repr(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _as_written(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """A number; what YAML takes for one in base 60, such as 24:00:00, stays text."""
    if ":" in node.value:
        return node.value
    read = loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float
    return read(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _as_written)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the configuration: {error}", where=str(path), fix="give a YAML file"
        ) from None
    try:
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(
            f"not valid YAML: {getattr(error, 'problem', error)}", where=at, fix="mend this line"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(
            "the configuration is no mapping of sections",
            where=str(path),
            fix=f"give the sections {', '.join(RunConfig.model_fields)}",
        )
    return raw, dict(_lines(node, path))


def _lines(node: Any, path: Path, prefix: tuple[str, ...] = ()) -> Any:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = (*prefix, str(key.value))
            yield name, f"{path}:{key.start_mark.line + 1}"
            yield from _lines(value, path, name)


def _override(raw: dict[str, Any], text: str, lines: dict[tuple[str, ...], str]) -> None:
    key, equals, value = text.partition("=")
    parts = tuple(key.split("."))
    if not equals or len(parts) != 2 or not all(parts):
        raise UserError(
            f"{text!r} is no override", where="command line", fix="write section.key=value"
        )
    section = raw.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise UserError(
            f"{parts[0]}: {section!r} is no mapping",
            where=lines.get(parts[:1], "command line"),
            fix="give the section's keys on lines of their own",
        )
    try:
        section[parts[1]] = yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise UserError(
            f"{value!r} is no YAML value", where=f"command line: {text}", fix="quote it"
        ) from None
    lines[parts] = f"command line: {text}"


def _make_absolute(raw: Mapping[str, Any]) -> None:
    """A run finds its data and its initial weights from any working directory."""
    train = raw.get("train")
    if isinstance(train, dict) and isinstance(weights := train.get("init_from"), str) and weights:
        train["init_from"] = str(Path(weights).absolute())
    data = raw.get("data")
    if not isinstance(data, dict):
        return
    mixture = data.get("mixture")
    parts = mixture if isinstance(mixture, list) else []
    named = [(part, "manifest") for part in (data, *parts) if isinstance(part, dict)]
    for holder, key in (*named, (data, "cache")):
        place = holder.get(key)
        if isinstance(place, str) and "://" not in place:
            holder[key] = str(Path(place).absolute())


def _explain(error: ValidationError, where: _Where, *under: str) -> NoReturn:
    """Turn pydantic's first complaint into three lines; a wrong name before what it leaves out."""
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    key = (*under, *(str(part) for part in first["loc"]))
    name = ".".join(key)
    if first["type"] == "extra_forbidden":
        known = _keys_of(key[:-1])
        where.fail(key, f"{name}: no such key", nearest(key[-1], known))
    if first["type"] == "missing":
        where.fail(key, f"{name}: missing", f"add {key[-1]} to {'.'.join(key[:-1]) or 'the file'}")
    where.fail(key, f"{name}: {first['input']!r} is not allowed", first["msg"])


def _keys_of(section: tuple[str, ...]) -> list[str]:
    """Keys that the group at this path may have; parts that name no field are places in it."""
    group: type[BaseModel] = RunConfig
    for part in section:
        field = group.model_fields.get(part)
        group = (_group_in(field.annotation) or group) if field else group
    return list(group.model_fields)


def _group_in(annotation: Any) -> type[BaseModel] | None:
    """The group of keys that a field's type holds, alone, in a list or by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_group_in, typing.get_args(annotation))), None)
