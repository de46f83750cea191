"""Measure what one poll costs with N clients: this server, what people would use instead, and the floor.

    python tests/bench/bench_fanout.py [--clients 100,1000,8000] [--rounds 15] [--sides this,picows] [--quick]
                                 [--before DIR]

Each side is a server process of its own (bench_sides.py) and has a reader process of its own, which
opens the N connections and does nothing but read. A round is one poll: the side sends the same ten
messages to every client, message by message, as its own documentation shows. Its time runs from just
before the first send until the last client has its last byte; all processes stamp with
CLOCK_MONOTONIC, which is one for the machine. All sides stay connected and take turns, so that
noise hits all alike. No side compresses or pings; the messages are made beforehand (this server
makes its own, timed). In a first round, not timed, every client's bytes must be the expected ones.

The floor and the readers are small C programs, compiled at the start. --before takes an earlier checkout
of this program into the same run: `git worktree add ../before COMMIT`.

The table has the median and the worst round, the time as a multiple of this server's, of the earlier
one's and of the floor's (the median of the multiples in each round: what slows the machine for a
while slows both), and what N clients add to the server process: memory (RSS after garbage
collection, connected and after one round) and threads. A side that cannot hold N clients
says why; one whose package is missing is left out and named. The exit status is 1 when any byte was
missing or too many. The last sections run the real `tracker.py`, `ab` (Debian's apache2-utils), and
the past with a year in it (bench_history.py).
Needs Linux, a C compiler, psutil, and for `ws` Node with `npm install --prefix .venv ws`.
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench_sides import BEFORE, ENVIRONMENT, FLOOR, IN_FLIGHT, SIDES, THIS, WS, Side, installed, raise_file_limit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from child import Child, Trouble  # noqa: E402

TIME = "2021-10-20T21:34:13.0000000Z"  # the stand-in's, so that a tracker sends the same bytes
CHUNKS = 4  # parts in which the clients are connected, the sides taking turns
CONNECT_TIMEOUT = 30.0  # seconds for one part, and for a round: those of the readers
ROUND_TIMEOUT = 20.0
BUDGET = 70.0  # seconds of rounds for one N; after it those missing of --rounds are left out
SETTLE = 0.2  # seconds from the last arrival until clients count as idle
PAUSE = 0.02  # seconds between two turns, for what is still on its way, like acknowledgements


# The processes


class Setup(NamedTuple):
    """What all sections run with."""

    messages: Sequence[str]  # one poll
    before: str  # the directory of the earlier checkout
    compiled: dict[str, str]  # the C programs

    def server_command(self, side: Side) -> list[str]:
        if side.name == FLOOR:
            return [self.compiled[FLOOR], self.frames().hex()]
        if side.serve is None:
            return ["node", "--expose-gc", "-e", WS, json.dumps(self.messages)]
        directory = self.before if side.name == BEFORE else str(ROOT)
        return [sys.executable, str(HERE / "bench_sides.py"), side.name, directory, json.dumps(self.messages)]

    def frames(self) -> bytes:
        """The bytes of one poll."""
        return b"".join(bytes([0x81, len(message)]) + message.encode() for message in self.messages)

    def versions(self, sides: Sequence[Side]) -> dict[str, str | None]:
        """Of each side; None for one that is not installed."""
        known = {side.name: installed(side) for side in sides}
        known[FLOOR] = "in C"
        if self.before:
            git = ["git", "-C", self.before, "log", "-1", "--format=%h"]
            known[BEFORE] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        return known


def compile_programs(directory: str) -> dict[str, str]:
    """The paths of the floor and the crowd. Raises CalledProcessError or FileNotFoundError."""
    programs = {name: str(Path(directory) / name) for name in (FLOOR, "crowd")}
    for name, program in programs.items():
        command = ["cc", "-O2", "-Wall", "-Wextra", "-o", program, str(HERE / f"bench_{name}.c"), "-lm"]
        subprocess.run(command, check=True)
    return programs


class Crowd(Child):
    """The reader process with the clients of one server."""

    def __init__(self, stack: ExitStack, setup: Setup, in_flight: int, port: int = 0):
        super().__init__(setup.compiled["crowd"])
        stack.enter_context(self)
        self.setup = setup
        self.in_flight = in_flight
        self.port = port

    def tell(self, do: str, within: float, **options: object) -> dict[str, Any]:
        return self.ask(json.dumps({"do": do} | options), within)

    def connect(self, clients: int, stall: bool = False) -> float:
        """Seconds it took."""
        options = {"port": self.port, "clients": clients, "in_flight": self.in_flight, "stall": stall}
        return float(self.tell("connect", CONNECT_TIMEOUT * 2 + 10, **options)["seconds"])

    def drain(self, quiet: float = 0.2, seconds: float = 10.0) -> None:
        self.tell("drain", seconds + 10, quiet=quiet, seconds=seconds)

    def expect(self, check: bool = False) -> None:
        """Back as soon as the reader waits for a round, which `receive` then tells; check: byte by byte."""
        frames = self.setup.frames()
        self.tell("round", ROUND_TIMEOUT, poll=len(frames), expected=frames.hex() if check else "")


class Contender:
    """One side, its server starting, and what was measured of it so far."""

    def __init__(self, stack: ExitStack, side: Side, setup: Setup):
        self.name = side.name
        self.server = stack.enter_context(Child(*setup.server_command(side), **ENVIRONMENT))
        self.crowd = Crowd(stack, setup, side.in_flight)
        self.memory = 0.0  # bytes per client
        self.threads = 0  # more than without clients
        self.connecting = 0.0  # seconds
        self.times: list[float] = []  # seconds from the start of a round until the last client had its last byte
        self.p99: list[float] = []  # seconds until 99 % of the clients had theirs
        self.reason = ""  # why it is out of the race
        self.failed = False  # it is out because it lost bytes

    def start(self) -> None:
        """Wait until the server serves."""
        self.crowd.port = self.server.receive()["port"]
        self.before = self.usage()

    def usage(self) -> tuple[int, int]:
        """Bytes of memory, threads."""
        self.server.ask("collect")
        import psutil

        process = psutil.Process(self.server.process.pid)
        return process.memory_info().rss, process.num_threads()

    def connect(self, clients: int) -> None:
        self.connecting += self.crowd.connect(clients)

    def weigh(self, clients: int) -> None:
        """Note what the clients cost, once the server has all of them and they have had a poll."""
        deadline = time.monotonic() + 10
        while (known := self.server.ask("collect")["clients"]) != clients:
            if time.monotonic() > deadline:
                raise Trouble(f"knows {known:,} of {clients:,} clients")
            time.sleep(0.05)
        self.round(check=True)
        time.sleep(SETTLE)
        after = self.usage()
        self.memory = (after[0] - self.before[0]) / clients
        self.threads = after[1] - self.before[1]

    def round(self, check: bool = False) -> None:
        self.crowd.expect(check)
        start = self.server.ask("send")["start"]
        end = self.crowd.receive()
        if not check:
            self.times.append(end["last"] - start)
            self.p99.append(end["p99"] - start)
        time.sleep(PAUSE)


def fan_out(sides: Sequence[Side], setup: Setup, clients: int, rounds: int) -> list[Contender]:
    """All sides with this many clients, taking turns."""
    with ExitStack() as stack:
        contenders = [Contender(stack, side, setup) for side in sides]
        racing = list(contenders)

        def each(step: Callable[[Contender], None], must: bool = True) -> None:
            """Everyone's next turn; who fails is out. must: it has failed the benchmark too."""
            racing[:] = racing[1:] + racing[:1]  # nobody is always behind the same neighbour
            for contender in list(racing):
                try:
                    step(contender)
                except Trouble as trouble:
                    contender.reason = f"{trouble}; {contender.server.last_error()}".rstrip("; ")
                    contender.failed = must or contender.name == THIS
                    contender.server.process.kill()
                    contender.crowd.process.kill()
                    racing.remove(contender)

        each(Contender.start)
        for chunk in range(CHUNKS):
            share = clients * (chunk + 1) // CHUNKS - clients * chunk // CHUNKS
            each(lambda contender, share=share: contender.connect(share), must=False)  # type: ignore[misc]
        each(lambda contender: contender.weigh(clients))
        deadline = time.monotonic() + BUDGET
        for number in range(rounds):
            if racing and (number < 3 or time.monotonic() < deadline):
                each(Contender.round)
        return contenders


