"""The worked example of an exploration: the delta landscape of five teachers, all ordered pairs, three seeds.

    .venv/bin/python tests/benchmarks/landscape.py

Runs `deltaray tune jobs/recipes/miniature-landscape.yaml` (trials that are over are not run again) and writes
`results/miniature-landscape.json`: the landscape, every trial, the time of every stage, the hardware, the versions and
the command; and, where Chromium is installed, `results/miniature-landscape.png`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from miniature_seeds import PACKAGES, hardware, installed

RECIPE = "jobs/recipes/miniature-landscape.yaml"
OUT = Path("runs/miniature-landscape")
RESULT = Path(__file__).parent / "results" / "miniature-landscape.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    command = ["deltaray", "tune", RECIPE]
    subprocess.run([sys.executable, "-m", *command], check=True)
    subprocess.run([sys.executable, "-m", "deltaray", "report", str(OUT)], check=True)
    record = {
        "command": " ".join(command),
        "landscape": json.loads((OUT / "tuning" / "landscape.json").read_text()),
        "trials": [trial(path) for path in sorted(OUT.glob("tuning/trials/*.json"))],
        "stages": [json.loads(line) for line in (OUT / ".deltaray" / "stages.jsonl").read_text().splitlines()],
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(RESULT)
    picture(RESULT.with_suffix(".png"))


def trial(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    return {key: record[key] for key in ("name", "state", "mean", "gain", "delta", "signatures", "seconds")}


def picture(path: Path) -> None:
    """The chart as the report shows it."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        return print("no Chromium, no picture")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 900}, device_scale_factor=1.5)
        page.goto(f"file://{(OUT / 'report.html').resolve()}")
        chart = page.locator("#landscape")
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
        chart.screenshot(path=str(path))
        browser.close()
    print(path)


if __name__ == "__main__":
    main()
