"""Reading data through a cache on the nodes' own disks. No torch here."""

import getpass
import json
import os
from pathlib import Path

from titans_pretrain.config import RunConfig
from titans_pretrain.errors import UserError

SHARED = (
    "local://"  # what fsspec calls a mounted directory; the ranks cache what they read of a URL
)


def overrides(config: RunConfig) -> list[str]:
    """What the ranks' configuration changes for ``job.stage_data``; empty without it.

    Raises:
        UserError: ``job.local_directory`` is not given, or is no absolute path.
    """
    job, data = config.job, config.data
    if not job.stage_data:
        return []
    if not Path(job.local_directory).is_absolute():
        raise UserError(
            f"job.local_directory: {job.local_directory!r} is no directory of the nodes",
            where="job.local_directory",
            fix="give the absolute path of the nodes' scratch disk, or take job.stage_data out",
        )
    changes = [f"data.cache={json.dumps(str(Path(job.local_directory, f'titans-{_user()}')))}"]
    if data.manifest is not None:
        return [f"data.manifest={json.dumps(_shared(data.manifest))}", *changes]
    parts = [{"manifest": _shared(p.manifest), "weight": p.weight} for p in data.mixture]
    return [f"data.mixture={json.dumps(parts)}", *changes]


def _shared(manifest: str) -> str:
    return manifest if "://" in manifest else f"{SHARED}{Path(manifest).absolute()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user that the node's database does not know
        return str(os.getuid())
