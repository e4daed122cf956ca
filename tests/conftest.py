"""What all tests rely on."""

import signal

# Under nohup, processes ignore the hang-up, and hand that on to all they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
