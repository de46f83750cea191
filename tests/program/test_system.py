"""system: a log that never blocks, what systemd is told, signals, room for clients, missing packages."""

import fcntl
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, Tracker, outside, wait_for
from stand_in import KEY, StandIn
from websockets.sync.client import connect

import system
from price_server import PriceServer
from system import Log, Systemd


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.makeLogRecord({"levelno": level, "levelname": logging.getLevelName(level), "msg": message})


# The log


class Stderr:
    """In place of stderr: takes nothing until it is opened."""

    def __init__(self, is_open: bool = True):
        self.lines: list[str] = []
        self.open = threading.Event()
        if is_open:
            self.open.set()

    def __call__(self, line: str) -> None:
        self.open.wait(20)
        self.lines.append(line)

    @property
    def texts(self) -> list[str]:
        return [line.partition(" ")[2] for line in self.lines]


def test_a_stderr_whose_disk_is_full_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(system, "STDERR", full.fileno())
        system._write("nobody can be told")


def test_a_line_that_stderr_takes_in_parts_is_written_whole(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda number, data: write(number, data[:5]))
    system._write("a pipe that is nearly full takes what it has room for")
    assert capfd.readouterr().err == "a pipe that is nearly full takes what it has room for\n"


@pytest.fixture
def start_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Log, Stderr]]]:
    logs: list[Log] = []

    def start(is_open: bool = True, max_waiting: int = system.MAX_WAITING) -> tuple[Log, Stderr]:
        stderr = Stderr(is_open)
        monkeypatch.setattr(system, "_write", stderr)
        monkeypatch.setattr(system, "MAX_WAITING", max_waiting)
        monkeypatch.setattr(system, "FLUSH_TIMEOUT", 10.0 if is_open else 0.1)
        logs.append(Log())
        return logs[-1], stderr

    yield start
    for log in logs:
        log.close()


def test_lines_are_written_in_order_by_a_thread_of_that_name(start_log: Callable[..., tuple[Log, Stderr]]) -> None:
    log, stderr = start_log()
    for number in range(100):
        log.handle(record(f"line {number}"))
    assert "log" in [thread.name for thread in threading.enumerate() if thread.daemon]
    log.close()
    assert stderr.texts == [f"INFO line {number}" for number in range(100)]


def test_a_stderr_that_nobody_reads_blocks_no_thread_and_lost_lines_are_counted(
    start_log: Callable[..., tuple[Log, Stderr]],
) -> None:
    log, stderr = start_log(is_open=False, max_waiting=10)
    log.handle(record("first"))
    wait_for(log._lines.empty, what="the thread has the first line")
    for number in range(25):
        log.handle(record(f"line {number}"))
    stderr.open.set()
    wait_for(lambda: len(stderr.lines) >= 12)
    assert stderr.texts == [
        "INFO first",
        *(f"INFO line {number}" for number in range(10)),
        "WARNING log lines lost: 15",
    ]
    log.handle(record("last"))
    wait_for(lambda: stderr.texts[12:] == ["INFO last"])


def test_up_to_ten_thousand_lines_wait() -> None:
    assert system.MAX_WAITING == 10_000


@pytest.mark.parametrize("lines", [1, 20])
def test_the_end_waits_at_most_half_a_second_for_a_stuck_stderr(
    start_log: Callable[..., tuple[Log, Stderr]], lines: int
) -> None:
    assert system.FLUSH_TIMEOUT == 0.5
    log, stderr = start_log(is_open=False, max_waiting=10)
    for number in range(lines):
        log.handle(record(f"line {number}"))
    started = time.monotonic()
    log.close()
    log.close()  # logging does so at exit
    assert time.monotonic() - started < 0.4
    stderr.open.set()
    wait_for(lambda: len(stderr.lines) >= min(lines, 10), what="its thread writes into no other test")


def test_a_line_that_cannot_be_made_ends_nothing(
    start_log: Callable[..., tuple[Log, Stderr]], capsys: pytest.CaptureFixture[str]
) -> None:
    log, stderr = start_log()
    wrong = record("%d")
    wrong.args = ("one",)
    log.handle(wrong)
    log.handle(record("next"))
    log.close()
    assert stderr.texts == ["INFO next"]
    assert "Logging error" in capsys.readouterr().err


@pytest.mark.parametrize(("zone", "offset"), [("UTC", "+00:00"), ("Asia/Tokyo", "+09:00"), ("America/Lima", "-05:00")])
def test_times_have_their_offset(monkeypatch: pytest.MonkeyPatch, zone: str, offset: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        line = system._TimeFormatter().format(record("x"))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}{re.escape(offset)} INFO x", line)


@pytest.mark.parametrize(
    ("level", "priority"), [("DEBUG", 7), ("INFO", 6), ("NOTICE", 5), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 2)]
)
def test_under_journald_each_line_has_its_priority_and_no_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], level: str, priority: int
) -> None:
    stderr = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    log = Log()
    log.handle(record("one\ntwo", logging.getLevelName(level)))
    log.close()
    assert capfd.readouterr().err == f"<{priority}>{level} one\n<{priority}>two\n"


