import json
import os

import numpy as np
import pytest

from data_prep import manifest, merge
from data_prep.task import prepare as prepare_task
from titans_pretrain.errors import UserError


@pytest.fixture
def output(prepare, corpus):
    """Two tasks, both finished, of several windows each."""
    prepare(corpus, task=0, tasks=2, held_out=0.1)
    return prepare(corpus, task=1, tasks=2, held_out=0.1)[0]


def edit(output, task, change):
    """Rewrite a task's record after ``change`` has edited it."""
    path = output / f"task-{task:05d}.json"
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


def age(path, seconds):
    """Make a file older."""
    changed = path.stat().st_mtime - seconds
    os.utime(path, (changed, changed))


def refused(output, message):
    (output / "manifest.json").unlink()
    with pytest.raises(UserError, match=message) as caught:
        merge.merge(output)
    assert not (output / "manifest.json").exists()
    return caught.value.fix


def test_the_manifest_holds_all_shards_in_the_order_of_tasks_and_windows(output):
    content = manifest.load(output / "manifest.json")
    names = [shard["name"] for shard in content["shards"]]
    assert names == sorted(names)
    assert {name[:6] for name in names} == {"00000-", "00001-"}
    assert [s["name"] for s in content["held_out"]] == [f"held-out-{name}" for name in names]
    assert content["tokens"] == sum(shard["tokens"] for shard in content["shards"])
    assert content["held_out_tokens"] == sum(shard["tokens"] for shard in content["held_out"])
    assert content["documents"]["held_out"] == sum(s["documents"] for s in content["held_out"])
    assert (content["bos"], content["bos_id"], content["eos_id"]) == (False, 1, 2)


def test_merging_again_gives_the_same_bytes(output):
    path = output / "manifest.json"
    before = path.read_bytes()
    path.unlink()
    merge.merge(output)
    assert path.read_bytes() == before


def test_tasks_that_are_missing_are_named_with_the_command_that_does_them(prepare, corpus):
    output, done = prepare(corpus, task=2, tasks=4)
    assert done is None
    with pytest.raises(UserError, match="3 of 4 tasks are not finished: 0-1,3") as caught:
        merge.merge(output)
    wrapped = f"'titans data prepare --output {output}'"
    assert caught.value.fix == f"run `sbatch --array=0-1,3 --wrap {wrapped}`"
    for task in (0, 1):
        prepare_task(output, task)
    with pytest.raises(UserError, match="1 of 4 tasks are not finished: 3") as caught:
        merge.merge(output)
    assert caught.value.fix == f"run `titans data prepare --output {output} --task 3`"


def test_a_damaged_record_counts_as_a_missing_task(output):
    (output / "task-00001.json").write_text("{")
    assert "--task 1" in refused(output, "1 of 2 tasks are not finished: 1")


def test_a_record_under_another_tasks_name_counts_as_missing(output):
    (output / "task-00001.json").write_bytes((output / "task-00000.json").read_bytes())
    refused(output, "1 of 2 tasks are not finished: 1")


def test_a_window_that_is_left_out_is_a_gap(output):
    edit(output, 1, lambda entry: entry["windows"].pop(0))
    fix = refused(output, r"window 0 of task 1 leaves out units: \[0, 0\] to \[0, 1\]")
    assert fix.endswith("--task 1`")


def test_the_last_window_left_out_is_a_gap(output):
    edit(output, 0, lambda entry: entry["windows"].pop())
    refused(output, r"what follows the windows of task 0 leaves out units: ")


def test_the_last_window_left_out_of_the_counts_too_is_a_gap(output):
    def change(entry):
        lost = entry["windows"].pop()["documents"]
        entry["documents"] = {key: entry["documents"][key] - lost[key] for key in lost}

    edit(output, 0, change)
    refused(output, r"what follows the windows of task 0 leaves out units: ")


@pytest.mark.parametrize("name", ["read", "kept", "empty", "held_out"])
def test_counts_that_windows_and_the_rest_do_not_add_up_to_are_refused(output, name):
    edit(output, 0, lambda entry: entry["documents"].update({name: 9999}))
    refused(output, rf"task 0 has 9999 documents {name}, its windows and the rest \d+")


def test_a_rest_that_ends_before_the_tasks_units_do_is_refused(output):
    edit(output, 0, lambda entry: entry["tail"].update(last=[1, 0]))
    refused(output, r"what follows the windows of task 0 ends at \[1, 0\] of 2 units")


def test_documents_kept_after_the_last_window_are_refused(output):
    def change(entry):
        for counts in (entry["documents"], entry["tail"]["documents"]):
            counts.update(read=counts["read"] + 1, kept=counts["kept"] + 1)

    edit(output, 0, change)
    refused(output, "task 0 kept 1 documents after its last window")


def test_redoing_a_task_whose_record_has_a_gap_mends_it(output):
    whole = {path.name: path.read_bytes() for path in output.iterdir()}
    edit(output, 0, lambda entry: entry["windows"].pop())
    prepare_task(output, 0)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole


