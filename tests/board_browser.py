"""A board in a process of its own, and the windows of a browser that look at it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).parent.parent
TOKEN = "the-token-of-the-browser-tests"
TINY = ("model=tiny_glm", "tracker=none", "data.dataset=identity_sample", "data.dev_ratio=0.2", "trainer.do_eval=true")
LANGUAGES = {"en": "127.0.0.1", "zh": "localhost"}
Value = TypeVar("Value")


def glmtuner(folder: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    """The command line, started in a folder; its output goes to a file beside."""
    log = folder / f"{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "glmtuner", *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLMTUNER_BOARD_TOKEN": TOKEN}, **options,
        )  # fmt: skip
    process.log = log  # type: ignore[attr-defined]
    return process


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """What the process printed, when it has ended with this code."""
    found = process.wait(240)
    text: str = process.log.read_text()  # type: ignore[attr-defined]
    assert found == code, text
    return text


def until(
    condition: Callable[[], Value], seconds: float = 90, what: Callable[[], str] | None = None, every: float = 0.1
) -> Value:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, what() if what else f"not within {seconds} s: {condition}"
        time.sleep(every)


@dataclass
class Served:
    """A board in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    folder: Path  # that of the runs

    def url(self, language: str = "en") -> str:
        return f"http://{LANGUAGES[language]}:{self.port}/"

    def ask(self, name: str) -> Any:
        """What GET /api/<name> answers, without a browser."""
        request = Request(f"{self.url()}api/{name}", headers={"Authorization": f"Bearer {TOKEN}"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.ask("runs")["rows"]}


def served(folder: Path, *words: str) -> Served:
    """A board of the folder's `outputs`, once it says where it listens."""
    process = glmtuner(folder, "board", "outputs", "--port", "0", *words, start_new_session=True)
    found = until(
        lambda: re.search(r"at http://\S+?:(\d+)/", process.log.read_text()) or process.poll() is not None, 60
    )  # type: ignore[attr-defined]
    assert not isinstance(found, bool), process.log.read_text()  # type: ignore[attr-defined]
    return Served(process, int(found.group(1)), folder / "outputs")


def driver_of(folder: Path, *words: str) -> Any:
    """A headless Chromium that keeps a log of what it asks for."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--lang=en", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,900",
        "--host-resolver-rules=MAP evil.example 127.0.0.1", f"--user-data-dir={folder}", *words,
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    driver.set_script_timeout(60)
    return driver


def asked_addresses(driver: Any) -> list[str]:
    """Every address that the browser has asked for since the last call."""
    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@dataclass
class Page:
    """A window of the browser with the board in a language."""

    driver: Any
    board: Served
    language: str
    window: str = ""

    def go(self, address: str = "#/runs") -> None:
        """Open a view by its address, as one typed behind the board's."""
        self.driver.switch_to.window(self.window)
        self.driver.get(self.board.url(self.language) + address)

    def find(self, selector: str, text: str | None = None, seconds: float = 90) -> Any:
        """The first visible element of a selector, with this text in it."""
        return until(
            lambda: next(iter(self.all(selector, text)), None),
            seconds,
            lambda: f"no {selector} {text or ''}: {self.text()[:600]}",
        )

    def all(self, selector: str, text: str | None = None) -> list[Any]:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.common.by import By

        try:
            return [
                element for element in self.driver.find_elements(By.CSS_SELECTOR, selector)
                if element.is_displayed() and (text is None or text in element.text)
            ]  # fmt: skip
        except StaleElementReferenceException:  # the page drew it anew
            return []

    def click(self, selector: str, text: str | None = None) -> None:
        from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException

        for _ in range(20):
            element = self.find(selector, text)
            try:
                self.js("arguments[0].scrollIntoView({block: 'center'})", element)
                return element.click()
            except (StaleElementReferenceException, ElementClickInterceptedException):
                time.sleep(0.2)
        raise AssertionError(f"{selector} {text} cannot be clicked")

    def fill(self, selector: str, text: str) -> None:
        """Type a text in place of what a field has."""
        from selenium.webdriver.common.keys import Keys

        element = self.find(selector)
        element.send_keys(Keys.CONTROL, "a")
        element.send_keys(text if text else Keys.DELETE)

    def wait(self, condition: Callable[[], Value], seconds: float = 90) -> Value:
        return until(condition, seconds, lambda: self.text()[:900])

    def text(self) -> str:
        """All that the page shows."""
        return str(self.js("return document.body.innerText"))

    def content(self, selector: str) -> str:
        """The text of an element, whether or not it is folded away."""
        return str(self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def word(self, name: str) -> str:
        """A word of the page's own list, in its language."""
        return str(self.js("return board.word(arguments[0])", name))

    def row(self, run: str) -> Any:
        """The table's row of a run; None as long as there is none."""
        return next(iter(self.all(f'tr[data-run="{run}"]')), None)
