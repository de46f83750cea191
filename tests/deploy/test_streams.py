"""Event streams through the proxies: each event comes at once, and a stream that is quiet for a while is not cut."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

import pytest
from proxies import Certificate, HAProxy, Nginx, deployed, free_port, make_certificate
from running import ASSETS, Tracker, outside
from stand_in import EventStream

from price_server.hub import HEARTBEAT_INTERVAL

HTTP_VERSIONS = pytest.mark.parametrize("version", ["--http1.1", "--http2"])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@contextmanager
def curl(*arguments: object) -> Iterator[IO[str]]:
    """What curl prints as it comes, while the block lasts."""
    outside("curl")
    command = ["curl", "--silent", "--no-buffer", "--max-time", "15", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout
        finally:
            process.kill()


@HTTP_VERSIONS
def test_haproxy_passes_each_event_on_and_cuts_no_quiet_stream(
    certificate: Certificate, tmp_path: Path, version: str
) -> None:
    """Here HAProxy's timeouts are 1 s where a request ends, and the stream is quiet for 2 s."""
    changes = (("timeout client 30s", "timeout client 1s"), ("timeout server 15s", "timeout server 1s"))
    with EventStream() as stream, HAProxy(tmp_path, [stream.port] * 3, certificate, *changes) as proxy:
        url = f"https://localhost:{proxy.port}/stream"
        with curl(version, "--compressed", "--cacert", certificate.chain, url) as lines:
            assert stream.asked.wait(10)
            for event in ("first", "second"):
                stream.send(event)
                assert [lines.readline(), lines.readline()] == [f"data: {event}\n", "\n"]
                time.sleep(2)  # how long it is quiet is the point
            stream.send("last")
            assert lines.readline() == "data: last\n"


def test_haproxy_waits_for_more_than_two_heartbeats() -> None:
    (seconds,) = re.findall(r"timeout tunnel (\d+)s", deployed("haproxy.cfg"))
    assert int(seconds) > 2 * HEARTBEAT_INTERVAL


# A proxy that collected what comes would hold a tracker's first prices back until the next poll, in an hour.


def test_prices_of_a_tracker_come_at_once_through_an_nginx_with_nothing_but_proxy_pass(tmp_path: Path) -> None:
    port = free_port()
    with Tracker("--demo", "--interval", "3600") as tracker:
        passes = f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {tracker.http}; }} }}"
        with Nginx(tmp_path, port, passes), curl(f"http://127.0.0.1:{port}/stream") as lines:
            events = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
            assert [json.loads(event)["asset_id"] for event in islice(events, len(ASSETS))] == list(ASSETS)
