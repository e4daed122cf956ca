"""The batch process: starts the step, hears the nodes, leaves the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launchers import preflight
from launchers.slurm_utils import Allocation
from titans_pretrain import config as run_config
from titans_pretrain.errors import TitansError
from titans_pretrain.train.directory import RunDirectory

HERE = Path(__file__).parent
SRUN = f"""#!{sys.executable}
import json, os, sys
sys.path.insert(0, {str(HERE)!r})
from preflight_answers import answers
task = json.loads(sys.argv[-1])
with open({{calls!r}}, "a") as handle:
    handle.write(json.dumps(sys.argv[1:]) + "\\n")
told = answers({{count}})
nonce = open(task["directory"] + "/nonce").read()
for name, answer in told.items():
    answer["values"] |= {{{{"nonce": nonce, "config": {{digest!r}}}}}}
    answer |= {{{{"first": task["begun"], "last": task["begun"]}}}}
{{spoil}}
for name, answer in told.items():
    with open(task["directory"] + "/" + name + ".json", "w") as handle:
        json.dump(answer, handle)
"""


class Batch:
    """A job's batch process on this machine, with a stand-in for srun.

    Args:
        directory: the test's.
        monkeypatch: of the test.
    """

    def __init__(self, directory, monkeypatch):
        self.directory, self.run = directory, directory / "run"
        self.config_path = directory / "run.yaml"
        self.config_path.write_text(
            yaml.safe_dump(
                {
                    "model": {"preset": "titans-lmm-170m"},
                    "data": {"manifest": "none", "sequence_length": 64},
                    "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 0.1},
                    "checkpoint": {"keep": 2},
                    "run": {"directory": str(self.run)},
                    "job": {"preflight_seconds": 30},
                }
            )
        )
        self.calls = directory / "calls"
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    @property
    def config(self):
        return run_config.load(self.config_path)

    def srun(self, count, spoil="", text=SRUN):
        import hashlib

        digest = hashlib.sha256(self.config_path.read_bytes()).hexdigest()
        program = self.directory / "srun"
        program.write_text(
            text.format(calls=str(self.calls), count=count, digest=digest, spoil=spoil)
        )
        program.chmod(0o755)

    def check(self, count):
        nodes = [f"n{number}" for number in range(count)]
        allocation = Allocation("12", "titans-x", nodes, [1] * count, 3, "main")
        return preflight.check(allocation, self.config, config_path=self.config_path)


@pytest.fixture
def batch(tmp_path, monkeypatch):
    return Batch(tmp_path, monkeypatch)


@pytest.fixture
def hurried(monkeypatch):
    """A check that has two seconds, ended as one of a minute is."""
    monkeypatch.setattr(preflight, "STEP_SHARE", 2 / 30)
    monkeypatch.setattr(preflight, "AGAIN_SHARE", 0)


@pytest.mark.parametrize("count", [1, 4, 1024])
def test_nodes_that_are_well_have_no_problem_and_their_rates_add_up(batch, count):
    batch.srun(count)
    verdict = batch.check(count)
    assert verdict.problems == ()
    assert verdict.suspects == []
    assert verdict.write_bytes_per_second == pytest.approx(count * 1e8)


def test_the_result_is_left_in_the_run_directory_and_nothing_else(batch):
    batch.srun(4, 'told["n2"]["values"]["code"] = "other"')
    verdict = batch.check(4)
    kept = json.loads(RunDirectory(batch.run).preflight.read_text())
    assert verdict.suspects == ["n2"]
    assert [problem["node"] for problem in kept["problems"]] == ["n2"]
    assert (kept["job"], kept["restart"]) == ("12", 3)
    assert set(kept["nodes"]) == {"n0", "n1", "n2", "n3"}
    assert list((batch.run / "preflight").iterdir()) == []


def test_what_an_earlier_check_left_is_not_taken_for_an_answer(batch):
    batch.srun(2, 'del told["n1"]')
    old = batch.run / "preflight" / "12-3"
    old.mkdir(parents=True)
    (old / "n1.json").write_text("{}")
    assert batch.check(2).suspects == ["n1"]


def test_the_step_has_all_nodes_and_one_bad_exit_does_not_end_it(batch):
    batch.srun(3)
    batch.check(3)
    (call,) = map(json.loads, batch.calls.read_text().splitlines())
    assert "--nodes=3" in call
    assert "--ntasks-per-node=1" in call
    exits = [word for word in call if word.startswith("--kill-on-bad-exit")]
    assert exits[-1] == "--kill-on-bad-exit=0"


def test_an_answer_that_is_cut_short_counts_as_none(batch):
    batch.srun(3, "json.dump = lambda value, handle: handle.write('{')")
    (problem,) = batch.check(3).problems
    assert "all 3 nodes: no answer" in problem.what


def test_an_answer_of_other_code_is_told_as_such(batch):
    batch.srun(3, 'del told["n1"]["processes"]')
    (problem,) = batch.check(3).problems
    assert problem.node == "n1"
    assert "runs other code" in problem.what


def test_what_a_node_says_in_the_output_is_told_where_it_has_no_file(batch):
    batch.srun(4, 'del told["n1"]\nprint("1: python: not found", flush=True)')
    (problem,) = batch.check(4).problems
    assert problem.node == "n1"
    assert "python: not found" in problem.what


def test_a_node_that_cannot_write_its_file_is_told_with_its_words(batch):
    words = "1: titans-preflight n1 unwritable [Errno 30] Read-only file system"
    batch.srun(4, f'del told["n1"]\nprint("{words}", flush=True)')
    (problem,) = batch.check(4).problems
    assert "unwritable [Errno 30] Read-only file system" in problem.what


@pytest.mark.parametrize(
    ("line", "heard"),
    [
        ("1: bash: python: not found", {"n1": "bash: python: not found"}),
        ("srun: error: n1: task 1: Exited with exit code 127", {"n1": "Exited with exit code 127"}),
        ("srun: error: n1: task 1: Killed", {}),
        ("srun: error: n[0-1]: tasks 0-1: Killed", {}),
        ("srun: Job step aborted: Waiting up to 4 seconds", {}),
        (
            "srun: error: Unable to create step",
            dict.fromkeys(("n0", "n1"), "Unable to create step"),
        ),
        ("7: a task that is not there", {}),
    ],
)
def test_what_the_output_says_of_nodes(line, heard):
    assert preflight._words(f"noise\n{line}\nnoise", ["n0", "n1"]) == heard


def test_a_nodes_last_words_of_its_own_go_before_others():
    text = (
        "1: titans-preflight n1 done\n1: titans-preflight n1 unwritable no space\n"
        "1: some warning\nsrun: error: n1: task 1: Exited with exit code 1\n"
        "0: execve(): No such file\nsrun: error: n0: task 0: Exited with exit code 2\n"
    )
    assert preflight._words(text, ["n0", "n1"]) == {
        "n0": "execve(): No such file",
        "n1": "unwritable no space",
    }


def test_the_nodes_do_not_meet_where_the_shell_that_submits_was_told(batch, monkeypatch):
    others = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    for name in others:
        monkeypatch.setenv(name, "7")
    batch.srun(2, f"assert not {set(others)!r} & os.environ.keys()")
    assert batch.check(2).problems == ()


def test_a_step_that_does_not_end_is_ended_and_judged(batch, hurried):
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    batch.srun(2, text=f"#!{sys.executable}\n{ignore}\ntime.sleep(600)\n")
    verdict = batch.check(2)
    assert verdict.seconds < 120
    assert "all 2 nodes: no answer" in verdict.problems[0].what


def test_a_step_that_slurm_did_not_start_is_tried_again(batch, monkeypatch):
    monkeypatch.setattr(preflight, "PAUSE_SECONDS", 0.01)
    refuse = f"if open({str(batch.calls)!r}).read().count(chr(10)) < 3: sys.exit(1)"
    batch.srun(2, refuse)
    assert batch.check(2).problems == ()
    assert len(batch.calls.read_text().splitlines()) == 3


def test_a_step_of_which_nodes_spoke_is_not_tried_again(batch, monkeypatch):
    monkeypatch.setattr(preflight, "PAUSE_SECONDS", 0.01)
    batch.srun(2, 'print("0: titans-preflight n0 torch", flush=True); sys.exit(1)')
    assert batch.check(2).problems
    assert len(batch.calls.read_text().splitlines()) == 1


def test_without_srun_the_check_says_what_it_needs(batch, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TitansError, match="cannot be checked") as caught:
        batch.check(2)
    assert "srun" in caught.value.where + caught.value.fix


def test_a_run_directory_that_cannot_be_made_is_told(batch):
    batch.run.write_text("a file")
    with pytest.raises(TitansError, match="cannot be checked") as caught:
        batch.check(2)
    assert str(batch.run) in caught.value.where


@pytest.mark.parametrize(("there", "checkpoints"), [(0, 3), (1, 2), (2, 1), (9, 1)])
def test_space_is_needed_for_the_checkpoints_that_are_not_there_yet(batch, there, checkpoints):
    run = RunDirectory(batch.run)
    for step in range(there):
        (run.checkpoints / f"step-{step}").mkdir(parents=True)
    one = preflight.checks.checkpoint_bytes(batch.config)
    assert preflight.needed_bytes(batch.config, run) == int(checkpoints * one * 1.05)


@pytest.mark.parametrize(
    ("text", "size"), [("", 0), ("0", 0), ("900G", 900 * 2**30), ("512", 2**29), ("2T", 2**41)]
)
def test_memory_is_read_as_slurm_reads_it(text, size):
    assert preflight._bytes(text) == size


def test_no_module_of_the_batch_process_or_of_a_nodes_checks_imports_torch():
    program = (
        "import sys, launchers.preflight, launchers.preflight_node, launchers.fabric\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "whole"), [("", False), ("8G", False), ("100", False), ("0", True), ("0G", True)]
)
def test_a_memory_of_zero_is_all_of_a_node(text, whole):
    assert preflight.asks_all(text) is whole
