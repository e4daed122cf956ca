"""The run configuration refuses what it cannot mean, and says where, what and how to mend it."""

from pathlib import Path

import pytest
import yaml

from titans_pretrain import config
from titans_pretrain.errors import UserError

RUN = """\
model: {variant: lmm, hidden_size: 64, memory_heads: 2}
data: {manifest: data/manifest.json, sequence_length: 64}
train:
  steps: 10
  global_batch_size: 4
  learning_rate: 1e-3
run: {directory: runs/x}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_a_run_reads_its_defaults_and_keeps_its_values(run_file):
    run = config.load(run_file)
    assert run.train.learning_rate == 1e-3
    assert run.train.beta2 == 0.95
    assert run.model["memory_depth"] == 2


def test_an_override_replaces_one_key(run_file):
    assert config.load(run_file, ["train.steps=20"]).train.steps == 20


def test_a_dumped_run_loads_to_an_equal_one(run_file, tmp_path):
    run = config.load(run_file)
    (tmp_path / "again.yaml").write_text(config.dump(run))
    assert config.load(tmp_path / "again.yaml") == run


def test_the_manifest_is_found_from_any_working_directory(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(run_file).data.manifest == str(tmp_path / "data" / "manifest.json")


def test_a_preset_gives_its_fields_and_a_given_field_wins():
    section = {"preset": "titans-mac-170m", "chunk_size": 32}
    values = config.resolve_model(section)
    assert (values["variant"], values["hidden_size"], values["chunk_size"]) == ("mac", 768, 32)


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("train.learning_rat=3", "train.learning_rat: no such key", "'learning_rate'"),
        ("trian.steps=3", "trian: no such key", "'train'"),
        ("model.hiden_size=2", "no such field of the model", "'hidden_size'"),
        ("train.steps=many", "'many' is not allowed", "integer"),
        ("train.steps=0", "0 is not allowed", "greater than or equal to 1"),
        ("train.precision=fp16", "'fp16' is not allowed", "bf16"),
        ("model.hidden_size=big", "'big' is no int", "type int"),
        ("model.memory_heads=3", "3 heads do not divide hidden_size 64", "2 heads"),
        ("model.segment_length=3", "'lmm' does not use it", "take it out"),
        ("model.preset=titans-mac-2b", "no preset 'titans-mac-2b'", "titans-mac"),
        ("model.variant=mca", "'mca' is unknown", "'mac'"),
        ("mesh.tensor=0", "0 is not allowed", "greater than or equal to 1"),
        ("mesh.shard=all", "'all' is not allowed", "data"),
        ("train.warmup_steps=100", "100 exceeds train.steps 10", "10"),
        ("train.micro_batch_size=3", "no multiple", "6"),
        ("data.length_schedule=[{from_step: 3, length: 8}]", "start at [3]", "step 0"),
        ("data.length_schedule=[{from_step: 0, length: 7}]", "7 does not divide", "divisor"),
        ("steps=3", "is no override", "section.key=value"),
        ("run.trace_step=11", "11 exceeds train.steps 10", "10 or less"),
        ("checkpoint.keep_every=4", "keeps nothing where checkpoint.every is 0", "divisor"),
        ("guard.policy=ignore", "'ignore' is not allowed", "rollback"),
        ("guard.loss_spike=1", "1.0 would call ordinary steps spikes", "above 1"),
        ("guard.gradient_spike=0.5", "0.5 would call ordinary steps spikes", "or 0"),
        ("guard.policy=rollback", "no step to go back to", "checkpoint.every"),
        ("guard.rollback_steps=2", "policy 'stop' does not use it", "rollback"),
        ("guard.limit=0", "0 is not allowed", "greater than or equal to 1"),
    ],
)
def test_a_bad_value_is_named_with_its_fix(run_file, override, what, fix):
    with pytest.raises(UserError) as caught:
        config.load(run_file, [override])
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where
    assert caught.value.exit_code == 2


MAC = ["model.variant=mac", "model.num_attention_heads=2", "model.segment_length=64"]
TRANSFORMER = [
    "model.variant=transformer",
    "model.memory_heads=null",
    "model.num_attention_heads=4",
]


@pytest.mark.parametrize(
    ("overrides", "key", "what", "fix"),
    [
        (
            ["mesh.tensor=4"],
            "tensor",
            "share model.memory_heads 2",
            "tensor 2, or model.memory_heads 4",
        ),
        (["mesh.tensor=3"], "tensor", "share model.memory_heads 2", "use mesh.tensor 2"),
        ([*MAC, "mesh.tensor=4"], "tensor", "share model.num_attention_heads 2", "mesh.tensor 2"),
        (
            ["mesh.tensor=2", "model.intermediate_size=5"],
            "tensor",
            "share model.intermediate_size 5",
            "mesh.tensor 1, or model.intermediate_size 4 or 6",
        ),
        (
            ["mesh.tensor=2", "model.vocab_size=301"],
            "tensor",
            "share model.vocab_size 301",
            "model.vocab_size 300 or 302",
        ),
        (
            ["mesh.sequence=2"],
            "sequence_length",
            "64 is no multiple of mesh.sequence * chunk_size = 2 * 64 = 128",
            "use 128, or mesh.sequence 1",
        ),
        (
            ["mesh.sequence=3", "model.chunk_size=16"],
            "sequence_length",
            "64 is no multiple of mesh.sequence * chunk_size = 3 * 16 = 48",
            "use 48 or 96, or mesh.sequence 2",
        ),
        (
            [*MAC, "mesh.sequence=2", "model.chunk_size=16"],
            "sequence_length",
            "mesh.sequence * segment_length = 2 * 64 = 128",
            "use 128",
        ),
        (
            [
                "mesh.sequence=2",
                "model.chunk_size=32",
                "data.length_schedule=[{from_step: 0, length: 32}]",
            ],
            "length_schedule",
            "32 is no multiple of mesh.sequence * chunk_size = 2 * 32 = 64",
            "use 64, or mesh.sequence 1",
        ),
        (
            [*TRANSFORMER, "mesh.sequence=8", "model.num_attention_heads=8", "mesh.tensor=4"],
            "sequence",
            "8 ranks cannot share the 2 attention heads of a tensor rank",
            "use 2",
        ),
        (
            [*TRANSFORMER, "mesh.sequence=4", "data.sequence_length=30"],
            "sequence_length",
            "30 is no multiple of mesh.sequence = 4",
            "use 28 or 32, or mesh.sequence 2",
        ),
        (
            [*TRANSFORMER, "mesh.sequence=2", "model.attention_window=8"],
            "sequence",
            "attention sees model.attention_window 8 tokens",
            "use 1, or leave model.attention_window out",
        ),
        (
            ["checkpoint.every=3", "checkpoint.keep_every=4"],
            "keep_every",
            "4 is no multiple of checkpoint.every 3",
            "use 3 or 6",
        ),
    ],
)
def test_what_ranks_cannot_share_is_named_with_what_they_can(run_file, overrides, key, what, fix):
    with pytest.raises(UserError) as caught:
        config.load(run_file, overrides)
    assert f".{key}: " in caught.value.what
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh.tensor=2", "mesh.sequence=2", "data.sequence_length=128"],
        ["data.sequence_length=100"],
        ["checkpoint.every=3", "checkpoint.keep_every=6", "guard.policy=rollback"],
        ["guard.loss_spike=1.5", "guard.gradient_spike=10"],
    ],
)
def test_what_ranks_can_share_is_taken(run_file, overrides):
    assert config.load(run_file, overrides)


def test_a_chunk_larger_than_the_segment_is_refused(run_file):
    with pytest.raises(UserError, match="exceeds segment_length"):
        config.load(
            run_file,
            ["model.variant=mac", "model.num_attention_heads=2", "model.segment_length=32"],
        )


def test_a_bad_key_in_the_file_is_named_with_its_line(run_file):
    run_file.write_text(RUN.replace("  steps: 10", "  step: 10"))
    with pytest.raises(UserError) as caught:
        config.load(run_file)
    assert caught.value.what in ("train.step: no such key", "train.steps: missing")
    assert caught.value.where.startswith(f"{run_file}:")


def test_a_missing_section_is_named(run_file):
    run_file.write_text(RUN.replace("run: {directory: runs/x}\n", ""))
    with pytest.raises(UserError, match="run: missing"):
        config.load(run_file)


def test_a_key_given_twice_is_refused(run_file):
    run_file.write_text(RUN.replace("  steps: 10", "  steps: 10\n  steps: 20"))
    with pytest.raises(UserError, match="given twice"):
        config.load(run_file)


@pytest.mark.parametrize("text", ["- 1\n", "just text\n", "a: [1\n", ""])
def test_a_file_that_is_no_mapping_is_refused(run_file, text):
    run_file.write_text(text)
    with pytest.raises(UserError):
        config.load(run_file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        config.load(tmp_path / "absent.yaml")


def test_every_key_is_documented():
    for section in (
        config.DataSection,
        config.MeshSection,
        config.TrainSection,
        config.CheckpointSection,
        config.GuardSection,
        config.RunSection,
        config.RunConfig,
    ):
        for name, field in section.model_fields.items():
            assert field.description or name in config.RunConfig.model_fields, name


def test_ready_runs_load():
    for path in (config.PRESETS.parent).glob("*.yaml"):
        assert config.load(path).run.directory, path


def test_presets_are_flat_maps_of_fields_that_their_variant_uses():
    presets = [path for path in config.PRESETS.glob("*.yaml") if "hf:" not in path.read_text()]
    names = {path.stem for path in presets}
    sizes = ("170m", "340m", "400m", "760m", "1.3b", "3b", "7b")
    kinds = ("titans-lmm", "titans-mac", "titans-mag", "titans-mal", "transformer")
    assert names == {f"{kind}-{size}" for kind in kinds for size in sizes}
    for path in presets:
        values = yaml.safe_load(path.read_text())
        assert not config.fields.problems(values), path
        assert not config.fields.unused(values["variant"], values), path


def test_a_variant_other_than_the_presets_is_refused():
    with pytest.raises(UserError, match="not the variant of preset"):
        config.resolve_model({"preset": "titans-mal-170m", "variant": "mac"})


@pytest.mark.parametrize(
    "path", sorted(config.PRESETS.glob("t[ir]*.yaml")), ids=lambda path: path.stem
)
def test_a_run_of_any_preset_dumps_to_one_that_loads(path, run_file):
    raw = yaml.safe_load(RUN) | {"model": {"preset": path.stem}}
    raw["train"]["learning_rate"] = 1e-3
    run = config.resolve(raw, source="here")
    assert config.resolve(yaml.safe_load(config.dump(run)), source="there") == run


@pytest.mark.parametrize("text", ["model: {1: 2}\n", "? [a, b]\n: 3\n", "? {a: 1}\n: 3\n"])
def test_odd_keys_are_the_users_mistake(run_file, text):
    run_file.write_text(text)
    with pytest.raises(UserError):
        config.load(run_file)


@pytest.mark.parametrize("key", ["train.learning_rate", "train.gradient_clip"])
def test_an_infinite_number_is_refused(run_file, key):
    with pytest.raises(UserError, match="is not allowed"):
        config.load(run_file, [f"{key}=.inf"])


def test_yaml_merges_work(run_file):
    run_file.write_text("base: &b {steps: 10}\n" + RUN.replace("  steps: 10", "  <<: *b"))
    with pytest.raises(UserError, match="base: no such key"):
        config.load(run_file)


def test_without_presets_the_message_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "PRESETS", tmp_path)
    with pytest.raises(UserError, match="holds no presets"):
        config.resolve_model({"preset": "titans-mac-170m"})


MIXTURE = "data.mixture=[{manifest: a/manifest.json, weight: 3}, {manifest: 's3://b/m', weight: 1}]"


def test_a_mixture_takes_the_place_of_the_manifest(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = config.load(run_file, ["data.manifest=null", MIXTURE]).data
    assert data.parts == [(str(tmp_path / "a/manifest.json"), 3.0), ("s3://b/m", 1.0)]
    assert config.load(run_file).data.parts == [(str(tmp_path / "data/manifest.json"), 1.0)]


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (["data.manifest=null"], "data.manifest: missing", "or mixture"),
        ([MIXTURE], "data.mixture: given beside data.manifest", "only one of the two"),
        (
            ["data.manifest=null", "data.mixture=[{manifest: a, weight: 0}]"],
            "data.mixture.0.weight: 0 is not allowed",
            "greater than 0",
        ),
        (
            ["data.manifest=null", "data.mixture=[{manifest: a, weight: .inf}]"],
            "data.mixture.0.weight: inf is not allowed",
            "finite",
        ),
        (
            ["data.manifest=null", "data.mixture=[{manifest: a, weight: 1, wieght: 1}]"],
            "data.mixture.0.wieght: no such key",
            "'weight'",
        ),
        (
            ["data.manifest=null", "data.mixture=[{manifest: a}]"],
            "data.mixture.0.weight: missing",
            "add weight",
        ),
    ],
)
def test_wrong_data_sections_are_refused(run_file, overrides, what, fix):
    with pytest.raises(UserError) as caught:
        config.load(run_file, overrides)
    assert what in caught.value.what
    assert fix in caught.value.fix
