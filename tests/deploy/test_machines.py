"""Trackers on several machines, each a network namespace of its own: one is cut off for a while."""

import json
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from caching import Nameserver, every_second, soon_stale, start_cache
from crowd import Crowd
from namespaces import Machines
from proxies import Certificate, HAProxy, deployed, free_port, get, make_certificate, put, readme_block
from running import Tracker, outside, wait_for
from stand_in import StandIn

# As in deploy/README.md and nginx-cache-tls.conf.
ADDRESSES = {"front": "192.0.2.11", "two": "192.0.2.12", "three": "192.0.2.13"}
CLIENTS = 60


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Three; the test itself is on the first."""
    outside("haproxy", "nginx", "openssl")
    with Machines(**ADDRESSES) as running, running.on("front"):
        yield running


def door_certificate(folder: Path) -> Path:
    """As the README's command makes it."""
    (command,) = re.findall(r"^openssl .*?(?=^install )", readme_block("CN=price-tracker-cache"), re.DOTALL | re.M)
    command = put(command, ("/etc/nginx/", f"{folder}/"))
    subprocess.run(["sh", "-euc", command], check=True, stderr=subprocess.DEVNULL)
    file = folder / "price-tracker-cache.crt"
    # What Python 3.13 and newer insist on.
    subprocess.run(["openssl", "verify", "-x509_strict", "-CAfile", file, file], check=True, capture_output=True)
    return file


class Site:
    """HAProxy, cache and one tracker on the first machine, one tracker on each of the others."""

    def __init__(self, stack: ExitStack, machines: Machines, folder: Path, certificate: Certificate):
        self.machines = machines
        self.trusted = door_certificate(folder)
        port = free_port()
        changes = (("/etc/nginx/", f"{folder}/"), ("127.0.0.1:3040", f"127.0.0.1:{port}"))
        door = deployed("nginx-cache-tls.conf", *changes)
        self.coin_api = stack.enter_context(StandIn())
        nameserver = stack.enter_context(Nameserver("rest.coinapi.io"))
        changes = (*every_second(), ("/etc/ssl/certs/ca-certificates.crt", str(certificate.chain)))
        stack.enter_context(start_cache(folder, port, self.coin_api, certificate, nameserver, changes, (door,)))
        lines = put(readme_block("COIN_API_URL=https:"), ("/etc/price-tracker-cache.crt", self.trusted))
        environment = dict(line.split("=", 1) for line in lines.splitlines())
        local = environment | {"COIN_API_URL": f"http://127.0.0.1:{port}"}
        self.trackers: dict[str, Tracker] = {"front": stack.enter_context(soon_stale(folder, **local))}
        places = [f"127.0.0.1:{self.trackers['front'].port}"]
        for name in ("two", "three"):
            with machines.on(name):
                tracker = soon_stale(folder, "--host", ADDRESSES[name], **environment)
                self.trackers[name] = stack.enter_context(tracker)
            places.append(f"{ADDRESSES[name]}:{tracker.port}")
        (folder / "haproxy").mkdir()
        self.proxy = stack.enter_context(HAProxy(folder / "haproxy", places, certificate))

    def status(self, name: str) -> str:
        """What the tracker of this machine says there."""
        with self.machines.on(name):
            host = "127.0.0.1" if name == "front" else ADDRESSES[name]
            return str(json.loads(get(f"http://{host}:{self.trackers[name].port}/healthz")[1])["status"])


def test_machine_that_is_cut_off_loses_its_clients_to_the_others_and_serves_again_later(
    machines: Machines, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path, "DNS:rest.coinapi.io")
    with ExitStack() as stack:
        site = Site(stack, machines, tmp_path, certificate)
        wait_for(lambda: all(site.status(name) == "ok" for name in ADDRESSES), what="prices through the cache's door")
        # From an address that is not listed, with the right certificate.
        context = ssl.create_default_context(cafile=str(site.trusted))
        code, body, _ = get(f"https://{ADDRESSES['front']}:3443/v1/exchangerate/USD", context)
        assert (code, "your address is not listed" in json.loads(body)["error"]) == (403, True)

        before, start = len(site.coin_api.requests), time.monotonic()
        uri = f"wss://localhost:{site.proxy.port}/ws?assets=BTC"
        crowd = stack.enter_context(Crowd(uri, CLIENTS, certificate.context))

        def all_served(since: float) -> None:
            wait_for(lambda: crowd.served_since(since) == CLIENTS, what="prices for all clients")

        all_served(start)
        assert min(site.proxy.sessions().values()) >= CLIENTS // 3 - 5
        assert len(site.coin_api.requests) - before <= time.monotonic() - start + 2, "one request an interval for all"

        machines.cable("two", "down")
        cut = time.monotonic()
        all_served(cut + 0.5)
        wait_for(lambda: site.status("two") == "stale", what="the machine alone says that its prices are stale")
        assert site.status("three") == "ok"
        came = crowd.newcomers
        wait_for(lambda: crowd.newcomers > came + 20, what="new clients")
        assert crowd.refused == []
        # Whoever was being connected to it when HAProxy gave it up was hung up on, and nobody later.
        assert all(when < cut + 5 for when, _ in crowd.unserved), crowd.unserved
        crowd.unserved.clear()

        machines.cable("two", "up")
        wait_for(lambda: site.status("two") == "ok", 25, "prices are current again")
        wait_for(lambda: site.proxy.sessions()["3032"] > 0, what="new clients on the machine that is back")
        all_served(time.monotonic())
        assert (crowd.refused, crowd.unserved) == ([], [])
