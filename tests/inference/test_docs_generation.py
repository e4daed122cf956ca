"""The commands and code of docs/generation.md do what they say, in order."""

import contextlib
import json
import re
import shlex
from pathlib import Path

from tokenizer_models import corpus

from titans_pretrain import cli

PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()


def test_the_page_s_commands_and_code_run_in_order(exported, tmp_path, capfd):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "demo").symlink_to(exported)
    (tmp_path / "book.txt").write_text("\n".join(corpus(12)))
    (tmp_path / "second.txt").write_text("\n".join(corpus(3, seed=1)))
    told = {}
    with contextlib.chdir(tmp_path):
        for command in re.findall(r"^    titans (.*)$", PAGE, re.MULTILINE):
            assert cli.main(shlex.split(command)) == 0, command
            told[command] = capfd.readouterr().out
        (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        exec(code, {})
    assert len(told) == 9
    asked = 'generate exported/demo "What came of it?" --memory book.memory --max-new-tokens 20'
    assert told[asked].startswith("What came of it?")
    first, both = (
        int(re.search(r"([\d,]+) tokens read", told[command])[1].replace(",", ""))
        for command in told
        if command.startswith("memorize")
    )
    assert both > first
    assert capfd.readouterr().out.startswith(f"{first} (1, ")
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    assert list(json.loads((tmp_path / "first.memory.json").read_text())["layers"]) == ["0"]


def test_the_table_names_every_number_of_a_layer():
    from titans_pretrain.inference.memory_trace import LayerTrace

    for name in vars(LayerTrace()):
        assert f"`{name}`" in PAGE, name
