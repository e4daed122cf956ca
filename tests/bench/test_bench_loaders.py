"""``titans bench data``: the stream, the loaders, the table, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stub_contenders import named

from titans_pretrain import cli
from titans_pretrain.bench import data, loaders
from titans_pretrain.bench.progress import Tell

TOKENS = 2 * data.LEAST_TOKENS


def bench(*arguments):
    return cli.main(["bench", "data", "--tokens", str(TOKENS), "--rounds", "1", *arguments])


@pytest.fixture(scope="module")
def folder():
    with data.stream(data.Options(TOKENS + 5), Tell()) as made:
        yield Path(made)


@pytest.mark.parametrize("name", loaders.READERS)
def test_every_loader_hands_out_every_token_pass_after_pass(folder, name):
    stream = torch.from_numpy(loaders.spans(folder).astype(np.int64))
    read = loaders.READERS[name](folder)
    for _ in range(2):
        parts = list(read())
        assert all(part.dtype == torch.int64 for part in parts)
        found = torch.cat([part.reshape(-1) for part in parts])
        if name.startswith("ours"):  # a target is the token after: the last of all is another's
            assert found.numel() == stream.numel()
        else:
            assert torch.equal(found.sort().values, stream.reshape(-1).sort().values)
    facts, passes = loaders.build({"loader": name, "folder": str(folder)})
    passes["read"]()
    assert facts == {"tokens": TOKENS}


def test_a_loader_that_leaves_tokens_out_fails(folder):
    _, passes = loaders.passes(lambda: [torch.zeros(5)], folder)
    with pytest.raises(ValueError, match=f"5 of {TOKENS} tokens"):
        passes["read"]()


def test_a_table_targets_and_all_figures_as_json(monkeypatch, folder, tmp_path, capsys):
    def quick(name, *_, **__):
        return named(name)

    monkeypatch.setattr(data, "Contender", quick)
    monkeypatch.setattr(data.machine, "contender", lambda *_: named(data.machine.NAME))
    tell, file = Tell(), tmp_path / "result.json"
    options = data.Options(TOKENS, 2, check=1e-9)
    result = data.measure(options, folder, [named("other")], tell, {"other": "another's"})
    data.show(result)
    assert capsys.readouterr().out.count("another's") == 2
    data.figures.write_json(file, result)
    found = json.loads(file.read_text())
    assert set(found) == {"benchmark", "environment", "options", "ceilings", "rows", "checks"}
    assert [row["loader"] for row in found["rows"]] == [*data.TOLD, "other"]
    assert found["rows"][1]["of_raw"] == {"median": 1, "least": 1, "most": 1}
    judged = [one["told"] for one in found["checks"]]
    assert len(judged) == len(data.JUDGED) + 2  # webdataset's and the other's


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (["--tokens", "5"], "--tokens"),
        (["--folder", "/no/such/directory"], "--folder"),
        (["--json", "/no/such/directory/file.json"], "--json"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, where, capsys):
    assert bench(*wrong) == 2
    assert f"where: {where}" in capsys.readouterr().err
