"""A sweep of six while it runs, is killed, and is run again: what the pages of two viewers show, against its files."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from board_browser import TINY, Page, Served, finished, glmtuner, until

SWEEP = "sweeps/six"
WORDS = (
    "-m", *TINY, "name=six", "objective=eval_loss", "trainer.max_steps=60", "trainer.logging_steps=1", "trainer.eval_strategy=steps",
    "trainer.eval_steps=10", "finetuning=lora,freeze", "trainer.learning_rate=3e-2,3e-3,1e-4",
)  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    """The losses in a run's history."""
    history = folder / "history.jsonl"
    found = [json.loads(line) for line in history.read_text().splitlines()] if history.is_file() else []
    return [line for line in found if "loss" in line]


def drawn(page: Page) -> float:
    """The last step that the picture of the loss has."""
    return float(page.js("return Math.max(0, ...board.charts.map((chart) => chart.scales.x.max || 0))"))


def points(page: Page) -> int:
    """The losses in the picture of the loss, of all jobs together, by the table below it."""
    return sum(int(row[2]) for row in rows_of(page, "figure details") if row[1] == "loss")


def walks_on(sweep: Any, folder: Path) -> int:
    """Let a sweep learn five steps more, and stop its processes; the losses that its jobs have written by then."""
    before = sum(len(lines(path.parent)) for path in folder.glob("*/history.jsonl"))
    os.killpg(sweep.pid, signal.SIGCONT)
    until(lambda: sum(len(lines(path.parent)) for path in folder.glob("*/history.jsonl")) >= before + 5, every=0.01)
    os.killpg(sweep.pid, signal.SIGSTOP)
    time.sleep(0.1)  # until every process has heard it
    return sum(len(lines(path.parent)) for path in folder.glob("*/history.jsonl"))


def third_in_training(folder: Path) -> Path | None:
    """The folder of the job that trains after two that have ended."""
    done = {path.parent for path in folder.glob("*/metrics.json")}
    begun = {path.parent for path in folder.glob("*/history.jsonl")} - done
    return next((run for run in begun if len(done) == 2 and len(lines(run)) > 10), None)


def states(page: Page, sweep: str = SWEEP) -> dict[str, str]:
    """The states of the sweep's jobs that the table shows."""
    return dict(
        page.js(
            "return [...document.querySelectorAll('tr[data-run]')].map((row) => [row.dataset.run, row.dataset.state])"
            ".filter(([run]) => run.startsWith(arguments[0]))", f"{sweep}/",
        )
    )  # fmt: skip


def test_a_running_sweep_is_watched_killed_and_run_again(
    folder: Path, board: Served, pages: dict[str, Page], request: pytest.FixtureRequest
) -> None:
    for page in pages.values():
        page.go()
    sweep = glmtuner(folder, *WORDS, start_new_session=True)
    request.addfinalizer(lambda: None if sweep.poll() is not None else os.killpg(sweep.pid, signal.SIGKILL))
    for page in pages.values():  # without a reload
        page.driver.switch_to.window(page.window)
        page.wait(lambda page=page: "running" in states(page).values(), 90)  # type: ignore[misc]
        assert page.word("state.running") in page.find('tr[data-state="running"]').text
        assert page.all(f'[data-sweep="{SWEEP}"]')

    # the sweep stands still while a page is compared with its files, and goes on for some steps in between
    for page in pages.values():
        before = walks_on(sweep, board.folder / SWEEP)
        page.go(f"#/sweep/{SWEEP.replace('/', '%2F')}?tab=lines")
        page.click("figure summary")
        page.wait(lambda page=page, before=before: points(page) == before)  # type: ignore[misc]
        now = walks_on(sweep, board.folder / SWEEP)
        page.wait(lambda page=page, now=now: points(page) == now)  # type: ignore[misc]

    # the third job is killed in its middle
    os.killpg(sweep.pid, signal.SIGCONT)
    victim = until(lambda: third_in_training(board.folder / SWEEP), 120, every=0.01)
    assert victim
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    name = victim.relative_to(board.folder).as_posix()
    for page in pages.values():
        page.go()
        page.wait(lambda page=page: states(page).get(name) == "interrupted")  # type: ignore[misc]
        row = page.row(name)
        assert page.word("state.interrupted") in row.text
        assert sorted(states(page).values()) == ["finished"] * 2 + ["interrupted"] + ["not started"] * 3
    assert board.rows()[name]["step"] == lines(victim)[-1]["step"]

    # the same command again does what is left
    finished(glmtuner(folder, *WORDS))
    for page in pages.values():
        page.driver.switch_to.window(page.window)
        page.wait(lambda page=page: [*states(page).values()] == ["finished"] * 6)  # type: ignore[misc]