def test_another_stderr_than_the_journals_gets_times(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", f"{os.fstat(2).st_dev}:1")  # inherited, and stderr sent elsewhere
    log = Log()
    log.handle(record("one\udcff"))
    log.close()
    assert re.fullmatch(r"2\d{3}-\S+ INFO one\\udcff\n", capfd.readouterr().err)


@contextmanager
def serving(command: list[str], stderr: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """This command with a free port; after the block it must serve a client, and stop."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with subprocess.Popen([*command, "--port", str(port)], stderr=stderr) as process:
        try:
            wait_for(lambda: connects(port))
            yield process
            with connect(f"ws://127.0.0.1:{port}/ws", max_queue=None) as client:
                for _ in range(50):
                    assert json.loads(client.recv(timeout=5))["asset_id"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def connects(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


TALKATIVE = [sys.executable, str(ROOT / "tracker.py"), "--demo", "--interval", "0.2", "--log-level", "debug"]


def test_a_pipe_that_nobody_reads_stops_neither_the_feed_nor_the_stop() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    try:
        while os.write(writer, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(writer, True)
    with serving(TALKATIVE, stderr=writer):
        pass
    os.close(reader)
    os.close(writer)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks /proc")
def test_a_closed_stderr_puts_no_line_of_the_log_into_a_socket() -> None:
    with serving(["sh", "-c", 'exec "$@" 2>&-', "sh", *TALKATIVE]) as process:
        assert Path(f"/proc/{process.pid}/fd/2").readlink() == Path("/dev/null")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("sqlite3", "this Python was built without sqlite3"),
        ("_sqlite3", "this Python was built without sqlite3"),
        (
            "websocket_server",
            f"the package websocket_server is missing: add it with {sys.executable} -m pip install -r ",
        ),
        ("requests", f"the package requests is missing: add it with {sys.executable} -m pip install -r "),
        ("options", "options is missing beside tracker.py: copy all files of the program"),
    ],
)
def test_a_missing_module_is_exit_2_and_one_line_with_the_way_out(module: str, said: str) -> None:
    program = f"import sys, runpy; sys.modules[{module!r}] = None; sys.path.insert(0, {str(ROOT)!r}); "
    program += f"runpy.run_path({str(ROOT / 'tracker.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program, "--demo"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f" CRITICAL {said}" in done.stderr


def test_the_command_of_a_missing_package_is_one_for_the_python_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/a place/python")
    words = shlex.split(system.explain_missing("requests.adapters"))
    assert words[-6:] == ["/a place/python", "-m", "pip", "install", "-r", str(ROOT / "requirements.txt")]
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)  # without a virtual environment
    command = system.explain_missing("requests").partition("start with ")[2]
    assert f"{command} --demo" in (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "platform", "win32")
    assert system.explain_missing("requests").endswith(r".txt && .venv\Scripts\python tracker.py")
    monkeypatch.setattr(sys, "prefix", "elsewhere")
    monkeypatch.setattr(sys, "executable", r"C:\My Python\python.exe")
    assert r'add it with "C:\My Python\python.exe" -m pip' in system.explain_missing("requests")


# systemd


class NotifySocket:
    """What systemd would hear, at an address that is a file or, with @, is none."""

    def __init__(self, folder: Path, is_file: bool):
        self.address = str(folder / "notify") if is_file else f"@price-tracker-test-{os.getpid()}-{folder.name}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address if is_file else "\0" + self.address[1:])

    def receive(self, seconds: float = 10.0) -> str:
        self.socket.settimeout(seconds)
        return self.socket.recv(4096).decode()

    def receive_all(self) -> list[str]:
        """What came so far, each once."""
        self.socket.settimeout(0.0)
        heard: list[str] = []
        try:
            while True:
                heard.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return list(dict.fromkeys(heard))


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[NotifySocket]:
    notify = NotifySocket(tmp_path, is_file=False)
    with notify.socket:
        yield notify


@pytest.mark.parametrize("is_file", [True, False])
def test_systemd_receives_ready_signs_of_life_and_the_stop(tmp_path: Path, is_file: bool) -> None:
    systemd = NotifySocket(tmp_path, is_file)
    with systemd.socket, Tracker("--demo", NOTIFY_SOCKET=systemd.address, WATCHDOG_USEC="1200000") as tracker:
        heard = [systemd.receive() for _ in range(4)]
        assert sorted(heard) == ["READY=1", *["WATCHDOG=1"] * 3]
        assert tracker.stop() == 0
        assert systemd.receive_all()[-1] == "STOPPING=1"


def test_ready_waits_for_the_first_poll_and_no_longer_than_2_s(coin_api: StandIn, systemd: NotifySocket) -> None:
    answer = threading.Event()

    def answer_late(handler: BaseHTTPRequestHandler) -> None:
        answer.wait(10)
        coin_api.send_rates(handler)

    coin_api.answer = answer_late
    with Tracker(COIN_API_KEY=KEY, COIN_API_URL=coin_api.url, NOTIFY_SOCKET=systemd.address) as tracker:
        # The block has begun, so the start-up lines are there, without an answer.
        assert systemd.receive() == "READY=1"
        assert requested_ago(coin_api) == pytest.approx(2.0, abs=0.7)
        answer.set()
        assert tracker.stop() == 0


def requested_ago(coin_api: StandIn) -> float:
    return time.monotonic() - coin_api.requests[0].at


def test_a_first_poll_that_fails_is_ready_too(coin_api: StandIn, systemd: NotifySocket) -> None:
    coin_api.say(b"", 503)
    with Tracker(COIN_API_KEY=KEY, COIN_API_URL=coin_api.url, NOTIFY_SOCKET=systemd.address) as tracker:
        assert systemd.receive() == "READY=1"
        assert requested_ago(coin_api) < 1.5
        assert tracker.stop() == 0, "2 is for a key that was refused"


def test_a_refused_key_and_a_taken_port_are_never_ready(coin_api: StandIn, systemd: NotifySocket) -> None:
    coin_api.say(b'{"error":"Invalid API key"}', 401)
    start = partial(Tracker, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url, NOTIFY_SOCKET=systemd.address)
    refused = start()
    assert refused.wait(20) == 2
    assert [line.split(" ", 1)[1] for line in refused.log] == [
        "INFO stopping, clients connected: 0",
        "INFO stopped",
        "ERROR CoinAPI refused the key (401): Invalid API key: check COIN_API_KEY",
    ]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        no_port = start("--port", str(taken.getsockname()[1]))
        assert no_port.wait(20) == 1
    assert "Address already in use" in no_port.text
    assert systemd.receive_all() == ["STOPPING=1"]
    assert len(coin_api.requests) == 1


def test_no_sign_of_life_from_a_loop_that_hangs(start_server: Callable[..., PriceServer]) -> None:
    fed = threading.Event()
    hang = threading.Event()
    server = start_server()
    server.on_housekeeping = fed.set
    wait_for(fed.is_set)
    server.set_fn_new_client(lambda client, server: hang.wait(10))
    try:
        with connect(f"ws://127.0.0.1:{server.port}/ws"):
            fed.clear()
            assert not fed.wait(0.5)
            hang.set()
            assert fed.wait(5)
    finally:
        hang.set()


@pytest.mark.parametrize(
    ("environment", "at"),
    [
        ({"WATCHDOG_USEC": "30000000"}, [0, 10, 20]),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, [0, 10, 20]),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, []),
        ({"WATCHDOG_USEC": "soon"}, []),
        ({}, []),
    ],
)
def test_the_watchdog_is_notified_three_times_per_timeout(
    environment: dict[str, str], at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    fed: list[tuple[float, str]] = []
    systemd = Systemd(environment, clock=lambda: now)
    monkeypatch.setattr(systemd, "notify", lambda state: fed.append((now, state)))
    while now < 30:
        systemd.notify_watchdog()
        now += 0.5
    assert fed == [(second, "WATCHDOG=1") for second in at]


def test_a_systemd_that_does_not_read_blocks_no_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    systemd = NotifySocket(tmp_path, is_file=True)
    with systemd.socket:
        program = Systemd({"NOTIFY_SOCKET": systemd.address})

        def tell() -> None:
            for _ in range(2_000):
                program.notify("WATCHDOG=1")

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert "systemd does not receive WATCHDOG=1" in caplog.text, "its queue was full"


def test_a_systemd_that_does_not_listen_is_one_warning_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    Systemd({"NOTIFY_SOCKET": "/nonexistent"}).notify("READY=1")
    assert caplog.messages == ["systemd does not receive READY=1: No such file or directory"]
    Systemd({}).notify("READY=1")
    assert len(caplog.messages) == 1


# Signals


def test_a_hangup_that_was_ignored_at_the_start_stays_so() -> None:
    outside("nohup")
    with Tracker("--demo", "--interval", "0.2", before=("nohup",)) as tracker, connect(tracker.ws) as client:
        tracker.process.send_signal(signal.SIGHUP)
        for _ in range(30):
            assert client.recv(timeout=5)
        assert tracker.stop() == 0


# Room for clients


@pytest.mark.parametrize(
    ("limits", "allowed", "raised"),
    [
        ((1024, 4096), True, [(4096, 4096)]),
        ((4096, 4096), True, []),
        ((1024, 1 << 20), True, [(1 << 20, 1 << 20)]),
        ((1024, -1), True, [(-1, -1)]),  # unlimited
        ((1024, 1 << 20), False, []),
        ((256, -1), (10_050, -1), [(10_050, -1)]),  # macOS says "unlimited" and does not mean it
        ((20_000, -1), (10_050, -1), []),
    ],
)
def test_the_limit_of_files_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], allowed: object, raised: list[tuple[int, int]]
) -> None:
    resource: Any = pytest.importorskip("resource")
    assert resource.RLIM_INFINITY == -1
    set_to: list[object] = []

    def setrlimit(which: int, new: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        if allowed not in (True, new) or new[0] > new[1] >= 0:
            raise ValueError("not allowed to raise maximum limit")
        set_to.append(new)

    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    system.raise_file_limit(10_050)
    assert set_to == raised


def test_without_limits_of_files_there_is_nothing_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "resource", None)
    system.raise_file_limit(10_050)
