"""The clock that runs on while the machine sleeps.

How old prices are is measured with it. Deadlines are measured with `time.monotonic`: on Linux it stands still
while the machine sleeps, so that waking does not drop every client at once.
"""

import sys
import time


def boottime() -> float:
    """Seconds since some moment in the past; never set back, and goes on during a suspension."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    if sys.platform == "darwin":  # where time.monotonic stands still
        return time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.monotonic()  # on Windows it goes on