# What comes out


def print_table(title: str, head: Sequence[str], *rows: Sequence[str], notes: Sequence[str] = ()) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print(f"### {title}\n")
    for row in (head, ["-" * width for width in widths], *rows):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), "|")
    print("".join(f"\n{note}\n" for note in notes), flush=True)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def multiple(numbers: Sequence[float], others: Sequence[float]) -> float:
    """The median of how many times the other each is, measured in the same turn."""
    return statistics.median(number / other for number, other in zip(numbers, others, strict=True))


def compare(contenders: Sequence[Contender], versions: dict[str, str | None], clients: int, messages: int) -> None:
    """The table of one N."""
    rows = []
    sound = {each.name: each for each in contenders if not each.reason}
    bases = [sound[name] for name in (THIS, BEFORE, FLOOR) if name in sound]
    for each in contenders:
        name = f"{each.name} {versions[each.name]}".rstrip()
        if each.reason:
            rows.append([name, "FAILED" if each.failed else "cannot", *[""] * (5 + len(bases))])
            continue
        median = statistics.median(each.times)
        row = [name, milliseconds(median), milliseconds(max(each.times))]
        row += [f"{multiple(each.times, base.times):.2f}" for base in bases]
        row += [f"{clients * messages / median:,.0f}", f"{each.memory / 1024:.2f}", f"{each.threads:+,d}"]
        rows.append([*row, f"{clients / each.connecting:,.0f}"])
    rounds = max(len(each.times) for each in contenders)
    head = ["side", "median ms", "worst ms", *(f"x {base.name.split()[0]}" for base in bases)]
    head += ["messages/s", "KiB/client", "threads", "accepted/s"]
    notes = [f"{each.name}: {each.reason}." for each in contenders if each.reason]
    print_table(f"{clients:,} clients, {rounds} rounds", head, *rows, notes=notes)


