"""`tracker.py` with an hour of history behind it, so that `/history` is more than the sockets' buffers take."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tracker
from coin_api import PriceUpdate

HOUR = 3600  # seconds
SPACING = 4  # seconds between two prices; no server keeps more of them
PAST = "0.0"  # the time of these prices


class WithHistory(tracker.PriceServer):
    def __init__(self, assets: tuple[str, ...], *arguments: Any, **options: Any):
        self.shift = 0.0  # seconds that its clocks are behind
        options |= {"wall_clock": self.shifted("time"), "clock": self.shifted("monotonic")}
        super().__init__(assets, *arguments, **options)
        for seconds in range(HOUR, 0, -SPACING):
            self.shift = float(seconds)
            self.publish([PriceUpdate(asset, 65_980.1 + seconds, PAST) for asset in assets])
        self.shift = 0.0

    def shifted(self, name: str) -> Any:
        clock = getattr(time, name)
        return lambda: clock() - self.shift


if __name__ == "__main__":
    tracker.PriceServer = WithHistory  # type: ignore[assignment,misc]
    sys.exit(tracker.main())
