import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import make_run
from transformers import dynamic_module_utils

from titans_pretrain.export import huggingface, reload, verification


@pytest.fixture(autouse=True, scope="session")
def _no_code_in_the_users_cache(tmp_path_factory):
    """transformers copies the code of models it loads; let it do so elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of a tiny MAC with one checkpoint; not to be changed."""
    return make_run(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory) -> Path:
    """The run's model in Hugging Face's format; not to be changed."""
    out = tmp_path_factory.mktemp("export") / "model"
    huggingface.export(run, out)
    return out


@pytest.fixture
def proven_here(monkeypatch) -> None:
    """The proof in this process, as loading torch into another one takes seconds.

    Only that nothing of the project is needed is not shown; the fixture ``exported`` shows it.
    """

    def run(room, directory):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            reload.main(str(room / "request.json"))
        return printed.getvalue()

    monkeypatch.setattr(verification, "_run", run)
    monkeypatch.setattr(verification, "PROJECT", "no project")
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def unproven(monkeypatch) -> SimpleNamespace:
    """Exports without the clean process, for tests of what is written."""
    calls = SimpleNamespace(count=0)

    def skip(*_):
        calls.count += 1

    monkeypatch.setattr(huggingface.verification, "verify", skip)
    return calls
