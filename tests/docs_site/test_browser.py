"""The site in a browser, opened from the folder: nothing is loaded from elsewhere, and search, languages and colours work."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="Chromium and ChromeDriver are not installed",
)
INPUT = "document.activeElement.shadowRoot?.activeElement"
RESULTS = """
const found = [];
const walk = (root) => root.querySelectorAll("*").forEach((element) => {
  if (element.shadowRoot) walk(element.shadowRoot);
  if (root !== document && element.matches("li a")) found.push([element.innerText, element.href]);
});
walk(document);
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium that logs its requests, in which no name of the network is found."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--window-size=1280,900",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, site: Path) -> Callable[[str], Any]:
    def show(page: str) -> Any:
        path, _, anchor = page.partition("#")
        browser.get((site / path).as_uri() + (f"#{anchor}" if anchor else ""))
        return browser

    return show


def until(browser: Any, condition: Callable[[], Any], seconds: float = 60) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda _: condition())


def search(browser: Any, words: str, wanted: Callable[[str, str], bool]) -> list[list[str]]:
    """Text and address of what the search finds, once one of them is wanted; the last state after a minute."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.action_chains import ActionChains

    until(browser, lambda: browser.find_elements("css selector", ".md-search__button"))[0].click()
    until(browser, lambda: browser.execute_script(f"return {INPUT}?.tagName") == "INPUT")
    ActionChains(browser).send_keys(words).perform()
    with suppress(TimeoutException):
        until(browser, lambda: any(wanted(*it) for it in browser.execute_script(RESULTS)), 30)
    assert browser.execute_script(f"return {INPUT}.value") == words  # what was typed stays while results come
    return browser.execute_script(RESULTS)


def test_nothing_is_loaded_from_elsewhere_and_nothing_fails(opened: Callable[[str], Any], site: Path) -> None:
    """On pages of every kind; what each page loads is looked at when the site is built."""
    kinds = (
        "index",
        "start",
        "data",
        "sweeps",
        "architectures",
        "reference/index",
        "reference/trainer",
        "reference/commands",
        "reference/models",
    )
    pages = [f"{language}/{kind}.html" for language in ("en", "zh") for kind in kinds]
    browser = opened("en/index.html")
    browser.get_log("performance"), browser.get_log("browser")
    for page in pages:
        opened(page)
    told = [entry["message"] for entry in browser.get_log("browser")]
    assert told == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [it["params"]["request"]["url"] for it in messages if it["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 5 * len(pages)
    assert [url for url in asked if not url.startswith((site.as_uri(), "data:", "blob:"))] == []
    failed = [it["params"] for it in messages if it["method"] == "Network.loadingFailed"]
    assert failed == []


@pytest.mark.parametrize(
    ("page", "words", "title", "address"),
    [
        ("en/index.html", "lora_rank", "finetuning.lora_rank", "en/reference/finetuning.html#finetuning.lora_rank"),
        ("en/index.html", "resuming", "Resuming", "en/start.html#resuming"),
        ("zh/index.html", "lora_rank", "finetuning.lora_rank", "zh/reference/finetuning.html#finetuning.lora_rank"),
        ("zh/index.html", "续训", "续训", "zh/start.html#resuming"),
        ("zh/data.html", "故障排除", "故障排除", "zh/troubleshooting.html#"),
        ("zh/index.html", "学习率", "trainer.learning_rate", "zh/reference/trainer.html#trainer.learning_rate"),
    ],
)
def test_the_search_finds_keys_and_words(
    page: str, words: str, title: str, address: str, opened: Callable[[str], Any]
) -> None:
    def is_it(text: str, url: str) -> bool:
        path, _, anchor = url.partition("#")
        return title in text and f"{path.partition('?')[0]}#{anchor}".endswith(f"/site/{address}")

    found = search(opened(page), words, is_it)
    assert any(is_it(*it) for it in found), found


def test_a_search_result_leads_to_its_page(opened: Callable[[str], Any]) -> None:
    browser = opened("zh/index.html")
    search(browser, "lora_alpha", lambda text, url: text.startswith("finetuning.lora_alpha"))
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(Keys.ENTER)
    until(browser, lambda: "lora_alpha" in browser.current_url)
    assert browser.find_element("id", "finetuning.lora_alpha").is_displayed()


def test_the_language_switch_shows_the_same_place(opened: Callable[[str], Any]) -> None:
    browser = opened("en/reference/trainer.html#trainer.save_steps")
    switch = browser.find_element("css selector", "a.other-language")
    assert switch.text == "中文"
    switch.click()
    until(browser, lambda: browser.current_url.endswith("/zh/reference/trainer.html#trainer.save_steps"))
    assert browser.find_element("tag name", "html").get_attribute("lang") == "zh"
    browser.find_element("css selector", "a.other-language").click()
    until(browser, lambda: browser.current_url.endswith("/en/reference/trainer.html#trainer.save_steps"))


def test_the_start_page_leads_to_a_language(opened: Callable[[str], Any]) -> None:
    browser = opened("index.html")
    until(browser, lambda: browser.current_url.endswith(("/en/index.html", "/zh/index.html")))


def change_colours(browser: Any) -> None:
    labels = browser.find_elements("css selector", "form[data-md-component=palette] label")
    next(label for label in labels if label.is_displayed()).click()


def test_the_colours_can_be_changed_and_stay(opened: Callable[[str], Any]) -> None:
    browser = opened("en/index.html")

    def background() -> str:
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    before = background()
    change_colours(browser)
    until(browser, lambda: background() != before)
    after = background()
    opened("en/data.html")
    assert background() == after
    red_of = [int(colour[colour.index("(") + 1 :].split(",")[0]) for colour in (before, after)]
    assert abs(red_of[0] - red_of[1]) > 150
    change_colours(browser)


@pytest.mark.parametrize("page", ["zh/index.html", "zh/architectures.html", "en/reference/models.html", "en/race.html"])
def test_a_phone_scrolls_pages_in_one_direction_only(page: str, opened: Callable[[str], Any], browser: Any) -> None:
    """Wide tables and code scroll by themselves."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        opened(page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_pictures_are_shown(opened: Callable[[str], Any]) -> None:
    for page in ("en/sweeps.html", "zh/sweeps.html", "zh/serving.html"):
        browser = opened(page)
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('article img')].map((image) => image.naturalWidth)"
        )
        assert sizes and min(sizes) > 100, page
