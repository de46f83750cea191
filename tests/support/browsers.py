"""Chromium, Firefox and WebKit, each headless, for tests that are the same in all three."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from browser import start_chromium
from firefox import Firefox, open_firefox
from running import outside, wait_for
from selenium.webdriver import Chrome, WebKitGTK, WebKitGTKOptions, WebKitGTKService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder

NAMES = ("chromium", "firefox", "webkit")
MINI_BROWSERS = "/usr/lib/*/webkit2gtk-4.*/MiniBrowser"
ARROW_LEFT, END, TAB, ENTER = "\ue012", "\ue010", "\ue004", "\ue007"


class Selenium:
    """The same as Firefox's class, by Selenium."""

    def __init__(self, driver: Chrome | WebKitGTK):
        self.driver = driver
        self.get, self.execute_script, self.back = driver.get, driver.execute_script, driver.back

    def set_size(self, width: int, height: int) -> None:
        with suppress(AssertionError):  # once more below, because WebKit loses a change of its window now and then
            self._set_size(width, height, seconds=5)
            return
        self._set_size(width, height, seconds=30)

    def _set_size(self, width: int, height: int, seconds: float) -> None:
        if isinstance(self.driver, Chrome):
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        else:  # the bars of the window come on top
            self.driver.set_window_size(width, height)
            bars = height - self.execute_script("return innerHeight")
            self.driver.set_window_size(width, height + bars)
        wait_for(lambda: self.execute_script("return [innerWidth, innerHeight]") == [width, height], seconds)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver, 0).send_keys(*keys).perform()

    def click(self, x: float, y: float) -> None:
        actions = ActionBuilder(self.driver, duration=0)
        actions.pointer_action.move_to_location(round(x), round(y)).click()
        actions.perform()


class View:
    """The page in one of the browsers."""

    def __init__(self, name: str, driver: Any):
        self.name, self.driver = name, driver
        self.run = driver.execute_script

    def visit(self, port: int, state: str = "Live", query: str = "") -> None:
        self.driver.get(f"http://127.0.0.1:{port}/{query}")
        self.wait_for_state(state)

    def wait_for_state(self, state: str, seconds: float = 30.0) -> None:
        wait_for(lambda: self.texts("#state") == [state], seconds, f"{state!r} in {self.name}")

    def wait_for_charts(self) -> None:
        """As high as they will be."""
        script = """return document.documentElement.style.getPropertyValue('--chart')
            && [...document.querySelectorAll('[data-part=line]')].every((line) => line.getAttribute('d'))"""
        wait_for(lambda: self.run(script), what="a line in each chart")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent.trim())"
        return list(self.run(script, selector))

    def part(self, name: str) -> list[str]:
        return self.texts(f"tbody [data-part={name}]")

    def box(self, selector: str) -> dict[str, float]:
        script = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
        return dict(self.run(script, selector))

    def style(self, selector: str, name: str) -> str:
        return str(
            self.run("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name)
        )

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """At this share of its width and height."""
        box = self.box(selector)
        self.driver.click(box["x"] + x * box["width"], box["y"] + y * box["height"])

    def press(self, *keys: str) -> None:
        self.driver.press(*keys)


@contextmanager
def open_browser(name: str, folder: Path, dark: bool = False) -> Iterator[View]:
    opened = {"chromium": _open_chromium, "firefox": _open_firefox, "webkit": _open_webkit}[name]
    with opened(folder, dark) as driver:
        yield View(name, driver)


@contextmanager
def _open_chromium(folder: Path, dark: bool) -> Iterator[Selenium]:
    flags = ["--force-dark-mode"] if dark else []
    driver = start_chromium(f"--user-data-dir={folder / 'chromium'}", *flags)
    if dark:
        media = [{"name": "prefers-color-scheme", "value": "dark"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    yield Selenium(driver)
    driver.quit()


@contextmanager
def _open_firefox(folder: Path, dark: bool) -> Iterator[Firefox]:
    outside("firefox-esr")
    preferences = {"layout.css.prefers-color-scheme.content-override": int(not dark)}
    with open_firefox(folder / "firefox", preferences) as firefox:
        yield firefox


@contextmanager
def _open_webkit(folder: Path, dark: bool) -> Iterator[Selenium]:
    outside("WebKitWebDriver", "Xvfb")
    receiving, sending = os.pipe()
    command = ["Xvfb", "-displayfd", str(sending), "-screen", "0", "3840x2400x24", "-nolisten", "tcp"]
    display = subprocess.Popen(command, pass_fds=[sending], stderr=subprocess.DEVNULL)
    os.close(sending)
    with os.fdopen(receiving) as numbers:
        number = numbers.readline().strip()
    options = WebKitGTKOptions()
    options.binary_location = str(next(Path("/").glob(MINI_BROWSERS[1:])))
    options.add_argument("--automation")
    environment = {**os.environ, "DISPLAY": f":{number}", "GTK_THEME": "Adwaita:dark" if dark else "Adwaita"}
    service = WebKitGTKService(shutil.which("WebKitWebDriver") or "", env=environment)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Selenium's own
            driver = WebKitGTK(options, service)
        yield Selenium(driver)
        driver.quit()
    finally:
        display.terminate()
        display.wait(20)
