"""Markup, escapes and damage in everything that a run folder holds; and pages of other addresses that ask the board for something."""

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import yaml
from board_browser import TOKEN, Page, Served, until

IMAGE = "<img src=x onerror=window.pwned=1>"
BIDI, ESCAPES = "\u202egnp.exe\u2066", "\x1b[31mred\x1b]0;title\x07\x00\x9b"
MARKUP = (
    f"{IMAGE}</script><script>window.pwned=1</script></textarea></title><a id=evil href='javascript:window.pwned=1'>x</a>"
    f"\"'`><svg onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'>&lt;b&gt;{{{{7*7}}}}{BIDI}"
)
NAME = f"bad {IMAGE}\"'` &lt;b&gt;"
REPORT = "<html><body><p id=shown>a report</p><script>parent.pwned=1;top.pwned=1</script><img src=x onerror=parent.pwned=1></body></html>"


def replaced(value: Any) -> Any:
    """The value with markup behind every text in it, names of keys left out."""
    if isinstance(value, dict):
        return {key: replaced(each) for key, each in value.items()}
    if isinstance(value, list):
        return [replaced(each) for each in value]
    return f"{value}{MARKUP}" if isinstance(value, str) else value


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_hostile(first: Path, run: Path) -> None:
    """A copy of a run in which every file that is shown holds markup."""
    shutil.copytree(first, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["name"], config["data"]["dataset"] = MARKUP, [f"identity_sample{MARKUP}"]
    config["model"]["model_name_or_path"] = MARKUP
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    (run / "overrides.txt").write_text(f"model=tiny_glm\nname={json.dumps(MARKUP)}\n", encoding="utf-8")
    metrics = json.loads((run / "metrics.json").read_text())
    write(run / "metrics.json", {**metrics, MARKUP: 1.5, "__proto__": 2.5, "constructor": 3.5})
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    odd = {MARKUP: 1.0, "__proto__": 2, "constructor": 1e308, "hasOwnProperty": -5, "toString": 3}
    (run / "history.jsonl").write_text(
        "".join(f"{json.dumps({**line, **odd})}\n" for line in history), encoding="utf-8"
    )
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    (run / "predictions.jsonl").write_text(
        "".join(f"{json.dumps(replaced(line))}\n" for line in answers), encoding="utf-8"
    )
    write(run / "provenance.json", replaced(json.loads((run / "provenance.json").read_text())))
    write(run / "plan.json", replaced(json.loads((run / "plan.json").read_text())))
    (run / "output.log").write_text(f"{MARKUP}\n{ESCAPES}\n", encoding="utf-8")
    (run / "report.html").write_text(REPORT, encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(folder: Path, board: Served) -> Iterator[str]:
    """The folder `hostile` with runs and a sweep full of markup, and with damage of all kinds."""
    place = folder / "outputs/hostile"
    place.mkdir()
    make_hostile(folder / "outputs/first", place / NAME)
    failed = place / f"failed {IMAGE}"
    shutil.copytree(place / NAME, failed)
    (failed / "metrics.json").unlink()
    write(failed / "failed.json", {"kind": MARKUP, "reason": MARKUP, "time": MARKUP, "words": [MARKUP]})
    sweep = place / f"sweep {IMAGE}"
    shutil.copytree(folder / "outputs/sweeps/before", sweep)
    told = json.loads((sweep / "sweep.json").read_text())
    write(sweep / "sweep.json", {key: value if key == "jobs" else replaced(value) for key, value in told.items()})
    for job in sweep.glob("*/config.yaml"):
        config = yaml.safe_load(job.read_text())
        config["name"] = MARKUP
        job.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    for damaged, content in {
        "metrics.json": "{", "history.jsonl": '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1e999}\n[]\n{"step": "x"}\n\x00\n{"st', "config.yaml": ": - {",
        "provenance.json": "[]", "predictions.jsonl": "[]\n{}\n", "timings.jsonl": "null\n",
    }.items():  # fmt: skip
        run = place / f"damaged {damaged}"
        shutil.copytree(folder / "outputs/first", run)
        (run / damaged).write_text(content, encoding="utf-8")
    pipe = place / "pipe"
    shutil.copytree(folder / "outputs/first", pipe)
    for name in ("history.jsonl", "output.log", "report.html", "predictions.jsonl"):
        (pipe / name).unlink(missing_ok=True)
        os.mkfifo(pipe / name)
    outside = folder / "outside"
    shutil.copytree(folder / "outputs/first", outside)
    (outside / "output.log").write_text("what stands outside", encoding="utf-8")
    (place / "linked").symlink_to(outside)
    (place / "loop").symlink_to(place)
    shutil.copytree(folder / "outputs/first", place / "borrows")
    for name in ("output.log", "report.html", "predictions.jsonl"):
        (place / "borrows" / name).unlink(missing_ok=True)
        (place / "borrows" / name).symlink_to(outside / "output.log")
    shutil.copytree(folder / "outputs/first", place / f"turned {BIDI}")
    os.mkdir(os.fsencode(place) + b"/not utf-8 \xff\xfe")
    shutil.copy(folder / "outputs/first/config.yaml", os.fsencode(place) + b"/not utf-8 \xff\xfe/config.yaml")
    until(lambda: any(NAME in run for run in board.rows()), 30)
    yield "hostile"
    shutil.rmtree(place)
    until(lambda: not any(NAME in run for run in board.rows()), 30)


def nothing_is_obeyed(page: Page) -> None:
    """No element, script, address or control character of the folder's texts is a part of the page."""
    strange = page.js(
        """
        const found = [];
        for (const element of document.querySelectorAll("*")) {
          if (["IMG", "OBJECT", "EMBED", "BASE", "FORM", "META"].includes(element.tagName) && !element.closest("head") && element.tagName !== "FORM" && !(element.getAttribute("src") ?? "").startsWith("files/picture?")) found.push(element.outerHTML);
          if (element.tagName === "SCRIPT" && !element.src.startsWith(`${location.origin}/page/`)) found.push(element.outerHTML);
          if (element.tagName === "IFRAME" && (element.hasAttribute("srcdoc") || !element.hasAttribute("sandbox") || /allow-(scripts|same-origin)/.test(element.sandbox))) found.push(element.outerHTML);
          if (element.id === "evil") found.push(element.outerHTML);
          for (const { name, value } of element.attributes) {
            if (name.startsWith("on") || /^\\s*(javascript|data:text)/i.test(value)) found.push(`${name}=${value}`);
            if (["title", "aria-label", "placeholder"].includes(name) && /[\\u202a-\\u202e\\u2066-\\u2069\\u0000-\\u0008\\u001b]/.test(value)) found.push(`${name}=${value}`);
          }
        }
        if (window.pwned !== undefined) found.push("window.pwned");
        return found;
        """
    )  # fmt: skip
    assert strange == []
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b\x9b]", page.text())


@pytest.mark.console("api/clone.* 400")  # words that no command line can have are refused
def test_markup_in_a_folder_is_text_on_every_page(hostile: str, board: Served, pages: dict[str, Page]) -> None:
    page = pages["en"]
    page.go("#/runs")
    page.fill("#filter", "hostile")
    bad = next(run for run in board.rows() if run == f"hostile/{NAME}")
    page.wait(lambda: IMAGE in page.text())
    page.wait(lambda: r"\u202e" in page.content("main"))
    nothing_is_obeyed(page)
    page.fill("#filter", "")
    identity = quote(bad, safe="")
    for tab in ("overview", "config", "provenance", "report", "predictions", "samples", "log"):
        page.go(f"#/run/{identity}?tab={tab}")
        page.find(f"[data-tab='{tab}'][aria-selected=true]")
        if tab in ("overview", "config", "predictions", "log"):
            page.wait(lambda: IMAGE in page.content("#tabpanel"))
        page.wait(lambda: page.word("loading") not in page.text())
        nothing_is_obeyed(page)
    failed = quote(f"hostile/failed {IMAGE}", safe="")
    page.go(f"#/run/{failed}")
    page.wait(lambda: page.content("main").count(IMAGE) > 2)
    nothing_is_obeyed(page)
    sweep = quote(f"hostile/sweep {IMAGE}", safe="")
    for tab in ("leaderboard", "jobs", "lines", "scatter", "parallel", "report"):
        page.go(f"#/sweep/{sweep}?tab={tab}")
        page.find(f"[data-tab='{tab}'][aria-selected=true]")
        nothing_is_obeyed(page)
    ids = quote(f"{bad}\nfirst", safe="")
    metrics = quote(f"loss\n{MARKUP}\n__proto__\nconstructor", safe="")
    for address in (
        f"#/curves?ids={ids}&metrics={metrics}", f"#/curves?kind=scatter&ids={ids}", f"#/curves?kind=parallel&ids={ids}",
        f"#/compare?ids={ids}", f"#/start?clone={identity}", f"#/talk/{identity}",
    ):  # fmt: skip
        page.go(address)
        page.wait(
            lambda: (
                IMAGE
                in page.js(
                    "return document.body.innerText + [...document.querySelectorAll('textarea, option')].map((each) => each.value)"
                )
            )
        )
        nothing_is_obeyed(page)


def test_a_report_is_shown_and_does_nothing(hostile: str, board: Served, pages: dict[str, Page]) -> None:
    """Its own page, in which a script runs nowhere, even where somebody opens it alone."""
    page = pages["en"]
    page.driver.switch_to.window(page.window)
    page.driver.get(f"{board.url()}files/report?{urlencode({'id': f'hostile/{NAME}'})}")
    assert page.find("#shown").text == "a report"
    assert page.js("return window.pwned") is None
    # the console says that the script was blocked: that is the point, and the only lines there are
    messages = [entry["message"] for entry in page.driver.get_log("browser")]
    assert messages and all("Content Security Policy" in message or "sandboxed" in message for message in messages)


@pytest.mark.parametrize(
    "name", ["metrics.json", "history.jsonl", "config.yaml", "provenance.json", "predictions.jsonl", "timings.jsonl"]
)
def test_a_damaged_file_is_said_and_breaks_no_page(
    hostile: str, board: Served, pages: dict[str, Page], name: str
) -> None:
    page = pages["en"]
    run = quote(f"hostile/damaged {name}", safe="")
    page.go("#/runs")
    page.wait(lambda: page.all("tr[data-run]"))
    for address in (f"#/run/{run}", f"#/run/{run}?tab=predictions", f"#/curves?ids={run}"):
        page.go(address)
        page.wait(lambda: page.word("loading") not in page.text())
    answered = board.ask("runs")
    rows = {row["id"]: row for row in answered["rows"]}
    known = rows.get(f"hostile/damaged {name}", {}).get("note") or ""
    problems = [problem["message"] for problem in answered["problems"] if f"damaged {name}" in problem["id"]]
    if name in ("metrics.json", "config.yaml"):
        assert name in known or any(name in problem for problem in problems), (known, problems)


def test_links_and_pipes_lead_nowhere(hostile: str, board: Served, pages: dict[str, Page]) -> None:
    page = pages["en"]
    for name in ("pipe", "borrows"):
        for tab in ("overview", "log", "predictions", "report"):
            page.go(f"#/run/{quote(f'hostile/{name}', safe='')}?tab={tab}")
            page.wait(lambda: page.word("loading") not in page.text())
            assert "what stands outside" not in page.text()
    rows = board.rows()
    assert not [run for run in rows if run.startswith(("hostile/linked", "hostile/loop"))]
    assert {"hostile/pipe", "hostile/borrows"} <= rows.keys()
    problems = " ".join(f"{problem['id']} {problem['message']}" for problem in board.ask("runs")["problems"])
    assert ("linked" in problems and "utf-8" in problems.lower()) or any("utf-8" in run for run in rows)


ATTACKS = """<!doctype html><body><script>
const results = {};
const board = "BOARD";
const attempt = async (name, work) => { try { results[name] = await work(); } catch (error) { results[name] = `refused: ${error.name}`; } };
const loaded = (tag, attributes) => new Promise((resolve) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.onload = () => resolve("loaded"); element.onerror = () => resolve("refused"); document.body.append(element);
});
(async () => {
  const body = JSON.stringify({ ids: ["first"], words: ["model=tiny_glm"] });
  for (const path of ["api/delete", "api/start", "api/compose"]) {
    await attempt(`plain ${path}`, async () => (await fetch(board + path, { method: "POST", mode: "no-cors", credentials: "include", body })).type);
    await attempt(`json ${path}`, async () => (await fetch(board + path, { method: "POST", credentials: "include", headers: { "Content-Type": "application/json", "X-Glmtuner-Board": "1" }, body })).status);
    await attempt(`form ${path}`, async () => {
      const frame = Object.assign(document.createElement("iframe"), { name: `frame-${path}` });
      const form = Object.assign(document.createElement("form"), { action: board + path, method: "POST", enctype: "text/plain", target: frame.name });
      form.append(Object.assign(document.createElement("input"), { name: body, value: "" }));
      document.body.append(frame, form); form.submit();
      await new Promise((resolve) => setTimeout(resolve, 300)); return "sent";
    });
  }
  await attempt("read", async () => (await (await fetch(board + "api/runs", { credentials: "include" })).text()).length);
  await attempt("script", () => loaded("script", { src: board + "api/runs" }));
  await attempt("page script", () => loaded("script", { src: board + "page/main.js" }));
  await attempt("image", () => loaded("img", { src: board + "files/picture?id=first&name=loss.png" }));
  await attempt("socket", () => new Promise((resolve) => { const socket = new WebSocket(board.replace("http", "ws") + "api/runs"); socket.onopen = () => resolve("opened"); socket.onerror = () => resolve("refused"); }));
  await attempt("frame", () => new Promise((resolve) => {
    const frame = Object.assign(document.createElement("iframe"), { src: board });
    frame.onload = () => { try { resolve(frame.contentDocument === null ? "foreign" : frame.contentDocument.body.innerText.slice(0, 40) || "empty"); } catch { resolve("foreign"); } };
    document.body.append(frame);
  }));
  window.results = results;
})();
</script></body>"""


@pytest.fixture(scope="module")
def other(board: Served) -> Iterator[tuple[int, list[str]]]:
    """Another server of this machine, as another user may run one: its port, and the cookies that browsers sent it."""
    cookies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cookies.append(self.headers.get("Cookie", ""))
            target = board.url("en") if "?cross" in self.path else board.url("zh")
            page = (
                f"<a id=link href='{board.url('en')}?token={TOKEN}'>the board</a>"
                if self.path == "/link"
                else ATTACKS.replace("BOARD", target)
            )
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, cookies
    server.shutdown()


@pytest.mark.elsewhere
@pytest.mark.console(".")  # full of what was refused
@pytest.mark.parametrize("address", ["/?same", "/?cross"])
def test_a_page_of_another_address_changes_and_reads_nothing(
    board: Served, pages: dict[str, Page], other: tuple[int, list[str]], address: str
) -> None:
    """Same site (another port of localhost, which gets the board's cookies) and another site (localhost to 127.0.0.1)."""
    page, (port, cookies) = pages["zh"], other
    before = board.rows().keys()
    page.driver.switch_to.window(page.window)
    page.driver.get(f"http://localhost:{port}{address}")
    results = page.wait(lambda: page.js("return window.results"), 60)
    assert len(results) == 15
    for name, result in results.items():
        if name.startswith("plain"):
            assert result == "opaque" or result.startswith("refused"), (
                name,
                result,
            )  # sent and refused by the board, below
        elif not name.startswith("form"):
            assert result in ("refused", "foreign", "refused: TypeError"), (name, result)
    assert board.rows().keys() == before and (board.folder / "first").is_dir()
    stolen = next((found for found in cookies if "glmtuner-board-" in found), None)
    assert stolen, "browsers send cookies to all ports of a host name; else the next check tells nothing"
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", board.port)
    headers = {"Cookie": stolen, "Content-Type": "application/json", "X-Glmtuner-Board": "1"}
    connection.request("POST", "/api/delete", json.dumps({"ids": ["first"]}), headers)
    assert connection.getresponse().status == 401 and (board.folder / "first").is_dir()


@pytest.mark.elsewhere
@pytest.mark.console("403|Cross-Origin-Opener-Policy")
def test_a_name_that_leads_here_is_refused(board: Served, pages: dict[str, Page]) -> None:
    """DNS rebinding: the browser takes evil.example for this address."""
    page = pages["zh"]
    page.driver.switch_to.window(page.window)
    page.driver.get(f"http://evil.example:{board.port}/?token={TOKEN}")
    assert "this board answers to 127.0.0.1, localhost, [::1], not to 'evil.example'" in page.text()
    assert page.js("return document.scripts.length") == 0


@pytest.mark.elsewhere
def test_the_address_works_as_a_link_on_a_page_of_another_site(
    board: Served, pages: dict[str, Page], other: tuple[int, list[str]]
) -> None:
    """A chat or a wiki in the browser, from which a Strict cookie alone would not be sent along."""
    page = pages["zh"]
    page.driver.switch_to.window(page.window)
    page.driver.delete_all_cookies()
    page.driver.get(f"{board.url('en')}api/about")
    page.driver.delete_all_cookies()
    page.driver.get_log("browser")
    page.driver.get(f"http://localhost:{other[0]}/link")
    page.click("#link")
    page.find("tr[data-run]")
    assert TOKEN not in page.driver.current_url
    page.driver.get(f"{board.url('zh')}?token={TOKEN}")
    page.find("tr[data-run]")
