"""`board --static OUT`: the page and what it shows as files, for machines without open ports."""

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from glmtuner import __version__
from glmtuner.board.app import PAGE, TYPES
from glmtuner.board.curves import AXES, curves, metrics_of
from glmtuner.board.index import Index
from glmtuner.board.records import Record
from glmtuner.board.root import Root
from glmtuner.board.run_files import file_in, log_of
from glmtuner.board.run_view import run_view
from glmtuner.board.sweep_view import sweep_view
from glmtuner.board.sweeps import Sweep
from glmtuner.board.workers import Worker
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.files import strict_json
from glmtuner.run_folder.names import PREDICTIONS, REPORT_PAGE

POINTS, ANSWERS = 500, 200  # of a curve, and of a run, that are written
DATA, REPORTS, INDEX = "data", "reports", "data/index.js"
LEFT_OUT = "training data as they are learned, comparisons, and everything that starts, stops or talks with a run"


class Static:
    """The page as files in a folder; `write` brings them up to date and leaves what did not change as it is."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.out = out
        if out.is_dir() and any(out.iterdir()) and not (out / INDEX).is_file():
            raise ConfigError(
                f"--static {out}: the folder holds other files; type the name of a new folder, or of one written before"
            )
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--static {out}: it is a file; type the name of a folder")
        self.index = Index(Root(folder))
        self.worker = Worker(self.index.root.path)
        self.files: dict[str, str] = {}  # what the page asks for, and the name of the file that has it
        self.left_out: Counter[str] = Counter()
        self._seen: dict[str, tuple[Any, dict[str, str], Counter[str]]] = {}  # of a run: of what its files were written
        self._written: set[str] = set()  # paths below `out`

    def close(self) -> None:
        """End the child processes."""
        self.worker.close()
        if self.index.rankings is not None:
            self.index.rankings.worker.close()

    def write(self, refresh: float | None = None) -> bool:
        """Write what changed; the page loads itself again after `refresh` seconds. Returns whether jobs run or wait."""
        self.index.refresh(at_once=True)
        if self.index.rankings is not None:
            self.index.rankings.wait()
        self.files, self.left_out, self._written = {}, Counter(), set()
        runs = json.loads(self.index.changes(None))
        for path in sorted(path for path in PAGE.rglob("*") if path.suffix in TYPES):
            self._put(f"page/{path.relative_to(PAGE).as_posix()}", path.read_bytes())
        records = list(self.index.records.values())
        self._data("runs", "", runs)
        self._data("keys", "", sorted({key for record in records for key in record.values}))
        varied = sorted({key for row in runs["rows"] for key in row["varied"]})
        self._data(
            "values",
            "",
            {key: {record.id: record.values[key] for record in records if key in record.values} for key in varied},
        )
        for record in records:
            self._run(record)
        for sweep in list(self.index.sweeps.values()):
            self._sweep(sweep)
        about = {
            "folder": str(self.index.root.path), "read_only": True, "version": __version__, "static": True, "time": time.time(),
            "left_out": [*(f"{what}, of {count} runs" for what, count in self.left_out.items()), LEFT_OUT],
        }  # fmt: skip
        self._data("about", "", about)
        self._put("index.html", start_page(refresh).encode())
        self._put(
            INDEX, f"window.glmtunerStatic = {strict_json({'files': self.files})};\n".encode()
        )  # last: it names the others
        self._remove_others()
        return any(row["state"] in ("running", "queued", "unknown") for row in runs["rows"])

    def _run(self, record: Record) -> None:
        """Write the files of a run, unless it is as it was."""
        state = (record.files, self.index.rows.get(record.id))
        known = self._seen.get(record.id)
        if known is not None and known[0] == state:
            files, left_out = known[1], known[2]
            self._written |= {f"{DATA}/{key}.js" for key in files.values()}
            if (self.out / report_file(record.id)).is_file():
                self._written.add(report_file(record.id))
            self.files |= files
            self.left_out += left_out
            return
        before_files, before_left_out = dict(self.files), Counter(self.left_out)
        try:
            self._put_run(record)
        except (CheckpointError, OSError) as error:  # it was removed meanwhile, or cannot be read
            say(f"--static: {record.id} is left out: {error}")
        added = {name: key for name, key in self.files.items() if name not in before_files}
        self._seen[record.id] = ((dict(record.files), state[1]), added, self.left_out - before_left_out)

    def _put_run(self, record: Record) -> None:
        id = record.id
        view = run_view(self.index, record, self.worker)
        self._data("run", id, {**view, "report": self._report(id, record.path)})
        names = metrics_of(record)
        self._data("metrics", id, names)
        by = {axis: curves([record], names, axis, POINTS) for axis in AXES}
        if any(not series["whole"] for series in by["step"]["series"]):
            self.left_out[f"points of curves beyond {POINTS:,}"] += 1
        self._data("curves", id, {**by["step"], "by": {axis: by[axis]["series"] for axis in ("tokens", "time")}})
        record.forget_history()
        if PREDICTIONS in record.files:
            page = self.worker.ask("predicted", id=id, other=None, asked={"limit": ANSWERS})
            if page["total"] > ANSWERS:
                self.left_out[f"answers beyond {ANSWERS}"] += 1
            self._data("predictions", id, page)
        if view["has"]["log"]:
            self._data("log", id, log_of(self.index.root.path, record.path, None))

    def _sweep(self, sweep: Sweep) -> None:
        self._data("sweep", sweep.id, {**sweep_view(self.index, sweep), "report": self._report(sweep.id, sweep.path)})

    def _report(self, id: str, folder: Path) -> str | None:
        """Copy the report; its address, None where there is none."""
        try:
            content = file_in(self.index.root.path, folder, REPORT_PAGE).read_bytes()
        except (CheckpointError, OSError):
            return None
        self._put(report_file(id), content)
        return report_file(id)

    def _data(self, name: str, id: str, content: Any) -> None:
        """Write what the page gets for this question."""
        key = f"{name}-{short(id)}" if id else name
        self.files[json.dumps([name, id], ensure_ascii=False, separators=(",", ":"))] = key
        self._put(f"{DATA}/{key}.js", f"glmtunerData({json.dumps(key)}, {strict_json(content)});\n".encode())

    def _put(self, name: str, content: bytes) -> None:
        """Write a file at once, unless it has this content."""
        path = self.out / name
        self._written.add(name)
        try:
            if path.stat().st_size == len(content) and path.read_bytes() == content:
                return
        except OSError:
            path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)

    def _remove_others(self) -> None:
        """Remove the files of runs that are gone, and of earlier versions of the page."""
        for folder in (DATA, REPORTS, "page"):
            for path in sorted((self.out / folder).rglob("*")):
                if path.is_file() and path.relative_to(self.out).as_posix() not in self._written:
                    path.unlink(missing_ok=True)


def short(id: str) -> str:
    """A short name for an id that any file system takes."""
    return hashlib.sha256(id.encode()).hexdigest()[:16]


def report_file(id: str) -> str:
    """The path of a report below the folder of the page."""
    return f"{REPORTS}/{short(id)}.html"


def start_page(refresh: float | None) -> str:
    """index.html with the list of the data."""
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    head = f'<script src="{INDEX}"></script>\n'
    if refresh is not None:
        head = f'<meta http-equiv="refresh" content="{max(round(refresh), 1)}">\n{head}'
    return text.replace("</head>", f"{head}</head>", 1)


def write(folder: Path, out: Path) -> None:
    """Write the page into `out`, where a browser opens index.html without any server."""
    static = Static(folder, out)
    try:
        static.write()
        report(static)
    finally:
        static.close()


def write_while_running(folder: Path, out: Path, seconds: float) -> None:
    """Write the page every so many seconds, until no job in the folder runs or waits."""
    static = Static(folder, out)
    try:
        while static.write(refresh=seconds):
            say(f"{out / 'index.html'} was written at {time.strftime('%H:%M:%S')}; jobs are running")
            time.sleep(seconds)
        static.write()
        report(static)
    finally:
        static.close()


def report(static: Static) -> None:
    """Say what was written, and what the page does not have."""
    what = "; ".join([*(f"{name} (of {count} runs)" for name, count in static.left_out.items()), LEFT_OUT])
    say(
        f"{static.out / 'index.html'}: {len(static.index.records)} runs, {len(static.index.sweeps)} sweeps; open it in a browser"
    )
    say(f"not in it: {what}")
