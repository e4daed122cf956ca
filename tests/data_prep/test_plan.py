import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import rows, sentences, write_jsonl

from data_prep import estimate, forecast, inputs, manifest, plan, spool, task, tokenizer
from data_prep.settings import Settings
from data_prep.sources import documents
from titans_pretrain.errors import UserError


def tokens_of(items, model):
    texts = list(documents(items, Settings().columns()))
    return sum(len(ids) + 1 for ids in model.encode(texts))


def test_every_unit_is_dealt_to_one_task_in_an_order_of_the_seed(freeze, corpus):
    frozen = {}
    for tasks in (1, 3):
        frozen[tasks], _ = plan.load(freeze(corpus, f"of-{tasks}", tasks=tasks))
    units = frozen[1].units()
    dealt = [frozen[3].task_units(task) for task in range(3)]
    assert sorted(ordinal for mine in dealt for ordinal, *_ in mine) == list(range(len(units)))
    for ordinal, *unit in [one for mine in dealt for one in mine]:
        assert tuple(unit) == units[ordinal]
    assert [o for o, *_ in frozen[1].task_units(0)] != list(range(len(units)))
    other, _ = plan.load(freeze(corpus, "other", seed=5))
    assert [o for o, *_ in other.task_units(0)] != [o for o, *_ in frozen[1].task_units(0)]


def test_the_digest_is_of_the_work_and_not_of_how_or_where(freeze, corpus, tmp_path):
    content = manifest.read_plan(freeze(corpus))
    same = content | {"command": ["--input", "x"], "expected": {}}
    same["inputs"] = [entry | {"url": "/elsewhere"} for entry in content["inputs"]]
    assert manifest.plan_digest(same) == manifest.plan_digest(content)
    for change in ({"tasks": 9}, {"duplicates": {}}, {"tokenizer_sha256": "0" * 64}):
        assert manifest.plan_digest(content | change) != manifest.plan_digest(content)


def test_late_files_are_named_and_stay_out(prepare, freeze, corpus, tmp_path, capfd):
    output = freeze(corpus)
    before = (output / "plan.json").read_bytes()
    write_jsonl(tmp_path / "raw/c.jsonl", rows(3))
    _, done = prepare(corpus)
    assert "files that are not in the frozen plan stay out (1): " in capfd.readouterr().err
    assert done["documents"]["read"] == 2540
    assert (output / "plan.json").read_bytes() == before


def test_late_files_in_another_folder_do_not_rename_the_planned_ones(freeze, tmp_path, capfd):
    (tmp_path / "crawls/one").mkdir(parents=True)
    write_jsonl(tmp_path / "crawls/one/a.jsonl", rows(3))
    pattern = f"{tmp_path}/crawls/*/*.jsonl"
    output = freeze(pattern)
    before = (output / "plan.json").read_bytes()
    (tmp_path / "crawls/two").mkdir()
    write_jsonl(tmp_path / "crawls/two/a.jsonl", rows(5))
    freeze(pattern)
    assert "two/a.jsonl" in capfd.readouterr().err
    assert (output / "plan.json").read_bytes() == before


def test_other_patterns_that_give_another_list_are_refused(freeze, corpus, tmp_path):
    freeze(corpus)
    write_jsonl(tmp_path / "raw/c.jsonl", rows(3))
    with pytest.raises(UserError, match=r"the input c.jsonl is new"):
        freeze(f"{tmp_path}/raw/*.js*")
    with pytest.raises(UserError, match=r"its input b.jsonl is not given now"):
        freeze(f"{tmp_path}/raw/a.jsonl")


def test_a_planned_file_that_is_gone_or_changed_is_an_error(freeze, corpus, tmp_path):
    output = freeze(corpus)
    path = tmp_path / "raw/b.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("doc-2-7", "doc-2-8"))
    with pytest.raises(UserError, match=r"the planned input b.jsonl has other content now"):
        plan.load(output)
    path.write_text(whole + "\n")
    with pytest.raises(UserError, match=r"the planned input b.jsonl has other content now"):
        plan.load(output)
    path.unlink()
    with pytest.raises(UserError, match=r"the planned input b.jsonl is gone"):
        plan.load(output)
    with pytest.raises(UserError, match=r"its input b.jsonl is not given now"):
        freeze(corpus)


