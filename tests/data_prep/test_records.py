"""Plans, task files and manifests that are damaged, of another plan, or made to mislead."""

import json

import pytest
from made_up import rows, write_jsonl

from data_prep import manifest, merge
from titans_pretrain.errors import UserError


def change(path, edit):
    """Edit a JSON file's content in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def finals(output):
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.fixture
def small(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", rows(30))


@pytest.mark.parametrize(
    "edit",
    [
        lambda task: task.clear(),
        lambda task: task.pop("unigrams"),
        lambda task: task.pop("tail"),
        lambda task: task.update(windows=None),
        lambda task: task["windows"][0].pop("last"),
        lambda task: task["windows"][0]["shard"].pop("provenance"),
        lambda task: task["windows"][0]["shard"].update(bytes="many"),
        lambda task: task["windows"][0]["shard"].update(name="../a.tar"),
        lambda task: task.update(documents={}),
        lambda task: task.update(task=1),
        lambda task: task.update(format=1),
    ],
)
def test_a_damaged_task_file_counts_as_not_finished(prepare, small, edit):
    output, _ = prepare(small)
    whole = finals(output)
    change(output / "task-00000.json", edit)
    with pytest.raises(UserError, match="1 of 1 tasks are not finished: 0") as caught:
        merge.merge(output)
    assert f"titans data prepare --output {output}" in caught.value.fix
    prepare(small)
    assert finals(output) == whole


@pytest.mark.parametrize("held", ["", "[]", "{", "\xff", "[" * 100_000])
def test_a_task_file_that_is_no_json_object_counts_as_not_finished(prepare, small, held):
    output, _ = prepare(small)
    whole = finals(output)
    (output / "task-00000.json").write_bytes(held.encode("latin1"))
    prepare(small)
    assert finals(output) == whole


def test_a_damaged_task_file_of_another_task_does_not_stop_this_one(prepare, small):
    output, _ = prepare(small, task=0, tasks=2)
    (output / "task-00000.json").write_text("")
    assert prepare(small, task=1, tasks=2)[1] is None
    assert prepare(small, task=0, tasks=2)[1]["documents"]["kept"] == 30


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda plan: plan.clear(), "format"),
        (lambda plan: plan.pop("tasks"), "tasks"),
        (lambda plan: plan.update(tasks=0), "tasks"),
        (lambda plan: plan.update(tasks=True), "tasks"),
        (lambda plan: plan.update(command="x"), "command"),
        (lambda plan: plan["settings"].pop("prompt_column"), "settings.prompt_column"),
        (lambda plan: plan["inputs"][0].pop("size"), "inputs.0"),
        (lambda plan: plan["inputs"][0].update(starts=[0, 5]), "inputs.0"),
        (lambda plan: plan["inputs"][0].update(starts=[-1]), "inputs.0"),
    ],
)
def test_a_damaged_plan_is_refused_with_the_place_and_can_be_made_again(
    prepare, small, edit, place
):
    output, _ = prepare(small)
    whole = finals(output)
    change(output / "plan.json", edit)
    for use in (lambda: prepare(small), lambda: merge.merge(output)):
        with pytest.raises(UserError, match=rf"plan.json is damaged at '{place}'") as caught:
            use()
    assert "remove plan.json" in caught.value.fix
    (output / "plan.json").unlink()
    prepare(small)
    assert finals(output) == whole


def test_an_empty_plan_is_refused(prepare, small):
    output, _ = prepare(small)
    (output / "plan.json").write_text("")
    with pytest.raises(UserError, match=r"cannot read plan.json: no JSON"):
        prepare(small)


def test_a_task_of_another_plan_is_not_finished(prepare, small):
    """Its files are whole, but not those that the new plan asks for."""
    output, _ = prepare(small)
    (output / "plan.json").unlink()
    prepare(small, seed=1)
    expected, _ = prepare(small, "fresh", seed=1)
    assert finals(output) == finals(expected)


def test_merge_refuses_provenance_of_another_size(prepare, small):
    output, _ = prepare(small)
    path = output / "00000-00000.documents.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"documents.parquet has \d+ bytes instead of") as caught:
        merge.merge(output)
    assert f"titans data prepare --output {output}" in caught.value.fix


def refit(output, edit):
    def both(content):
        edit(content)
        content["fingerprint"] = manifest.fingerprint(content)

    change(output / "manifest.json", both)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "a/b.tar", "..", ""])
def test_a_manifest_that_names_files_outside_its_directory_is_refused(prepare, small, name):
    output, _ = prepare(small)
    refit(output, lambda content: content["shards"][0].update(name=name))
    with pytest.raises(UserError, match=r"manifest.json is damaged at 'shards.0.name'"):
        manifest.load(output / "manifest.json")
    refit(output, lambda content: content["shards"][0].update(name="00000-00000.tar"))
    refit(output, lambda content: content["shards"][0]["provenance"].update(name=name))
    with pytest.raises(UserError, match=r"damaged at 'shards.0.provenance.name'"):
        manifest.load(output / "manifest.json")


def test_a_manifest_without_a_key_is_refused(prepare, small):
    output, _ = prepare(small)
    change(output / "manifest.json", lambda content: content.pop("eos_id"))
    with pytest.raises(UserError, match=r"damaged at 'eos_id'"):
        manifest.load(output / "manifest.json")


def test_the_fingerprint_does_not_depend_on_the_version_that_wrote_provenance(prepare, small):
    output, done = prepare(small)
    change(output / "manifest.json", lambda c: c["shards"][0]["provenance"].update(bytes=7))
    assert manifest.load(output / "manifest.json")["fingerprint"] == done["fingerprint"]
    change(output / "manifest.json", lambda c: c["shards"][0]["provenance"].update(name="b"))
    with pytest.raises(UserError, match="does not match its fingerprint"):
        manifest.load(output / "manifest.json")
    merge.merge(output)
    change(output / "manifest.json", lambda c: c["shards"][0].update(bytes=7))
    with pytest.raises(UserError, match="does not match its fingerprint"):
        manifest.load(output / "manifest.json")
