"""The sections job and pipeline: profiles, checks, what a dump keeps."""

import pytest
import yaml

from titans_pretrain import config, config_job
from titans_pretrain.errors import UserError

RUN = {
    "model": {"variant": "lmm", "vocab_size": 300, "hidden_size": 16, "num_attention_heads": 1},
    "data": {"manifest": "data/manifest.json", "sequence_length": 64},
    "train": {"steps": 2, "global_batch_size": 4, "learning_rate": 1e-3},
    "run": {"directory": "runs/first"},
}
PREPARE = {"input": ["text/*.jsonl"], "tokenizer": "tokenizer.model"}


def resolved(**sections):
    return config.resolve(RUN | sections, source="run.yaml")


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text(
        "nodes: 4\nranks_per_node: 8\npartition: gpu\nenvironment: {NCCL_DEBUG: WARN}\n"
    )
    return path


def test_a_run_without_a_job_section_is_one_rank_on_one_node():
    assert resolved().job.ranks == 1
    assert resolved().pipeline.data is None


def test_a_profile_gives_its_keys_and_a_given_key_wins(profile):
    job = resolved(job={"cluster": str(profile), "nodes": 2}).job
    assert (job.nodes, job.ranks_per_node, job.partition) == (2, 8, "gpu")
    assert job.environment == {"NCCL_DEBUG": "WARN"}


def test_a_dumped_job_needs_its_profile_no_more(profile):
    run = resolved(job={"cluster": str(profile)})
    profile.write_text("nodes: 9\n")
    again = config.resolve(yaml.safe_load(config.dump(run)), source="config.yaml")
    assert again.job == run.job
    profile.unlink()
    assert config.resolve(yaml.safe_load(config.dump(run)), source="config.yaml").job == run.job


def test_an_unknown_profile_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"job\.cluster: no profile 'cpus'") as caught:
        resolved(job={"cluster": "cpus"})
    assert "did you mean 'cpu'?" in caught.value.fix


def test_a_bad_key_of_a_profile_is_named_with_its_file_and_line(profile):
    profile.write_text("nodes: 4\nparttition: gpu\n")
    with pytest.raises(UserError, match=r"job\.parttition: no such key") as caught:
        resolved(job={"cluster": str(profile)})
    assert caught.value.where == f"{profile}:2"
    assert caught.value.fix == "did you mean 'partition'?"


def test_the_ready_profiles_load():
    for path in config.CLUSTERS.glob("*.yaml"):
        assert resolved(job={"cluster": path.stem}).job.cluster == path.stem


@pytest.mark.parametrize(
    ("job", "key"),
    [
        ({"nodes": 0}, "job.nodes"),
        ({"time": "soon"}, "job.time"),
        ({"time": "0"}, "job.time"),
        ({"signal_seconds": 65536}, "job.signal_seconds"),
        ({"partition": "a b"}, "job.partition"),
        ({"account": "me\n#SBATCH --uid=0"}, "job.account"),
        ({"options": ["-p gpu"]}, "job.options.0"),
        ({"options": ["--comment=a\nrm"]}, "job.options.0"),
        ({"environment": {"A-B": "1"}}, "job.environment.A-B.[key]"),
        ({"environment": {"A": "1\n2"}}, "job.environment.A"),
        ({"modules": ["cuda; rm"]}, "job.modules.0"),
        ({"container": {"runtime": "docker", "image": "x"}}, "job.container.runtime"),
        ({"memory_per_node": "many"}, "job.memory_per_node"),
        ({"slow_factor": 1.0}, "job.slow_factor"),
    ],
)
def test_a_bad_value_is_refused_by_its_key(job, key):
    with pytest.raises(UserError) as caught:
        resolved(job=job)
    assert caught.value.what.startswith(key)


@pytest.mark.parametrize(
    ("sections", "what", "fix"),
    [
        ({"job": {"node": 2}}, "job.node: no such key", "nodes"),
        ({"job": {"container": {"runtime": "pyxis", "imge": "x"}}}, "job.container.imge", "image"),
        ({"pipeline": {"data": PREPARE | {"task": 2}}}, "pipeline.data.task: no such", "tasks"),
        ({"pipeline": {"stages": {"plan": {"tim": "1"}}}}, "pipeline.stages.plan.tim", "time"),
        ({"pipeline": {"stages": {"train": {}}}}, "pipeline.stages.train", "plan"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(sections, what, fix):
    with pytest.raises(UserError) as caught:
        resolved(**sections)
    assert caught.value.what.startswith(what)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30", 1.5),
        ("2:00:00", 120),
        ("0:10:30", 10.5),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("1-02:30:30", 1590.5),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, minutes):
    assert config_job.minutes(text) == minutes
    assert resolved(job={"time": text}).job.minutes == minutes


def test_a_time_limit_needs_no_quotes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN) + "job:\n  time: 24:00:00\n")
    assert config.load(path).job.minutes == 1440
    assert config.load(path, ["job.time=1:30"]).job.minutes == 1.5
    assert config.load(path, ["job.time=2-0"]).job.minutes == 2880


def test_a_pipeline_that_prepares_data_needs_input_and_a_tokenizer():
    assert resolved(pipeline={"data": PREPARE}).pipeline.data.tasks == 1
    with pytest.raises(UserError, match=r"pipeline\.data\.tokenizer: missing"):
        resolved(pipeline={"data": {"input": ["a"]}})
    with pytest.raises(UserError, match="nothing to prepare"):
        resolved(pipeline={"data": {"tokenizer": "t"}})
    dataset = {"tokenizer": "t", "options": ["--dataset=HuggingFaceFW/fineweb-edu"]}
    assert resolved(pipeline={"data": dataset}).pipeline.data.input == []
    with pytest.raises(UserError, match="both given"):
        resolved(pipeline={"data": dataset | {"input": ["a"]}})


def test_prepared_data_needs_a_directory():
    data = {"manifest": "s3://bucket/manifest.json", "sequence_length": 64}
    with pytest.raises(UserError, match=r"pipeline\.data: prepared data needs a directory"):
        resolved(data=data, pipeline={"data": PREPARE})


@pytest.mark.parametrize(
    ("every", "saved", "fix"),
    [(8, 0, "set checkpoint.every to 8"), (8, 3, "use 6 or 9"), (2, 3, "use 3")],
)
def test_only_checkpoints_can_be_evaluated(every, saved, fix):
    with pytest.raises(UserError, match=rf"pipeline\.eval: every {every}") as caught:
        resolved(pipeline={"eval": {"every": every}}, checkpoint={"every": saved})
    assert fix in caught.value.fix


def test_evaluations_need_something_to_score():
    data = {"mixture": [{"manifest": "a", "weight": 1.0}], "sequence_length": 64}
    changes = {"data": data, "checkpoint": {"every": 4}}
    with pytest.raises(UserError, match="nothing to evaluate on"):
        resolved(pipeline={"eval": {"every": 8}}, **changes)
    asked = resolved(pipeline={"eval": {"every": 8, "tasks": ["piqa"]}}, **changes).pipeline.eval
    assert (asked.every, asked.tasks) == (8, ["piqa"])
    with pytest.raises(UserError, match="options '--samples=4' says nothing without tasks"):
        resolved(pipeline={"eval": {"options": ["--samples=4"]}})


def test_every_key_of_a_job_is_documented():
    for group in vars(config_job).values():
        if isinstance(group, type) and issubclass(group, config_job.Section):
            for name, field in group.model_fields.items():
                assert field.description, f"{group.__name__}.{name}"
                assert field.description.endswith("."), name
