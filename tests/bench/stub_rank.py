"""A rank that tells its place, or fails as it is told."""

import json
import os
import sys
import time

options = json.loads(sys.argv[1])
rank = int(os.environ["RANK"])
if options.get("fails") == rank:
    print("rank's reason", file=sys.stderr)
    sys.exit(4)
if "fails" in options:
    time.sleep(600)
print("a greeting")
print(json.dumps([rank, int(os.environ["WORLD_SIZE"]), options["word"]]))
