"""Every view in light, in dark, on a phone and in Chinese: accessible, within its window, in one language."""

import json
import re
from pathlib import Path
from urllib.parse import quote

import pytest
from board_browser import Page, Served, driver_of, finished, glmtuner

AXE = Path(__file__).parent.parent.parent / ".axe/axe_playwright_python/axe.min.js"
SWEEP = "sweeps%2Fbefore"
VIEWS = {
    "runs": "#/runs",
    "filtered": "#/runs?filter=finetuning%3Dlora&group=finetuning",
    "curves": "#/curves?ids=first",
    "scatter": "#/curves?kind=scatter",
    "parallel": "#/curves?kind=parallel",
    **{
        f"run {tab}": f"#/run/first?tab={tab}"
        for tab in ("overview", "config", "provenance", "report", "predictions", "samples", "log")
    },
    **{
        f"sweep {tab}": f"#/sweep/{SWEEP}?tab={tab}"
        for tab in ("leaderboard", "jobs", "lines", "scatter", "parallel", "report")
    },
    "compare": "#/compare?ids=first%0A{job}",
    "start": "#/start",
    "talk": "#/talk",
    "trash": "#/trash",
    "unknown": "#/run/nowhere",
}
RECORDS = Path(__file__).parent.parent.parent / "glmtuner/assets/data/identity_sample.json"
PAGE_WORDS = Path(__file__).parent.parent.parent / "glmtuner/board/page"


def job_of(board: Served) -> str:
    """The id of a job of the sweep, as an address has it."""
    return quote(next(run for run in board.rows() if run.startswith("sweeps/before/")), safe="")


def settled(page: Page, name: str) -> None:
    """Wait until the view has what it shows."""
    page.wait(lambda: page.content("main").strip() and page.word("loading") not in page.content("main"))
    if name == "run samples":
        page.wait(lambda: page.word("makingSamples") not in page.content("main"))
    if name == "compare":
        page.wait(lambda: page.word("comparing") not in page.content("main"))
    if name == "start":
        page.find("[data-preset]")


def faults(page: Page) -> list[str]:
    """What axe-core finds, serious or critical, with where it is."""
    if not page.js("return window.axe !== undefined"):
        page.js(AXE.read_text(encoding="utf-8"))
    found = page.driver.execute_async_script(
        "const done = arguments[0]; axe.run(document, {iframes: false, resultTypes: ['violations']}).then((result) => done(result.violations), (error) => done([{id: String(error), impact: 'critical', nodes: []}]))"
    )
    return [
        f"{each['id']} ({each['impact']}): {[node['html'][:150] + ' ' + str(node['any'][:1] and node['any'][0]['message'])[:150] for node in each['nodes'][:3]]}"
        for each in found if each["impact"] in ("serious", "critical")
    ]  # fmt: skip


