"""The container of deploy/: what its image does, and that compose.yaml fits it."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from container import Container, Image
from proxies import DEPLOY, get
from running import ASSETS, ROOT, outside, wait_for
from stand_in import StandIn
from websockets.sync.client import connect

from price_server import PriceServer

HTTP = "http://127.0.0.1:3030"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    with Image(tmp_path_factory.mktemp("image")) as built:
        yield built


@pytest.fixture
def volume(image: Image, tmp_path: Path) -> Path:
    return image.volume(tmp_path / "volume")


def test_once_prints_ten_prices(image: Image, volume: Path) -> None:
    container = Container(image, volume, "--demo", "--once")
    assert container.wait() == 0
    assert [json.loads(line)["asset_id"] for line in container.log] == list(ASSETS)


def test_container_serves_prices_at_port_3030_and_the_page(image: Image, volume: Path) -> None:
    with Container(image, volume, "--demo") as container, container.network():
        with connect("ws://127.0.0.1:3030/ws") as client:
            assert json.loads(client.recv(timeout=5))["asset_id"] == "BTC"
        assert b"<html" in get(f"{HTTP}/")[1].lower()
        assert image.config["ExposedPorts"] == {"3030/tcp": {}}


def test_container_without_a_key_says_so_and_ends(image: Image, volume: Path) -> None:
    container = Container(image, volume)
    assert container.wait() == 2
    assert "COIN_API_KEY is not set" in container.log[-1]


def test_container_is_healthy_and_unhealthy_while_the_program_hangs(image: Image, volume: Path) -> None:
    with Container(image, volume, "--demo") as container:
        assert container.is_healthy()
        container.send(signal.SIGSTOP)
        assert not container.is_healthy()
        container.send(signal.SIGCONT)
        wait_for(container.is_healthy)


def test_health_check_asks_no_proxy_of_the_environment(image: Image, volume: Path, monkeypatch: Any) -> None:
    """Docker's client settings put these into every container."""
    names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    proxies = [f"{name}=http://127.0.0.1:3031" for name in names]
    monkeypatch.setitem(image.config, "Env", [*image.config["Env"], *proxies])
    with Container(image, volume, "--demo") as container:
        assert container.is_healthy()
        with container.network(), StandIn(port=3031) as proxy:
            proxy.say(b"[]")  # a proxy that answers everything
            container.send(signal.SIGSTOP)
            assert not container.is_healthy()
            assert proxy.requests == []


def test_container_is_healthy_without_any_price(image: Image, volume: Path) -> None:
    """It reaches no CoinAPI here; to start it again would not help."""
    environment = ("env", "COIN_API_KEY=key", "COIN_API_URL=http://127.0.0.1:1", *image.config["Entrypoint"])
    with Container(image, volume, *image.config["Cmd"], entrypoint=environment) as container:
        with container.network():
            assert get(f"{HTTP}/healthz")[0] == 503
        assert container.is_healthy()


def test_sigterm_ends_the_container_within_2_s(image: Image, volume: Path) -> None:
    with Container(image, volume, "--demo") as container:
        asked = time.monotonic()
        container.send(signal.SIGTERM)
        assert container.wait() == 0
        assert time.monotonic() - asked < 2


