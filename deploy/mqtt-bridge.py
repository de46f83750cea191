"""Prices for an MQTT broker: follows a tracker as the page does, and publishes each message as `prices/BTC` and so on.

    python3 -m venv venv && venv/bin/pip install paho-mqtt websockets
    TRACKER_URL=ws://127.0.0.1:3030/ws MQTT_URL=mqtt://127.0.0.1:1883 venv/bin/python mqtt-bridge.py

Prices are retained, for those who subscribe later, and expire at the broker after EXPIRE_AFTER seconds (60): when
CoinAPI, the tracker or this bridge fails, none is left. A price is published within MAX_AGE seconds (5, the tracker's
interval) or not at all: prices that come during an outage of the broker replace one another here, and paho-mqtt keeps
none, because each connection has a client of its own.
"""

import json
import logging
import os
import threading
import time
from urllib.parse import unquote, urlsplit

from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

TRACKER_URL = os.environ.get("TRACKER_URL", "ws://127.0.0.1:3030/ws")
# mqtts:// for TLS; user:password@ before the host, percent-encoded.
MQTT_URL = urlsplit(os.environ.get("MQTT_URL", "mqtt://127.0.0.1:1883"))
TOPIC = os.environ.get("TOPIC", "prices")
MAX_AGE = float(os.environ.get("MAX_AGE", "5"))
RETRY_AFTER = 1.0  # seconds
EXPIRY = Properties(PacketTypes.PUBLISH)
EXPIRY.MessageExpiryInterval = int(os.environ.get("EXPIRE_AFTER", "60"))

logger = logging.getLogger("bridge")
newest: dict[str, tuple[float, str]] = {}  # by asset: when it came, and the message
came = threading.Event()


def receive() -> None:
    """A thread: follow the tracker, and come back when the connection is lost."""
    while True:
        try:
            with connect(TRACKER_URL, max_queue=None) as tracker:
                logger.info("following %s", TRACKER_URL)
                known = set()
                for message in tracker:
                    asset_id = json.loads(message)["asset_id"]
                    # The first one of each asset is the last known price, which may be of any age.
                    if asset_id in known:
                        newest[asset_id] = time.monotonic(), str(message)
                        came.set()
                    known.add(asset_id)
        except (OSError, WebSocketException) as error:
            logger.warning("lost the tracker: %s", error)
        time.sleep(RETRY_AFTER)


def publish_over(client: Client) -> None:
    """Publish the newest price of each asset until the broker fails: OSError."""
    while True:
        came.wait()
        came.clear()
        sent = []
        while newest:
            asset_id, (since, message) = newest.popitem()
            if time.monotonic() - since < MAX_AGE:
                sent.append(client.publish(f"{TOPIC}/{asset_id}", message, qos=1, retain=True, properties=EXPIRY))
        # Until the broker has them, nothing more is sent: no prices wait in a socket that nobody reads.
        deadline = time.monotonic() + max(1, MAX_AGE)
        while not all(each.rc == 0 and each.is_published() for each in sent):
            if time.monotonic() > deadline or not client.is_connected():
                raise OSError("the broker does not take prices")
            time.sleep(0.01)


def publish() -> None:
    """Publish over one connection until it is lost; then over the next."""
    while True:
        client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        connected = threading.Event()
        client.on_connect = lambda _client, _data, _flags, reason, _properties, is_in=connected: (
            logger.warning("refused: %s", reason) if reason.is_failure else is_in.set()
        )
        if MQTT_URL.username:
            client.username_pw_set(unquote(MQTT_URL.username), unquote(MQTT_URL.password or ""))
        port = 1883
        if MQTT_URL.scheme == "mqtts":
            client.tls_set()
            port = 8883
        try:
            client.connect(MQTT_URL.hostname or "", MQTT_URL.port or port, keepalive=10)
            client.loop_start()
            if not connected.wait(5):
                raise OSError("it does not let this client in")
            logger.info("connected to the broker")
            publish_over(client)
        except OSError as error:
            logger.warning("no broker: %s", error)
        client.disconnect()
        client.loop_stop()
        time.sleep(RETRY_AFTER)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
    threading.Thread(target=receive, daemon=True).start()
    publish()
