"""The configurations and commands of docs/baselines.md hold."""

import re
import shlex
from pathlib import Path

import yaml

from titans_pretrain import config
from titans_pretrain.baselines import foreign
from titans_pretrain.cli import _parser, main
from titans_pretrain.model.configuration_baseline import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_first_run_loads_and_plans(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama.yaml").write_text(blocks("yaml")[0])
    (commands,) = blocks("bash")
    words = [shlex.split(line)[1:] for line in commands.splitlines()]
    assert main(words[0]) == 0
    assert "llama, 341,099,520 parameters" in capsys.readouterr().out
    assert all(callable(_parser().parse_args(command).verb) for command in words)


def test_every_model_of_the_page_is_one():
    for block in blocks("yaml")[1:]:
        model = yaml.safe_load(block)["model"]
        assert model.items() <= foreign.resolve(model).items()


def test_every_preset_and_mixer_is_named():
    named = set(re.findall(r"`([a-z0-9-]+)-\*`", PAGE))
    of_others = {p.stem.rsplit("-", 1)[0] for p in config.PRESETS.glob("*-170m.yaml")}
    assert named == {name for name in of_others if not name.startswith("titans")}
    assert all(f"`{kind}`" in PAGE for kind in KINDS)
