"""A SLURM that only remembers what it was asked, and runs to submit to it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tiny import MODEL

from launchers import slurm_refusals, slurm_utils
from titans_pretrain import config as run_config
from titans_pretrain.checkpoint.manifest import record_file
from titans_pretrain.checkpoint.manifest import write as write_manifest
from titans_pretrain.errors import TitansError
from titans_pretrain.files import write_json


def job_of(number, name, state="PENDING"):
    array = number.partition("_")[0] if "_" in number else ""
    empty = {"user": "me", "reason": "", "restarts": 0, "nodelist": "", "partition": "main"}
    times = dict.fromkeys(("submitted", "start_time", "end_time", "seconds_left"))
    rest = {"dependency": "", "batch_host": ""}
    return slurm_utils.Job(
        id=number, number=number, array=array, name=name, state=state, **empty, **times, **rest
    )


@dataclass
class FakeSlurm:
    """What was asked of SLURM."""

    submitted: list = field(default_factory=list)
    tested: list = field(default_factory=list)
    waits: list = field(default_factory=list)
    cancelled: list = field(default_factory=list)
    known: list = field(default_factory=list)
    refuse_stage: str = ""
    partitions: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    next_id: int = 11

    def install(self, monkeypatch):
        for name in ("submit", "test_only", "jobs", "job", "cancel", "available"):
            monkeypatch.setattr(slurm_utils, name, getattr(self, name))
        monkeypatch.setattr(slurm_utils, "settings", lambda: self.settings)
        monkeypatch.setattr(slurm_refusals, "partitions", lambda: self.partitions)

    def available(self):
        return True

    def submit(self, script, options=()):
        if Path(script).stem == self.refuse_stage:
            raise TitansError("SLURM refused: no", where="sbatch", fix="ask")
        text = Path(script).read_text()
        number, self.next_id = str(self.next_id), self.next_id + 1
        self.submitted.append((Path(script).stem, list(options)))
        self.known.append(job_of(number, _name(text)))
        return number

    def test_only(self, script, options=(), **more):
        self.tested.append(Path(script).stem)
        return self.waits

    def jobs(self, ids=None, *, user=None):
        return [job for job in self.known if ids is None or {job.id, job.array} & set(ids)]

    def job(self, number):
        return next((job for job in self.known if job.id == number), None)

    def cancel(self, number, **more):
        self.cancelled.append(number)

    def end_all(self):
        self.known = [job_of(job.id, job.name, "COMPLETED") for job in self.known]


def _name(text):
    lines = text.splitlines()
    return next(line.split("=", 1)[1] for line in lines if line.startswith("#SBATCH --job-name="))


def write_config(root, name="run", **sections):
    """The file of a tiny run whose manifest is there."""
    manifest = root / "data" / "manifest.json"
    manifest.parent.mkdir(exist_ok=True)
    write_json(manifest, {"fingerprint": "f" * 64})
    base = {
        "model": dict(MODEL),
        "data": {"manifest": str(manifest), "sequence_length": 32},
        "train": {"steps": 6, "global_batch_size": 4, "learning_rate": 0.01},
        "checkpoint": {"every": 2},
        "run": {"directory": str(root / name)},
    }
    for section, values in sections.items():
        base[section] = base.get(section, {}) | values
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(base))
    return file


def write_checkpoint(file, run, step):
    """What a run of that many steps leaves, as far as submission looks at it."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(run_config.dump(run_config.load(file)))
    place = run / "checkpoints" / f"step-{step}"
    place.mkdir(parents=True)
    (place / "state.json").write_text("{}")
    facts = {"format": "titans-checkpoint/1", "step": step}
    write_manifest(place, [record_file(place, "state.json")], facts)
    write_json(run / "data.json", {"fingerprint": "f" * 64})


def write_export(out, step):
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    write_manifest(out, [record_file(out, "config.json")], {"step": step})


def rows(run):
    path = run / "jobs" / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
