"""A tracker under load for minutes: 1,000 clients, some of them rude, and a CoinAPI that fails now and then.

    python tests/bench/soak.py [--minutes 2] [--clients 1000]
    python tests/bench/soak.py --storm [--seconds 25] [--scale 1] [--wait 0.7]

Prints figures and exits 1 when a promise broke. This process runs CoinAPI's stand-in and the tracker; a second one
has all the clients (soak_clients.py). The stand-in's price is a counter of its good answers, so a poll that a client
missed is a gap.

A storm is 5,000 connections that send half a request a byte at a time, 1,000 that ask for /history and never read,
and 20 that ping as fast as they can, all at once. What must hold then: an honest client of an independent library
(`websockets`) never waits longer for a price than two intervals and 0.2 s; the tracker's number of threads never
changes; afterwards its files are back to their number, and the second storm adds under 2 MB.
"""

import argparse
import itertools
import re
import signal
import statistics
import sys
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from bench_sides import raise_file_limit
from child import Clients
from feed import Feed, Lateness
from running import Tracker, wait_for
from soak_source import LONG, SHORT, SLOW_TROUBLES, WITHOUT_DOT, Source
from stand_in import KEY

INTERVAL = 0.1  # seconds
MOST_THREADS = 4  # main, poller, server, log: at any number of clients
MEMORY_ROOM = 8 << 20  # bytes of growth after the warm-up, 5 MiB in half an hour: history 0.7, the rest malloc settling
LOG_LINE = re.compile(  # in UTC with its offset, or as Python's logging writes it by default
    r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d\.\d{3}\+00:00| \d\d:\d\d:\d\d,\d{3}) (INFO|NOTICE|WARNING) \S.*"
)
STORM = (5_000, 1_000, 20)  # connections that send half a request, that never read, that ping
STORM_ROOM = 2_000_000  # bytes of memory that a second storm may add
SPARE_FILES = 200  # of the tracker and of the process with the clients
HERE = Path(__file__).resolve().parent
CLIENTS = str(HERE / "soak_clients.py")
Usage = tuple[int, int, int, float]


