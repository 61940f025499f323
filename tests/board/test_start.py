"""A run from the form to its export, in each language: a typo, a start, a stop at a checkpoint, the rest, a talk, an export, the trash."""

import json
import time
from pathlib import Path

import pytest
from board_browser import Page, Served, until
from safetensors.torch import load_file
from selenium.webdriver.common.keys import Keys

STEPS = 150


def words_of(name: str) -> str:
    return (
        "model=tiny_glm tracker=none data.dataset=identity_sample finetuning=lora finetuning.lora_target=all "
        f"trainer.learning_rate=1e-2 trainer.max_steps={STEPS} trainer.logging_steps=1 trainer.save_steps=20 name={name}"
    )


def test_a_typo_is_refused_with_the_right_word(board: Served, page: Page) -> None:
    before = set(board.rows())
    page.go("#/start")
    page.fill("#command", "model=tiny_glm data.dataset=identity_sample finetuning.lora_rnk=4")
    page.find("[data-error='finetuning.lora_rnk=4']", "did you mean 'lora_rank'? type finetuning.lora_rank=…")
    assert not page.find("#start").is_enabled()
    page.click("[data-proposal='finetuning.lora_rank=4']")
    page.wait(lambda: page.find("#start").is_enabled() and not page.all("[data-error]"))
    assert page.find("#command").get_attribute("value") == (
        "python -m glmtuner model=tiny_glm data.dataset=identity_sample finetuning.lora_rank=4"
    )
    page.wait(lambda: "lora_rank: 4" in page.content("#yaml"))
    # a wrong value, a wrong preset and an open quote; the field says it too
    page.fill("#command", "model=tiny_glm data.dataset=identity_sample trainer.max_steps=many")
    page.find("[data-error='trainer.max_steps=many']")
    page.fill("#command", "model=tiny_gml")
    page.click("[data-proposal='model=tiny_glm']")
    page.wait(lambda: page.find("#start").is_enabled())
    page.fill("#command", "model=tiny_glm 'name=a b")
    page.find("#errors p", page.word("start.openQuote"))
    assert set(board.rows()) == before


def test_fields_presets_and_the_command_line_are_in_step(page: Page) -> None:
    page.go("#/start")
    page.fill("#command", "model=tiny_glm data.dataset=identity_sample")
    page.wait(lambda: page.find("#start").is_enabled())
    page.click("details[data-group=finetuning] summary")
    page.click("[data-preset='finetuning=freeze']")
    page.wait(lambda: page.find("#command").get_attribute("value").endswith(" finetuning=freeze"))
    page.wait(lambda: page.all("input[name='finetuning.trainable_layers']") or page.all("[data-key^='finetuning.']"))
    page.click("[data-preset='finetuning=lora']")
    page.fill("input[name='finetuning.lora_rank']", "6")
    page.wait(lambda: page.find("#command").get_attribute("value").endswith("finetuning=lora finetuning.lora_rank=6"))
    page.wait(lambda: "lora_rank: 6" in page.content("#yaml"))
    page.fill("#command", "model=tiny_glm data.dataset=identity_sample finetuning.lora_rank=7")
    page.wait(lambda: page.find("input[name='finetuning.lora_rank']").get_attribute("value") == "7")
    page.fill(
        "#command",
        "-m model=tiny_glm data.dataset=identity_sample finetuning.lora_rank=2,4 trainer.learning_rate=1e-2,1e-3,1e-4",
    )
    page.wait(lambda: "6" in page.find("#jobs").text)


