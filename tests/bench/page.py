"""How fast the page is, in headless Chromium: `python tests/bench/page.py`, run by hand.

With 200 assets and an hour of history: when all prices are shown after the load, and the longest task in the first
10 s, with a /healthz that is late. Then the share of the main thread with ten and 40 assets at one poll a second. At
last the bytes of the first load, compressed, without the history.
"""

import gzip
import random
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from browser import Line, prices, record, start_chromium  # noqa: E402
from selenium.webdriver import Chrome  # noqa: E402

from price_server import PriceServer  # noqa: E402

WATCH = """
    window.tasks = [];
    new PerformanceObserver((list) => tasks.push(...list.getEntries().map((task) => task.duration)))
        .observe({type: 'longtask', buffered: true});
    const look = () => {
        const shown = [...document.querySelectorAll('[data-part=price]')].filter((part) => part.textContent !== '–');
        if (shown.length === 200) window.all_shown = performance.now(); else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
"""


def start_server(count: int) -> PriceServer:
    server = PriceServer(tuple(f"T{number:03}" for number in range(count)), interval=1.0)
    server.run_forever(threaded=True)
    record(server, 3600, 10, lambda age: 100 + random.random())
    publish(server)
    return server


def publish(server: PriceServer) -> None:
    prices(server, 0.0, **{asset: random.uniform(99, 101) for asset in server.assets})


def publish_for(server: PriceServer, seconds: int) -> None:
    for _ in range(seconds):
        time.sleep(1)
        publish(server)


def measure_start(browser: Chrome) -> None:
    server = start_server(200)
    line = Line(server)
    line.late["/healthz"] = 1.5
    threading.Thread(target=line.serve_forever, daemon=True).start()
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    browser.get(f"http://127.0.0.1:{line.port}/?range=1h")
    publish_for(server, 10)
    shown, tasks = browser.execute_script("return [window.all_shown, tasks]")
    print(f"200 assets: all shown after {shown:.0f} ms, longest task {max(tasks, default=0):.0f} ms, of {len(tasks)}")
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    line.shutdown()
    server.shutdown_gracefully()


def measure_share(browser: Chrome, count: int, seconds: int = 20) -> None:
    server = start_server(count)
    browser.get(f"http://127.0.0.1:{server.port}/?range=1h")
    publish_for(server, 5)
    busy = [busy_seconds(browser)]
    publish_for(server, seconds)
    busy.append(busy_seconds(browser))
    print(f"{count} assets: main thread {1000 * (busy[1] - busy[0]) / seconds:.0f} ms a second")
    server.shutdown_gracefully()


def busy_seconds(browser: Chrome) -> float:
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))


def main() -> None:
    browser = start_chromium()
    browser.execute_cdp_cmd("Performance.enable", {})
    measure_start(browser)
    for count in (10, 40, 200):
        measure_share(browser, count)
    browser.quit()
    files = (ROOT / "price_server/page").iterdir()
    print(f"first load: {sum(len(gzip.compress(file.read_bytes())) for file in files)} bytes, compressed")


if __name__ == "__main__":
    main()
