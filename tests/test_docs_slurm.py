"""docs/slurm.md: the reference is config_job.py's, its commands parse."""

import re
import shlex
from pathlib import Path

from titans_pretrain import config
from titans_pretrain.cli import _parser

PAGE = Path(__file__).resolve().parents[1] / "docs/slurm.md"


def rows(prefix, group):
    """A row for each key of a section, and of the sections in it."""
    for name, field in group.model_fields.items():
        key, inner = f"{prefix}.{name}", config._group_in(field.annotation)
        by_name = str(field.annotation).startswith("dict")
        if inner is None or field.default is None or by_name:
            default = "required" if field.is_required() else f"`{field.default!r}`"
            yield f"| `{key}` | {default} | {field.description} |"
        if inner is not None:
            yield from rows(f"{key}.STAGE" if by_name else key, inner)


def test_the_reference_is_that_of_config_job_py():
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for section in ("job", "pipeline"):
        lines += rows(section, config.RunConfig.model_fields[section].annotation)
    assert "\n".join(lines) in PAGE.read_text()


def test_every_profile_is_in_the_table():
    named = re.findall(r"^\| `([\w-]+)` \|", PAGE.read_text(), re.MULTILINE)
    assert {path.stem for path in config.CLUSTERS.glob("*.yaml")} <= set(named)


def test_every_command_parses():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("titans ")]
    assert {words[0] for words in commands} == {
        "doctor",
        "submit",
        "status",
        "logs",
        "stop",
        "data",
    }
    for words in commands:
        assert callable(_parser().parse_args(words).verb)
