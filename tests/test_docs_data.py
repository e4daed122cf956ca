import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import estimate, plan
from data_prep.forecast import RATES, amount, duration, size

PAGE = Path(__file__).resolve().parent.parent / "docs/data.md"
JOBS = ["tokenizer", "plan", "prepare", "status", "merge", "verify", "inspect", "at-step"]
# Files, bytes, rows and GPT-2 tokens of FineWeb-Edu, and Llama-2 tokens for each of GPT-2's.
FINEWEB_EDU = {
    "sample-10BT": (14, 28_518_193_415, 9_672_101, 10e9),
    "sample-100BT": (140, 286_394_522_604, 97_270_686, 100e9),
    "sample-350BT": (472, 998_102_051_512, 340e6, 350e9),
    "default": (2410, 4_522_727_684_984, 1.53e9, 1.58e12),
}
RATIO = 1.146


def blocks():
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def cells(heading):
    """The rows of a table, by the name in their first cell."""
    table = PAGE.read_text().split(heading)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0].strip("`").split("`")[0]: row for row in rows if row[0].startswith("`")}


def test_every_command_of_the_page_runs_as_written(tmp_path):
    assert len(blocks()) >= 11
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    for block in blocks():
        done = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, block + done.stderr
    done = json.loads((tmp_path / "tokens/manifest.json").read_text())
    assert (done["tasks"], done["tokens"] > 10**5) == (3, True)
    assert json.loads((tmp_path / "answers/manifest.json").read_text())["masks"]
    assert (tmp_path / "lengths.png").exists()


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_on_the_page(job):
    assert f"titans data {job}" in PAGE.read_text()


def test_every_option_of_the_page_exists_and_every_option_of_a_plan_is_on_it(capsys):
    from titans_pretrain import cli

    known = {}
    for job in JOBS:
        with pytest.raises(SystemExit):
            cli.main(["data", job, "--help"])
        known[job] = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    sbatch = {"--array", "--cpus-per-task", "--mem", "--time", "--wrap"}
    told = set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text()))
    assert told - set.union(*known.values()) == sbatch
    assert known["plan"] | known["prepare"] <= told | {"--help"}


def test_the_table_of_fineweb_edu_is_computed():
    found = cells("<!-- fineweb-edu: computed by tests/test_docs_data.py -->\n")
    for name, (files, stored, rows, gpt2) in FINEWEB_EDU.items():
        tokens = gpt2 * RATIO
        hours = [tokens / RATES[kind] / 3600 for kind in ("sentencepiece", "fast")]
        assert found[name][1:] == [
            str(files),
            size(stored),
            amount(rows),
            amount(tokens),
            size(2 * tokens * 1.004 + rows * estimate.DOCUMENT_BYTES),
            str(tasks_of(tokens)),
            *(f"{h:.2f}" if h < 1 else f"{h:.2g}" if h < 100 else f"{h:.0f}" for h in hours),
        ]


def test_the_times_of_fineweb_edu_are_computed():
    found = cells("| what | `--array` |")
    for name, (_, _, _, gpt2) in FINEWEB_EDU.items():
        tasks, hours = tasks_of(gpt2 * RATIO), gpt2 * RATIO / RATES["sentencepiece"] / 3600
        seconds, rounds = 3600 * hours / tasks / 8, -(-tasks // (20 * 8))
        assert found[name][1] == f"`0-{tasks - 1}`"
        assert found[name][2] == (
            f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
        )
        minutes = round(rounds * seconds / 60)
        assert found[name][3] == f"{minutes} minute" + "s" * (minutes > 1)


def test_the_example_of_a_plan_is_what_the_command_would_print():
    _, _, _, gpt2 = FINEWEB_EDU["sample-10BT"]
    tokens, page = gpt2 * RATIO, PAGE.read_text()
    hours = {name: tokens / rate / 3600 for name, rate in RATES.items()}
    told = ", ".join(
        f"{hours[name]:.2f} with {name} ({rate / 1e6:g} M tokens/s/core)"
        for name, rate in RATES.items()
    )
    assert f"core-hours  {told}" in page
    time = duration(2 * hours["sentencepiece"] / tasks_of(tokens) / 8 + 0.25)
    assert page.count(f"--array=0-22 --cpus-per-task=8 --mem=5G --time={time}") == 2


def tasks_of(tokens):
    return min(1000, -(-round(tokens) // plan.TASK_TOKENS))
