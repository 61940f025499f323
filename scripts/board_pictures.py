"""Take the pictures of docs/board.md: a board over a folder of runs, in light, in dark, on a phone and in Chinese.

`python scripts/board_pictures.py outputs` writes docs/board.png, board_dark.png, board_phone.png and board_zh.png. It needs chromium,
chromedriver, selenium and Pillow, and a folder with a sweep; the first sweep and its best run are shown.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
TOKEN = "the-token-of-the-pictures"
FORM = (
    "-m model=tiny_glm data.dataset=identity_sample finetuning=lora,freeze trainer.learning_rate=1e-2,1e-3 name=rates"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with runs and a finished sweep")
    parser.add_argument("--to", type=Path, default=ROOT / "docs", help="where the pictures go")
    parser.add_argument("--sweep", help="the sweep's id; by default the first one with finished jobs")
    arguments = parser.parse_args()
    process, url = board(arguments.folder)
    try:
        take(url, arguments.to, arguments.sweep or first_sweep(url))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def board(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A board of the folder in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glmtuner", "board", str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "GLMTUNER_BOARD_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    found = re.search(r"at (http://\S+?/)", process.stdout.readline())
    if found is None:
        sys.exit("the board did not start")
    return process, found.group(1)


def first_sweep(url: str) -> str:
    """The id of a sweep with finished jobs."""
    with urlopen(Request(f"{url}api/runs", headers={"Authorization": f"Bearer {TOKEN}"}), timeout=60) as answer:
        sweeps = json.load(answer)["sweeps"]
    found = [sweep["id"] for sweep in sweeps if sweep["count"].get("finished", 0) > 1]
    if not found:
        sys.exit("there is no sweep with finished jobs in this folder")
    return str(found[0])


def take(url: str, to: Path, sweep: str) -> None:
    """Write the four pictures into `to`."""
    from PIL import Image
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--lang=en"):
        options.add_argument(word)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))

    def picture(
        name: str, address: str, wanted: str, theme: str, language: str, width: int, height: int, then: Any = None
    ) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1 if width > 500 else 2, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_script(
            "board.remember('theme', arguments[0]); board.remember('language', arguments[1])", theme, language
        )
        driver.get("about:blank")
        driver.get(url + address)
        WebDriverWait(driver, 60).until(lambda _: driver.find_elements(By.CSS_SELECTOR, wanted))
        if then is not None:
            then()
        time.sleep(2)  # what is drawn behind the first answer
        driver.save_screenshot(str(to / name))
        with Image.open(to / name) as taken:  # a page has few colours: a third of the bytes
            taken.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(to / name, optimize=True)

    def type_the_form() -> None:
        box = driver.find_element(By.ID, "command")
        box.clear()
        box.send_keys(FORM)
        WebDriverWait(driver, 60).until(
            lambda _: any("4" in found.text for found in driver.find_elements(By.ID, "jobs"))
        )

    try:
        driver.get(f"{url}?token={TOKEN}")
        identity = quote(sweep, safe="")
        picture("board.png", f"#/sweep/{identity}?tab=lines", "[data-chart]", "light", "en", 1200, 800)
        picture("board_dark.png", "#/runs", "tr[data-run]", "dark", "en", 1200, 700)
        picture("board_phone.png", f"#/sweep/{identity}", "#leaderboard", "light", "en", 390, 760)
        picture("board_zh.png", "#/start", "[data-preset]", "light", "zh", 1200, 800, type_the_form)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
