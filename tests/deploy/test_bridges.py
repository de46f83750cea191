"""The bridges of deploy/ to NATS and MQTT: after an outage of the real broker no old price is sent."""

import asyncio
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nats
import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from proxies import DEPLOY, free_port, listens
from running import Tracker, outside, wait_for

INTERVAL = 0.5
ASSETS = {"BTC", "ETH"}


class Received:
    """What a subscriber got: (asset, age in seconds when it came)."""

    def __init__(self) -> None:
        self.prices: list[tuple[str, float]] = []

    def add(self, message: bytes | bytearray) -> None:
        price = json.loads(message)
        age = (datetime.now(UTC) - datetime.fromisoformat(price["time"])).total_seconds()
        self.prices.append((price["asset_id"], age))

    def clear_and_wait(self, what: str) -> None:
        """Return when both assets have come again."""
        self.prices.clear()
        wait_for(lambda: {asset_id for asset_id, _ in self.prices} == ASSETS, 20, what)


class Broker:
    """`with Broker(...) as broker:` runs a real one at a fixed port; a test may end it and start it again."""

    def __init__(self, *command: object, port: int):
        self.command, self.port = [str(part) for part in command], port

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: listens(self.port), what=self.command[0])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def nats_server(_: Path, port: int) -> Broker:
    outside("nats-server")
    return Broker("nats-server", "-a", "127.0.0.1", "-p", port, port=port)


def mosquitto(folder: Path, port: int) -> Broker:
    outside("mosquitto")
    (folder / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    return Broker("mosquitto", "-c", folder / "mosquitto.conf", port=port)


@contextmanager
def nats_subscriber(port: int, received: Received) -> Iterator[None]:
    """It comes back by itself after an outage, a tenth of a second apart."""
    ended = asyncio.Event()

    async def add(message: Any) -> None:
        received.add(message.data)

    async def follow() -> None:
        client = await nats.connect(
            f"nats://127.0.0.1:{port}", max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=nothing
        )
        await client.subscribe("prices.*", cb=add)
        await ended.wait()
        await client.close()

    async def nothing(_: Exception) -> None:
        pass

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(follow(),))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()


@contextmanager
def mqtt_subscriber(port: int, received: Received) -> Iterator[None]:
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    client.reconnect_delay_set(0.1, 0.1)  # type: ignore[arg-type]
    client.on_connect = lambda client, *_: client.subscribe("prices/+")
    client.on_message = lambda _client, _data, message: received.add(message.payload)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield
    finally:
        client.disconnect()
        client.loop_stop()


@contextmanager
def running(name: str, tracker: Tracker, **environment: object) -> Iterator[subprocess.Popen[bytes]]:
    settings = {name: str(value) for name, value in environment.items()}
    settings |= {"TRACKER_URL": tracker.ws, "MAX_AGE": str(INTERVAL)}
    with subprocess.Popen([sys.executable, DEPLOY / name], env=os.environ | settings) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "make_broker", "subscriber", "setting"),
    [
        ("nats-bridge.py", nats_server, nats_subscriber, "NATS_URL"),
        ("mqtt-bridge.py", mosquitto, mqtt_subscriber, "MQTT_URL"),
    ],
)
def test_no_old_price_is_sent_after_an_outage_of_the_broker_and_the_bridge_comes_back(
    tmp_path: Path, name: str, make_broker: Callable[[Path, int], Broker], subscriber: Callable[..., Any], setting: str
) -> None:
    port, received = free_port(), Received()
    url = {setting: f"{setting[:4].lower()}://127.0.0.1:{port}"}
    with (
        make_broker(tmp_path, port) as broker,
        Tracker("--demo", "--assets", "BTC,ETH", "--interval", str(INTERVAL)) as tracker,
        running(name, tracker, **url),
        subscriber(port, received),
    ):
        received.clear_and_wait("prices through the broker")
        broker.stop()
        time.sleep(4 * INTERVAL)  # how long it is gone is the point
        broker.start()
        received.clear_and_wait("prices after the broker was ended")
        assert max(age for _, age in received.prices) < 2 * INTERVAL

        broker.process.send_signal(signal.SIGSTOP)
        time.sleep(6 * INTERVAL)
        received.prices.clear()
        broker.process.send_signal(signal.SIGCONT)
        wait_for(lambda: len(received.prices) > 8, what="prices after the broker hung")
        # What was under way when it hung is in the broker's own socket: one poll.
        assert sum(age > 2 * INTERVAL for _, age in received.prices) <= len(ASSETS), received.prices


def test_retained_prices_expire_when_no_new_ones_come(tmp_path: Path) -> None:
    port, received = free_port(), Received()
    with (
        mosquitto(tmp_path, port),
        Tracker("--demo", "--assets", "BTC,ETH", "--interval", str(INTERVAL)) as tracker,
        running("mqtt-bridge.py", tracker, MQTT_URL=f"mqtt://127.0.0.1:{port}", EXPIRE_AFTER=2),
    ):
        with mqtt_subscriber(port, received):
            received.clear_and_wait("prices through the broker")
        tracker.process.send_signal(signal.SIGSTOP)
        assert retained(port) == ASSETS
        wait_for(lambda: retained(port) == set(), 10, "they expire")
        tracker.process.send_signal(signal.SIGCONT)


def test_mqtts_has_a_port_of_its_own_and_a_password_may_have_any_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQTT_URL", "mqtts://me:p%40s%2Fs@broker.example")
    publish = runpy.run_path(str(DEPLOY / "mqtt-bridge.py"))["publish"]
    client = Mock(**{"connect.side_effect": SystemExit})
    monkeypatch.setitem(publish.__globals__, "Client", lambda *_, **__: client)
    with pytest.raises(SystemExit):
        publish()
    client.username_pw_set.assert_called_once_with("me", "p@s/s")
    client.tls_set.assert_called_once_with()
    client.connect.assert_called_once_with("broker.example", 8883, keepalive=10)


def retained(port: int) -> set[str]:
    """The assets whose prices a new subscriber gets at once: those that come before the answer to a later request."""
    got: list[MQTTMessage] = []
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    asked = threading.Event()
    client.on_connect = lambda client, *_: client.subscribe("prices/+")
    client.on_message = lambda _client, _data, message: got.append(message)
    # The broker answers in order: retained messages first, then the second subscription.
    answers: Iterator[Callable[[], object]] = iter((lambda: client.subscribe("nothing"), asked.set))

    def on_subscribe(*_: object) -> None:
        next(answers)()

    client.on_subscribe = on_subscribe
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert asked.wait(10)
    client.disconnect()
    client.loop_stop()
    return {message.topic.removeprefix("prices/") for message in got if message.retain}
