"""The image of deploy/Dockerfile, built by buildah and run without an engine, as the image's own config says."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from namespaces import network, only_root
from running import ROOT, outside, wait_for

CERTIFICATES = Path(os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "price-tracker-tests"
SUITE = "bookworm"
# What an engine does, in namespaces of its own: the root read-only, the volume at /data, a /dev of its own. The
# last line makes the program process 1.
START = """
set -eu
mount --make-rprivate /
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
mount --bind "$2" "$1/data"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=755 tmpfs "$1/dev"
for device in null zero urandom; do touch "$1/dev/$device"; mount --bind "/dev/$device" "$1/dev/$device"; done
mount -o remount,ro "$1/dev"
ip link set lo up
user=$3 root=$1
shift 3
exec chroot --userspec="$user" --groups= "$root" "$@"
"""


@contextmanager
def in_memory(folder: Path) -> Iterator[Path]:
    """The folder, in memory for as long as the block lasts: thousands of small files come and go in no time."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3g", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--recursive", folder], check=True)


def base_image() -> Path:
    """A Debian with Python, as a tar file; the first time it takes debootstrap a minute to make it."""
    base = CACHE / f"debian-{SUITE}.tar"
    if not base.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as place, in_memory(Path(place, "memory")) as root:
            command = ["debootstrap", "--variant=minbase", "--include=python3,python3-venv", SUITE, str(root)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            nobody_needs = ("dev/*", "proc/*", "sys/*", "var/cache/apt/*", "var/lib/apt/lists/*")
            leave_out = [f"--exclude=./{path}" for path in nobody_needs]
            subprocess.run(["tar", "-C", root, "-cf", f"{place}/tar", *leave_out, "."], check=True)
            Path(place, "tar").rename(base)
    return base


class Image:
    """`with Image(folder) as image:` builds it; `image.root` is its file system, `image.config` how to run it."""

    def __init__(self, folder: Path):
        outside("buildah", "debootstrap", "unshare", "nsenter")
        only_root()
        self.command = ["buildah", "--root", f"{folder}/storage", "--runroot", f"{folder}/run"]
        self._stack = ExitStack()
        self._stack.enter_context(in_memory(folder))

    def __enter__(self) -> "Image":
        with self._stack:
            self._build()
            self._stack = self._stack.pop_all()
        return self

    def _build(self) -> None:
        scratch = self.buildah("from", "scratch")
        subprocess.run(["tar", "-C", self.buildah("mount", scratch), "-xf", base_image()], check=True)
        self.buildah("commit", scratch, "localhost/base")
        # How this machine reaches PyPI is its own affair, and no line of the Dockerfile.
        settings = [f"--env={name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
        files = [file for file in (CERTIFICATES, Path("/etc/pip.conf")) if file.exists()]
        volumes = [f"--volume={file}:{file}:ro" for file in files]
        self.buildah(
            "bud", "--isolation=chroot", "--format=docker", "--build-arg=BASE=localhost/base", *settings, *volumes,
            f"--file={ROOT}/deploy/Dockerfile", "--tag=localhost/price-tracker", str(ROOT),
        )  # fmt: skip
        inspected = json.loads(self.buildah("inspect", "--type=image", "localhost/price-tracker"))
        self.config: dict[str, Any] = inspected["Docker"]["config"]
        self.container = self.buildah("from", "localhost/price-tracker")
        self.root = Path(self.buildah("mount", self.container))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def buildah(self, *arguments: str) -> str:
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"buildah {shlex.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    def volume(self, folder: Path) -> Path:
        """A new volume: an engine gives it the owner and the rights that the image's folder has."""
        (path,) = self.config["Volumes"]
        place = self.root / path.lstrip("/")
        folder.mkdir()
        shutil.copystat(place, folder)
        os.chown(folder, place.stat().st_uid, place.stat().st_gid)
        return folder


class Container:
    """`with Container(image, volume, "--demo") as container:` runs the image until the block ends.

    arguments: take the place of the image's command, as after `docker run IMAGE`. entrypoint: of the image's own.
    """

    def __init__(self, image: Image, volume: Path, *arguments: str, entrypoint: tuple[str, ...] = ()):
        self.config = image.config
        self.log: list[str] = []  # lines of stdout and stderr so far
        program = [*(entrypoint or self.config["Entrypoint"]), *(arguments or self.config["Cmd"])]
        self.environment = ["env", "-i", *self.config["Env"]]
        self.process = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"),
                *("sh", "-c", START, "start", image.root, volume, self.config["User"], *self.environment, *program),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            self.log.extend(line.rstrip("\n") for line in lines)

    def __enter__(self) -> "Container":
        wait_for(lambda: self.process.poll() is not None or any("ws://" in line for line in self.log), 20)
        assert self.process.poll() is None, self.log
        return self

    def __exit__(self, *_: object) -> None:
        for child in psutil.Process(self.process.pid).children() if self.process.poll() is None else []:
            child.kill()  # its end is that of all in there, and unshare's
        self.wait()

    def wait(self, seconds: float = 20.0) -> int:
        status = self.process.wait(seconds)
        self._reader.join()
        return status

    @property
    def program(self) -> int:
        """Its process number outside; inside it is 1."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.program, number)

    def network(self) -> Any:
        """In the block, this thread is in the container's network."""
        return network(f"/proc/{self.program}/ns/net")

    def is_healthy(self) -> bool:
        """What the health check of the image says, run as an engine runs it."""
        check = self.config["Healthcheck"]
        kind, *command = check["Test"]
        assert kind == "CMD"
        user, group = self.config["User"].split(":")
        enter = ["nsenter", f"--target={self.program}", "--mount", "--net", "--pid", "--root", "--wd=/"]
        enter += [f"--setuid={user}", f"--setgid={group}", *self.environment]
        with ExitStack() as stack:
            process = subprocess.Popen([*enter, *command], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            try:
                return process.wait(check["Timeout"] / 1e9) == 0
            except subprocess.TimeoutExpired:
                return False
