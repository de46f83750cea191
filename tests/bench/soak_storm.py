"""Two storms of half requests, slow readers and pings beside an honest client; then thousands in one second.

A storm is 5,000 connections that send half a request a byte at a time, 1,000 that ask for /history and
never read, and 20 that ping flat out, all at once. What must hold then: an honest client of an
independent library (`websockets`) never waits longer for a price than two intervals and 0.2 s; the
tracker's number of threads never changes; afterwards its files are back to their number, and the second
storm adds under 2 MB. And of 6,000 clients that connect within a second, each sending its request 0.3 s
later, all are served.

`Storm` in the first process runs the stand-in and the tracker. Others, which this file is the program
of too, have the clients: `soak_storm.py WHAT PORT [NUMBERS]`.
"""

import json
import selectors
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import psutil
from bench_sides import raise_file_limit
from raw import PING, frame, get, request
from running import Tracker, wait_for
from soak_source import Source
from stand_in import KEY
from swarm import Swarm

INTERVAL = 0.25  # seconds
DRIBBLERS, HISTORY_READERS, PINGERS, HERD = 5_000, 1_000, 20, 6_000
SPARE_FILES = 200  # of the tracker and of the processes with the clients
DRIBBLE = 0.5  # seconds between two bytes: 20 of them until the server's 10 s are over
HALF = request()[:100]
PINGS = frame(PING) * 700
THINK = 0.3  # seconds from a herd client's connection until its request
HERD_TIMEOUT = 30.0  # seconds
SETTLE = 20.0  # seconds until files are back to their number
MEMORY_ROOM = 2_000_000  # bytes that a second storm may add


# Those that mean no good, and those that all come at once


class Visitor:
    """A connection of one kind; `crowd` keeps the selector, the delayed steps and the count of what was seen."""

    kind = ""
    receive_buffer = 0  # bytes, 0 for the default

    def __init__(self, crowd: "Crowd"):
        self.crowd = crowd
        self.life = 0  # which connection this is
        self.open()

    def open(self) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        if self.receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self.sock.connect_ex(("127.0.0.1", self.crowd.port))
        self.crowd.selector.register(self.sock, selectors.EVENT_WRITE, self)
        self.connected = False

    def serve(self, events: int) -> None:
        try:
            if not self.connected:
                self.crowd.seen[f"{self.kind} connections"] += 1
                self.crowd.awaited -= self.life == 0
                self.connected = True
                self.crowd.selector.modify(self.sock, selectors.EVENT_READ, self)
                self.begin()
            else:
                self.go_on(events)
        except BlockingIOError:
            pass
        except OSError:
            self.hung_up_on()

    def begin(self) -> None:
        """It is connected."""

    def go_on(self, events: int) -> None:
        """The socket is ready for what the selector watches."""
        self.read()

    def read(self) -> bytes:
        data = self.sock.recv(1 << 16)
        if not data:
            raise ConnectionError
        return data

    def hung_up_on(self) -> None:
        """The server wants no more of it: again, a bit later."""
        self.crowd.seen[f"{self.kind} connections ended by the server"] += 1
        self.crowd.selector.unregister(self.sock)
        self.sock.close()
        self.connected = False
        self.life += 1
        self.crowd.later(self)

    def later(self) -> None:
        """The crowd's pause after `crowd.later`."""
        self.open()


class Dribbler(Visitor):
    kind = "half request"

    def begin(self) -> None:
        self.sent = 0
        self.later()

    def later(self) -> None:
        if not self.connected:
            self.open()
            return
        if self.sent < len(HALF):
            try:
                self.sock.send(HALF[self.sent : self.sent + 1])
            except OSError:
                return  # the selector tells
            self.sent += 1
        self.crowd.later(self)


class HistoryReader(Visitor):
    kind = "history"
    receive_buffer = 4096

    def begin(self) -> None:
        self.sock.send(get("/history"))
        self.crowd.selector.unregister(self.sock)  # never another look at it


