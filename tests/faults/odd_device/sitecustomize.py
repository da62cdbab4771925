"""Put first on PYTHONPATH: a device whose clock is off, or whose worker keeps its progress after every step."""

import os
import sys

if off_s := float(os.environ.get("EDGE_CLOCK_OFF_S", "0")):
    import time

    _right = time.time
    time.time = lambda: _right() + off_s

if os.environ.get("EDGE_KEEP_OFTEN") and "edge_runtime.worker.main" in sys.orig_argv:
    from edge_runtime.training import progress

    progress.WRITE_EVERY_S = 0.0