def test_a_corpus_that_moved_is_found_at_its_new_place(prepare, freeze, corpus, tmp_path):
    output = freeze(corpus)
    frozen, _ = plan.load(output)
    (tmp_path / "raw").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is gone") as caught:
        plan.load(output)
    assert "repeat the first command with other --input" in caught.value.fix
    _, done = prepare(f"{tmp_path}/moved/*.jsonl")
    assert done["documents"]["read"] == 2540
    moved, _ = plan.load(output)
    assert moved.digest == frozen.digest
    assert {Path(item.url).parent.name for item in moved.inputs} == {"moved"}


def test_another_file_at_a_new_place_is_refused(freeze, corpus, tmp_path):
    freeze(corpus)
    (tmp_path / "raw").rename(tmp_path / "moved")
    path = tmp_path / "moved/b.jsonl"
    path.write_text(path.read_text().replace("doc-2-7", "doc-2-8"))
    with pytest.raises(UserError, match=r"b.jsonl has other content now"):
        freeze(f"{tmp_path}/moved/*.jsonl")
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"its input b.jsonl has \d+ bytes, now"):
        freeze(f"{tmp_path}/moved/*.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": 2}, "it has 1 tasks, now 2"),
        ({"seed": 7}, "it has seed 0, now 7"),
        ({"min_score": 3.5}, "it has min_score None, now 3.5"),
        ({"held_out": 0.5}, "it has held_out 0.0, now 0.5"),
        ({"drop_duplicates": True}, "it keeps duplicates"),
    ],
)
def test_another_plan_on_the_same_output_is_refused(freeze, corpus, change, message):
    freeze(corpus)
    with pytest.raises(UserError, match=message):
        freeze(corpus, **change)


def test_another_tokenizer_on_the_same_output_is_refused(freeze, corpus, tmp_path):
    output = freeze(corpus)
    other = tokenizer.train(sentences(300), 320, tmp_path / "other.model")
    with pytest.raises(UserError, match="its tokenizer has sha256"):
        freeze(corpus, tokenizer=other)
    (output / "tokenizer.model").write_bytes(other.content)
    with pytest.raises(UserError, match="not the one that the plan was made with"):
        plan.load(output)


def test_a_plan_that_drops_duplicates_says_so_when_they_are_kept(freeze, corpus):
    output = freeze(corpus, drop_duplicates=True)
    assert manifest.read_plan(output)["duplicates"]["documents"] == 0
    with pytest.raises(UserError, match="it drops duplicates"):
        freeze(corpus)


def test_a_tokenizer_without_bos_cannot_begin_documents_with_it(
    freeze, corpus, tmp_path, monkeypatch
):
    monkeypatch.setitem(tokenizer.LLAMA2, "bos_id", -1)
    without = tokenizer.train(sentences(300), 320, tmp_path / "without.model")
    with pytest.raises(UserError, match="no BOS piece"):
        freeze(corpus, tokenizer=without, bos=True)
    assert manifest.read_plan(freeze(corpus, tokenizer=without))["bos_id"] is None


def test_a_plan_is_there_only_with_its_tokenizer(freeze, corpus, tmp_path, monkeypatch):
    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "write_json_once", killed)
    with pytest.raises(KeyboardInterrupt):
        freeze(corpus)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.model"]
    monkeypatch.undo()
    (freeze(corpus) / "tokenizer.model").unlink()
    plan.load(freeze(corpus))


