"""The pictures of the guide: a study as a Ray job on a real head, seen in Ray's dashboard and in Prometheus.

    python tests/benchmarks/screens.py

Needs Chromium and Prometheus (`make tools`). Submits the shipped miniature to a head of its own that asks for a token,
looks at both pages while it generates and when it is done, and writes `cluster/screens/*.png`. Takes five minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from job_server import JobServer, job_server  # noqa: E402

OBSERVABILITY, SCREENS = ROOT / "cluster" / "observability", ROOT / "cluster" / "screens"
PORT = 19090
SIZE = {"width": 1280, "height": 720}
PANEL = "Tokens generated per second"
"""Of the Grafana dashboard: Prometheus draws its query."""


def main() -> None:
    SCREENS.mkdir(exist_ok=True)
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        server = held.enter_context(job_server())
        held.enter_context(prometheus(server, folder))
        playwright = held.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        command = submitted(server, folder)
        until(lambda: list((folder / "study").glob(".deltaray/units/**/*.parquet")), command)
        look_at_ray(browser, server)
        assert command.wait(900) == 0
        look_at_prometheus(browser)
        browser.close()


@contextmanager
def prometheus(server: JobServer, folder: Path) -> Iterator[None]:
    """With our configuration, but for where Ray lists its nodes."""
    text = (OBSERVABILITY / "prometheus.yml").read_text().replace("/tmp/ray/", f"{server.folder}/ray/")
    config = folder / "prometheus.yml"
    config.write_text(text.replace("alerts.yml", str(OBSERVABILITY / "alerts.yml")).replace("10s", "2s"))
    files = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{PORT}"]
    with subprocess.Popen(["prometheus", *files], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def submitted(server: JobServer, folder: Path) -> "subprocess.Popen[bytes]":
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(server.token), "RAY_API_SERVER_ADDRESS": server.address}
    recipe = ROOT / "jobs" / "recipes" / "miniature.yaml"
    settings = [f"out={folder}/study", f"miniature.directory={ROOT}/runs/miniature-family"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "deltaray", "submit", str(recipe.relative_to(ROOT)), *words]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | own)


def until(look: Callable[[], Any], command: "subprocess.Popen[bytes]") -> None:
    while not look():
        assert command.poll() is None, "the job has ended"
        time.sleep(0.5)


def look_at_ray(browser: Browser, server: JobServer) -> None:
    context = browser.new_context(viewport=SIZE)
    token = {"name": "ray-authentication-token", "value": server.token.read_text(), "url": server.address}
    context.add_cookies([token])
    for name, shown in {"jobs": "RUNNING", "actors": "ALIVE"}.items():
        page = context.new_page()
        page.goto(f"{server.address}/#/{name}")
        page.get_by_text(shown).first.wait_for(timeout=60_000)
        take(page, f"ray-{name}")


def look_at_prometheus(browser: Browser) -> None:
    panels = json.loads((OBSERVABILITY / "grafana-dashboard.json").read_text())["panels"]
    query = next(panel["targets"][0]["expr"] for panel in panels if panel["title"] == PANEL)
    asked = urllib.parse.urlencode({"g0.expr": query, "g0.tab": "0", "g0.range_input": "5m"})
    page = browser.new_page(viewport={**SIZE, "height": 960})
    page.goto(f"http://127.0.0.1:{PORT}/graph?{asked}")
    take(page, "prometheus")
    page.set_viewport_size(SIZE)
    places = ("alerts", "classic/alerts")  # the second in Debian's build
    assert any(page.goto(f"http://127.0.0.1:{PORT}/{place}").ok for place in places)
    page.evaluate(f"document.body.innerHTML = document.body.innerHTML.replaceAll('{OBSERVABILITY}/', '')")
    take(page, "alerts")


def take(page: Page, name: str) -> None:
    page.wait_for_timeout(4000)  # tables fill themselves after the page has loaded
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=SCREENS / f"{name}.png")


if __name__ == "__main__":
    main()
