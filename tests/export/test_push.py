"""``titans export --push``, with the Hub's own client against a stand-in of the Hub."""

from pathlib import Path

import hub_server
import huggingface_hub
import pytest
from hub_server import TOKEN

from titans_pretrain import cli
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import huggingface, push


@pytest.fixture
def hub(monkeypatch):
    with hub_server.serving(monkeypatch) as hub:
        yield hub


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Stands in for an exported model; ``titans export`` finds it done."""
    directory = tmp_path / "model"
    directory.mkdir()
    names = ("README.md", "config.json", "model.safetensors", "modeling_titans.py")
    for name in names:
        (directory / name).write_text(f"---\ntags: []\n---\n{name}")
    manifest.write(directory, [manifest.record_file(directory, name) for name in names], {})
    done = huggingface.Exported(Path("RUN"), is_new=False)
    monkeypatch.setattr(huggingface, "export", lambda *_, **__: done)
    yield directory
    assert {path.name for path in directory.iterdir()} >= {*names, "manifest.json"}


def test_every_file_comes_to_a_new_repository(hub, model, capfd):
    assert cli.main(["export", "RUN", str(model), "--push", "lab/titans"]) == 0
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    assert hub.repositories == {"lab/titans": files}
    assert hub.private == set()
    told = capfd.readouterr()
    assert f"{model}: is there already, from RUN; every byte is as it was made" in told.out
    assert f"pushed to {hub.endpoint}/lab/titans" in told.out
    assert TOKEN not in told.out + told.err
    assert f"Bearer {TOKEN}" in hub.tokens


def test_a_second_push_replaces_and_takes_outdated_weights_away(hub, model):
    hub.repositories["lab/titans"] = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"old",
        "config.json": b"old",
        "LICENSE": b"theirs",
        "model-of-another-kind.safetensors": b"theirs",
    }
    push.push(model, "lab/titans")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    theirs = {"LICENSE": b"theirs", "model-of-another-kind.safetensors": b"theirs"}
    assert hub.repositories["lab/titans"] == files | theirs


def test_what_the_manifest_does_not_name_is_told_and_not_pushed(hub, model, capfd):
    names = {path.name for path in model.iterdir()}
    (model / "notes.txt").write_text("mine")
    (model / "optimizer").mkdir()
    (model / "optimizer" / "config.json").write_text("mine")
    push.push(model, "lab/titans")
    assert hub.repositories["lab/titans"].keys() == names
    told = capfd.readouterr().err
    for stray in ("notes.txt", "optimizer"):
        assert f"{model / stray} is not of the export, and not pushed" in told


def test_a_damaged_export_is_not_pushed(hub, model):
    (model / "model.safetensors").write_text("other")
    with pytest.raises(TitansError, match=r"the export is damaged: model\.safetensors"):
        push.push(model, "lab/titans")
    assert hub.repositories == {}


def test_a_private_repository_is_made_and_a_public_one_is_not_pushed_to_in_its_place(hub, model):
    push.push(model, "mine", private=True)
    assert hub.private == {"me/mine"}
    push.push(model, "mine", private=True)
    hub.repositories["lab/open"] = {}
    with pytest.raises(UserError, match="lab/open is there already, and public"):
        push.push(model, "lab/open", private=True)
    assert hub.repositories["lab/open"] == {}


@pytest.mark.parametrize("repo", ["a/b/c", "white space", "", "-x", "me/.git"])
def test_a_bad_name_is_refused_before_the_export(hub, model, repo, monkeypatch, capfd):
    monkeypatch.setattr(huggingface, "export", lambda *_, **__: pytest.fail("it began"))
    assert cli.main(["export", "RUN", str(model), f"--push={repo}"]) == 2
    assert "is no name of a repository" in capfd.readouterr().err


def test_without_a_token_the_export_does_not_begin(hub, model, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(huggingface, "export", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert cli.main(["export", "RUN", str(model), "--push", "lab/titans"]) == 2
    assert "there is no token" in capfd.readouterr().err


def test_private_without_push_is_a_mistake(model, capfd):
    assert cli.main(["export", "RUN", str(model), "--private"]) == 2
    assert "--private says nothing without --push" in capfd.readouterr().err


def test_a_token_that_is_not_accepted_is_not_told(hub, model, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert cli.main(["export", "RUN", str(model), "--push", "lab/titans"]) == 2
    told = capfd.readouterr()
    assert "does not accept the token" in told.err
    assert "the export is there" in told.err
    assert "hf_wrong" not in told.out + told.err


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (403, UserError, "may not write there"),
        (400, TitansError, "the Hub refuses: Bad request .*refused"),
    ],
)
def test_what_the_hub_refuses_is_told(hub, model, status, kind, message):
    hub.refuse = status
    with pytest.raises(kind, match=message) as caught:
        push.push(model, "lab/titans")
    assert type(caught.value) is kind


def test_a_network_that_is_down_is_told(hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TitansError, match=r"was not pushed: the Hub was not reached") as caught:
        push.push(model, "lab/titans")
    assert caught.value.exit_code == 1


def test_what_fails_elsewhere_is_not_laid_on_the_network(hub, model, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
    with pytest.raises(TitansError, match=r"client failed: PermissionError: .*model.safetensors"):
        push.push(model, "lab/titans")
