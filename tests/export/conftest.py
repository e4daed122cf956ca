import contextlib
import io
import sys
from types import SimpleNamespace

import pytest
from exported_model import exported, run  # noqa: F401

from titans_pretrain.baselines import gpu_packages
from titans_pretrain.export import huggingface, reload, verification


@pytest.fixture
def proven_here(monkeypatch) -> None:
    """The proof in this process, as loading torch into another one takes seconds.

    Only that nothing of the project is needed is not shown; the fixture ``exported`` shows it.
    """

    def in_this_process(room, directory, named):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            reload.main(str(room / "request.json"))
        return printed.getvalue()

    monkeypatch.setattr(verification, "_run", in_this_process)
    monkeypatch.setattr(verification, "PROJECT", "no project")
    monkeypatch.setattr(verification, "SPAN", 64)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in gpu_packages.NAMES:  # which the proof hides
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def unproven(monkeypatch) -> SimpleNamespace:
    """Exports without the clean process, for tests of what is written."""
    calls = SimpleNamespace(count=0)

    def skip(*_):
        calls.count += 1

    monkeypatch.setattr(huggingface.verification, "verify", skip)
    return calls