def test_a_run_is_started_watched_stopped_continued_talked_with_exported_and_deleted(
    board: Served, page: Page, folder: Path
) -> None:
    name = f"mine_{page.language}"
    page.go("#/start")
    page.fill("#command", words_of(name))
    page.wait(lambda: page.find("#start").is_enabled())
    page.click("#start")
    run = str(page.find("#started").get_attribute("data-id"))
    path = board.folder / run
    assert path.resolve().is_relative_to(board.folder.resolve())

    # the page goes to the run, and its buttons stop it
    page.wait(lambda: f"#/run/{run.replace('/', '%2F')}" in page.driver.current_url, 90)
    page.wait(lambda: page.word("state.running") in page.find("main").text, 60)
    until(lambda: (board.rows()[run]["step"] or 0) >= 3, 60)
    page.click("[data-action=stop]")
    page.click("dialog [data-answer=yes]")
    page.wait(lambda: page.word("state.interrupted") in page.text(), 60)
    [checkpoint] = sorted((path / "checkpoints").glob("checkpoint-*"))[-1:]
    stopped = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= stopped < STEPS
    page.wait(
        lambda: page.all("[data-action=continue]") and not page.all("[data-action=stop]")
    )  # its process has ended

    page.click("[data-action=continue]")
    page.wait(lambda: page.word("state.finished") in page.text(), 120)
    steps = [json.loads(line)["step"] for line in (path / "history.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, STEPS + 1))  # none twice, and none left out where it was stopped
    page.click("[data-tab=log]")
    page.find("pre.log")
    page.wait(lambda: str(STEPS) in page.find("pre.log").text)
    page.click("[data-tab=config]")
    differs = page.wait(
        lambda: page.js(
            "return [...document.querySelectorAll('#tabpanel tr')].map((row) => row.innerText.split(/\\s+/))"
        )
    )
    assert ["trainer.max_steps", str(STEPS), "-1"] in differs and not any("seed" in row[0] for row in differs)

    # a talk: the answer is that of the chat on the command line, tested elsewhere against this API's client
    page.click("[data-action=talk]")
    page.wait(lambda: page.find("#question").is_enabled(), 90)
    page.click("details.settings summary")
    page.fill("#talk-temperature", "0")
    page.find("#question").send_keys("你是谁？", Keys.ENTER)
    page.wait(lambda: "小格" in page.find(".answer").text, 60)
    page.wait(lambda: page.find("#send").text == page.word("talk.send"))

    # an export into the board's folder
    page.click("[data-action=export]")
    page.fill("dialog input[name=to]", f"exports/{name}")
    page.click("dialog [data-answer=yes]")
    page.wait(lambda: page.all("dialog .good"), 90)
    weights = load_file(next((board.folder / "exports" / name).glob("*.safetensors")))
    assert sum(tensor.numel() for tensor in weights.values()) > 1_000_000
    page.click("dialog button")
    page.click("[data-action=unload]")

    # clone, delete, undo
    page.go(f"#/run/{run.replace('/', '%2F')}")
    page.click("[data-action=clone]")
    page.wait(lambda: "finetuning.lora_target=[all]" in page.find("#command").get_attribute("value"))
    page.go(f"#/run/{run.replace('/', '%2F')}")
    page.click("[data-action=delete]")
    page.click("dialog [data-answer=no]")
    assert path.is_dir()
    page.click("[data-action=delete]")
    page.click("dialog [data-answer=yes]")
    until(lambda: not path.exists())
    page.go()
    page.wait(lambda: page.all("tr[data-run]") and page.row(run) is None)
    page.go("#/trash")
    page.click("[data-action=restore]")
    until(lambda: (path / "metrics.json").is_file())
    page.go()
    page.wait(lambda: page.row(run) is not None)


def test_a_run_is_started_and_its_curve_reached_with_the_keyboard_alone(pages: dict[str, Page], board: Served) -> None:
    page, name = pages["en"], f"typed_{time.time_ns() % 10**6}"
    page.go()
    page.find("tr[data-run]")
    page.driver.refresh()
    page.find("tr[data-run]")

    def press(*keys: str) -> None:
        page.driver.switch_to.active_element.send_keys(*keys)

    def tab_to(selector: str, most: int = 400) -> None:
        """Press Tab until an element of the selector has the focus, which must be seen."""
        for _ in range(most):
            press(Keys.TAB)
            if page.js("return document.activeElement.matches(arguments[0])", selector):
                style = page.js(
                    "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth, style.boxShadow]"
                )
                assert (style[0] != "none" and style[1] != "0px") or style[2] != "none", (selector, style)
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("a.skip")
    press(Keys.ENTER)
    assert page.js("return document.activeElement.id") == "main"
    page.driver.refresh()
    page.find("tr[data-run]")
    tab_to("nav a[href='#/start']")
    press(Keys.ENTER)
    page.find("#command")
    tab_to("#command")
    press(Keys.CONTROL, "a")
    press(words_of(name).replace(f"max_steps={STEPS}", "max_steps=5"))
    page.wait(lambda: page.find("#start").is_enabled())
    tab_to("#start")
    press(Keys.ENTER)
    page.wait(lambda: "#/run/" in page.driver.current_url, 90)
    page.wait(lambda: page.word("state.finished") in page.find("main").text, 60)
    tab_to("[role=tab]")
    press(Keys.ARROW_RIGHT)
    assert page.js("return document.activeElement.dataset.tab") == "config"
    page.driver.refresh()
    page.find("[role=tab]")
    tab_to("nav a[href='#/curves']")
    press(Keys.ENTER)
    page.find("[data-pick]")
    run = next(run for run in board.rows() if name in run)
    tab_to("#filter")
    press(name)
    page.wait(lambda: [element.get_attribute("data-pick") for element in page.all("[data-pick]")] == [run])
    tab_to("[data-pick]")
    if not page.js("return document.activeElement.checked"):
        press(Keys.SPACE)
    page.find("[data-chart=loss]")
    tab_to("[data-chart=loss]")
    press(Keys.ARROW_RIGHT)
    press(Keys.ARROW_RIGHT)
    tip = page.wait(lambda: [element.text for element in page.all(".tip") if name in element.text])[0]
    losses = [json.loads(line) for line in (board.folder / run / "history.jsonl").read_text().splitlines()]
    assert any(f"{line['loss']:.3f}"[:4] in tip for line in losses if "loss" in line), tip


@pytest.mark.console("the server responded with a status of 40")
def test_a_read_only_board_has_no_button_that_changes_something(folder: Path, pages: dict[str, Page]) -> None:
    from board_browser import TOKEN, served

    board = served(folder, "--read-only")
    page = pages["en"]
    try:
        page.driver.switch_to.window(page.window)
        page.driver.get(f"{board.url()}?token={TOKEN}")
        page.find("tr[data-run]")
        page.driver.get(f"{board.url()}#/run/first")
        page.find("[data-tab=overview]")
        time.sleep(1)
        assert not page.all("[data-action]")
        page.driver.get(f"{board.url()}#/start")
        page.wait(lambda: page.word("start.readOnly") in page.text())
        status = page.driver.execute_async_script(
            "const done = arguments[0]; fetch('api/delete', {method: 'POST', headers: board.headers(), body: '{\"ids\": [\"first\"]}'}).then((answer) => done(answer.status))"
        )
        assert status in (404, 405) and (board.folder / "first").is_dir()
    finally:
        page.driver.get("about:blank")  # before nobody answers what the page asks for
        board.process.terminate()
        board.process.wait(20)