@pytest.mark.console("status of 400")  # the run that is not there
@pytest.mark.parametrize(("theme", "width"), [("light", 1300), ("dark", 1300), ("light", 390)])
def test_no_view_has_a_serious_fault(board: Served, pages: dict[str, Page], theme: str, width: int) -> None:
    assert AXE.is_file(), "type make test-board"
    page = pages["en"]
    page.go()
    page.js("board.remember('theme', arguments[0]); location.reload()", theme)
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        wrong = {}
        for name, address in VIEWS.items():
            page.go(address.format(job=job_of(board)))
            settled(page, name)
            found = faults(page)
            overflow = page.js("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            if overflow > 0:
                found.append(f"{overflow} pixels wider than the window")
            if found:
                wrong[name] = found
        assert not wrong, json.dumps(wrong, indent=1)
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.go()
        page.js("board.remember('theme', 'light'); location.reload()")


@pytest.mark.console("status of 400")
def test_every_view_is_in_chinese(board: Served, pages: dict[str, Page]) -> None:
    """None of the page's English words of two and more words is there; titles and buttons are Chinese."""
    page = pages["zh"]
    page.go()
    english, chinese = page.js("return [board.words.en, board.words.zh]")
    assert english.keys() == chinese.keys() and len(english) > 150
    # what `diff` says is English, and may hold words of the page that are as short as "The run"
    own = {
        name: text
        for name, text in english.items()
        if chinese[name] != text and " " in text.strip() and "{" not in text and len(text) > 10
    }
    for name, address in VIEWS.items():
        page.go(address.format(job=job_of(board)))
        settled(page, name)
        text = page.text()
        assert [word for word in own.values() if word in text] == [], name
        untold = page.js(
            "return [...document.querySelectorAll('main button, main h1, main h2, main th[scope=col]')].map((each) => each.innerText.trim())"
        )
        latin = [
            word
            for word in untold
            if re.search("[A-Za-z]{2}", word)
            and any(word == each for each in english.values())
            and word not in chinese.values()
        ]
        assert latin == [], name
    assert page.js("return document.documentElement.lang") == "zh-CN"


def test_no_word_is_said_twice_and_none_is_missing() -> None:
    """A word that two files say would be the one of the file that comes last."""
    said: dict[str, str] = {}
    for path in sorted(PAGE_WORDS.glob("*.js")):
        for call in re.findall(
            r"^board\.say\(\n?(.*?)^\s*\},?\n", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            for name in re.findall(r"(?:^|[{,\s])\"?([\w. ]+?)\"?: \"", call):
                assert name not in said, f"{name}: {said[name]} and {path.name}"
                said[name] = path.name
    assert len(said) > 150


def test_the_language_and_the_theme_are_remembered(page: Page) -> None:
    other = "en" if page.language == "zh" else "zh"
    page.click("#tools button")
    page.wait(lambda: page.js("return document.documentElement.lang")[:2] == other)
    page.driver.refresh()
    page.find("tr[data-run]")
    assert page.js("return document.documentElement.lang")[:2] == other
    page.click("#tools button")
    page.wait(lambda: page.js("return document.documentElement.lang")[:2] == page.language)

    def background() -> str:
        return str(page.js("return getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.click("#theme option[value=dark]")
    page.wait(lambda: background() != light)
    page.driver.refresh()
    page.find("tr[data-run]")
    assert background() != light and page.js("return document.documentElement.dataset.theme") == "dark"
    page.click("#theme option[value=light]")
    page.wait(lambda: background() == light)


def test_predictions_are_searched_and_stand_beside_another_runs(page: Page, board: Served) -> None:
    lines = [json.loads(line) for line in (board.folder / "first/predictions.jsonl").read_text().splitlines()]
    page.go("#/run/first?tab=predictions")
    page.wait(lambda: lines[0]["prompt"] in page.content("#tabpanel"))
    word = lines[1]["prompt"]
    having = [line for line in lines if word in f"{line['prompt']}\n{line['label']}\n{line['predict']}"]
    assert len(having) < len(lines)
    page.fill("#prediction-search", word)
    page.wait(lambda: lines[0]["prompt"] not in page.content("#tabpanel"))
    assert page.js("return document.querySelectorAll('#tabpanel tbody tr').length") == min(len(having), 20)
    page.go("#/run/first?tab=predictions&with=first")  # beside its own answers nothing differs
    page.click("#prediction-against option[value=other]")
    page.wait(lambda: page.content("#tabpanel").count(lines[0]["predict"]) == 2)
    assert not page.all("#tabpanel tbody ins") and not page.all("#tabpanel tbody del")


def test_the_training_data_are_shown_as_they_are_learned(page: Page, board: Served) -> None:
    page.go("#/run/first?tab=samples")
    rows = "#tabpanel .segments:not(.key) .segment"  # without the legend

    def shown(kind: str) -> str:
        return "".join(element.text for element in page.all(f"{rows}.{kind}"))

    page.wait(lambda: shown("learned"))
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    record = next(each for each in records if each["output"] in shown("learned"))
    assert record["instruction"] in shown("prompt") and record["output"] not in shown("prompt")
    assert shown("stop")


def test_the_static_version_shows_the_same_numbers_from_files(
    folder: Path, board: Served, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = folder / "static"
    finished(glmtuner(folder, "board", "outputs", "--static", str(out)))
    driver = driver_of(tmp_path_factory.mktemp("files"))
    page = Page(driver, board, "en", driver.current_window_handle)
    try:
        address = (out / "index.html").as_uri()

        def go(hash: str) -> None:
            driver.get("about:blank")
            driver.get(address + hash)

        go("#/runs")
        page.find("tr[data-run='first']")
        assert {row.get_attribute("data-run") for row in page.all("tr[data-run]")} == board.rows().keys()
        assert not page.all("[data-action]") and not page.all("nav a[href='#/start']")
        go(f"#/sweep/{SWEEP}")
        page.find("#leaderboard")
        losses = sorted(
            json.loads(path.read_text())["eval_loss"]
            for path in (board.folder / "sweeps/before").glob("*/metrics.json")
        )
        shown = page.js("return [...document.querySelectorAll('#leaderboard tbody tr')].map((row) => row.innerText)")
        assert len(shown) == 2
        for loss, row in zip(losses, shown, strict=True):
            assert f"{loss:.3f}"[:5] in row
        go("#/curves?ids=first")
        page.find("[data-chart=loss]")
        page.click("figure summary")
        history = [json.loads(line) for line in (board.folder / "first/history.jsonl").read_text().splitlines()]
        last = next(line["loss"] for line in reversed(history) if "loss" in line)
        page.wait(lambda: f"{last:.6g}"[:6] in page.content("figure details"))
        go("#/run/first?tab=predictions")
        answers = [json.loads(line) for line in (board.folder / "first/predictions.jsonl").read_text().splitlines()]
        page.click("#prediction-against option[value=nothing]")
        page.wait(lambda: answers[0]["predict"] in page.content("main"))
        go("#/run/first?tab=config")
        page.wait(lambda: "trainer.max_steps" in page.content("main"))
        requested = [
            json.loads(entry["message"])["message"]["params"]["request"]["url"] for entry in driver.get_log("performance")
            if '"Network.requestWillBeSent"' in entry["message"]
        ]  # fmt: skip
        assert requested and all(
            address.startswith(("file:///", "data:", "blob:", "about:", "chrome:")) for address in requested
        )
        assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        driver.quit()
