"""The batch process of a test's job: ``preflight_job.py CONFIG VERDICT [OVERRIDE...]``."""

import dataclasses
import os
import sys
from pathlib import Path

from launchers.preflight import check
from launchers.slurm_utils import allocation
from titans_pretrain import config
from titans_pretrain.files import write_json

path, verdict, *overrides = sys.argv[1:]
found = check(allocation(os.environ), config.load(path, overrides), config_path=Path(path))
write_json(Path(verdict), dataclasses.asdict(found) | {"suspects": found.suspects})