class Pinger(Visitor):
    kind = "ping"

    def begin(self) -> None:
        self.position = 0
        self.upgraded = False
        self.sock.send(request())

    def go_on(self, events: int) -> None:
        if events & selectors.EVENT_READ:
            data = self.read()
            if not self.upgraded:
                if not data.startswith(b"HTTP/1.1 101 "):
                    raise ConnectionError
                self.upgraded = True
                self.crowd.selector.modify(self.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, self)
        if events & selectors.EVENT_WRITE:
            sent = self.sock.send(memoryview(PINGS)[self.position :])
            self.position = (self.position + sent) % len(PINGS)
            self.crowd.seen["bytes of pings"] += sent


class Newcomer(Visitor):
    """Asks a pause after it has connected, and is served when it has a price."""

    kind = "herd"

    def begin(self) -> None:
        self.received = b""
        self.crowd.later(self)

    def later(self) -> None:
        self.sock.send(request())

    def go_on(self, events: int) -> None:
        self.received += self.read()
        if b'"asset_id"' in self.received and self.received.startswith(b"HTTP/1.1 101 "):
            self.crowd.selector.unregister(self.sock)
            self.crowd.seen["served"] += 1

    def hung_up_on(self) -> None:
        self.crowd.selector.unregister(self.sock)
        self.crowd.seen["lost"] += 1


class Crowd:
    """All of them in one loop: a line on stdout when all have connected; for each on stdin, what was seen, as JSON.

    pause: seconds until a delayed step.
    """

    def __init__(self, port: int, pause: float, kinds: list[type[Visitor]]):
        self.port, self.pause, self.coming = port, pause, kinds
        self.selector = selectors.DefaultSelector()
        self.delayed: deque[tuple[float, Visitor, int]] = deque()  # all by the same time, so in order
        self.seen: Counter[str] = Counter()
        self.awaited = len(kinds)  # that have not connected yet

    def later(self, visitor: Visitor) -> None:
        self.delayed.append((time.monotonic() + self.pause, visitor, visitor.life))

    def run(self) -> None:
        visitors: list[Visitor] = []
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        ready = False
        while True:
            visitors += [kind(self) for kind in self.coming[-50:]]  # so that what is open goes on meanwhile
            del self.coming[-50:]
            if not ready and self.awaited == 0:
                ready = True
                print("{}", flush=True)
            delay = self.delayed[0][0] - time.monotonic() if self.delayed else 0.1
            for key, events in self.selector.select(0 if self.coming else max(delay, 0)):
                if key.data is not None:
                    key.data.serve(events)
                elif not sys.stdin.readline():
                    return
                else:
                    print(json.dumps(self.seen), flush=True)
            now = time.monotonic()
            while self.delayed and self.delayed[0][0] <= now:
                _, visitor, life = self.delayed.popleft()
                if visitor.life == life:  # not for a connection that has ended meanwhile
                    visitor.later()


# The honest one


def honest(port: int) -> None:
    """Answers each line on stdin with what it saw since the last one, as JSON.

    overslept: seconds that a sleep of 10 ms took too long, so how long this machine can leave a process waiting.
    """
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    seen = {"prices": 0, "missed": 0, "longest": 0.0, "last": time.monotonic(), "counter": 0, "overslept": 0.0}
    ended: list[str] = []

    def listen() -> None:
        try:
            for message in connection:
                update = json.loads(message)
                if update["asset_id"] == "BTC":
                    now, counter = time.monotonic(), int(update["price"])
                    seen["missed"] += counter - seen["counter"] - 1 if seen["counter"] else 0
                    seen.update(longest=max(seen["longest"], now - seen["last"]), last=now, counter=counter)
                    seen["prices"] += 1
        except ConnectionClosed as error:
            ended.append(str(error))
        else:
            ended.append("closed")

    def sleep() -> None:
        while True:
            start = time.monotonic()
            time.sleep(0.01)
            seen["overslept"] = max(seen["overslept"], time.monotonic() - start - 0.01)

    threading.Thread(target=sleep, daemon=True).start()
    with connect(f"ws://127.0.0.1:{port}/ws", compression=None) as connection:
        threading.Thread(target=listen, daemon=True).start()
        for _ in sys.stdin:
            seen["longest"] = max(seen["longest"], time.monotonic() - seen["last"])
            print(json.dumps(seen | {"ended": ended}), flush=True)
            seen.update(longest=0.0, prices=0, missed=0, overslept=0.0)


