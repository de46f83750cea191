"""A tracker under load for minutes: 1,000 clients, some of them rude, and a CoinAPI that fails now and then.

    python tests/bench/soak.py [--minutes 2] [--clients 1000]
    python tests/bench/soak.py --storm [--seconds 25] [--scale 1] [--wait 0.7]

Prints figures and exits 1 when a promise broke. The stand-in's price is a counter of its good
answers, so a poll that a client missed is a gap. This process runs the stand-in and the tracker; a second
one has all the clients (soak_clients.py). What --storm does stands in soak_storm.py.
"""

import argparse
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from bench_sides import raise_file_limit
from running import Tracker, wait_for
from soak_source import LONG, SHORT, SLOW_TROUBLES, WITHOUT_DOT, Source
from soak_storm import Storm
from stand_in import KEY

INTERVAL = 0.1  # seconds
MOST_THREADS = 4  # main, poller, server, log: at any number of clients
MEMORY_ROOM = 8 << 20  # bytes of growth after the warm-up, 5 MiB in half an hour: history 0.7, the rest malloc settling
LOG_LINE = re.compile(  # in UTC with its offset, or as Python's logging writes it by default
    r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d\.\d{3}\+00:00| \d\d:\d\d:\d\d,\d{3}) (INFO|NOTICE|WARNING) \S.*"
)


