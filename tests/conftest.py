"""What all tests rely on."""

import os
import signal
import tempfile

import hypothesis

# Under nohup, processes ignore the hang-up, and hand that on to all they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# transformers copies the code of models it loads: not into the user's cache, and all to one place.
_CODE = tempfile.TemporaryDirectory(prefix="titans-modules-")
os.environ["HF_MODULES_CACHE"] = _CODE.name

# A machine may be busy.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