# The first process


class Storm:
    """Both storms and the herd; `wrong` says what promise broke.

    scale: of the numbers of clients. wait: seconds that the honest client may wait for a price.
    """

    def __init__(self, seconds: float, scale: float, wait: float, most_files: int):
        self.seconds = seconds
        self.wait = wait
        self.most_files = most_files
        self.numbers = [max(1, round(number * scale)) for number in (DRIBBLERS, HISTORY_READERS, PINGERS)]
        self.herd = max(1, round(HERD * scale))
        self.wrong: list[str] = []
        self.samples: list[tuple[int, int, int, float]] = []  # of the tracker, in this phase
        self.done = threading.Event()

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)

    def go(self) -> bool:
        needed = max(sum(self.numbers), self.herd) + SPARE_FILES
        if 0 < self.most_files < needed:
            print(f"only {self.most_files} files may be open (ulimit -n), this needs {needed}: take a smaller --scale")
            return False
        program = str(Path(__file__).with_name("soak_tracker.py"))
        with (
            Source() as source,
            Tracker("--interval", f"{INTERVAL}", program=program, COIN_API_KEY=KEY, COIN_API_URL=source.url) as tracker,
            Swarm(__file__, "honest", tracker.port) as honest,
        ):
            wait_for(lambda: source.good > 3)
            wait_for(lambda: honest.ask()["prices"], 20.0, "a price for the honest client")
            try:
                self.all_phases(tracker, honest)
                self.stop(tracker)
            except psutil.NoSuchProcess:
                self.check(False, f"the tracker ended: {tracker.log[-3:]}")
        for line in self.wrong:
            print("WRONG", line)
        print("failed" if self.wrong else "passed")
        return not self.wrong

    def all_phases(self, tracker: Tracker, honest: Swarm) -> None:
        with urllib.request.urlopen(f"{tracker.http}/history", timeout=10) as answer:
            print(f"/history has {len(answer.read()):,} bytes")
        time.sleep(1.0)  # for the end of that connection
        before = tracker.usage()
        sampler = threading.Thread(target=self.sample, args=(tracker,), daemon=True)
        sampler.start()
        print(f"{'':14}{'prices':>7}{'missed':>7}{'longest wait':>14}{'overslept':>11}{'threads':>10}", end="")
        print(f"{'files':>7}{'at the end':>12}{'memory':>12}{'at the end':>12}")
        self.phase("calm", tracker, honest, before, self.calm)
        memory = [
            self.phase(f"storm {number}", tracker, honest, before, lambda: self.storm(tracker)) for number in (1, 2)
        ]
        self.phase("herd", tracker, honest, before, lambda: self.all_at_once(tracker))
        self.done.set()
        sampler.join()
        self.check(memory[1] - memory[0] < MEMORY_ROOM, f"the second storm added {memory[1] - memory[0]:,} bytes")

    def sample(self, tracker: Tracker) -> None:
        try:
            while not self.done.wait(0.1):
                self.samples.append(tracker.usage())
        except psutil.NoSuchProcess:
            pass  # the phase tells

    def phase(
        self,
        name: str,
        tracker: Tracker,
        honest: Swarm,
        before: tuple[int, int, int, float],
        act: Callable[[], str],
    ) -> int:
        """One row of the table; the tracker's memory when those who acted are gone."""
        honest.ask()
        self.samples = [before]
        what = act()
        self.settle(name, tracker, before[1])
        said, after = honest.ask(), tracker.usage()
        threads, files, memory, _ = zip(*self.samples, after, strict=True)
        few, many = min(threads), max(threads)
        print(f"{name:14}{said['prices']:>7}{said['missed']:>7}{said['longest']:>12.2f} s", end="")
        print(
            f"{said['overslept']:>9.2f} s{few if few == many else f'{few}-{many}':>10}{max(files):>7}{after[1]:>12}",
            end="",
        )
        print(f"{max(memory) / (1 << 20):>8.1f} MiB{after[2] / (1 << 20):>8.1f} MiB   {what}", flush=True)
        self.check(few == many == before[0], f"{name}: the number of threads changed, {few} to {many}")
        self.check(not said["ended"], f"{name}: the honest client was hung up on: {said['ended']}")
        self.check(said["missed"] == 0, f"{name}: the honest client missed {said['missed']} prices")
        late = f"{said['longest']:.2f} s for a price (the machine woke sleepers {said['overslept']:.2f} s late)"
        self.check(said["longest"] <= self.wait, f"{name}: the honest client waited {late}")
        return after[2]

    def settle(self, name: str, tracker: Tracker, files: int) -> None:
        """Back when the tracker's files are back to their number, for a second."""
        deadline = back = time.monotonic() + SETTLE
        while (now := time.monotonic()) < min(deadline, back + 1.0):
            back = min(back, now) if tracker.usage()[1] <= files else deadline
            time.sleep(0.05)
        self.check(back < deadline, f"{name}: files are not back to their number after {SETTLE:g} s")

    def calm(self) -> str:
        time.sleep(min(5.0, self.seconds))
        return ""

    def storm(self, tracker: Tracker) -> str:
        with Swarm(__file__, "rude", tracker.port, *self.numbers) as rude:
            seen = rude.hear()
            if "error" not in seen:  # all have connected
                time.sleep(self.seconds)
                seen = rude.ask()
        if "error" in seen:
            self.check(False, f"the rude clients did not all connect: {seen['error']}")
            return ""
        self.check(seen.get("bytes of pings", 0) > 0, "nothing was pinged")
        return ", ".join(f"{number:,} {what}" for what, number in seen.items())

    def all_at_once(self, tracker: Tracker) -> str:
        began = time.monotonic()
        with Swarm(__file__, "herd", tracker.port, self.herd) as clients:
            seen = clients.hear()
            while "error" not in seen and seen.get("served", 0) + seen.get("lost", 0) < self.herd:
                if time.monotonic() > began + HERD_TIMEOUT:
                    break
                time.sleep(0.02)
                seen = clients.ask()
        served = seen.get("served", 0)
        self.check(served == self.herd, f"{self.herd - served} of {self.herd} were not served: {seen}")
        return f"{served:,} of {self.herd:,} served, the last after {time.monotonic() - began:.2f} s"

    def stop(self, tracker: Tracker) -> None:
        started = time.monotonic()
        self.check(tracker.stop(signal.SIGTERM) == 0, "the exit status is not 0")
        self.check(time.monotonic() - started < 2, "took over 2 s to stop")
        warnings = [
            line for line in tracker.log if "DOT" not in line and " INFO " not in line and " NOTICE " not in line
        ]
        print(f"log: {len(tracker.log)} lines; those that are no INFO: {warnings[:5]}")
        self.check("Traceback" not in tracker.text, "log: a traceback")


if __name__ == "__main__":
    raise_file_limit()
    what, numbers = sys.argv[1], [int(number) for number in sys.argv[2:]]
    match what:
        case "rude":
            port, dribblers, readers, pingers = numbers
            Crowd(port, DRIBBLE, [Dribbler] * dribblers + [HistoryReader] * readers + [Pinger] * pingers).run()
        case "herd":
            port, number = numbers
            Crowd(port, THINK, [Newcomer] * number).run()
        case "honest":
            honest(*numbers)
