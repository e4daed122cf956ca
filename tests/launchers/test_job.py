import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import job, job_step, job_text, slurm_refusals
from titans_pretrain import config
from titans_pretrain.errors import UserError

RAW = {
    "model": {"preset": "titans-mac-170m"},
    "data": {"manifest": "/data/shards/manifest.json", "sequence_length": 4096},
    "train": {"steps": 10, "global_batch_size": 16, "learning_rate": 1e-3},
    "run": {"directory": "/runs/first", "name": "my first run"},
}
PLACE = Path("/runs/first")
FROZEN = PLACE / "jobs" / "config.yaml"
PREPARE = {"input": ["/text/*.jsonl", "/it's $(x)"], "tokenizer": "/t.model", "tasks": 8}


def run(job_section=None, **sections):
    return config.resolve({**RAW, "job": job_section or {}, **sections}, source="test")


def training(job_section=None, **options) -> job.JobSpec:
    return job.training_spec(run(job_section), directory=PLACE, config_path=FROZEN, **options)


def stage(name, job_section=None, **pipeline) -> job.JobSpec:
    whole = run(job_section, pipeline=pipeline)
    return job.stage_spec(name, whole, directory=PLACE, config_path=FROZEN)


def asked(spec, tmp_path) -> dict[str, str]:
    path = tmp_path / "job.sbatch"
    path.write_text(job.text(spec))
    return slurm_refusals.requested(path)


class TestTraining:
    def test_all_that_is_asked_for_stands_in_the_header(self, tmp_path):
        section = {
            "nodes": 2,
            "ranks_per_node": 8,
            "gpus_per_node": 8,
            "gpu_type": "h100",
            "cpus_per_rank": 12,
            "memory_per_node": "0",
            "time": "1-00:00:00",
            "partition": "gpu,big",
            "account": "research",
            "qos": "long",
            "constraint": "ib&h100",
            "reservation": "weekend",
            "exclude": ["gpu[3-4]"],
            "options": ["--exclusive", "--mail-user=me@example.org", "--comment=a b"],
            "signal_seconds": 600,
        }
        spec = training(section)
        assert asked(spec, tmp_path) == {
            "job-name": job.job_name(run(), PLACE),
            "output": "/runs/first/logs/slurm-%j.log",
            "open-mode": "append",
            "nodes": "2",
            "ntasks-per-node": "8",
            "cpus-per-task": "12",
            "gpus-per-node": "h100:8",
            "mem": "0",
            "time": "1-00:00:00",
            "requeue": "",
            "kill-on-invalid-dep": "yes",
            "export": "ALL",
            "partition": "gpu,big",
            "account": "research",
            "qos": "long",
            "constraint": "ib&h100",
            "reservation": "weekend",
            "exclude": "gpu[3-4]",
            "dependency": "singleton",
            "signal": "B:USR1@600",
            "exclusive": "",
            "mail-user": "me@example.org",
            "comment": "a b",
        }

    def test_what_is_not_asked_for_is_left_to_the_site(self, tmp_path):
        given = asked(training(), tmp_path)
        assert not {"partition", "account", "gpus-per-node", "mem", "array"} & given.keys()
        assert given["dependency"] == "singleton"

    def test_the_body_is_the_ready_file_s_own(self):
        ready = (job_text.READY / "pretrain.sbatch").read_text()
        body = job.text(training()).partition("set -euo pipefail\n")[2]
        assert body
        assert ready.endswith("set -euo pipefail\n" + body)

    def test_the_same_run_has_the_same_name_and_no_other_has_it(self, tmp_path, monkeypatch):
        name = job.job_name(run(), PLACE)
        assert re.fullmatch(r"titans-my-first-run-[0-9a-f]{8}", name)
        monkeypatch.chdir("/runs" if Path("/runs").exists() else "/")
        relative = Path("runs/first") if Path.cwd() == Path("/") else Path("first")
        assert job.job_name(run(), relative) == name
        assert job.job_name(run(), Path("/runs/second")) != name
        assert job.job_name(run(), PLACE, "export") == f"{name}-export"

    def test_a_run_has_one_name_by_whatever_link_it_is_reached(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "run")
        names = {job.job_name(run(), tmp_path / place) for place in ("run", "link", "x/../run")}
        assert len(names) == 1

    def test_a_percent_in_the_directory_is_no_pattern(self, tmp_path):
        spec = job.training_spec(run(), directory=Path("/runs/50%"), config_path=FROZEN)
        assert spec.output == "/runs/50%%/logs/slurm-%j.log"

    def test_a_blank_in_the_directory_stays_in_one_word(self, tmp_path):
        spec = job.training_spec(run(), directory=Path("/my runs/a#1"), config_path=FROZEN)
        assert asked(spec, tmp_path)["output"] == "/my runs/a#1/logs/slurm-%j.log"


