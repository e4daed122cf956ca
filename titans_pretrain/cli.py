"""The ``titans`` command: one function a verb, each a thin call into the library."""

import argparse
import sys
import traceback
from collections.abc import Sequence

from titans_pretrain import errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code (0, 1, 2 or 75)."""
    options = _parser().parse_args(arguments)
    try:
        return options.verb(options) or errors.DONE
    except errors.TitansError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return errors.FAILED
    except Exception:
        traceback.print_exc()
        return errors.FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titans", description="Pretrain Titans on clusters.")
    parser.add_subparsers(required=True, metavar="VERB")
    return parser


if __name__ == "__main__":
    sys.exit(main())