class Promises:
    """`wrong` says what promise broke."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)

    def stop(self, tracker: Tracker) -> None:
        started = time.monotonic()
        status = tracker.stop(signal.SIGTERM)
        self.check(status == 0, f"exit status {status}")
        self.check(time.monotonic() - started < 2, "took over 2 s to stop")


class Run(Promises):
    """One soak."""

    def __init__(self, minutes: float, clients: int):
        super().__init__()
        self.seconds = int(minutes * 60)
        self.clients = clients
        self.samples: list[tuple[float, Usage]] = []  # seconds since the start, what the tracker used
        self.bursts = 0

    def go(self) -> None:
        with Source() as source, Tracker("--interval", f"{INTERVAL}", COIN_API_KEY=KEY, COIN_API_URL=source.url) as t:
            wait_for(lambda: source.good > 3)
            before = t.usage()
            with Clients(CLIENTS, "soak", t.port, self.clients, self.seconds) as crowd:
                crowd.receive()  # all have connected
                self.make_trouble(source, t)
                source.fail("the end", 1 << 30)
                wait_for(lambda: source.bad["the end"], 30)  # so the good answer before it is published
                time.sleep(1.0)
                told, result = metrics(t), crowd.ask()
            try:
                wait_for(lambda: metrics(t)["clients"] == 0, 15)
                wait_for(lambda: t.usage()[1] <= before[1], 15)
            except AssertionError:
                pass  # the report tells
            after = t.usage()
            self.stop(t)
            self.report(source, t, told, before, after)
            self.check_clients(source, result)
            self.check_log(source, t)

    def make_trouble(self, source: Source, tracker: Tracker) -> None:
        """Have CoinAPI fail now and then until the time is over, and note what the tracker uses meanwhile."""
        start = time.monotonic()
        troubles = itertools.cycle(LONG if self.seconds >= 120 else SHORT)
        pause = min(5.0, self.seconds / 25)
        next_trouble, recovered = start + 1.0, source.good
        while (passed := time.monotonic() - start) < self.seconds and tracker.process.poll() is None:
            self.samples.append((passed, tracker.usage()))
            if time.monotonic() >= next_trouble and source.good >= recovered + 5:
                name = next(troubles)
                source.fail(name, 1 if name in SLOW_TROUBLES or "1 s" in name else 1 + self.bursts % 3)
                self.bursts += 1
                next_trouble, recovered = time.monotonic() + pause, source.good
            time.sleep(min(0.5, self.seconds / 50))

    def report(self, source: Source, tracker: Tracker, told: dict[str, float], before: Usage, after: Usage) -> None:
        warm = min(60.0, self.seconds / 4)
        window = max(1.0, warm / 3)
        early = [usage for at, usage in self.samples if warm <= at < warm + window]
        late = [usage for at, usage in self.samples if at >= self.samples[-1][0] - window]
        warmed_up, at_the_end = (
            [statistics.median(each) for each in zip(*part, strict=True)] for part in (early, late)
        )
        rows = {"before any client": before, f"after {warm:.0f} s": warmed_up}
        rows |= {f"after {self.seconds} s": at_the_end, "clients gone": after}
        print(f"{'':20}{'threads':>10}{'files':>10}{'memory':>12}")
        for name, (threads, files, memory, _) in rows.items():
            print(f"{name:20}{threads:>10.0f}{files:>10.0f}{memory / (1 << 20):>8.1f} MiB")
        cpu = (self.samples[-1][1][3] - before[3]) / self.seconds
        print(f"\n{self.clients} clients, {self.seconds} s, CPU of the tracker {cpu:.0%}")
        print(f"polls: {source.good} good, {source.bad.total()} failed in {self.bursts} bursts")
        print(f"clients dropped: {', '.join(f'{n:.0f} {w}' for w, n in told.items() if 'dropped' in w)}")
        print(f"messages sent: {told['messages_sent_total']:.0f}; log: {len(tracker.log)} lines")

        self.check(at_the_end[2] - warmed_up[2] < MEMORY_ROOM, "memory grew")
        most = max(usage[0] for _, usage in self.samples)
        self.check(most <= MOST_THREADS, f"more than {MOST_THREADS} threads")
        drift = abs(at_the_end[1] - warmed_up[1])
        self.check(warm < 30 or drift <= self.clients / 20, "other number of files than after the warm-up")
        self.check(after[0] <= before[0], "threads left when the clients are gone")
        self.check(after[1] <= before[1], "files left when the clients are gone")

    def check_clients(self, source: Source, result: dict[str, Any]) -> None:
        seen = Counter(result.get("seen", {}))
        print(f"clients: {', '.join(f'{number} {what}' for what, number in seen.items())}\n")
        for what, times in result.get("wrong", {}).items():
            self.check(False, f"{times} times: {what}")
        last = result.get("last")
        self.check(last == [source.good], f"steady clients saw {last} last, it was {source.good}")
        self.check(seen["polls checked"] > self.clients * source.good * 0.1, "too few polls were checked")
        self.check(seen["rude acts"] > 0 and seen["stalls"] > 0 and seen["caught up"] > 0, "nothing rude happened")

    def check_log(self, source: Source, tracker: Tracker) -> None:
        strange = [line for line in tracker.log if not LOG_LINE.fullmatch(line)]
        self.check(not strange, f"log: {strange[:5]}")
        # A burst is a warning and its end, also for the assets where these have no valid rate; DOT is missed and back;
        # the start and the stop have two each.
        lines = 2 * (self.bursts + 1 + source.bad["no valid rate"]) + 2 * (source.good // WITHOUT_DOT) + 4
        self.check(len(tracker.log) <= lines, f"log: more than {lines} lines: {tracker.log}")
        self.check(KEY not in tracker.text, "log: shows the key")


def metrics(tracker: Tracker) -> dict[str, float]:
    with urllib.request.urlopen(f"{tracker.http}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.removeprefix("price_").removeprefix("tracker_").rsplit(" ", 1) for line in lines if line[:1] != "#"]
    return {name: float(value) for name, value in pairs}


class Storm(Promises):
    """Two storms of this many seconds. wait: seconds that the honest client may wait for a price."""

    def __init__(self, seconds: float, scale: float, wait: float):
        super().__init__()
        self.seconds, self.wait = seconds, wait
        self.numbers = [max(1, round(number * scale)) for number in STORM]

    def go(self) -> None:
        most, needed = raise_file_limit(), sum(self.numbers) + SPARE_FILES
        if 0 < most < needed:
            sys.exit(f"only {most} files may be open (ulimit -n), this needs {needed}: take a smaller --scale")
        with ExitStack() as stack:
            feed = Feed(stack, str(HERE / "soak_tracker.py"))
            self.phase("calm", feed, [0, 0, 0])
            memory = [self.phase(f"storm {number}", feed, self.numbers) for number in (1, 2)]
            self.check(memory[1] - memory[0] < STORM_ROOM, f"the second storm added {memory[1] - memory[0]:,} bytes")
            self.stop(feed.tracker)
            feed.thread.join(5)
            self.check(feed.client.close_code == 1001, f"the honest client was hung up on: {feed.client.close_code}")
            self.check(feed.missed_nothing(), "the honest client missed prices")
            self.check("Traceback" not in feed.tracker.text, "log: a traceback")

    def phase(self, name: str, feed: Feed, numbers: list[int]) -> int:
        """Print a line of figures; the tracker's memory when these clients are gone."""
        began = time.monotonic()
        samples = [feed.usage]
        with Lateness() as lateness, Clients(CLIENTS, "storm", feed.tracker.port, *numbers) as clients:
            clients.receive()  # all have connected
            connected = time.monotonic()
            while time.monotonic() < connected + self.seconds:
                samples.append(feed.tracker.usage())
                time.sleep(0.1)
            result = clients.ask()
        wait_for(feed.is_as_before, 20, f"{name}: threads and files back to their number")
        feed.wait_for_polls(1)
        waited, after = feed.longest_wait(began), feed.tracker.usage()
        threads, files, memory, _ = zip(*samples, after, strict=True)
        late = f"the machine woke sleepers {lateness.longest:.2f} s late"
        print(f"{name}: longest wait {waited:.2f} s ({late})", end=", ")
        print(f"threads {min(threads)}-{max(threads)}, files {max(files)} and then {after[1]}", end=", ")
        print(f"memory {max(memory) / (1 << 20):.1f} MiB and then {after[2] / (1 << 20):.1f} MiB", flush=True)
        print(f"  {', '.join(f'{number:,} {what}' for what, number in result['seen'].items())}", flush=True)
        self.check(min(threads) == max(threads), f"{name}: the number of threads changed")
        self.check(waited <= self.wait, f"{name}: the honest client waited {waited:.2f} s for a price")
        self.check(not result["wrong"], f"{name}: {result['wrong']}")
        self.check(numbers[2] == 0 or result["seen"]["bytes of pings"] > 0, f"{name}: nothing was pinged")
        return after[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--storm", action="store_true", help="half requests, slow readers and pings, all at once")
    parser.add_argument("--seconds", type=float, default=25.0, help="of one storm (default: 25)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the storm's numbers of clients (default: 1)")
    parser.add_argument("--wait", type=float, default=0.7, help="seconds that an honest client may wait (default: 0.7)")
    options = parser.parse_args()
    raise_file_limit()
    run: Run | Storm = Run(options.minutes, options.clients)
    if options.storm:
        run = Storm(options.seconds, options.scale, options.wait)
    run.go()
    for line in run.wrong:
        print("WRONG", line)
    print("failed" if run.wrong else "passed")
    return int(bool(run.wrong))


if __name__ == "__main__":
    sys.exit(main())
