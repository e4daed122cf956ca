"""The benchmarks' commands in documentation and Makefile are ones that run."""

import re
import shlex
from pathlib import Path

import pytest

from titans_pretrain import cli, config
from titans_pretrain.bench import memory, memory_targets, model
from titans_pretrain.cli import _parser

ROOT = Path(config.__file__).parent.parent
PAGES = ("docs/performance.md", "docs/parallelism.md", "Makefile")
COMMANDS = [
    (page, line)
    for page in PAGES
    for line in re.findall(
        r"^\s*(?:\$\(BIN\)/)?titans bench (.*)$", (ROOT / page).read_text(), re.M
    )
]


def test_every_benchmark_is_shown_somewhere():
    shown = {shlex.split(line)[0] for _, line in COMMANDS}
    assert shown == {"memory", "model", "data", "wavefront"}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_shown_command_has_options_that_fit(page, line):
    given = _parser().parse_args(["bench", *shlex.split(line, comments=True)])
    assert callable(given.verb)
    if line.startswith("memory"):
        options = memory.Options(**{k: v for k, v in vars(given).items() if k != "verb"})
        assert memory._model(options)
        assert memory_targets.parse(
            options.check, options.lengths, options.peer_limit, options.peers
        ) or not (options.check)
    elif line.startswith("model"):
        models = model.named(given.models, given.override)
        peers = {name: model.equal_transformer(one) for name, one in models.items()}
        assert model._targets(given.check, models, peers) or not given.check


@pytest.mark.parametrize("job", ["memory", "model", "data", "wavefront"])
def test_every_benchmark_has_rounds_and_json(job, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", job, "--help"])
    told = capsys.readouterr().out
    assert "--rounds" in told
    assert "--json FILE" in told
