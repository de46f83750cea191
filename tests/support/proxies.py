"""The files of deploy/, run as they are by a real HAProxy and a real nginx but for ports, paths and names."""

import contextlib
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from running import ROOT, outside, wait_for
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_once

DEPLOY = ROOT / "deploy"


def put(text: str, *changes: tuple[str, object]) -> str:
    """The text with each first string replaced; each must be in it."""
    for old, new in changes:
        assert old in text, f"not in the configuration: {old}"
        text = text.replace(old, str(new))
    return text


def deployed(name: str, *changes: tuple[str, object]) -> str:
    """The file of deploy/ with each first string replaced; each must be in it."""
    return put((DEPLOY / name).read_text(encoding="utf-8"), *changes)


def readme_block(mark: str) -> str:
    """The one fenced block of deploy/README.md that holds this text."""
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE) if mark in text]
    return str(block)


def free_port() -> int:
    """Below those that the kernel gives to outgoing connections: the tests have thousands, and one would take it."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            return port


def listens(port: int, address: str = "127.0.0.1") -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((address, port)) == 0


def connect(uri: str, **options: Any) -> ClientConnection:
    """A client over TLS. It asks again when the proxy never saw its request: until Python
    3.13, TLS loses bytes where two threads use a connection, as this client's do, about once in 300 on a busy machine.
    """
    for _ in range(4):
        try:
            plain = socket.create_connection(("127.0.0.1", int(uri.split(":")[2].partition("/")[0])), timeout=5)
            return connect_once(uri, sock=plain, open_timeout=5, **options)
        except (TimeoutError, ConnectionClosedError):
            plain.close()
    raise TimeoutError(f"no answer to four requests: {uri}")


class _KeepStatus(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def get(
    url: str, context: ssl.SSLContext | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers (names in lower case) of one request; follows no redirect."""
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _KeepStatus)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers or {}), timeout=15)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.headers.items()}


class Certificate(NamedTuple):
    chain: Path
    key: Path
    context: ssl.SSLContext  # of a client that trusts it


def make_certificate(folder: Path, *names: str) -> Certificate:
    """A certificate for localhost and these names ("DNS:…", "IP:…"), which signs itself."""
    outside("openssl")
    chain, key = folder / "fullchain.pem", folder / "privkey.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    extensions = (
        "-addext",
        f"subjectAltName={','.join(('DNS:localhost', *names))}",
        "-addext",
        "keyUsage=critical,digitalSignature,keyCertSign",
    )
    subprocess.run([*command.split(), *extensions, "-keyout", key, "-out", chain], check=True, capture_output=True)
    return Certificate(chain, key, ssl.create_default_context(cafile=str(chain)))


class HAProxy:
    """`with HAProxy(folder, trackers, certificate) as proxy:` runs deploy/haproxy.cfg until the block ends.

    trackers: the ports of three, or ADDRESS:PORT. changes: what else to replace in the file, as for `put`.
    """

    def __init__(
        self, folder: Path, trackers: Sequence[int | str], certificate: Certificate, *changes: tuple[str, object]
    ):
        outside("haproxy")
        self.folder = folder
        self.port, self.http_port, self.metrics_port = free_port(), free_port(), free_port()
        self.pem = folder / "price-tracker.pem"
        self.pem.write_bytes(certificate.chain.read_bytes() + certificate.key.read_bytes())
        places = [at if isinstance(at, str) else f"127.0.0.1:{at}" for at in trackers]
        # The line's end too: 127.0.0.1:3032 is the start of another's 127.0.0.1:30325.
        servers = [(f" 127.0.0.1:{3031 + number}\n", f" {at}\n") for number, at in enumerate(places)]
        text = deployed(
            "haproxy.cfg",
            ("/etc/haproxy/price-tracker.pem", self.pem),
            ("/run/haproxy/admin.sock", folder / "admin.sock"),
            ("bind :80\n", f"bind :{self.http_port}\n"),
            ("bind [::]:80 ", f"bind [::]:{self.http_port} "),
            ("bind :443 ", f"bind :{self.port} "),
            ("bind [::]:443 ", f"bind [::]:{self.port} "),
            ("bind 127.0.0.1:8404\n", f"bind 127.0.0.1:{self.metrics_port}\n"),
            *servers,
            *changes,
        )
        if os.geteuid() != 0:
            text = re.sub(r"    (user|group|chroot) .*\n", "", text)
        self.file = folder / "haproxy.cfg"
        self.file.write_text(text)
        self.log = folder / "haproxy.log"

    def __enter__(self) -> "HAProxy":
        with self.log.open("w") as log:
            self.process = subprocess.Popen(["haproxy", "-W", "-f", self.file], stderr=log)
        wait_for(lambda: self.process.poll() is not None or self._takes_signals(), what="HAProxy is up")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)

    def _takes_signals(self) -> bool:
        """It listens before that, and ignores a reload."""
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert caught
        return bool(int(caught[1], 16) >> signal.SIGUSR2 - 1 & 1)

    def workers(self) -> set[int]:
        """The process numbers of those that serve: one, and during a reload the old one."""
        return {child.pid for child in psutil.Process(self.process.pid).children()}

    def reload(self) -> None:
        """What `systemctl reload haproxy` does; returns when the new process serves."""
        before = self.workers()
        self.process.send_signal(signal.SIGUSR2)
        wait_for(lambda: self.workers() - before, what="a new process after the reload")

    def sessions(self) -> dict[str, int]:
        """Of each tracker, the connections that this proxy has with it now, by the last port digits in the file."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.folder / "admin.sock"))
            sock.sendall(b"show stat\n")
            rows = [line.split(",") for line in sock.makefile().read().splitlines()]
        return {row[1]: int(row[4]) for row in rows if row[0] == "trackers" and row[1].startswith("303")}


class Nginx:
    """`with Nginx(folder, port, configuration, ...)` runs nginx with these files as its conf.d until the block ends.

    port: one that it listens on when it has started.
    """

    def __init__(self, folder: Path, port: int, *configurations: str):
        outside("nginx")
        self.folder = folder
        self.port = port
        (folder / "conf.d").mkdir()
        for number, configuration in enumerate(configurations):
            (folder / "conf.d" / f"{number}.conf").write_text(configuration)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        user = "user root;" if os.geteuid() == 0 else ""  # or its workers could not enter pytest's folder
        (folder / "nginx.conf").write_text(
            f"{user} daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log;\n"
            f"events {{ worker_connections 1000; }}\n"
            f"http {{ access_log {folder}/access.log; {paths} include {folder}/conf.d/*.conf; }}\n"
        )
        self.command = f"nginx -p {folder} -e {folder}/error.log -c {folder}/nginx.conf".split()

    def __enter__(self) -> "Nginx":
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        wait_for(lambda: listens(self.port) or self.process.poll() is not None, what="nginx listens")
        assert self.process.poll() is None, self.errors()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()
