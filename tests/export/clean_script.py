"""Run a module of checks on exported models, in an environment without the project.

Arguments: the module, and exported directories, each with its reference beside. Prints one JSON
object: which foreign packages can be imported, and per directory and check what failed, or "".
"""

import importlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path

FOREIGN = ("titans_pretrain", "data_prep", "sentencepiece", "deepspeed", "datasets")


def main(name: str, *directories: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    module = importlib.import_module(name)
    found = {"importable": [name for name in FOREIGN if importlib.util.find_spec(name)]}
    for directory in map(Path, directories):
        subject = module.Subject(directory, directory.with_suffix(".safetensors"))
        found[directory.name] = {
            name: _told(check, subject) for name, check in module.CHECKS.items()
        }
    print(f"\n{json.dumps(found)}")


def _told(check, subject) -> str:
    try:
        check(subject)
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
