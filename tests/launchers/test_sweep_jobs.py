"""``titans submit --sweep``: one run for each combination, as elements of one array job."""

import json
import random

import pytest
from submit_cases import job_of, rows, write_checkpoint, write_config

from launchers import sweep
from titans_pretrain import cli
from titans_pretrain import config as run_config
from titans_pretrain.errors import UserError

RATES = "train.learning_rate=0.01,0.02"
SEEDS = "train.seed=1,2"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "run.sweep"


def _titans(*words):
    return cli.main(["submit", *map(str, words)])


def _array(place):
    lines = (place / "jobs" / "sweep.sbatch").read_text().splitlines()
    return next(line for line in lines if line.startswith("#SBATCH --array="))


def test_a_grid_is_one_array_job_with_a_run_for_each_combination(tmp_path, place, slurm, capsys):
    assert _titans(write_config(tmp_path), "--sweep", RATES, SEEDS, "--at-once", "3") == 0
    assert [stage for stage, _ in slurm.submitted] == ["sweep"] == slurm.tested
    assert _array(place).endswith("%3")
    assert "singleton" not in (place / "jobs" / "sweep.sbatch").read_text()
    found = []
    for index in range(4):
        path = sweep.member(place / "sweep.json", index)
        config = run_config.load(path)
        run = place / f"{index:04d}"
        assert path == run / "jobs" / "config.yaml"
        assert config.run.directory == str(run)
        assert config.run.name == f"run-{index:04d}"
        assert [row["job"] for row in rows(run)] == [f"11_{index}"]
        assert f"export CONFIG={path}\n" in (run / "jobs" / "train.sbatch").read_text()
        found.append((config.train.learning_rate, config.train.seed))
    assert found == [(0.01, 1), (0.01, 2), (0.02, 1), (0.02, 2)]
    assert "11_3: 0003 train.learning_rate=0.02 train.seed=2" in capsys.readouterr().out


def test_a_dry_run_prints_the_array(tmp_path, place, capsys):
    assert _titans(write_config(tmp_path), "--sweep", RATES, "--dry-run") == 0
    assert "#SBATCH --array=" in capsys.readouterr().out
    assert not place.exists()


def test_values_added_later_leave_the_numbers_of_the_others(tmp_path, place, slurm):
    file = write_config(tmp_path)
    assert _titans(file, "--sweep", RATES) == 0
    before = sweep.read(place)
    slurm.end_all()
    assert _titans(file, "--sweep", "train.learning_rate=0.005,0.02,0.01") == 0
    after = sweep.read(place)
    assert after[:2] == before
    assert after[2] == sweep.Member(("train.learning_rate=0.005",), "0002")


def test_numbers_stay_whatever_is_added_in_whatever_order():
    dice = random.Random(0)
    values = [str(number) for number in range(12)]
    members = []
    for _ in range(30):
        some = dice.sample(values, dice.randint(1, len(values)))
        grown = sweep.grown(members, sweep.grid([f"train.seed={','.join(some)}"]))
        assert grown[: len(members)] == members
        members = grown
    assert len({one.overrides for one in members}) == len(members) == 12
    assert len({one.directory for one in members}) == 12


def test_the_order_of_the_axes_does_not_matter():
    assert set(sweep.grid([RATES, SEEDS])) == set(sweep.grid([SEEDS, RATES]))


def test_the_same_command_goes_on_with_what_is_not_finished(tmp_path, place, slurm, capsys):
    file = write_config(tmp_path)
    assert _titans(file, "--sweep", "train.seed=1,2,3,4") == 0
    slurm.known = [job_of("11_2", slurm.known[0].name, "RUNNING")]
    for index in (0, 1):
        config = place / f"{index:04d}" / "jobs" / "config.yaml"
        write_checkpoint(config, place / f"{index:04d}", 6 if index == 0 else 2)
    capsys.readouterr()
    assert _titans(file, "--sweep", "train.seed=1,2,3,4") == 0
    told = capsys.readouterr().out
    assert "0000: finished already" in told
    assert "0002: in job 11_2 already" in told
    assert _array(place) == "#SBATCH --array=1,3"
    assert [row["job"] for row in rows(place / "0001")] == ["11_1", "12_1"]
    assert [row["job"] for row in rows(place / "0002")] == ["11_2"]