def show_requests(setup: Setup, rounds: int, requests: int) -> None:
    """What `ab` makes of `/prices/BTC`, this server and the one before in turns."""
    if shutil.which("ab") is None:
        print("Left out: requests a second, as `ab` is not installed (Debian's apache2-utils).\n")
        return
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        contenders = [Contender(stack, side, setup) for side in SIDES[: 2 if setup.before else 1]]
        for contender in contenders:
            contender.start()
            contender.server.ask("send")  # so that there is a price
            ask_for_price(contender.crowd.port, requests)  # not counted
        for _ in range(rounds):
            for contender in contenders:
                rates.setdefault(contender.name, []).append(ask_for_price(contender.crowd.port, requests))
    rows = []
    for name, each in rates.items():
        row = [name, f"{statistics.median(each):,.0f}", f"{min(each):,.0f}", f"{max(each):,.0f}"]
        rows.append([*row, *([f"{multiple(each, rates[BEFORE]):.2f}"] if setup.before else [])])
    head = ["side", "median requests/s", "least", "most", *(["x before"] if setup.before else [])]
    print_table(f"`ab -c 50` asks for /prices/BTC, {rounds} times {requests:,} requests", head, *rows)


def ask_for_price(port: int, requests: int) -> float:
    """Requests a second; Trouble unless each was answered with 200."""
    command = ["ab", "-q", "-c", "50", "-n", str(requests), f"http://127.0.0.1:{port}/prices/BTC"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        raise Trouble(f"ab: {requests} requests took over 120 s") from None
    found = {
        name: re.search(rf"^{name}: +([\d.]+)", result.stdout, re.MULTILINE)
        for name in ("Complete requests", "Failed requests", "Non-2xx responses", "Requests per second")
    }
    numbers = {name: float(match[1]) for name, match in found.items() if match}
    right = {"Complete requests": requests, "Failed requests": 0}
    if not right.items() <= numbers.items() or numbers.get("Non-2xx responses"):
        raise Trouble(f"ab: {numbers or result.stderr.strip()[-200:]}")
    return numbers["Requests per second"]


def show_stalled(setup: Setup, clients: int, rounds: int) -> None:
    """Two of this server take turns, with as many clients that read; one has others that never do."""
    stalled = clients // 10
    with ExitStack() as stack:
        calm, hindered = (Contender(stack, SIDES[0], setup) for _ in range(2))
        calm.start()
        hindered.start()
        hindered.crowd.connect(stalled, stall=True)
        for _ in range(1_000):  # until all is full that the kernel keeps for them
            hindered.server.ask("send")
            if hindered.server.ask("collect")["behind"] == stalled:
                break
        calm.server.ask("send")
        for contender in (calm, hindered):
            contender.crowd.connect(clients - stalled)
            contender.crowd.drain()
            contender.round(check=True)
        for _ in range(rounds):
            calm.round()
            hindered.round()
        behind = int(hindered.server.ask("collect")["behind"])
    before, after = statistics.median(calm.p99), statistics.median(hindered.p99)
    print_table(
        "This server: one client in ten never reads",
        ["clients that read", "stalled ones", "99th percentile ms", "change"],
        [f"{clients - stalled:,}", "0", milliseconds(before), ""],
        [f"{clients - stalled:,}", f"{behind:,}", milliseconds(after), f"{after / before - 1:+.1%}"],
    )


def start_tracker(stack: ExitStack, setup: Setup, interval: str) -> tuple[Any, Any, Crowd]:
    """A CoinAPI stand-in, a real tracker that polls it, and its clients-to-be."""
    from running import Tracker
    from stand_in import KEY, StandIn

    coin_api = stack.enter_context(StandIn())
    tracker = stack.enter_context(Tracker("--interval", interval, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url))
    return coin_api, tracker, Crowd(stack, setup, IN_FLIGHT, tracker.port)


def show_tracker(setup: Setup, clients: int, polls: int, seconds: float) -> None:
    with ExitStack() as stack:
        coin_api, _, crowd = start_tracker(stack, setup, "0.5")
        crowd.connect(clients)
        crowd.drain()
        times = []
        for number in range(1 + polls):
            crowd.expect(check=number == 0)
            times.append(crowd.receive()["last"] - coin_api.answered_at)
    with ExitStack() as stack:
        (_, empty, _), (_, full, crowd) = (start_tracker(stack, setup, "5") for _ in range(2))
        crowd.connect(clients)
        crowd.drain()
        before, start = [tracker.usage()[3] for tracker in (empty, full)], time.monotonic()
        crowd.drain(quiet=math.inf, seconds=seconds)
        passed = time.monotonic() - start
        used = [tracker.usage()[3] - cpu for tracker, cpu in zip((empty, full), before, strict=True)]
    median, worst = statistics.median(times[1:]), max(times[1:])
    print_table(
        f"`tracker.py` and {clients:,} clients",
        ["what", "measured"],
        ["CoinAPI's last byte until the last client's, median ms", milliseconds(median)],
        [f"the worst of {polls} polls, ms", milliseconds(worst)],
        ["CPU at an interval of 5 s", f"{used[1] / passed:.2%} of a core"],
        ["the same without clients", f"{used[0] / passed:.2%} of a core"],
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", default="100,1000,8000", metavar="N,N", help="default: 100,1000,8000")
    parser.add_argument("--rounds", type=int, default=15, help="timed polls for each number of clients (default: 15)")
    parser.add_argument("--sides", default="", metavar="this,floor", help="first letters of the sides (default: all)")
    parser.add_argument("--before", default="", metavar="DIR", help="an earlier checkout of this program, to compare")
    parser.add_argument("--quick", action="store_true", help="measure tracker and requests for a moment only")
    options = parser.parse_args(argv)
    if options.before and not (Path(options.before) / "tracker.py").is_file():
        parser.error(f"--before {options.before}: no tracker.py there")
    return options


def choose(options: argparse.Namespace, versions: dict[str, str | None]) -> list[Side]:
    """The sides that are asked for and can run."""
    wanted = tuple(options.sides.split(","))
    sides = [side for side in SIDES if (options.before if side.name == BEFORE else side.name.startswith(wanted))]
    for side in list(sides):
        if versions[side.name] is None:
            sides.remove(side)
            print(f"Left out: {side.name}, which is not installed.")
    return sides


def measure(setup: Setup, options: argparse.Namespace) -> bool:
    """All sections; whether every client got every byte."""
    from bench_history import show_history

    versions = setup.versions(SIDES)
    sides = choose(options, versions)
    print()
    numbers = [int(number) for number in options.clients.split(",")]
    whole = True
    try:
        for clients in numbers:
            contenders = fan_out(sides, setup, clients, options.rounds)
            compare(contenders, versions, clients, len(setup.messages))
            whole &= not any(each.failed for each in contenders)
        show_requests(setup, *((1, 200) if options.quick else (7, 3_000)))
        show_stalled(setup, max(numbers), options.rounds)
        show_tracker(setup, min(max(numbers), 1_000), *((3, 1.0) if options.quick else (20, 20.0)))
        show_history(print_table, 1 if options.quick else 100)
    except Trouble as trouble:
        print(f"FAILED: {trouble}")
        return False
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    from running import ASSETS
    from stand_in import RATES

    from coin_api import PriceUpdate

    options = parse_arguments(argv)
    messages = [PriceUpdate(asset, float(RATES[asset]), TIME).to_json() for asset in ASSETS]
    print(
        f"One poll: {len(messages)} messages, {sum(map(len, messages))} bytes, to each client. "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}."
    )
    with tempfile.TemporaryDirectory() as directory:
        whole = measure(Setup(messages, options.before, compile_programs(directory)), options)
    print("Every client got every byte." if whole else "FAILED: not every client got every byte.")
    return int(not whole)


if __name__ == "__main__":
    raise_file_limit()
    sys.exit(main())
