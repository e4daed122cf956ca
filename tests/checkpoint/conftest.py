import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def refuse(monkeypatch) -> Callable[[Path, int], None]:
    """Let the system refuse to open a file with an error number, even to root."""

    def refuse(path: Path, number: int) -> None:
        for module in (builtins, io):
            real = module.open

            def refusing(file, *arguments, real=real, **options):
                if not isinstance(file, int) and Path(os.fsdecode(file)) == path:
                    raise OSError(number, os.strerror(number), str(path))
                return real(file, *arguments, **options)

            monkeypatch.setattr(module, "open", refusing)

    return refuse
