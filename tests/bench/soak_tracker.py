"""`tracker.py` with an hour of history behind it, so that `/history` is more than the sockets' buffers take."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import price_server
import tracker
from coin_api import PriceUpdate

HOUR = 3600  # seconds
SPACING = 4  # seconds between two prices; no server keeps more of them
PAST = "0.0"  # the time of these prices, in the soak's own form


class WithHistory(tracker.PriceServer):
    def __init__(self, assets: tuple[str, ...], *arguments: Any, **options: Any):
        self.shift = 0.0  # seconds that its clocks are behind
        clocks = {name: self.shifted(name) for name in ("time", "monotonic")}
        if hasattr(price_server, "time"):  # when the price server was one module, it took no clocks
            price_server.time = SimpleNamespace(**(vars(time) | clocks))
        else:
            options |= {"wall_clock": clocks["time"], "clock": clocks["monotonic"]}
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
