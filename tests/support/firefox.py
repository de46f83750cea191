"""Headless Firefox, driven by WebDriver BiDi: geckodriver is not packaged, and a page needs only a few commands."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from running import wait_for
from websockets.sync.client import ClientConnection, connect

PREFERENCES = {  # nothing is asked of the network, and nothing in the user's own profile
    "app.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "devtools.jsonview.enabled": False,
    "remote.active-protocols": 1,
    "services.settings.server": "http://127.0.0.1:9/",
    "toolkit.telemetry.enabled": False,
}


@contextmanager
def open_firefox(profile: Path, preferences: Mapping[str, object]) -> Iterator["Firefox"]:
    lines = [f'user_pref("{name}", {json.dumps(value)});' for name, value in {**PREFERENCES, **preferences}.items()]
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "user.js").write_text("\n".join(lines), encoding="utf-8")
    options = ["--headless", "--no-remote", "--remote-debugging-port=0", "--profile", str(profile)]
    log = profile / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(["firefox-esr", *options, "about:blank"], stdout=stderr, stderr=stderr)
    try:
        wait_for(lambda: re.search(r"BiDi listening on (ws://\S+)", log.read_text()), 60, "Firefox's address")
        address = re.findall(r"BiDi listening on (ws://\S+)", log.read_text())[0]
        with connect(f"{address}/session", max_size=None, proxy=None) as socket:
            yield Firefox(socket)
    finally:
        process.terminate()
        process.wait(20)


class Firefox:
    def __init__(self, socket: ClientConnection):
        self.socket, self.number = socket, 0
        self.call("session.new", capabilities={})
        self.context = self.call("browsingContext.getTree")["contexts"][0]["context"]

    def call(self, method: str, **params: object) -> Any:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv(60))).get("id") != self.number:
            pass  # an event
        assert message["type"] == "success", message
        return message["result"]

    def get(self, url: str) -> None:
        self.call("browsingContext.navigate", context=self.context, url=url, wait="complete")

    def execute_script(self, script: str, *arguments: object) -> Any:
        """As Selenium's, for what JSON can say."""
        function = f"() => JSON.stringify((function () {{ {script} }}).apply(null, {json.dumps(arguments)}) ?? null)"
        answer = self.call(
            "script.callFunction",
            functionDeclaration=function,
            target={"context": self.context},
            awaitPromise=True,
            userActivation=True,
        )
        assert answer["type"] == "success", answer
        return json.loads(answer["result"]["value"])

    def set_size(self, width: int, height: int) -> None:
        viewport = {"width": width, "height": height}
        self.call("browsingContext.setViewport", context=self.context, viewport=viewport)

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._perform({"type": "key", "id": "keys", "actions": actions})

    def click(self, x: float, y: float) -> None:
        move: dict[str, object] = {"type": "pointerMove", "x": round(x), "y": round(y)}
        actions = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._perform({"type": "pointer", "id": "mouse", "actions": actions})

    def _perform(self, source: Mapping[str, object]) -> None:
        self.call("input.performActions", context=self.context, actions=[source])

    def back(self) -> None:
        self.call("browsingContext.traverseHistory", context=self.context, delta=-1)