class TestStages:
    def test_the_data_is_planned_prepared_as_an_array_and_merged(self, tmp_path):
        data = PREPARE | {"at_once": 3, "options": ["--held-out=0.01"]}
        plan, prepare, merge = (stage(name, data=data) for name in ("plan", "prepare", "merge"))
        assert [one.variables["DATA_JOB"] for one in (plan, prepare, merge)] == [
            "plan",
            "prepare",
            "merge",
        ]
        assert plan.arguments[:3] == ("--input", "/text/*.jsonl", "/it's $(x)")
        assert plan.arguments[3:] == (
            "--tokenizer", "/t.model", "--tasks", "8", "--held-out=0.01",
        )  # fmt: skip
        assert prepare.arguments == merge.arguments == ()
        assert (plan.array, prepare.array, merge.array) == ("", "0-7%3", "")
        assert prepare.output.endswith("/logs/slurm-%A_%a.log")
        assert prepare.variables["OUTPUT"] == "/data/shards"

    def test_export_and_evaluation_follow_the_pipeline_s_places(self):
        assert stage("export").variables["OUT"] == "/runs/first/model"
        export = stage("export", export={"directory": "/m", "dtype": "bfloat16"})
        assert (export.variables["CHECKPOINT"], export.variables["OUT"]) == ("/runs/first", "/m")
        assert export.arguments == ("--dtype", "bfloat16")
        scored = stage("eval", export={"directory": "/m"}, eval={"sequences": 9, "output": "/e"})
        assert scored.variables["MODEL"] == "/m"
        assert (scored.variables["OUT"], scored.variables["DATA"]) == (
            "/e",
            RAW["data"]["manifest"],
        )
        assert scored.arguments == ("--sequences", "9")
        assert stage("eval").arguments == ("--sequences", "1024")
        assert stage("eval", eval={"sequences": 0}).arguments == ()

    def test_the_package_that_the_run_itself_names_may_run_in_its_evaluation(self):
        packaged = run().model_copy(update={"model": {"hf": "lanterns:LanternForCausalLM"}})
        spec = job.stage_spec("eval", packaged, directory=PLACE, config_path=FROZEN)
        assert spec.arguments == ("--sequences", "1024", "--trust-remote-code")

    def test_export_and_evaluation_have_what_a_rank_of_training_has(self, tmp_path):
        section = {
            "gpus_per_node": 8,
            "gpu_type": "h100",
            "cpus_per_rank": 12,
            "memory_per_node": "900G",
            "time": "8:00:00",
        }
        wanted = {"cpus-per-task": "12", "mem": "900G", "time": "8:00:00"}
        export, scored = (asked(stage(name, section), tmp_path) for name in ("export", "eval"))
        assert wanted.items() <= export.items()
        assert (wanted | {"gpus-per-node": "h100:1"}).items() <= scored.items()
        assert "gpus-per-node" not in export
        on_cpu = asked(stage("eval", section, stages={"eval": {"gpus": 0}}), tmp_path)
        assert "gpus-per-node" not in on_cpu
        plan = asked(stage("plan", section, data=PREPARE), tmp_path)
        assert (plan["cpus-per-task"], plan["time"]) == ("1", "1:00:00")
        assert "mem" not in plan

    def test_a_stage_asks_for_its_own_and_leaves_the_nodes_of_training(self, tmp_path):
        section = {
            "nodes": 4,
            "gpus_per_node": 8,
            "gpu_type": "h100",
            "partition": "gpu",
            "account": "research",
            "qos": "long",
            "constraint": "ib",
            "options": ["--exclusive"],
        }
        wishes = {"partition": "cpu", "cpus": 16, "memory": "64G", "time": "30"}
        given = asked(stage("eval", section, stages={"eval": wishes}), tmp_path)
        assert (given["nodes"], given["cpus-per-task"], given["mem"]) == ("1", "16", "64G")
        assert (given["partition"], given["account"], given["time"]) == ("cpu", "research", "30")
        absent = {"gpus-per-node", "qos", "constraint", "exclusive", "signal", "dependency"}
        assert not absent & given.keys()
        same = asked(stage("eval", section, stages={"eval": {"gpus": 1}}), tmp_path)
        assert (same["partition"], same["qos"], same["constraint"]) == ("gpu", "long", "ib")
        assert same["gpus-per-node"] == "h100:1"

    def test_no_data_to_prepare_is_an_error(self):
        with pytest.raises(UserError, match="no data to prepare"):
            stage("plan")

    def test_a_mixture_is_not_evaluated_as_if_it_were_one_data_set(self):
        parts = [{"manifest": "/a/manifest.json", "weight": 1.0}]
        whole = run(data={"mixture": parts, "sequence_length": 4096})
        with pytest.raises(UserError, match="trains on a mixture"):
            job.stage_spec("eval", whole, directory=PLACE, config_path=FROZEN)

    def test_a_sweep_is_an_array_with_a_bound(self):
        spec = job.sweep_spec(
            run({"nodes": 2}),
            directory=PLACE,
            sweep_path=PLACE / "sweep.json",
            members=[0, 1, 2, 5, 9, 8],
            at_once=2,
        )
        assert (spec.array, spec.nodes) == ("0-2,5,8-9%2", 2)
        assert spec.dependency == "", "a singleton array would run one element at a time"
        assert spec.variables["SWEEP"] == "/runs/first/sweep.json"


