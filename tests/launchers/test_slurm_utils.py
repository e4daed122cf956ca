import os
import re
import stat
from pathlib import Path

import pytest

from launchers import slurm_command, slurm_jobs, slurm_refusals, slurm_utils
from titans_pretrain.errors import TitansError, UserError


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Makes fake commands of SLURM, first on PATH; each call is noted in its own file."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path))
    monkeypatch.setattr(slurm_command, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(slurm_command, "LONGEST_PAUSE_SECONDS", 0.01)
    slurm_command.version.cache_clear()
    yield lambda name, script: fake(place / name, script)
    slurm_command.version.cache_clear()


def fake(path: Path, script: str) -> None:
    note = f'#!/bin/bash\necho "$@" >>"$CALLS/{path.name}.calls"\n'
    note += f'n=$(wc -l <"$CALLS/{path.name}.calls")\n'
    path.write_text(note + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def calls(tmp_path):
    def read(name: str) -> list[str]:
        path = tmp_path / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    return read


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text("#!/bin/bash\n#SBATCH --job-name=mine\n#SBATCH --time=1:00:00\ntrue\n")
    return path


def row(**values: str) -> str:
    given = {
        "jobarrayid": "7",
        "jobid": "7",
        "arrayjobid": "7",
        "name": "mine",
        "username": "me",
        "state": "RUNNING",
        "reason": "None",
        "restartcnt": "2",
        "nodelist": "gpu[3-4]",
        "partition": "main",
        "submittime": "1700000000",
        "starttime": "1700000010",
        "endtime": "1700003610",
        "timeleft": "59:50",
        "dependency": "(null)",
        "batchhost": "gpu3",
    } | values
    return "".join(given[name].ljust(width) for name, width in slurm_jobs.COLUMNS.items())


def squeue(commands, *rows: str, then: str = "") -> None:
    commands("squeue", "cat <<'ROWS'\n" + "\n".join(rows) + "\nROWS\n" + then)


class TestHosts:
    def test_scontrol_tells_them(self, commands):
        commands("scontrol", '[[ $3 == "odd[1-2]" ]] && printf "odd-one\\nodd-two\\n"')
        assert slurm_utils.hostnames("odd[1-2]") == ["odd-one", "odd-two"]

    def test_a_scontrol_that_fails_leaves_it_to_us(self, commands):
        commands("scontrol", "exit 1")
        assert slurm_utils.hostnames("gpu[1-2]") == ["gpu1", "gpu2"]

    @pytest.mark.parametrize(
        ("nodes", "hosts"),
        [
            ("node7", ["node7"]),
            ("login1,gpu[3-4]", ["login1", "gpu3", "gpu4"]),
            ("gpu[003-005,9],login1", ["gpu003", "gpu004", "gpu005", "gpu9", "login1"]),
            ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
            ("gpu[8-11]-ib", ["gpu8-ib", "gpu9-ib", "gpu10-ib", "gpu11-ib"]),
            ("r[1-2]n[03-04]", ["r1n03", "r1n04", "r2n03", "r2n04"]),
        ],
    )
    def test_without_scontrol_the_list_is_expanded(self, no_slurm, nodes, hosts):
        assert slurm_utils.hostnames(nodes) == hosts

    @pytest.mark.parametrize(
        "nodes", ["", "gpu[", "gpu[a-b]", "gpu[1-", "[]", "a b", "a,,b", "a[1]]"]
    )
    def test_an_unreadable_list_is_an_error_and_no_localhost(self, no_slurm, nodes):
        with pytest.raises(TitansError, match="no hosts in the node list"):
            slurm_utils.hostnames(nodes)


class TestTasks:
    def test_counts_are_expanded(self):
        assert slurm_utils.tasks_per_node("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]

    @pytest.mark.parametrize("text", ["", "2(x3", "two", "2,,1", "2(x3)1"])
    def test_anything_else_is_an_error(self, text):
        with pytest.raises(TitansError, match="no list of tasks per node"):
            slurm_utils.tasks_per_node(text)


def port(job, step, restarts=0):
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return slurm_utils.master_port(dict(zip(names, map(str, (job, step, restarts)), strict=True)))


class TestPort:
    def test_it_lies_below_the_ports_of_outgoing_connections(self):
        ports = [port(job, step) for job in range(5000) for step in (0, 15)]
        assert min(ports) >= 10_000
        assert max(ports) < 30_000

    def test_jobs_and_steps_side_by_side_differ(self):
        pairs = [(job, step) for job in range(4711, 4811) for step in range(16)]
        assert len({port(*pair) for pair in pairs}) == len(pairs)

    def test_a_requeued_job_does_not_meet_what_is_left_of_its_last_start(self):
        assert len({port(4711, 0, restarts) for restarts in range(1000)}) == 1000

    def test_a_job_that_was_never_requeued_has_no_count(self):
        names = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1"}
        assert slurm_utils.master_port(names) == port(4711, 1)


BATCH = {
    "SLURM_JOB_ID": "125",
    "SLURM_JOB_NAME": "mine",
    "SLURM_JOB_NODELIST": "gpu[1-2]",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_PARTITION": "main",
}


class TestAllocation:
    def test_a_batch_job_s_is_read(self, no_slurm):
        found = slurm_utils.allocation(BATCH | {"SLURM_RESTART_COUNT": "3"})
        expected = slurm_utils.Allocation("125", "mine", ["gpu1", "gpu2"], [8, 8], 3, "main")
        assert found == expected
        assert found.tasks == 16

    def test_an_array_s_element_goes_by_the_array_s_id(self, no_slurm):
        array = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"}
        assert slurm_utils.allocation(BATCH | array).job == "120_4"

    def test_outside_a_job_there_is_none(self):
        assert slurm_utils.allocation({"HOME": "/root"}) is None

    def test_half_of_slurm_s_variables_is_an_error(self):
        half = {k: v for k, v in BATCH.items() if k != "SLURM_TASKS_PER_NODE"}
        with pytest.raises(TitansError, match="SLURM_TASKS_PER_NODE is not set"):
            slurm_utils.allocation(half)


class TestJobs:
    def test_a_job_is_read(self, commands):
        squeue(commands, row())
        found = slurm_utils.job("7")
        assert (found.id, found.array, found.name, found.state) == ("7", "", "mine", "RUNNING")
        assert (found.restarts, found.nodelist, found.batch_host) == (2, "gpu[3-4]", "gpu3")
        assert (found.submitted, found.end_time) == (1_700_000_000, 1_700_003_610)
        assert (found.seconds_left, found.reason, found.dependency) == (3590, "", "")
        assert found.running
        assert not found.finished

    def test_names_with_blanks_and_long_lists_are_read_whole(self, commands):
        nodes = ",".join(f"host{n}x[1,3]" for n in range(500))
        squeue(commands, row(name="a b|c=d ü", nodelist=nodes, jobid="8", jobarrayid="8"))
        found = slurm_utils.job("8")
        assert found.nodelist == nodes
        assert found.batch_host == "gpu3"

    def test_elements_of_an_array_are_told_apart(self, commands):
        rows = [row(jobarrayid=f"120_{n}", jobid=str(120 + n), arrayjobid="120") for n in (1, 2)]
        squeue(commands, *rows)
        assert [one.id for one in slurm_utils.jobs(["120"])] == ["120_1", "120_2"]
        assert slurm_utils.job("120_2").number == "122"
        assert slurm_utils.job("120_2").array == "120"

    def test_a_missing_job_is_none(self, commands):
        commands("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
        commands("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
        assert slurm_utils.job("999") is None

    def test_what_squeue_forgot_the_accounting_tells(self, commands):
        commands("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
        line = "5\x1f5\x1fmine\x1fme\x1f{}\x1fgpu3\x1fmain\x1f1700000000\x1f1700000010\x1f{}\n"
        rows = line.format("NODE_FAIL", "1700000020") + line.format("CANCELLED by 0", "1700000030")
        commands("sacct", f"printf %s '{rows}'")
        found = slurm_utils.job("5")
        assert (found.state, found.restarts, found.end_time) == ("CANCELLED", 1, 1_700_000_030)
        assert found.finished

    @pytest.mark.parametrize(
        "accounting", ["echo 'error: Connection refused' >&2; exit 1", "exec sleep 60", None]
    )
    def test_an_accounting_that_is_away_remembers_nothing(self, commands, monkeypatch, accounting):
        monkeypatch.setattr(slurm_command, "COMMAND_SECONDS", 1.0)
        monkeypatch.setattr(slurm_command, "PAUSE_SECONDS", 60.0)
        commands("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
        if accounting:
            commands("sacct", accounting)
        else:
            (Path(os.environ["CALLS"]) / "bin" / "sacct").write_text("not executable")
        assert slurm_utils.job("999") is None

    def test_no_ids_ask_for_nothing(self, commands, calls):
        squeue(commands, row())
        assert slurm_utils.jobs([]) == []
        assert calls("squeue") == []

    def test_of_thousands_of_one_s_own_jobs_no_columns_of_full_width_are_asked_for(
        self, commands, calls
    ):
        values = ["120_4", "122", "120", "a|b", "me", "RUNNING", "None", "gpu3", "main"]
        values += ["5", "6", "9", "3:04", "afterok:1", "gpu3"]
        commands(
            "squeue",
            f"if [[ $* == *--Format=* ]]; then printf '%-64s%-12s\\n' 120_4 2; "
            f"else echo '{slurm_jobs.SEPARATOR.join(values)}'; fi",
        )
        (found,) = slurm_utils.jobs()
        assert (found.id, found.array, found.name, found.restarts) == ("120_4", "120", "a|b", 2)
        assert (found.end_time, found.seconds_left, found.dependency) == (9, 184, "afterok:1")
        assert all("--user=" in one for one in calls("squeue"))
        asked = " ".join(calls("squeue"))
        assert sum(map(int, re.findall(r":(\d+)", asked))) < 100

    def test_users_formats_and_zones_are_set_aside(self, commands, monkeypatch, tmp_path):
        monkeypatch.setenv("SQUEUE_FORMAT", "%i")
        monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
        monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
        squeue(commands, row(), then=f"env >{tmp_path}/env")
        slurm_utils.jobs(["7"])
        seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
        assert not [name for name in seen if name.startswith("SQUEUE_")]
        assert (seen["LC_ALL"], seen["SLURM_TIME_FORMAT"]) == ("C", "%s")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1-02:03:04", 93784),
            ("2:03:04", 7384),
            ("3:04", 184),
            ("UNLIMITED", None),
            ("N/A", None),
        ],
    )
    def test_times_are_read(self, text, expected):
        assert slurm_jobs.seconds(text) == expected

    def test_local_dates_are_read_where_a_version_prints_no_seconds(self):
        assert slurm_jobs.unix_seconds("2026-01-02T03:04:05") is not None
        assert slurm_jobs.unix_seconds("Unknown") is None


class TestPatience:
    GONE = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2"

    def test_a_controller_that_comes_back_is_waited_for(self, commands):
        squeue(commands, row(), then="")
        there = f"if ((n < 4)); then {self.GONE}; exit 1; fi\n"
        commands("squeue", there + "cat <<'ROWS'\n" + row() + "\nROWS\n")
        assert slurm_utils.job("7").state == "RUNNING"

    def test_one_that_stays_away_is_an_error_with_its_words(self, commands, calls):
        commands("squeue", f"{self.GONE}; exit 1")
        with pytest.raises(slurm_utils.SlurmError) as caught:
            slurm_command.run(["squeue"], patience=1.0)
        assert "Unable to contact slurm controller" in caught.value.what
        assert caught.value.where == "squeue"
        assert "scontrol ping" in caught.value.fix
        assert len(calls("squeue")) > 1

    def test_a_command_that_hangs_is_ended(self, commands, monkeypatch):
        monkeypatch.setattr(slurm_command, "COMMAND_SECONDS", 0.2)
        commands("squeue", "exec sleep 60")
        with pytest.raises(slurm_utils.SlurmError, match="timed out"):
            slurm_command.run(["squeue"], patience=0)

    def test_a_command_that_may_not_be_run_is_told(self, commands, monkeypatch, tmp_path):
        (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\n")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        with pytest.raises(slurm_utils.SlurmError, match="squeue cannot be run: Permission denied"):
            slurm_utils.jobs(["1"])

    def test_a_missing_command_is_told(self, no_slurm):
        with pytest.raises(slurm_utils.SlurmError, match="squeue is not on this machine"):
            slurm_utils.jobs(["1"])
        assert not slurm_utils.available()

    def test_a_refusal_is_told_at_once(self, commands, calls):
        commands("scontrol", "echo 'Access/permission denied' >&2; exit 1")
        with pytest.raises(slurm_utils.SlurmError, match="Access/permission denied"):
            slurm_utils.set_dependency("7", "afterok:1")
        assert len(calls("scontrol")) == 1


class TestSubmit:
    def test_the_id_is_returned(self, commands, script, calls):
        commands("squeue", "")
        commands("sbatch", "echo 'note: something'; echo '42;ci'")
        assert slurm_utils.submit(script, ["--hold"]) == "42"
        assert calls("sbatch") == [f"--parsable --hold {script}"]

    def test_a_lost_answer_makes_no_twin(self, commands, script, calls):
        commands("squeue", "((n > 1)) && echo 42; echo 7")
        commands("sbatch", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
        assert slurm_utils.submit(script) == "42"
        assert len(calls("sbatch")) == 1

    def test_a_lost_request_is_sent_again(self, commands, script, calls):
        commands("squeue", "echo 7")
        lost = "echo 'Socket timed out on send/recv operation' >&2; exit 1"
        commands("sbatch", f"if ((n < 2)); then {lost}; fi; echo 43")
        assert slurm_utils.submit(script) == "43"
        assert len(calls("sbatch")) == 2

    def test_a_silent_controller_is_given_up(self, commands, script, monkeypatch, calls):
        monkeypatch.setattr(slurm_utils, "PATIENCE_SECONDS", 0.05)
        commands("squeue", "echo 7")
        commands("sbatch", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
        with pytest.raises(slurm_utils.SlurmError, match="does not answer"):
            slurm_utils.submit(script)

    def test_nothing_of_the_job_around_reaches_the_new_one(
        self, commands, script, monkeypatch, tmp_path
    ):
        for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "SLURM_MEM_PER_CPU"):
            monkeypatch.setenv(name, "3")
        monkeypatch.setenv("SLURM_CONF", "/etc/x.conf")
        monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
        monkeypatch.setenv("SBATCH_ACCOUNT", "site")
        commands("squeue", "")
        commands("sbatch", f"env >{tmp_path}/env; echo 1")
        slurm_utils.submit(script)
        seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
        ours = {"SLURM_TIME_FORMAT", "SLURM_CONF"}
        assert {name for name in seen if name.startswith("SLURM_")} == ours
        assert "SBATCH_TIMELIMIT" not in seen, "it would go before the script's own --time"
        assert seen["SBATCH_ACCOUNT"] == "site", "the script says nothing of it"


class TestOrders:
    def test_a_signal_goes_to_the_tasks_or_to_the_batch_script(self, commands, calls):
        commands("scancel", "")
        slurm_utils.cancel("7")
        slurm_utils.cancel("7", signal="USR1")
        slurm_utils.cancel("7", signal="USR1", batch=True)
        assert calls("scancel") == ["7", "--signal=USR1 7", "--signal=USR1 --batch 7"]

    def test_a_job_that_has_ended_is_no_error_to_cancel(self, commands):
        said = (
            "scancel: error: Kill job error on job id 7: Job/step already completing or completed"
        )
        commands("scancel", f"echo '{said}' >&2; exit 1")
        slurm_utils.cancel("7")

    def test_a_job_of_someone_else_is_an_error_to_cancel(self, commands):
        commands("scancel", "echo 'Access/permission denied' >&2; exit 1")
        with pytest.raises(slurm_utils.SlurmError, match="permission denied"):
            slurm_utils.cancel("7")

    def test_a_job_that_waits_needs_no_requeue(self, commands):
        commands("scontrol", "echo 'Job is pending execution' >&2; exit 1")
        slurm_utils.requeue("7")

    def test_a_job_that_is_gone_cannot_be_requeued(self, commands):
        commands("scontrol", "echo 'Invalid job id specified for job 7' >&2; exit 1")
        with pytest.raises(slurm_utils.SlurmError, match="Invalid job id"):
            slurm_utils.requeue("7")

    def test_dependencies_are_spelled(self):
        assert slurm_utils.dependency("afterok", ["1", "2_3"]) == "afterok:1:2_3"
        assert slurm_utils.dependency("afterany", []) == ""
        with pytest.raises(UserError, match="no job's id"):
            slurm_utils.dependency("afterok", ["1,singleton"])

    def test_the_grace_of_a_partition(self, commands):
        partition = "PartitionName=low Default=NO GraceTime=90 MaxTime=UNLIMITED"
        commands("scontrol", f"echo '{partition}'")
        assert slurm_utils.grace_seconds("low") == 90
        assert slurm_utils.grace_seconds("other") is None

    def test_the_grace_of_a_quality_of_service_where_that_decides(self, commands):
        partition = "PartitionName=low Default=NO GraceTime=0"
        config = "PreemptType             = preempt/qos"
        commands("scontrol", f"[[ $* == *config* ]] && echo '{config}' || echo '{partition}'")
        commands("sacctmgr", "echo 00:02:00")
        assert slurm_utils.grace_seconds("low", qos="cheap") == 120
        commands("sacctmgr", "echo 'error: Connection refused' >&2; exit 1")
        assert slurm_utils.grace_seconds("low", qos="cheap") is None


class TestVersions:
    @pytest.mark.parametrize(
        ("said", "expected"), [("slurm-wlm 22.05.8", (22, 5)), ("slurm 24.11.1", (24, 11))]
    )
    def test_major_and_minor_are_read(self, commands, said, expected):
        commands("sbatch", f"echo {said}")
        assert slurm_utils.version() == expected


class TestRefusals:
    MAIN = (
        "PartitionName=main Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 TotalNodes=4\n"
        "PartitionName=debug Default=NO MaxNodes=1 MaxTime=00:30:00 TotalNodes=4\n"
    )
    NODES = (
        "n1|64|500000|idle|gpu:a100:4(S:0-1)\nn2|64|500000|mixed|gpu:a100:4\n"
        "n3|64|500000|{}|gpu:a100:4\nn4|8|500000|idle|(null)\n"
    )

    @pytest.fixture
    def site(self, commands, tmp_path):
        def refuse(said: str, *asked: str, associations: str = "", state: str = "idle") -> Path:
            commands("sbatch", f"echo '{said}' >&2; exit {int(bool(said))}")
            commands("scontrol", f"printf '%s' '{self.MAIN}'")
            commands("sinfo", f"printf '%s' '{self.NODES.format(state)}'")
            told = f"printf '{associations}'" if associations else "exit 1"
            commands("sacctmgr", told)
            path = tmp_path / "job.sbatch"
            path.write_text("#!/bin/bash\n" + "".join(f"#SBATCH {one}\n" for one in asked))
            return path

        return refuse

    WRONG = "allocation failure: Requested node configuration is not available"

    @pytest.mark.parametrize(
        ("said", "asked", "where", "told"),
        [
            ("Invalid partition name specified", "--partition=mian", "job.partition", "'main'"),
            ("Invalid account or account/partition combination", "--account=x", "job.account", ""),
            ("Invalid qos specification", "--qos=x", "job.qos", "qos"),
            ("Requested time limit is invalid", "--time=9-0", "job.time", "less time"),
            ("Invalid feature specification", "--constraint=x", "job.constraint", "features"),
            ("Requested reservation is invalid", "--reservation=x", "job.reservation", "x"),
            ("Invalid node name specified", "--exclude=zz", "job.exclude", "sinfo"),
            ("Invalid generic resource (gres) specification", "--gpus-per-node=1", "job.gpus", ""),
            ("unrecognized option --foo", "--foo=1", "job.options", "--foo"),
            ("Job dependency problem", "--dependency=afterok:1", "--after", ""),
            ("Invalid job array specification", "--array=0-9", "--sweep", "0-9"),
            (
                "Job violates accounting/QOS policy (job submit limit, user's size and/or time "
                "limits)",
                "--time=9-0",
                "job.qos",
                "sacctmgr",
            ),
            (WRONG, "--nodes=9", "job.nodes", "gives 4 at most"),
            (WRONG, "--gpus-per-node=h100:4", "job.gpu_type", "a100 x 4"),
            (WRONG, "--gpus-per-node=8", "job.gpus_per_node", "a100 x 4"),
            (WRONG, "--cpus-per-task=65", "job.cpus_per_rank", "64 cores"),
            (WRONG, "--mem=900G", "job.memory_per_node", "500000 MB"),
            (WRONG, "--gres=disk:1", "job", "sinfo"),
            ("something new", "--nodes=1", "job", "something new"),
        ],
    )
    def test_names_key_and_fix(self, site, said, asked, where, told):
        with pytest.raises(UserError) as caught:
            slurm_utils.test_only(site(said.replace("'", "'\\''"), asked))
        assert caught.value.where.startswith(where)
        assert told in str(caught.value)
        assert caught.value.fix

    def test_a_stage_s_own_keys_are_named(self, site):
        with pytest.raises(UserError) as caught:
            slurm_utils.test_only(site(self.WRONG, "--mem=900G"), section="pipeline.stages.eval")
        assert caught.value.where == "pipeline.stages.eval.memory"
        script = site("Invalid job array specification", "--array=0-9")
        with pytest.raises(UserError) as caught:
            slurm_utils.test_only(script, section="pipeline.stages.prepare")
        assert caught.value.where == "pipeline.data.tasks"

    @pytest.mark.parametrize("state", ["down*", "drained", "idle*", "maint"])
    def test_nodes_that_are_down_now_are_waited_for(self, site, state):
        asked = ("--nodes=3", "--gpus-per-node=4", "--cpus-per-task=64")
        (told,) = slurm_utils.test_only(site(self.WRONG, *asked, state=state))
        assert (
            told == "1 nodes of partition main are down or drained now, the job will wait for them"
        )

    def test_nodes_that_are_down_excuse_nothing_that_none_has(self, site):
        with pytest.raises(UserError, match="no 4 nodes with it"):
            slurm_utils.test_only(site(self.WRONG, "--nodes=4", "--mem=900G", state="down"))
        with pytest.raises(UserError, match="SLURM refuses the job"):
            slurm_utils.test_only(site(self.WRONG, "--nodes=2", state="down"))

    def test_more_time_than_the_partition_gives_is_refused_where_slurm_lets_it_wait(self, site):
        with pytest.raises(UserError, match="partition debug gives 00:30:00"):
            slurm_utils.test_only(site("", "--partition=debug", "--time=1:00:00"))
        slurm_utils.test_only(site("", "--partition=debug,main", "--time=1:00:00"))
        assert slurm_utils.test_only(site("", "--time=1-00:00:00")) == []

    def test_a_quality_of_service_may_lift_the_partition_s_time(self, site):
        (told,) = slurm_utils.test_only(site("", "--partition=debug", "--time=9:0:0", "--qos=long"))
        assert "the job waits for ever unless qos long allows more" in told

    def test_an_account_that_is_none_of_mine_is_refused_where_slurm_takes_any(self, site):
        known = "research|\\nteaching|debug\\n"
        with pytest.raises(UserError, match="'reserch' is none of yours") as caught:
            slurm_utils.test_only(site("", "--account=reserch", associations=known))
        assert "'research'" in caught.value.fix
        slurm_utils.test_only(site("", "--account=research", associations=known))

    def test_without_accounting_any_account_passes(self, site):
        slurm_utils.test_only(site("", "--account=whatever"))

    @pytest.mark.parametrize("how", ["Connection refused", "absent", "no right"])
    def test_an_accounting_that_cannot_be_asked_refuses_nothing(
        self, site, commands, tmp_path, how
    ):
        script = site("", "--account=whatever")
        tool = tmp_path / "bin" / "sacctmgr"
        if how == "Connection refused":
            commands("sacctmgr", f"echo 'sacctmgr: error: {how}' >&2; exit 1")
        elif how == "absent":
            tool.unlink()
        else:
            tool.chmod(0o644)
        assert slurm_utils.test_only(script) == []

    def test_options_of_a_script_end_where_its_commands_begin(self, tmp_path):
        path = tmp_path / "x.sbatch"
        path.write_text(
            '#!/bin/bash\n# note\n#SBATCH --nodes=2 --job-name="a b" # note\n\ntrue\n'
            "#SBATCH --time=9\n"
        )
        asked = slurm_refusals.requested(path, ["--nodes=3", "--hold"])
        assert asked == {"nodes": "3", "job-name": "a b", "hold": ""}


def test_the_commands_run_without_a_shell(commands, calls):
    squeue(commands)
    commands("sacct", "exit 1")
    slurm_utils.jobs(["1; touch /tmp/never", "$(id)"])
    assert "1; touch /tmp/never,$(id)" in calls("squeue")[0]
