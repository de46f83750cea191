"""nginx's cache with all that it needs: a nameserver, a CoinAPI with TLS, trackers that are soon stale."""

import re
import socket
import struct
import subprocess
import threading
from pathlib import Path

from proxies import DEPLOY, Certificate, Nginx, deployed, free_port, put, readme_block
from running import Tracker
from stand_in import KEY, StandIn


class Nameserver:
    """`with Nameserver("rest.coinapi.io") as dns:` tells 127.0.0.1 for this name, and of others that there is none.

    asked: the names, in order. silent: it answers nothing from now on.
    """

    def __init__(self, name: str):
        self.name = name
        self.asked: list[str] = []
        self.silent = False
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> "Nameserver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self.sock.close()

    def _answer(self) -> None:
        while True:
            query, client = self.sock.recvfrom(512)
            if not query:
                return
            labels, at = [], 12
            while query[at]:
                labels.append(query[at + 1 : at + 1 + query[at]].decode())
                at += 1 + query[at]
            self.asked.append(".".join(labels))
            question = query[12 : at + 5]
            known = self.asked[-1] == self.name
            address = known and question[-3] == 1  # an A record; of AAAA there is none
            head = struct.pack(">2s5H", query[:2], 0x8180 if known else 0x8183, 1, int(address), 0, 0)
            record = bytes.fromhex("c00c000100010000003c00047f000001") if address else b""
            if not self.silent:
                self.sock.sendto(head + question + record, client)


def local_settings(folder: Path, resolv_conf: str, key: str) -> Path:
    """What the README's commands make of this /etc/resolv.conf and this key."""
    (folder / "resolv.conf").write_text(resolv_conf)
    file = folder / "price-tracker.local"
    (commands,) = re.findall(r"^(install -m 600 .*?)^nginx -t", readme_block("nginx-cache.conf"), re.DOTALL | re.M)
    changes = (("/etc/resolv.conf", folder / "resolv.conf"), ("/etc/nginx/price-tracker.local", file))
    subprocess.run(["sh", "-euc", put(commands, *changes, ("your-key", key))], check=True)
    return file


def every_second() -> tuple[tuple[str, str]]:
    """The change that the file itself tells for intervals of 1 s."""
    text = deployed("nginx-cache.conf")
    five_seconds = re.search(r'(    "~\^\(\?<start>\.\{18\}\).*\n)+', text)
    one_second = re.search(r"# For 1 s: (.*?;)", text)
    assert five_seconds
    assert one_second
    return ((five_seconds[0], f"    {one_second[1]}\n"),)


def start_cache(
    folder: Path,
    port: int,
    coin_api: StandIn,
    certificate: Certificate,
    nameserver: Nameserver,
    changes: tuple[tuple[str, object], ...] = (),
    more: tuple[str, ...] = (),
) -> Nginx:
    """The cache at this port; behind it rest.coinapi.io, which is the stand-in with TLS. more: configurations."""
    tls_port = free_port()
    local = local_settings(folder, "nameserver 127.0.0.1\n", KEY)
    local.write_text(put(local.read_text(), ("127.0.0.1", f"127.0.0.1:{nameserver.port} ipv6=off")))
    cache = deployed(
        "nginx-cache.conf",
        ("127.0.0.1:3040", f"127.0.0.1:{port}"),
        ("/var/cache/nginx-coinapi", folder / "cache"),
        ("/etc/nginx/price-tracker.local", local),
        ("set $coinapi rest.coinapi.io;", f"set $coinapi rest.coinapi.io:{tls_port};"),
        *changes,
    )
    stand_in_with_tls = (
        f"server {{ listen 127.0.0.1:{tls_port} ssl default_server; ssl_reject_handshake on; }}"  # asked for no name
        f"server {{ listen 127.0.0.1:{tls_port} ssl; server_name rest.coinapi.io;"
        f" ssl_certificate {certificate.chain}; ssl_certificate_key {certificate.key};"
        f" location / {{ proxy_pass {coin_api.url}; proxy_set_header Host $http_host; }} }}"
    )
    return Nginx(folder, port, cache, stand_in_with_tls, *more)


def soon_stale(folder: Path, *arguments: str, **environment: str) -> Tracker:
    """A tracker that polls every second and is stale after 3 s, not after 60."""
    program = folder / "soon_stale.py"
    program.write_text(
        "import sys\nimport tracker\nfrom price_server.status import Status\n"
        "Status.stale_floor = 3.0\nsys.exit(tracker.main())\n"
    )
    environment["PYTHONPATH"] = str(DEPLOY.parent)
    return Tracker("--interval", "1", *arguments, program=str(program), before=(), **environment)