class TestQuoting:
    NASTY = "a b'c\"d $HOME `id` $(touch /tmp/never) \\ # %j é"

    def test_values_reach_the_job_as_they_are(self, tmp_path):
        section = {"environment": {"NOTE": self.NASTY, "NCCL_IB_HCA": "=mlx5_0,mlx5_3"}}
        spec = job.training_spec(
            run(section), directory=PLACE, config_path=Path(f"/{self.NASTY}/config.yaml")
        )
        seen = executed(job.text(spec), tmp_path)
        assert seen["NOTE"] == self.NASTY
        assert seen["NCCL_IB_HCA"] == "=mlx5_0,mlx5_3"
        assert seen["arguments"] == ["attempt", f"/{self.NASTY}/config.yaml"]

    def test_arguments_of_a_stage_reach_it_as_they_are(self, tmp_path):
        seen = executed(job.text(stage("plan", data=PREPARE)), tmp_path)
        assert seen["arguments"] == [
            "data", "plan", "--output", "/data/shards", "--input", "/text/*.jsonl", "/it's $(x)",
            "--tokenizer", "/t.model", "--tasks", "8",
        ]  # fmt: skip

    def test_what_is_wrong_in_the_run_s_directory_is_told_of_it(self):
        spec = job.training_spec(run(), directory=Path('/runs/"x"'), config_path=FROZEN)
        with pytest.raises(UserError) as caught:
            job.text(spec)
        assert caught.value.where == "run.directory"

    def test_modules_of_the_shell_that_submits_are_not_loaded(self, tmp_path):
        assert "export MODULES=''\n" in job.text(training())

    @pytest.mark.parametrize("bad", ["a\nb", 'a"b', "a\\b", "a'b", "a\0b"])
    def test_what_sbatch_would_read_otherwise_is_refused(self, bad):
        spec = job_text.JobSpec(name="x", body="pretrain", output=f"/runs/{bad}/log")
        with pytest.raises(UserError, match="cannot stand in a batch script"):
            job.text(spec)

    @pytest.mark.parametrize(
        "bad", ["-N2", "--Nodes=2", "--comment=", "x", "--a\n#SBATCH --b", "-- x"]
    )
    def test_an_option_that_is_none_is_refused(self, bad):
        spec = job_text.JobSpec(name="x", body="pretrain", output="/l", options=(bad,))
        with pytest.raises(UserError, match="no option of sbatch"):
            job.text(spec)

    @pytest.mark.parametrize(
        "bad",
        [
            "--time=5",
            "--nodes=9",
            "--wrap=id",
            "--parsable",
            "--array=0-3",
            "--no-requeue",
            "--output=/x",
            "--arr=0-3",
            "--sig=USR1@5",
            "--dep=singleton",
            "--tim=5",
            "--exclude=n1",
            "--nodelist=n1",
            "--clusters=other",
            "--chdir=/x",
            "--error=/x",
            "--uid=0",
            "--version",
        ],
    )
    def test_an_option_that_the_job_sets_itself_is_refused(self, bad):
        with pytest.raises(UserError, match="set already"):
            job.text(training({"options": [bad]}))

    @pytest.mark.parametrize(
        "name", ["CONFIG", "TITANS_PYTHON", "SLURM_NTASKS", "RANK", "TITANS_ATTEMPT"]
    )
    def test_a_variable_of_the_job_s_own_is_refused(self, name):
        with pytest.raises(UserError, match="set by the job itself"):
            job.text(training({"environment": {name: "1"}}))

    @pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD"])
    def test_a_secret_is_kept_out_of_job_files(self, name):
        with pytest.raises(UserError, match="looks like a secret") as caught:
            job.text(training({"environment": {name: "hunter2"}}))
        assert "hunter2" not in str(caught.value)

    def test_the_same_run_gives_the_same_text(self):
        assert job.text(training({"nodes": 2})) == job.text(training({"nodes": 2}))