@pytest.mark.parametrize("noted", [True, False])
def test_an_array_whose_runs_do_not_know_of_it_is_not_queued_again(
    noted, tmp_path, place, slurm, monkeypatch, capsys
):
    def killed(*_):
        raise KeyboardInterrupt

    file = write_config(tmp_path)
    monkeypatch.setattr(sweep, "_tell", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.submit(str(file), [], ["train.seed=1,2,3"])
    monkeypatch.undo()
    slurm.install(monkeypatch)
    name = slurm.known[0].name
    if not noted:
        (place / "jobs" / "jobs.jsonl").unlink()
    slurm.known = [job_of("11_0", name), job_of("11_2", name), job_of("9_1", "another")]
    assert sweep.submit(str(file), [], ["train.seed=1,2,3"]) == 0
    assert "0002: in job 11_2 already" in capsys.readouterr().out
    assert _array(place) == "#SBATCH --array=1"


def test_a_sweep_whose_runs_are_all_finished_says_so(tmp_path, place, slurm, capsys):
    file = write_config(tmp_path)
    assert _titans(file, "--sweep", "train.seed=1") == 0
    slurm.end_all()
    write_checkpoint(place / "0000" / "jobs" / "config.yaml", place / "0000", 6)
    assert _titans(file, "--sweep", "train.seed=1") == 0
    assert "all 1 runs" in capsys.readouterr().out
    assert len(slurm.submitted) == 1


def test_what_the_runs_share_may_not_change_under_them(tmp_path, place, slurm):
    file = write_config(tmp_path)
    assert _titans(file, "--sweep", "train.seed=1") == 0
    slurm.end_all()
    with pytest.raises(UserError, match=r"train.steps: 9 differs from 6") as refused:
        sweep.submit(str(file), ["train.steps=9"], ["train.seed=1"])
    assert "--sweep-directory" in refused.value.fix
    assert _titans(file, "job.nodes=2", "--sweep", "train.seed=1") == 0
    other = tmp_path / "other"
    words = ("train.steps=9", "--sweep", "train.seed=1", "--sweep-directory", other)
    assert _titans(file, *words) == 0
    assert sweep.member(other / "sweep.json", 0) == other / "0000" / "jobs" / "config.yaml"


@pytest.mark.parametrize(
    ("axes", "what"),
    [
        (["train.seed=1,1"], "a value twice"),
        (["train.seed=1", "train.seed=2"], "train.seed is given twice"),
        (["train.steps=1"], "train.steps is given twice"),
        (["train.seed"], "is no axis"),
        (["train.seed="], "is no axis"),
        (["train.seed=1,,2"], "is no axis"),
        (["job.nodes=1,2"], "job.nodes is one for all runs"),
        (["run.directory=a,b"], "run.directory is one for all runs"),
        (["train.sede=1,2"], "train.sede: no such key"),
        (["train.seed=1,x"], "train.seed: 'x' is not allowed"),
        (["mesh.sequence=1,2"], "no multiple of mesh.tensor"),
    ],
)
def test_a_bad_axis_is_refused_before_anything_is_queued(axes, what, tmp_path, place, slurm):
    with pytest.raises(UserError, match=what):
        sweep.submit(str(write_config(tmp_path)), ["train.steps=6"], axes)
    assert not slurm.submitted
    assert not place.exists()


def test_commas_in_brackets_and_quotes_belong_to_a_value():
    axes = ["data.length_schedule=[{from_step: 0, length: 16}],[]", 'run.wandb_project="a,b",c']
    assert sweep.grid(axes) == [
        ("data.length_schedule=[{from_step: 0, length: 16}]", 'run.wandb_project="a,b"'),
        ("data.length_schedule=[{from_step: 0, length: 16}]", "run.wandb_project=c"),
        ("data.length_schedule=[]", 'run.wandb_project="a,b"'),
        ("data.length_schedule=[]", "run.wandb_project=c"),
    ]


def test_a_sweep_has_no_pipeline(tmp_path, slurm, capsys):
    assert _titans(write_config(tmp_path), "--sweep", RATES, "--pipeline") == 2
    assert "a sweep has no pipeline" in capsys.readouterr().err


def test_an_element_that_is_none_is_refused(tmp_path, place, slurm):
    assert _titans(write_config(tmp_path), "--sweep", RATES) == 0
    with pytest.raises(UserError, match="run 2 of 2"):
        sweep.member(place / "sweep.json", 2)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"format": "x", "runs": []})])
def test_a_damaged_list_of_runs_is_told(text, tmp_path):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match="the sweep cannot be read"):
        sweep.member(tmp_path / "sweep.json", 0)
