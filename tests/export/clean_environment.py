"""A virtual environment that holds only what a user of an exported model has."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def make(directory: Path, also: Sequence[str] = (), instead: Sequence[str] = ()) -> Path:
    """The interpreter of an environment with symbolic links to PACKAGES and what they need.

    Args:
        directory: of the environment.
        also: names of further packages.
        instead: requirements to install there in place of what is installed here.

    Raises:
        ConnectionError: what to install cannot be had.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    python = directory / "bin" / "python"
    if instead:
        _install(python, instead)
    (site,) = directory.glob("lib/python*/site-packages")
    own = {canonicalize_name(Requirement(text).name) for text in instead}
    for name in _closure([*PACKAGES, *also]) - own:
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            source, link = Path(str(found.locate_file(top))), site / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
    return python


def oldest(name: str) -> str:
    """The oldest release of a package that the project says it works with, as a requirement."""
    needs = map(Requirement, distribution("titans-pretrain").requires or ())
    (bounds,) = (need.specifier for need in needs if need.name == name)
    (version,) = (bound.version for bound in bounds if bound.operator == ">=")
    return f"{name}=={version}"


def _install(python: Path, requirements: Sequence[str]) -> None:
    options = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConnectionError(done.stderr)


def _closure(names: Sequence[str]) -> set[str]:
    known: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
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
        canonicalize_name(wanted.name)
        for wanted in requirements
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    ]
