"""One node's preflight with a made-up network: ``lone_node.py SCRIPT TASK``.

SCRIPT is what stands for the processes that join: Python that has ``tell(**found)``.
"""

import sys

from launchers import preflight_node

HEAD = """
import json, os, sys, time
place = json.loads(sys.argv[1])
rows = os.fdopen(place["pipe"], "w")
def tell(**found):
    rows.write(json.dumps(found) + "\\n")
    rows.flush()
"""

script = sys.argv.pop(1)
preflight_node.FABRIC = (sys.executable, "-c", HEAD + script)
preflight_node.main()