def executed(text: str, tmp_path: Path) -> dict:
    """Runs a batch script with a Python that tells what it was given."""
    tell = tmp_path / "python"
    tell.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"told = dict(os.environ) | {{'arguments': sys.argv[sys.argv.index('-m') + 2:]}}\n"
        f"open({str(tmp_path / 'told')!r}, 'w').write(json.dumps(told))\n"
    )
    tell.chmod(0o755)
    text = re.sub(
        r"export TITANS_PYTHON=.*", f"export TITANS_PYTHON={shlex.quote(str(tell))}", text
    )
    script = tmp_path / "script"
    script.write_text(text)
    subprocess.run(["bash", script], check=True, timeout=60)
    return json.loads((tmp_path / "told").read_text())


GPUS = {"gpus_per_node": 8, "gpu_type": "h100", "cpus_per_rank": 12}


class TestStep:
    def step(self, section, **options):
        words = job.step_command(
            run(section).job, ["python3", "train.py"], nodes=2, tasks_per_node=8, **options
        )
        assert words[0] == "srun"
        return words

    def test_it_says_all_that_srun_does_not_take_from_the_job(self):
        words = self.step(GPUS, options=["--chdir=/x"])
        for word in (
            "--nodes=2",
            "--ntasks=16",
            "--ntasks-per-node=8",
            "--cpus-per-task=12",
            "--kill-on-bad-exit=1",
            "--export=ALL",
            "--distribution=block",
            "--gpus-per-node=h100:8",
        ):
            assert word in words
        assert words[-3:] == ["--chdir=/x", "python3", "train.py"]
        assert not [word for word in words if word.startswith(("--label", "--gpu-bind"))]

    def test_without_gpus_none_are_asked_for(self):
        assert not [word for word in self.step({}) if "gpu" in word]

    def test_pyxis_is_told_by_options_of_srun(self):
        container = {
            "runtime": "pyxis",
            "image": "/i.sqsh",
            "mounts": ["/a:/b", "/c:/d:ro"],
            "options": ["--no-container-mount-home"],
        }
        section = GPUS | {"container": container, "environment": {"NCCL_DEBUG": "WARN"}}
        words = self.step(section)
        assert "--container-image=/i.sqsh" in words
        assert "--container-mounts=/a:/b,/c:/d:ro" in words
        named = next(word for word in words if word.startswith("--container-env="))
        assert {"NCCL_DEBUG", "TITANS_ATTEMPT"} <= set(named.partition("=")[2].split(","))
        assert words[-3:] == ["--no-container-mount-home", "python3", "train.py"]

    def test_apptainer_is_a_command_before_the_command(self):
        container = {"runtime": "apptainer", "image": "/i.sif", "mounts": ["/a:/b"]}
        words = self.step(GPUS | {"container": container})
        at = words.index("apptainer")
        assert words[at:] == [
            "apptainer", "exec", "--nv", "--bind", "/a:/b", "/i.sif", "python3", "train.py",
        ]  # fmt: skip
        assert "--nv" not in self.step({"container": container})

    @pytest.mark.parametrize("mount", ["/a", "/a:/b,/c:/d"])
    def test_a_mount_that_is_none_is_refused(self, mount):
        container = {"runtime": "pyxis", "image": "/i", "mounts": [mount]}
        with pytest.raises(UserError, match="is no mount"):
            self.step({"container": container})

    def test_a_stage_runs_in_the_container_with_its_python(self, tmp_path):
        container = {"runtime": "apptainer", "image": "/my image.sif"}
        spec = stage("export", {"container": container, "python": "/opt/python"})
        assert "launcher=(apptainer exec '/my image.sif')" in job.text(spec)
        assert spec.variables["TITANS_PYTHON"] == "/opt/python"

    def test_the_watch_over_a_container_runs_outside_of_it(self):
        container = {"runtime": "pyxis", "image": "/i"}
        inside = run({"container": container, "python": "/opt/python"}).job
        assert job_step.interpreter(inside, in_step=True) == "/opt/python"
        assert job_step.interpreter(inside, in_step=False) == sys.executable
        bare = run({"python": "/opt/python"}).job
        assert job_step.interpreter(bare, in_step=False) == "/opt/python"
        assert job_step.interpreter(run().job, in_step=True) == sys.executable


@pytest.mark.parametrize("path", sorted(config.CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_cluster_s_profile_makes_a_job(path):
    whole = run({"cluster": path.stem})
    spec = job.training_spec(whole, directory=PLACE, config_path=FROZEN)
    assert f"#SBATCH --nodes={whole.job.nodes}\n" in job.text(spec)
    nodes, tasks = whole.job.nodes, whole.job.ranks_per_node
    assert job.step_command(whole.job, ["true"], nodes=nodes, tasks_per_node=tasks)[-1] == "true"
