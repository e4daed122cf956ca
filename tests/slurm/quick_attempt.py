"""`titans attempt`, with a shorter patience than a real run needs."""

import sys

from launchers import evaluation_jobs, steps
from titans_pretrain import cli

steps.LOOK_SECONDS = 0.5
steps.SILENT_SECONDS = 6.0
steps.ENDING_SECONDS = 4.0
steps.KILL_SECONDS = 5.0
evaluation_jobs.LOOK_SECONDS = 0.5
evaluation_jobs.ASK_SECONDS = 1.0
evaluation_jobs.AGAIN_SECONDS = 1.0

if __name__ == "__main__":
    sys.exit(cli.main(["attempt", *sys.argv[1:]]))