def test_a_finished_array_begun_again_does_not_merge_again(output):
    path = output / "manifest.json"
    whole, before = path.read_bytes(), path.stat().st_ino
    age(path, -10)
    merged = [prepare_task(output, task)["fingerprint"] for task in (0, 1)]
    assert merged == 2 * [json.loads(whole)["fingerprint"]]
    assert path.stat().st_ino == before
    (output / "00000-00000.tar").unlink()
    age(path, 30)
    prepare_task(output, 0)
    assert path.stat().st_ino != before
    assert path.read_bytes() == whole


def test_files_that_vanish_while_the_directory_is_listed_are_no_matter(output):
    (output / ".gone.tmp").symlink_to("nothing")
    (output / "manifest.json").unlink()
    assert prepare_task(output, 0)["tasks"] == 2


def test_a_damaged_manifest_is_merged_again_by_any_task(output):
    path = output / "manifest.json"
    whole = path.read_bytes()
    path.write_text("{")
    age(path, -10)
    prepare_task(output, 1)
    assert path.read_bytes() == whole


def test_tasks_of_another_plan_count_as_not_finished_while_others_are_redone(
    freeze, output, corpus
):
    (output / "plan.json").unlink()
    freeze(corpus, tasks=2, seed=3)
    assert prepare_task(output, 1) is None
    assert not (output / "manifest.json").exists()
    with pytest.raises(UserError, match="task 0 was prepared under another plan") as caught:
        merge.merge(output)
    assert "--task 0" in caught.value.fix
    assert prepare_task(output, 0)["settings"]["seed"] == 3


def test_a_new_task_removes_the_manifest_of_a_plan_of_fewer_tasks(freeze, output, corpus):
    (output / "plan.json").unlink()
    freeze(corpus, tasks=3, held_out=0.1)
    assert prepare_task(output, 2) is None
    assert not (output / "manifest.json").exists()


def test_a_window_that_comes_twice_is_refused(output):
    edit(output, 0, lambda entry: entry["windows"].append(entry["windows"][0]))
    refused(output, r"window \d of task 0 repeats units")


def test_a_window_beyond_the_tasks_units_is_refused(output):
    def change(entry):
        entry["windows"][-1]["last"] = [9, 1]

    edit(output, 0, change)
    refused(output, r"window \d of task 0 ends at \[9, 1\] of 2 units")


def test_a_window_without_units_is_refused(output):
    def change(entry):
        first = entry["windows"][0]
        entry["windows"].insert(0, first | {"last": first["first"]})

    edit(output, 0, change)
    refused(output, r"window 0 of task 0 ends at \[0, 0\]")


def test_a_shard_of_another_window_or_task_is_refused(output):
    other = json.loads((output / "task-00001.json").read_text())["windows"][0]

    def change(entry):
        window = entry["windows"][0]
        window["shard"] = other["shard"] | {"documents": window["shard"]["documents"]}

    edit(output, 0, change)
    refused(output, r"window 0 of task 0 has the shard 00001-00000.tar of another")


@pytest.mark.parametrize("kind", ["shard", "held_out"])
def test_a_shard_with_other_counts_than_its_window_is_refused(output, kind):
    def change(entry):
        entry["windows"][0][kind] = None

    edit(output, 0, change)
    refused(output, r"00000-00000.tar has 0 documents, its window \d+")


def test_a_record_of_a_task_that_the_plan_lacks_is_refused(output):
    def change(entry):
        entry["task"] = 2

    (output / "task-00002.json").write_bytes((output / "task-00000.json").read_bytes())
    edit(output, 2, change)
    refused(output, "task 2 was prepared under another plan")


def test_a_record_of_another_plan_is_refused(output):
    edit(output, 1, lambda entry: entry.update(plan="0" * 64))
    refused(output, "task 1 was prepared under another plan")


def test_a_shard_that_is_gone_or_cut_is_refused(output):
    tar = output / "00000-00000.tar"
    os.truncate(tar, 1000)
    refused(output, r"00000-00000.tar has 1000 bytes instead of")
    tar.unlink()
    with pytest.raises(UserError, match="is missing"):
        merge.merge(output)


@pytest.mark.parametrize("ending", ["documents.parquet", "index.npy"])
def test_what_lies_beside_a_shard_must_be_there_too(output, ending):
    (output / f"held-out-00001-00000.{ending}").unlink()
    refused(output, f"held-out-00001-00000.{ending} is missing")


def test_damaged_counts_are_refused(output):
    path = output / "task-00000.unigrams.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    refused(output, r"task-00000.unigrams.npy does not have its checksum")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        merge.merge(output)


def test_the_fingerprint_leaves_out_what_depends_on_the_version_of_pyarrow(output):
    content = manifest.load(output / "manifest.json")
    content["held_out"][0]["provenance"]["sha256"] = "0" * 64
    assert manifest.fingerprint(content) == content["fingerprint"]
    content["held_out"][0]["index"]["sha256"] = "0" * 64
    assert manifest.fingerprint(content) != content["fingerprint"]


def test_entropy_is_of_the_training_tokens(output):
    content = manifest.load(output / "manifest.json")
    counts = sum(np.load(output / f"task-0000{task}.unigrams.npy") for task in (0, 1))
    assert counts.sum() == content["tokens"]
    shares = counts[counts > 0] / counts.sum()
    assert content["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-5)


@pytest.mark.parametrize(
    ("numbers", "told"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 9], "0,2-3,9")]
)
def test_numbers_are_told_as_slurm_takes_them(numbers, told):
    assert manifest.ranges(numbers) == told
