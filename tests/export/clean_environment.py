"""A virtual environment that holds only what a user of an exported model has."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def make(directory: Path) -> Path:
    """The interpreter of an environment with symbolic links to PACKAGES and what they need."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    for name in _closure():
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            source, link = Path(str(found.locate_file(top))), site / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
    return directory / "bin" / "python"


def _closure() -> set[str]:
    known: set[str] = set()
    waiting = list(PACKAGES)
    while waiting:
        name = waiting.pop()
        if name not in known and (needs := _requirements(name)) is not None:
            known.add(name)
            waiting += needs
    return known


def _requirements(name: str) -> list[str] | None:
    """What a package needs on this machine, no extras; None if it is not installed."""
    try:
        requirements = [Requirement(text) for text in distribution(name).requires or ()]
    except PackageNotFoundError:
        return None
    return [
        wanted.name
        for wanted in requirements
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    ]
