"""Models whose class an installed package has: not transformers, not this project."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import UserError


def model_class(directory: Path, *, trusted: bool) -> Any:
    """The class that an export names, of a package that is imported for it; None of other models.

    Args:
        directory: the model.
        trusted: whether the package may run; one that runs already needs no such word.

    Raises:
        UserError: the package may not run, is not installed, or does not have the class.
        TitansError: the export's manifest is damaged.
    """
    told = manifest.read(directory) if (directory / manifest.NAME).exists() else {}
    name = str(told.get("training", {}).get(foreign.KEY))
    package, where = foreign.package(name), str(directory)
    if package is None:
        return None
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise UserError(
            f"the model is {name}, and the package {package!r} is not installed",
            where=where,
            fix=f"install {package}",
        )
    if name.partition(":")[0] not in sys.modules and not trusted:
        raise UserError(
            f"the model is {name}: code of the installed package {package!r}",
            where=where,
            fix=f"add --trust-remote-code if {package} may run; in Python, import it before",
        )
    try:
        return foreign.classes(name)[0]
    except UserError as error:
        fix = f"install the {package} that the model was trained with, and what that needs"
        raise UserError(error.what, where=where, fix=fix) from None


def check_known(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a kind of model that neither transformers nor the directory has.

    Args:
        settings: the model's ``config.json``.
        where: the model's directory.
    """
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING and not settings.get("auto_map"):
        raise UserError(
            f"transformers knows no model_type {kind!r}, and the model brings no code",
            where=where,
            fix="give what titans export wrote, which names a package, or update transformers",
        )
