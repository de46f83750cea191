"""The benchmark in small, so that it cannot rot. Nothing here depends on how long anything takes."""

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bench_fanout import Crowd, Setup, compile_programs
from bench_sides import BEFORE, FLOOR, SIDES, installed
from child import Trouble
from running import ROOT, outside

BENCH = Path(__file__).with_name("bench_fanout.py")
ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
MESSAGES = ("one", "two")
FRAMES = b"\x81\x03one\x81\x03two"


@pytest.fixture(autouse=True)
def compiler() -> None:
    """The readers are in C, and use epoll."""
    if platform.system() != "Linux":
        pytest.skip("no epoll")
    outside("cc")


def run(*arguments: str) -> tuple[str, dict[str, list[str]]]:
    """The benchmark's output, and the cells of its first table by the name of the side."""
    command = [sys.executable, str(BENCH), *arguments, "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert result.stdout.endswith("Every client got every byte.\n")
    table = result.stdout.partition("### ")[2].partition("###")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return result.stdout, {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_the_benchmark_measures_every_installed_side_and_none_loses_a_byte():
    output, rows = run("--clients", "100", "--rounds", "3")
    for side in SIDES:
        version = "in C" if side.name == FLOOR else installed(side)
        if side.name == BEFORE:
            assert side.name not in output
        elif version is None:
            assert f"Left out: {side.name}," in output
        else:
            assert len([float(cell.replace(",", "")) for cell in rows[f"{side.name} {version}".rstrip()]]) == 8
    if shutil.which("ab") or os.environ.get("CI") == "true":
        assert "### `ab -c 50`" in output


def test_an_earlier_checkout_runs_beside_this_one():
    _, rows = run("--clients", "20", "--rounds", "2", "--sides", "this,floor", "--before", str(ROOT))
    assert "x before" in rows["side"]
    (before,) = (cells for name, cells in rows.items() if name.startswith(BEFORE))
    assert before[rows["side"].index("x before")] == "1.00"


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Crowd]:
    """The readers, with a listener that answers nobody yet."""
    with ExitStack() as stack:
        yield Crowd(stack, Setup(MESSAGES, "", compile_programs(str(tmp_path))), in_flight=1)


def reply_to(crowd: Crowd, sent: bytes) -> dict[str, float]:
    """What the readers say of a round in which their one client got these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        crowd.port = listener.getsockname()[1]
        crowd.process.stdin.write(  # type: ignore[union-attr]
            f'{{"do": "connect", "port": {crowd.port}, "clients": 1, "in_flight": 1, "stall": false}}\n'
        )
        crowd.process.stdin.flush()  # type: ignore[union-attr]
        client, _ = listener.accept()
        with client:
            assert client.recv(4096).startswith(b"GET /ws HTTP/1.1\r\n")
            client.sendall(ANSWER)
            crowd.receive()
            crowd.expect(check=True)
            client.sendall(sent)
            return crowd.receive()


@pytest.mark.parametrize(
    "sent", [FRAMES, b"\x89\x00" + FRAMES, FRAMES + b"\x89\x00"], ids=["poll", "ping", "ping last"]
)
def test_readers_take_a_poll_and_answer_pings(crowd: Crowd, sent: bytes):
    assert reply_to(crowd, sent)["last"] > 0


@pytest.mark.parametrize(
    "sent", [FRAMES[:-1] + b"0", FRAMES + b"\x81\x03two", FRAMES[5:] + FRAMES[:5]], ids=["other", "more", "order"]
)
def test_readers_notice_every_wrong_byte(crowd: Crowd, sent: bytes):
    with pytest.raises(Trouble, match="a client got"):
        reply_to(crowd, sent)