class Run:
    """One soak; `wrong` says what promise broke."""

    def __init__(self, minutes: float, clients: int):
        self.seconds = minutes * 60
        self.clients = clients
        self.wrong: list[str] = []
        self.samples: list[tuple[float, int, int, int]] = []  # seconds, threads, files, memory
        self.bursts = 0

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)

    def go(self) -> bool:
        with Source() as source, Tracker("--interval", f"{INTERVAL}", COIN_API_KEY=KEY, COIN_API_URL=source.url) as t:
            wait_for(lambda: source.good > 3)
            before = t.usage()
            crowd = self.start_crowd(t.port)
            warm = min(60.0, self.seconds / 4)
            start = time.monotonic()
            troubles = itertools.cycle(LONG if self.seconds >= 120 else SHORT)
            pause = min(5.0, self.seconds / 25)
            next_trouble, recovered = start + 1.0, source.good
            while (passed := time.monotonic() - start) < self.seconds and t.process.poll() is None:
                threads, files, memory, _ = t.usage()
                self.samples.append((passed, threads, files, memory))
                if time.monotonic() >= next_trouble and source.good >= recovered + 5:
                    name = next(troubles)
                    source.fail(name, 1 if name in SLOW_TROUBLES or "1 s" in name else 1 + self.bursts % 3)
                    self.bursts += 1
                    next_trouble, recovered = time.monotonic() + pause, source.good
                time.sleep(min(0.5, self.seconds / 50))
            usage = t.usage()
            result = self.end(source, t, crowd, before[1])
            self.report(source, t, result, before, warm, usage)
        for line in self.wrong:
            print("WRONG", line)
        print("failed" if self.wrong else "passed")
        return not self.wrong

    def start_crowd(self, port: int) -> "subprocess.Popen[str]":
        program = str(Path(__file__).with_name("soak_clients.py"))
        command = [sys.executable, program, str(port), str(self.clients), str(self.seconds)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self, source: Source, tracker: Tracker, crowd: "subprocess.Popen[str]", files: int) -> dict[str, Any]:
        """Let the last poll arrive, have the clients leave, stop; what the clients saw."""
        source.fail("the end", 1 << 30)
        wait_for(lambda: source.bad["the end"], 30)  # so the good answer before it is published
        time.sleep(1.0)
        self.metrics = metrics(tracker)
        try:
            output, _ = crowd.communicate(f"{source.good}\n", timeout=30)
            result: dict[str, Any] = json.loads(output)
        except (subprocess.TimeoutExpired, ValueError):
            crowd.kill()
            result = {"seen": {}, "wrong": {"the process of the clients ended without a result": 1}}
        try:
            wait_for(lambda: metrics(tracker)["clients"] == 0, 15)
            wait_for(lambda: tracker.usage()[1] <= files, 15)
        except AssertionError:
            pass  # the report tells
        self.after = tracker.usage()
        started = time.monotonic()
        status = tracker.stop(signal.SIGTERM)
        self.check(status == 0, f"exit status {status}")
        self.check(time.monotonic() - started < 2, "took over 2 s to stop")
        return result

    def report(
        self,
        source: Source,
        tracker: Tracker,
        result: dict[str, Any],
        before: tuple[int, int, int, float],
        warm: float,
        usage: tuple[int, int, int, float],
    ) -> None:
        seen = Counter(result["seen"])
        window = max(1.0, warm / 3)
        early = [sample for sample in self.samples if warm <= sample[0] < warm + window]
        late = [sample for sample in self.samples if sample[0] >= self.samples[-1][0] - window]
        rows = [
            ("before any client", *before[:3]),
            (f"after {warm:.0f} s", *map(statistics.median, list(zip(*early, strict=True))[1:])),
            (f"after {self.seconds:.0f} s", *map(statistics.median, list(zip(*late, strict=True))[1:])),
            ("clients gone", *self.after[:3]),
        ]
        print(f"{'':20}{'threads':>10}{'files':>10}{'memory':>12}")
        for name, threads, files, memory in rows:
            print(f"{name:20}{threads:>10.0f}{files:>10.0f}{memory / (1 << 20):>8.1f} MiB")
        most = [max(column) for column in list(zip(*self.samples, strict=True))[1:]]
        print(f"{'at most':20}{most[0]:>10}{most[1]:>10}{most[2] / (1 << 20):>8.1f} MiB")
        cpu = (usage[3] - before[3]) / self.seconds
        print(f"\n{self.clients} clients, {self.seconds:.0f} s, CPU of the tracker {cpu:.0%}")
        print(f"polls: {source.good} good, {source.bad.total()} failed in {self.bursts} bursts")
        print(f"clients: {', '.join(f'{number} {what}' for what, number in seen.items())}")
        print(f"clients dropped: {', '.join(f'{n:.0f} {w}' for w, n in self.metrics.items() if 'dropped' in w)}")
        print(f"messages sent: {self.metrics['messages_sent_total']:.0f}")
        print(f"log: {len(tracker.log)} lines\n")

        for what, times in result["wrong"].items():
            self.check(False, f"{times} times: {what}")
        self.check(rows[2][3] - rows[1][3] < MEMORY_ROOM, "memory grew")
        self.check(most[0] <= MOST_THREADS, f"more than {MOST_THREADS} threads")
        drift = abs(rows[2][2] - rows[1][2])
        self.check(warm < 30 or drift <= self.clients / 20, "other number of files than after the warm-up")
        self.check(self.after[0] <= before[0], "threads left when the clients are gone")
        self.check(self.after[1] <= before[1], "files left when the clients are gone")
        self.check(seen["polls checked"] > self.clients * source.good * 0.1, "too few polls were checked")
        self.check(seen["rude acts"] > 0 and seen["stalls"] > 0 and seen["caught up"] > 0, "nothing rude happened")
        strange = [line for line in tracker.log if not LOG_LINE.fullmatch(line)]
        self.check(not strange, f"log: {strange[:5]}")
        # A burst is a warning and its end; DOT is missed and back; the start and the stop have two each.
        lines = 2 * (self.bursts + 1) + 2 * (source.good // WITHOUT_DOT) + 4
        self.check(len(tracker.log) <= lines, f"log: more than {lines} lines: {tracker.log}")
        self.check(KEY not in tracker.text, "log: shows the key")


def metrics(tracker: Tracker) -> dict[str, float]:
    with urllib.request.urlopen(f"{tracker.http}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.removeprefix("price_").removeprefix("tracker_").rsplit(" ", 1) for line in lines if line[:1] != "#"]
    return {name: float(value) for name, value in pairs}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--storm", action="store_true", help="half requests, slow readers and pings, all at once")
    parser.add_argument("--seconds", type=float, default=25.0, help="of one storm (default: 25)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the storm's numbers of clients (default: 1)")
    parser.add_argument("--wait", type=float, default=0.7, help="seconds that an honest client may wait (default: 0.7)")
    options = parser.parse_args()
    most = raise_file_limit()
    if options.storm:
        return 0 if Storm(options.seconds, options.scale, options.wait, most).go() else 1
    return 0 if Run(options.minutes, options.clients).go() else 1


if __name__ == "__main__":
    sys.exit(main())