def test_inputs_without_a_row_are_refused(freeze, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="the inputs hold no row at all"):
        freeze(f"{tmp_path}/empty.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bad_rows": "mend"}, "bad_rows is 'mend'"),
        ({"held_out": 1.0}, r"a share of 1.0 cannot be held out"),
        ({"held_out": float("nan")}, "a share of nan"),
        ({"min_characters": 9, "max_characters": 8}, "at least 9 and at most 8 characters"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Settings(**settings)


def test_a_plan_of_another_format_or_a_damaged_one_is_refused(freeze, corpus):
    path = freeze(corpus) / "plan.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"format": 1}, "has format 1, this version reads 2"),
        ({"settings": {}}, r"plan.json is damaged at 'settings\."),
        ({"bos_id": "1"}, "damaged at 'bos_id'"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            plan.load(path.parent)


FREEZE = """
    import sys, time
    from pathlib import Path
    from data_prep import estimate, inputs, plan, tokenizer
    from data_prep.settings import Settings
    model, output, *files = sys.argv[1:]
    measured = estimate.expected
    def expected(*arguments):
        time.sleep(1)
        return measured(*arguments)
    estimate.expected = expected
    items = inputs.find(files)
    print("ready", flush=True)
    sys.stdin.readline()
    made = plan.freeze(items, tokenizer.Tokenizer(model), Path(output), Settings(), 2, [])
    print(made.digest)
"""


def test_tasks_that_start_together_while_a_file_arrives_share_one_plan(corpus, model, tmp_path):
    late = write_jsonl(tmp_path / "late.jsonl", rows(3))
    files = [str(tmp_path / "raw/a.jsonl")]
    command = [sys.executable, "-c", textwrap.dedent(FREEZE), model.path, tmp_path / "out"]
    started = [
        subprocess.Popen(
            [*command, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for names in (files, [*files, str(late)])
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    digests = {process.communicate()[0] for process in started}
    frozen, _ = plan.load(tmp_path / "out")
    assert digests in ({f"{frozen.digest}\n"}, {f"{frozen.digest}\n", ""})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "tokenizer.model"}


RACE = """
    import contextlib, sys
    from pathlib import Path
    from data_prep import duplicates, inputs, plan, tokenizer
    from data_prep.settings import Settings
    model, output, name, seed = sys.argv[1:]
    @contextlib.contextmanager
    def no_lock(output):
        output.mkdir(exist_ok=True)
        yield
    plan.alone = no_lock
    real = plan.write_json_once
    def waits(path, content):
        print("ready", flush=True)
        sys.stdin.readline()
        real(path, content)
    plan.write_json_once = waits
    made = plan.freeze(inputs.find([name]), tokenizer.Tokenizer(model), Path(output),
                       Settings(seed=int(seed)), 2, ["x"], drop_duplicates=True, workers=0)
    print(made.digest)
"""


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_where_no_lock_holds_the_first_plan_stays(corpus, model, tmp_path, seeds):
    command = [sys.executable, "-c", textwrap.dedent(RACE), model.path, tmp_path / "out"]
    started = [
        subprocess.Popen(
            [*command, tmp_path / "raw/a.jsonl", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    told = [process.communicate("\n") for process in started]
    frozen, _ = plan.load(tmp_path / "out")
    assert told[0][0] == f"{frozen.digest}\n"
    if seeds[0] == seeds[1]:
        assert told[1][0] == f"{frozen.digest}\n"
    else:
        assert "it has seed 0, now 1" in told[1][1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"plan.json", "tokenizer.model", "duplicates.npy"}


def test_a_damaged_list_of_duplicates_is_refused_and_made_again(freeze, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(30) * 2)
    output = freeze(tmp_path / "a.jsonl", drop_duplicates=True)
    path = output / "duplicates.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(UserError, match=r"duplicates.npy does not have its checksum") as caught:
        plan.load(output)
    assert caught.value.fix == f"run `titans data plan --output {output}`: it is made again"
    plan.restore(output)
    assert path.read_bytes() == whole
    plan.load(output)


def test_a_list_of_duplicates_that_does_not_come_out_as_recorded_is_refused(freeze, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(30) * 2)
    output = freeze(tmp_path / "a.jsonl", drop_duplicates=True)
    content = manifest.read_plan(output)
    content["duplicates"]["sha256"] = "0" * 64
    (output / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"duplicates.npy, made again, is not as recorded"):
        plan.restore(output)


def test_expected_tokens_of_a_small_corpus_are_exact(freeze, corpus, model):
    expected = manifest.read_plan(freeze(corpus))["expected"]
    items = inputs.find([corpus])
    texts = list(documents(items, Settings().columns()))
    assert expected["tokens"] == tokens_of(items, model)
    assert expected["documents"] == 2540
    assert expected["units"] == 4
    assert expected["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_expected_tokens_of_a_sample_come_close(tmp_path, model, monkeypatch):
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 20_000)
    monkeypatch.setattr(estimate, "SAMPLE_UNITS", 4)
    monkeypatch.setattr(estimate, "FILES", 2)
    for name in "abcd":
        table = pa.Table.from_pylist(rows(2000, ord(name)))
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=100)
    items = inputs.find([f"{tmp_path}/*.parquet"])
    layouts = [plan.layout(item) for item in items]
    found = estimate.expected(items, layouts, model, Settings())
    assert found["tokens"] == pytest.approx(tokens_of(items, model), rel=0.03)
    assert found["documents"] == pytest.approx(8000, rel=0.03)
    filtered = estimate.expected(items, layouts, model, Settings(min_score=3.5))
    assert filtered["tokens"] == pytest.approx(found["tokens"] / 2, rel=0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_expected_tokens_of_a_unit_sorted_by_length_come_close(tmp_path, model, order):
    words = ["memory", "learns", "at", "test", "time", "what", "surprises", "it", "most"]
    texts = [" ".join((words * 30)[: 1 + i // 20]) for i in range(4000)][::order]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=4000)
    (item,) = inputs.find([str(path)])
    found = estimate.expected([item], [plan.layout(item)], model, Settings())
    assert found["tokens"] == pytest.approx(tokens_of([item], model), rel=0.05)
    assert found["documents"] == 4000
    assert found["text_bytes"] == sum(map(len, texts))


def test_large_units_are_read_as_far_as_the_sample_allows(tmp_path, model, monkeypatch):
    table = pa.Table.from_pylist(rows(3000, 7))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    (item,) = inputs.find([f"{tmp_path}/a.parquet"])
    read, real = [], estimate.Reader.rows

    def counted(self, item, layout, unit):
        read.append(unit)
        return real(self, item, layout, unit)

    monkeypatch.setattr(estimate.Reader, "rows", counted)
    monkeypatch.setattr(estimate, "READ_BYTES", 1)
    found = estimate.expected([item], [plan.layout(item)], model, Settings())
    assert len(read) == 1
    assert found["tokens"] == pytest.approx(tokens_of([item], model), rel=0.05)


def test_expected_bytes_are_what_the_output_takes(prepare, corpus):
    output, _ = prepare(corpus, member_tokens=2**18, shard_bytes=2**29)
    expected = manifest.read_plan(output)["expected"]["bytes"]
    found = sum(path.stat().st_size for path in output.glob("0*"))
    assert expected == pytest.approx(found, rel=0.4)


def test_without_a_number_tasks_are_as_many_as_the_tokens_need(freeze, corpus, monkeypatch):
    assert manifest.read_plan(freeze(corpus, "one", tasks=None))["tasks"] == 1
    monkeypatch.setattr(plan, "TASK_TOKENS", 60_000)
    output = freeze(corpus, "three", tasks=None)
    assert manifest.read_plan(output)["tasks"] == 3
    monkeypatch.undo()
    freeze(corpus, "three", tasks=None)
    assert manifest.read_plan(output)["tasks"] == 3


def test_the_forecast_tells_tokens_disk_hours_and_the_line_that_submits(freeze, corpus):
    output = freeze(corpus, "with space", tasks=4)
    frozen, _ = plan.load(output)
    told = forecast.facts(frozen, output, rate=2.0, cores=2)
    assert told["core_hours"] == {"given": told["tokens"] / 2e6 / 3600}
    assert told["task_hours"] == pytest.approx(told["tokens"] / 2e6 / 3600 / 4 / 2)
    words = shlex.split(told["submit"])
    assert words[:3] == ["sbatch", "--array=0-3", "--cpus-per-task=2"]
    assert words[3:6] == ["--mem=2G", "--time=00:15:00", "--wrap"]
    assert shlex.split(words[6]) == ["titans", "data", "prepare", "--output", str(output)]
    assert told["temporary_bytes"] == 0
    lines = forecast.text(told)
    assert "4, 41.8 K tokens each" in lines
    assert "NOT ENOUGH" not in lines
    assert "NOT ENOUGH" in forecast.text(told | {"free_bytes": 5})
    assert "few cores" not in lines
    assert "few cores" in forecast.text(told | {"text_bytes": 5e9})
    assert "memory" in forecast.text(told | {"text_bytes": 5e9})
    alone, _ = plan.load(freeze(corpus, "alone"))
    assert forecast.facts(alone, output)["submit"].startswith("titans data prepare --output")


def test_compressed_inputs_need_room_to_be_unpacked(freeze, tmp_path):
    import gzip

    content = "".join(json.dumps(row) + "\n" for row in rows(2500))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    output = freeze(f"{tmp_path}/a.jsonl.gz")
    told = forecast.facts(plan.load(output)[0], output)
    assert told["temporary_bytes"] == pytest.approx(len(content), rel=0.3)
    assert "TMPDIR" in forecast.text(told)


def packed_corpus(folder, files):
    import gzip

    for index in range(files):
        content = "".join(json.dumps(row) + "\n" for row in rows(1500, seed=index))
        (folder / f"{index}.jsonl.gz").write_bytes(gzip.compress(content.encode()))


def test_a_compressed_file_goes_to_one_task_whole_if_every_task_gets_one(freeze, tmp_path):
    packed_corpus(tmp_path, 5)
    write_jsonl(tmp_path / "plain.jsonl", rows(2500, seed=9))
    whole, _ = plan.load(freeze(f"{tmp_path}/*.jsonl*", "whole", tasks=3))
    dealt = [whole.task_units(task) for task in range(3)]
    assert sorted(ordinal for units in dealt for ordinal, *_ in units) == list(range(13))
    for units in dealt:
        names = [item.name for _, item, _, _ in units if item.name.endswith(".gz")]
        assert names
        assert all(names.count(name) == 2 for name in names)
        assert names[::2] == names[1::2]
    assert forecast.facts(whole, tmp_path / "whole")["temporary_bytes"] > 0
    fewer, _ = plan.load(freeze(f"{tmp_path}/*.jsonl*", "fewer", tasks=6))
    assert max(len(fewer.task_units(task)) for task in range(6)) == 3


def test_files_dealt_whole_are_unpacked_once_and_few_are_kept(
    freeze, tmp_path, monkeypatch, capsys
):
    packed_corpus(tmp_path, 6)
    unpacked = []
    unpack = spool._unpack

    def counted(item, part):
        unpacked.append(item.name)
        unpack(item, part)

    output = freeze(f"{tmp_path}/*.gz", tasks=2)
    monkeypatch.setattr(spool, "_unpack", counted)
    for task_number in range(2):
        task.prepare(output, task_number)
    assert sorted(unpacked) == [f"{index}.jsonl.gz" for index in range(6)]
    assert "again and again" not in capsys.readouterr().err


def test_duplicates_are_taken_off_the_forecast(freeze, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(100) * 3)
    output = freeze(f"{tmp_path}/a.jsonl", drop_duplicates=True)
    told = forecast.facts(plan.load(output)[0], output)
    assert told["duplicates"] == 200
    assert told["documents"] == 100
    assert "200 documents to drop" in forecast.text(told)


@pytest.mark.parametrize(
    ("bytes_", "told"), [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (2.3e10, "23 GB")]
)
def test_sizes_are_told_in_three_digits(bytes_, told):
    assert forecast.size(bytes_) == told


@pytest.mark.parametrize(
    ("hours", "told"), [(0.25, "00:15:00"), (3.5, "03:30:00"), (49, "2-01:00:00")]
)
def test_durations_are_written_as_slurm_takes_them(hours, told):
    assert forecast.duration(hours) == told


def test_an_output_that_cannot_be_made_is_refused(freeze, corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no directory"):
        freeze(corpus, "file/out")