def rows_of(page: Page, selector: str) -> list[list[str]]:
    """The texts of a table's cells."""
    return list(
        page.js(
            "return [...document.querySelectorAll(`${arguments[0]} tbody tr`)].map((row) => [...row.cells].map((cell) => cell.innerText.trim()))",
            selector,
        )
    )


def test_the_leaderboard_has_the_losses_in_their_order_with_intervals(board: Served, page: Page) -> None:
    losses = {
        path.parent.name: json.loads(path.read_text())["eval_loss"] for path in (board.folder / SWEEP).glob("*/metrics.json")
    }  # fmt: skip
    assert len(losses) == 6
    page.go(f"#/sweep/{SWEEP.replace('/', '%2F')}")
    until(lambda: not board.ask("sweep?id=sweeps/six")["pending"], 60)
    page.find("#leaderboard")
    page.wait(lambda: all("[" in "".join(row) for row in rows_of(page, "#leaderboard")))
    found = rows_of(page, "#leaderboard")
    assert [row[0] for row in found] == list("123456")
    for shown, (job, loss) in zip(found, sorted(losses.items(), key=lambda item: item[1]), strict=True):
        [cell] = [cell for cell in shown if cell.startswith(f"{loss:.3f}"[:5])][:1]
        low, high = (float(bound) for bound in cell[cell.index("[") + 1 : -1].split(", "))
        assert low <= loss <= high and low < high, (job, cell)
        method, rate = (
            job.partition("_")[0].removeprefix("finetuning-"),
            float(job.split("learning_rate-")[1].split("_")[0]),
        )
        assert method in shown and str(rate) in [
            str(float(cell)) for cell in shown if cell.replace(".", "").replace("e-", "").isdigit()
        ]


def test_curves_show_every_point_and_the_pointer_finds_run_and_step(board: Served, page: Page) -> None:
    page.go(f"#/sweep/{SWEEP.replace('/', '%2F')}?tab=lines")
    chart = page.find("[data-chart=loss]")
    page.wait(lambda: drawn(page) >= 60)
    page.click("figure summary")
    table = page.wait(lambda: rows_of(page, "figure details"))
    of_losses = [row for row in table if row[1] == "loss"]
    assert len(of_losses) == 6 and len(table) == 12, table  # loss and eval_loss of six
    histories = {path.parent.name: lines(path.parent) for path in (board.folder / SWEEP).glob("*/history.jsonl")}
    for row in of_losses:
        history = next(found for name, found in histories.items() if row[0] == name)
        assert row[2] == "60" and len(history) == 60
        numbers = [float(cell.split()[0]) for cell in row[3:7]]
        losses = [line["loss"] for line in history]
        assert numbers == pytest.approx([losses[0], losses[-1], min(losses), max(losses)], rel=1e-4)
        assert row[3].endswith("(1)") and row[4].endswith("(60)")
    from selenium.webdriver import ActionChains

    page.js("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(page.driver).move_to_element(chart).move_by_offset(20, 10).perform()
    tip = page.wait(lambda: [element.text for element in page.all(".tip") if element.text])[0]
    run = next(name for name in histories if name in tip)
    step = next(line for line in histories[run] if str(line["step"]) in tip.split(run)[1])
    assert step


def test_the_table_is_filtered_sorted_and_grouped(board: Served, page: Page) -> None:
    page.fill("#filter", "finetuning=lora six")
    page.wait(lambda: len(page.all("tr[data-run]")) == 3)
    page.fill("#filter", "lr>1e-3 sweep:six")
    page.wait(lambda: len(page.all("tr[data-run]")) == 4)
    page.fill("#filter", "eval_los<1")
    assert "eval_loss" in page.wait(lambda: page.find("#filter-error").text)
    page.fill("#filter", "sweep:six")
    page.wait(lambda: len(page.all("tr[data-run]")) == 6)
    page.click("th[data-key='metric:eval_loss'] button")

    def shown() -> list[float]:
        rows = board.rows()
        return [rows[str(row.get_attribute("data-run"))]["metrics"]["eval_loss"] for row in page.all("tr[data-run]")]

    page.wait(lambda: shown() in (sorted(shown()), sorted(shown(), reverse=True)))
    first = shown()
    page.click("th[data-key='metric:eval_loss'] button")
    page.wait(lambda: shown() == first[::-1])
    page.fill("#filter", "")


def test_two_sweeps_are_compared(board: Served, page: Page) -> None:
    page.go("#/compare?ids=sweeps%2Fbefore%0Asweeps%2Fsix")
    said = board.ask("compare?a=sweeps/before&b=sweeps/six")
    assert said["kind"] == "sweep"
    page.wait(lambda: said["verdict"][:40] in page.text(), 60)
    assert "max_steps" in page.text() and "12" in page.text() and "60" in page.text()
