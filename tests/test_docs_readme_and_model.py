"""What the README and the page on the model show, works."""

import re
import shlex
from pathlib import Path

import yaml

from titans_pretrain import config
from titans_pretrain.cli import _parser

ROOT = Path(config.__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_models_python_runs(capsys):
    (code,) = blocks("docs/model.md", "python")
    exec(compile(code, "docs/model.md", "exec"), {})
    assert "torch.Size([2, 30])" in capsys.readouterr().out


def test_the_readmes_run_loads_and_trains_as_many_tokens_as_the_paper():
    text, jobs = blocks("README.md", "yaml")
    run = config.resolve(yaml.safe_load(text) | yaml.safe_load(jobs), source="README.md")
    assert run.job.ranks == 32
    tokens = run.train.steps * run.train.global_batch_size * run.data.sequence_length
    assert 14.9e9 < tokens < 15.1e9


def test_every_command_of_the_readme_parses():
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("titans ")]
    assert {words[0] for words in commands} == {
        "data",
        "plan",
        "train",
        "eval",
        "export",
        "generate",
        "report",
        "doctor",
        "submit",
        "status",
    }
    for words in commands:
        assert callable(_parser().parse_args(words).verb)
