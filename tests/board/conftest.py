"""One folder of real runs, one board over it, and one Chromium that looks at it in English and in Chinese.

The languages are two windows at two origins, 127.0.0.1 and localhost, each with settings of its own: two viewers at once.
"""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from board_browser import LANGUAGES, TINY, TOKEN, Page, Served, asked_addresses, driver_of, finished, glmtuner, served


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, its answers, and a finished sweep of two jobs; more come in the tests."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "outputs").mkdir()
    sweep = glmtuner(
        folder, "-m", *TINY, "name=before", "objective=eval_loss", "trainer.max_steps=12", "trainer.logging_steps=1",
        "trainer.learning_rate=3e-2,1e-4",
    )  # fmt: skip
    finished(
        glmtuner(
            folder, "experiment=quickstart", "trainer.max_steps=60", "trainer.num_train_epochs=30", "trainer.logging_steps=1",
            "trainer.output_dir=outputs/first",
        )
    )  # fmt: skip
    finished(sweep)
    return folder


@pytest.fixture(scope="session")
def board(folder: Path) -> Iterator[Served]:
    found = served(folder)
    yield found
    found.process.send_signal(signal.SIGINT)
    text = finished(found.process)
    assert "Traceback" not in text, text


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = driver_of(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def pages(driver: Any, board: Served) -> dict[str, Page]:
    """A window for each language, opened by the address that the board printed."""
    found = {}
    for language in LANGUAGES:
        if found:
            driver.switch_to.new_window("window")
        page = found[language] = Page(driver, board, language, driver.current_window_handle)
        driver.set_window_size(1300, 900)
        driver.get(f"{board.url(language)}?token={TOKEN}")
        page.js(
            "board.remember('language', arguments[0]); board.remember('theme', 'light'); location.reload()", language
        )
        page.wait(lambda page=page: page.js("return document.documentElement.lang")[:2] == page.language)  # type: ignore[misc]
        assert TOKEN not in driver.current_url
    return found


@pytest.fixture(params=LANGUAGES)
def page(pages: dict[str, Page], request: pytest.FixtureRequest) -> Page:
    """The board in each language."""
    page = pages[request.param]
    page.driver.switch_to.window(page.window)
    page.driver.get("about:blank")  # a new page, whatever a test has put into the one before
    page.go()
    return page


@pytest.fixture(autouse=True)
def nothing_else_is_asked_for_and_nothing_fails(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test of the browser leaves an address of another host, or an error in the console, behind."""
    yield
    if not {"page", "pages"} & {*request.fixturenames}:
        return
    driver = request.getfixturevalue("driver")
    addresses = asked_addresses(driver)
    strange = [
        address for address in addresses
        if urlsplit(address).scheme not in ("data", "blob", "file", "chrome", "about") and urlsplit(address).hostname not in LANGUAGES.values()
    ]  # fmt: skip
    if request.node.get_closest_marker("elsewhere") is None:
        assert strange == []
    console = [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    allowed = [marker.args[0] for marker in request.node.iter_markers("console")]
    assert [text for text in console if not any(re.search(pattern, text) for pattern in allowed)] == []