def test_past_is_there_in_a_new_container_with_the_same_volume(image: Image, volume: Path) -> None:
    options = ("--demo", "--interval", "0.5", *image.config["Cmd"])

    def points(container: Container) -> list[list[float]]:
        with container.network():
            return list(json.loads(get(f"{HTTP}/history?assets=BTC")[1])["BTC"])

    with Container(image, volume, *options) as first:
        wait_for(lambda: points(first), what="a point of the past")
        time.sleep(1)  # two polls, of which one may be under way at the end
        last = points(first)[-1]
        first.send(signal.SIGTERM)
        first.wait()
    # In the same 10 s, the new one's first price would take the place of the last.
    wait_for(lambda: time.time() // 10 > last[0] // 10, 11)
    restart = time.time()
    with Container(image, volume, *options) as second:
        wait_for(lambda: points(second), what="the past")
        assert points(second)[0][0] < restart


def test_nothing_but_the_volume_is_writable(image: Image, volume: Path) -> None:
    look = "import os; [print(at) for at, *_ in os.walk('/') if os.access(at, os.W_OK) and at[:6] != '/proc/']"
    container = Container(image, volume, look, entrypoint=("python3", "-c"))
    assert container.wait() == 0
    assert container.log == ["/data"]
    # And without the engine's help: of the image's own files, none is the program's.
    user = int(image.config["User"].split(":")[0])
    owned = [Path(folder) for folder, *_ in os.walk(image.root) if os.lstat(folder).st_uid == user]
    assert owned == [image.root / "data"]


def test_image_has_labels_and_the_program_alone(image: Image, tmp_path: Path) -> None:
    labels = {
        name.rpartition(".")[2]: value for name, value in image.config["Labels"].items() if "opencontainers" in name
    }
    assert labels.items() >= {"title": "price-tracker", "version": "unknown", "revision": "unknown"}.items()
    assert "Server-Sent Events" in labels["description"]
    # What the build could copy: with it, the key in deploy/.env would be in a layer.
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    image.buildah("bud", "--isolation=chroot", f"--file={tmp_path}/Dockerfile", "--tag=localhost/context", str(ROOT))
    context = Path(image.buildah("mount", image.buildah("from", "localhost/context")))
    programs = {path.name for path in ROOT.glob("*.py")}
    assert {path.name for path in context.iterdir()} == programs | {"price_server", "requirements.txt"}
    assert list(context.rglob("__pycache__")) == []
    assert (image.root / "opt/price-tracker/tracker.py").exists()


def compose_config(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """What docker-compose makes of the compose.yaml in this folder."""
    command = ["docker-compose", "-f", str(folder / "compose.yaml"), "config", *options]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_env_file_with_the_key_is_enough_for_each_command_and_git_ignores_it(tmp_path: Path) -> None:
    outside("docker-compose", "git")
    shutil.copy(DEPLOY / "compose.yaml", tmp_path)
    (tmp_path / ".env").write_text("COIN_API_KEY=your-key\n")
    told = compose_config(tmp_path).stdout
    assert yaml.safe_load(told)["services"]["tracker"]["environment"] == {"COIN_API_KEY": "your-key"}
    assert subprocess.run(["git", "check-ignore", "-q", "deploy/.env"], cwd=ROOT).returncode == 0


def test_dockerfile_names_no_machine_and_no_setting_of_one() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert [word for word in ("--index-url", "PIP_", "ca-certificates", "http://") if word in text] == []


def test_compose_file_gives_the_port_to_this_machine_alone_and_has_room_for_all_clients() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["tracker"]
    assert service["ports"] == ["127.0.0.1:3030:3030"]
    assert service["ulimits"]["nofile"] > PriceServer.files_needed(10_000)
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])


def test_compose_file_is_understood_and_fits_the_image(image: Image) -> None:
    outside("docker-compose")
    without_key = compose_config(DEPLOY).stderr
    assert "write COIN_API_KEY=your-key to the file .env beside compose.yaml" in without_key
    service = yaml.safe_load(compose_config(DEPLOY, "--no-interpolate").stdout)["services"]["tracker"]
    assert service["read_only"] is True
    assert service["restart"] == "unless-stopped"
    assert service["command"] == image.config["Cmd"]
    assert [volume.split(":")[1] for volume in service["volumes"]] == list(image.config["Volumes"])
    assert [port.split(":")[-1] for port in service["ports"]] == list(image.config["ExposedPorts"])
    build = service["build"]
    assert (Path(build["context"]), Path(build["context"], build["dockerfile"])) == (ROOT, DEPLOY / "Dockerfile")
