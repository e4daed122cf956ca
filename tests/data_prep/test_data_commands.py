import dataclasses
import json
import shlex

import pytest
from made_up import rows

from data_prep import inputs, manifest, plan
from data_prep.settings import Settings
from titans_pretrain import cli, cli_data


@pytest.fixture(autouse=True)
def no_array(monkeypatch):
    """The tests may themselves run in an array job."""
    for name in ("ID", "COUNT", "MIN", "MAX", "STEP"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)


@pytest.fixture
def titans(tmp_path, monkeypatch):
    """Runs `titans data …` in a directory with raw text; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda line: cli.main(["data", *line.split()])


def test_the_road_from_text_to_shards(titans, corpus, capsys):
    assert titans("tokenizer --input raw/*.jsonl --vocab-size 350 --output t.model") == 0
    assert titans("plan --input raw/*.jsonl --tokenizer t.model --output out --tasks 2") == 0
    told = capsys.readouterr().out
    assert "sbatch --array=0-1" in told
    assert "of 2.54 K documents" in told
    assert titans("prepare --output out --task 1") == 0
    assert titans("merge --output out") == 2
    assert "titans data prepare --output out --task 0" in capsys.readouterr().err
    assert titans("status out") == 0
    assert titans("verify out") == 0
    assert "1 of 2 tasks" in capsys.readouterr().out
    assert titans("prepare --output out --task 0") == 0
    assert "2,540 documents" in capsys.readouterr().out
    assert titans("merge --output out") == 0
    assert titans("verify out") == 0
    assert titans("inspect out --documents 1") == 0


def test_one_command_is_enough_where_there_is_one_task(titans, corpus, model, tmp_path):
    assert titans(f"prepare --input raw/*.jsonl --tokenizer {model.path} --output out") == 0
    assert manifest.load(tmp_path / "out/manifest.json")["documents"]["read"] == 2540


def test_the_jobs_of_an_array_do_the_tasks_of_the_plan(titans, corpus, model, monkeypatch, capsys):
    titans(f"plan --input raw/*.jsonl --tokenizer {model.path} --output out --tasks 3")
    for name, value in {"COUNT": 3, "MIN": 0, "MAX": 2, "STEP": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for task in (2, 0, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert titans("prepare --output out") == 0
    assert "2,540 documents in 3 shards" in capsys.readouterr().out


def test_the_jobs_of_an_array_may_freeze_the_plan_themselves(titans, corpus, model, monkeypatch):
    for name, value in {"COUNT": 2, "MIN": 0, "MAX": 1, "STEP": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for task in (1, 0):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        line = f"prepare --input raw/*.jsonl --tokenizer {model.path} --output out"
        assert titans(line) == 0
    assert titans("verify out") == 0


def test_a_task_goes_well_though_another_is_damaged(titans, corpus, model, tmp_path, capsys):
    titans(f"plan --input raw/*.jsonl --tokenizer {model.path} --output out --tasks 2")
    titans("prepare --output out --task 0")
    (tmp_path / "out/00000-00000.tar").unlink()
    assert titans("prepare --output out --task 1") == 0
    told = capsys.readouterr().err
    assert "task 1 is finished, but not all can be merged" in told
    assert "fix:   run `titans data prepare --output out --task 0`" in told


def test_a_task_goes_well_though_one_beyond_the_plan_is_left(
    titans, corpus, model, tmp_path, capsys
):
    line = f"plan --input raw/*.jsonl --tokenizer {model.path} --output out"
    titans(f"{line} --tasks 2")
    titans("prepare --output out --task 1")
    (tmp_path / "out/plan.json").unlink()
    titans(f"{line} --tasks 1")
    assert titans("prepare --output out") == 0
    told = capsys.readouterr().err
    assert "task 0 is finished, but not all can be merged" in told
    assert "fix:   remove it, or prepare into an empty --output" in told
    assert titans("merge --output out") == 2
    for path in (tmp_path / "out").glob("*00001*"):
        path.unlink()
    assert titans("merge --output out") == 0


def test_the_plan_makes_a_damaged_list_of_duplicates_again(titans, model, tmp_path, capsys):
    from made_up import write_jsonl

    write_jsonl(tmp_path / "a.jsonl", rows(30) * 2)
    line = f"plan --input a.jsonl --tokenizer {model.path} --output out --drop-duplicates"
    assert titans(line) == 0
    path = tmp_path / "out/duplicates.npy"
    whole = path.read_bytes()
    for held in (whole[:-1] + b"\1", whole[:-8], None):
        path.unlink()
        if held:
            path.write_bytes(held)
        capsys.readouterr()
        assert titans("prepare --output out") == 2
        assert "fix:   run `titans data plan --output out`" in capsys.readouterr().err
        assert titans("plan --output out") == 0
        assert path.read_bytes() == whole
    assert titans("prepare --output out") == 0
    assert manifest.load(tmp_path / "out/manifest.json")["documents"]["duplicate"] == 30


OPTIONS = {
    "text_column": "id",
    "id_column": "url",
    "prompt_column": "text",
    "score_column": "score",
    "language_column": "dump",
    "url_column": "id",
    "dump_column": "id",
    "min_score": 0.0,
    "language": "CC-1",
    "min_characters": 0,
    "max_characters": 50,
    "bad_rows": "skip",
    "held_out": 0.25,
    "bos": True,
    "seed": 7,
    "shard_bytes": 1000,
}


def test_every_setting_has_an_option(titans, corpus, model, tmp_path):
    fields = {field.name for field in dataclasses.fields(Settings)} - {"member_tokens"}
    assert fields == OPTIONS.keys() == set(cli_data.SETTINGS)
    line = f"plan --input raw/b.jsonl --tokenizer {model.path} --output out --drop-duplicates "
    words = cli_data._spelled(OPTIONS)
    assert titans(line + shlex.join(words)) == 0
    frozen = manifest.read_plan(tmp_path / "out")
    assert {name: frozen["settings"][name] for name in OPTIONS} == OPTIONS
    assert frozen["duplicates"] is not None
    again = [*frozen["command"], "--tokenizer", str(model.path), "--output", "again"]
    assert cli.main(["data", "plan", *again]) == 0
    assert manifest.plan_digest(manifest.read_plan(tmp_path / "again")) == (
        manifest.plan_digest(frozen)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 3", "it has seed 0, now 3"),
        ("--min-score 0", "it has min_score None, now 0.0"),
        ("--bos", "it has bos False, now True"),
        ("--tasks 3", "it has 2 tasks, now 3"),
        ("--drop-duplicates", "it keeps duplicates"),
        ("--tokenizer other.model", "its tokenizer has sha256"),
    ],
)
@pytest.mark.parametrize("job", ["plan", "prepare --task 0"])
def test_options_against_a_frozen_plan_are_refused(
    titans, corpus, model, tmp_path, capsys, job, options, message
):
    from made_up import sentences

    from data_prep import tokenizer

    titans(f"plan --input raw/b.jsonl --tokenizer {model.path} --output out --tasks 2")
    if "other" in options:
        tokenizer.train(sentences(100), 320, tmp_path / "other.model")
    assert titans(f"{job} --output out {options}") == 2
    assert message in capsys.readouterr().err
    assert titans(f"{job} --output out --tasks 2 --seed 0 --tokenizer {model.path}") == 0


def test_the_encoder_and_the_workers_are_not_part_of_the_plan(titans, corpus, model, tmp_path):
    line = f"--input raw/b.jsonl --tokenizer {model.path} --output out"
    assert titans(f"plan {line} --workers 1") == 0
    before = (tmp_path / "out/plan.json").read_bytes()
    assert titans(f"prepare {line} --workers 0 --encoder sentencepiece") == 0
    assert (tmp_path / "out/plan.json").read_bytes() == before


def test_the_plan_can_be_had_as_json(titans, corpus, model, capsys):
    titans(f"plan --input raw/*.jsonl --tokenizer {model.path} --output out --tasks 2 --rate 2")
    capsys.readouterr()
    assert titans("plan --output out --json --rate 2 --cores 4") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["core_hours"] == {"given": told["tokens"] / 2e6 / 3600}
    assert told["cores"] == 4


def test_the_named_command_redoes_what_is_damaged(titans, corpus, model, capsys, tmp_path):
    line = f"prepare --input raw/*.jsonl --tokenizer {model.path} --output out --language en"
    titans(line)
    before = (tmp_path / "out/00000-00000.tar").read_bytes()
    (tmp_path / "out/00000-00000.tar").unlink()
    assert titans("verify out") == 2
    fix = capsys.readouterr().err.splitlines()[-1]
    command = shlex.split(fix.split("`")[1])
    assert command[:3] == ["titans", "data", "prepare"]
    assert cli.main(command[1:]) == 0
    assert (tmp_path / "out/00000-00000.tar").read_bytes() == before
    assert titans("verify out") == 0


def test_a_dataset_and_its_files_give_the_same_shards(titans, model, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows(50)), tmp_path / "set/train.parquet")
    assert titans(f"prepare --dataset {tmp_path}/set --tokenizer {model.path} --output a") == 0
    assert titans(f"prepare --input set/*.parquet --tokenizer {model.path} --output b") == 0
    one, other = (json.loads((tmp_path / d / "manifest.json").read_text()) for d in "ab")
    assert one == other


def test_a_frozen_plan_of_the_hub_is_not_looked_up_again(
    titans, corpus, model, tmp_path, monkeypatch
):
    line = f"--input raw/b.jsonl --tokenizer {model.path} --output out"
    assert titans(f"plan {line}") == 0
    command = manifest.read_plan(tmp_path / "out")["command"]
    assert plan.pinned_inputs(tmp_path / "out", command) is None
    path = tmp_path / "out/plan.json"
    content = json.loads(path.read_text())
    content["inputs"][0] |= {"url": f"hf://datasets/a/b@{'0' * 40}/b.jsonl"}
    path.write_text(json.dumps(content))

    def gone(_):
        raise AssertionError("looked up again")

    monkeypatch.setattr(inputs, "find", gone)
    assert titans(f"plan {line}") == 0
    assert plan.pinned_inputs(tmp_path / "out", [*command, "--seed", "3"]) is None
    assert plan.pinned_inputs(tmp_path / "elsewhere", command) is None


def test_options_of_a_dataset_without_one_are_refused(titans, corpus, model, capsys):
    line = f"--input raw/*.jsonl --tokenizer {model.path} --output out --revision abc"
    assert titans(f"plan {line}") == 2
    assert "error: --revision without a dataset" in capsys.readouterr().err


def test_a_first_plan_needs_inputs_and_a_tokenizer(titans, corpus, capsys):
    assert titans("plan --output out") == 2
    assert titans("prepare --output out") == 2
    assert "with --input and --tokenizer" in capsys.readouterr().err
    assert titans("prepare --input raw/*.jsonl --output out") == 2
    assert "where: --tokenizer" in capsys.readouterr().err


def test_bad_options_end_with_exit_code_2(titans, corpus, model):
    assert titans(f"prepare --input none/* --tokenizer {model.path} --output out") == 2
    assert titans("prepare --input raw/* --tokenizer none.model --output out") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prepare --tasks 0", "argument --tasks: 0 is less than 1"),
        ("prepare --tasks abc", "argument --tasks: 'abc' is no whole number"),
        ("prepare --task 1.5", "argument --task: '1.5' is no whole number"),
        ("prepare --task -1", "argument --task: -1 is negative"),
        ("prepare --seed -1", "argument --seed: -1 is negative"),
        ("prepare --shard-bytes 0", "argument --shard-bytes: 0 is less than 1"),
        ("prepare --min-score nan", "argument --min-score: 'nan' is no finite number"),
        ("prepare --min-score inf", "argument --min-score: 'inf' is no finite number"),
        ("prepare --min-score high", "argument --min-score: 'high' is no finite number"),
        ("plan --held-out 1", "argument --held-out: 1 is no share from 0 to below 1"),
        ("plan --min-characters -1", "argument --min-characters: -1 is negative"),
        ("plan --cores 0", "argument --cores: 0 is less than 1"),
        ("plan --rate x", "argument --rate: 'x' is no finite number"),
        ("plan --rate 0", "argument --rate: 0 is not above zero"),
        ("status out --watch 0", "argument --watch: 0 is less than 1"),
        ("verify out --workers 0", "argument --workers: 0 is less than 1"),
        ("inspect out --documents -3", "argument --documents: -3 is negative"),
        ("inspect out --documents x", "argument --documents: 'x' is no whole number"),
        ("tokenizer --vocab-size x", "argument --vocab-size: 'x' is no whole number"),
        ("tokenizer --sample-bytes 0", "argument --sample-bytes: 0 is less than 1"),
    ],
)
def test_a_bad_option_is_told_in_words(titans, capsys, line, message):
    with pytest.raises(SystemExit) as caught:
        titans(line)
    assert caught.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(message)
