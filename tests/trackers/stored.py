"""What a tracker has of a run, read by its own library from where the run has put it."""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Series = dict[str, list[tuple[int, float]]]


@dataclass
class Stored:
    """One run at a tracker; what a tracker has no notion of is None."""

    values: Series = field(default_factory=dict)
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: set[str] | None = None
    state: str | None = None
    config: dict[str, Any] = field(default_factory=dict)  # leaves, by dotted keys
    tables: dict[str, list[list[Any]]] = field(default_factory=dict)
    pictures: set[str] = field(default_factory=set)
    page: str | None = None  # the sweep's report
    weights: dict[str, bytes | None] = field(default_factory=dict)  # by file names; None: only the name is told
    id: str | None = None
    parent: str | None = None

    def add(self, name: str, step: int, value: float) -> None:
        self.values.setdefault(name, []).append((step, value))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else name)
    return found


def mlflow(folder: Path, uri: str | None = None) -> Stored:
    from mlflow import MlflowClient

    about = json.loads((folder / "mlflow/run.json").read_text())
    client = MlflowClient(uri or about["tracking_uri"])
    run = client.get_run(about["run_id"])
    tags = run.data.tags
    found = Stored(
        id=run.info.run_id, name=run.info.run_name, group=tags.get("group"), job_type=tags.get("job_type"), config=run.data.params,
        tags={name for name, value in tags.items() if value == "true" and name != "preempted"}, parent=tags.get("mlflow.parentRunId"),
        state={"FINISHED": "finished", "FAILED": "failed", "RUNNING": "running"}.get(run.info.status)
        or ("preempted" if tags.get("preempted") else run.info.status),
    )  # fmt: skip
    for name in run.data.metrics:
        for metric in sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step):
            found.add(name, metric.step, metric.value)
    for listed in json.loads(tags.get("mlflow.loggedArtifacts", "[]")):
        assert listed["type"] == "table"
        table = json.loads(Path(client.download_artifacts(run.info.run_id, listed["path"])).read_text())
        found.tables[Path(listed["path"]).stem] = table["data"]
    for item in client.list_artifacts(run.info.run_id):
        if item.path == "pictures":
            found.pictures = {
                f"pictures/{Path(each.path).stem}" for each in client.list_artifacts(run.info.run_id, item.path)
            }
        elif item.path in ("adapter", "model"):
            local = Path(client.download_artifacts(run.info.run_id, item.path))
            found.weights = {path.name: path.read_bytes() for path in local.iterdir()}
        elif item.path == "report.html":
            found.page = Path(client.download_artifacts(run.info.run_id, item.path)).read_text(encoding="utf-8")
    return found


def swanlab(folder: Path) -> Stored:
    """By the reader of `swanlab sync`."""
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (session,) = (folder / "swanlab").glob("run-*")  # one is left to be synced
    (file,) = session.glob("*.swanlab")
    reader, found = DataStoreReader(), Stored(state="running")
    reader.open(file)
    for entry in reader:
        record = Record.FromString(entry)
        match record.WhichOneof("record_type"):
            case "start":
                start = record.start
                found.name, found.group, found.job_type, found.id = (
                    start.name,
                    start.group or None,
                    start.job_type,
                    start.id,
                )
                found.tags = {*start.tags}
            case "scalar" if not record.scalar.key.startswith("__swanlab__"):
                found.add(record.scalar.key, record.scalar.step, record.scalar.value.number)
            case "media":
                kind = {"image", "echarts", "html"} & {path.name for path in (session / "media").iterdir()}
                for item in record.media.value.items:
                    (path,) = [
                        path for path in (session / "media").glob(f"*/{item.filename}") if path.parent.name in kind
                    ]
                    if path.parent.name == "image":
                        found.pictures.add(record.media.key)
                    elif path.parent.name == "html":
                        found.page = path.read_text(encoding="utf-8")
                    else:
                        table = json.loads(path.read_text(encoding="utf-8"))
                        columns = [column["field"] for column in table["colDefs"]]
                        found.tables[record.media.key] = [
                            [row[column] for column in columns] for row in table["rowData"]
                        ]
            case "finish":
                found.state = {
                    RunState.RUN_STATE_FINISHED: "finished", RunState.RUN_STATE_ABORTED: "preempted",
                    RunState.RUN_STATE_CRASHED: "failed",
                }[record.finish.state]  # fmt: skip
    reader.close()
    if (session / "files/config.yaml").is_file():
        config = yaml.safe_load((session / "files/config.yaml").read_text(encoding="utf-8"))
        found.config = flat({name: entry["value"] for name, entry in config.items()})
    found.weights = {path.name: path.read_bytes() for path in session.glob("files/adapter/*")}
    return found


def trackio(folder: Path) -> Stored:
    import trackio as library
    from trackio.sqlite_storage import SQLiteStorage

    about = json.loads((folder / "trackio/run.json").read_text())
    (run,) = [run for run in library.Api().runs(about["project"]) if run.id == about["run_id"]]
    assert [other.name for other in library.Api().runs(about["project"])].count(run.name) == 1
    config = dict(run.config)
    found = Stored(
        id=run.name, name=run.name, group=config.pop("_Group"), job_type=config.pop("job_type"), tags={*config.pop("tags")},
        config=flat({name: value for name, value in config.items() if name[0] != "_"}),
    )  # fmt: skip
    for row in SQLiteStorage.get_logs(about["project"], run.name, run_id=run.id):
        step = row.pop("step")
        row.pop("timestamp")
        for name, value in row.items():
            if not isinstance(value, dict):
                found.add(name, step, value)
            elif value["_type"] == "trackio.table":
                found.tables[name] = [[*line.values()] for line in value["_value"]]
            elif value["_type"] == "trackio.image":
                found.pictures.add(name)
            else:
                assert value["_type"] == "trackio.html", value
                found.page = html_of(value)
    for artifact in SQLiteStorage.list_artifacts(about["project"]):
        if run.id in artifact["name"]:
            found.weights = dict.fromkeys([artifact["name"]])
    return found


def html_of(value: dict[str, Any]) -> str:
    from trackio.utils import MEDIA_DIR

    return (MEDIA_DIR / unquote(value["file_path"])).read_text(encoding="utf-8")


def comet(folder: Path) -> Stored:
    """From the archive that `comet upload` sends, by what its own sender calls the messages."""
    (archive,) = (folder / "comet").glob("*/*.zip")  # one is left to be uploaded
    found = Stored(id=archive.stem)
    with zipfile.ZipFile(archive) as files:
        about = json.loads(files.read("experiment.json"))
        found.tags = {*about["tags"]}
        for text in files.read("messages.json").decode().splitlines():
            message = json.loads(text)
            payload = message["payload"]
            match message["type"]:
                case "metric_msg":
                    metric = payload["metric"]
                    if metric["metricName"] != "process duration":  # Comet's own
                        found.add(metric["metricName"], metric["step"], float(metric["metricValue"]))
                case "parameter_msg":
                    parameter = payload.get("param") or payload["params"]  # `params` of a list
                    if parameter["source"] == "manual":
                        found.config[parameter["paramName"].replace("|", ".")] = parameter["paramValue"]
                case "log_other":
                    key = {"Name": "name"}.get(payload["key"], payload["key"])
                    if key in ("name", "group", "job_type", "state"):
                        setattr(found, key, payload["value"])
                case "file_upload":
                    add_upload(found, payload, files)
                case "html":
                    found.page = payload["html"]
    return found


def add_upload(found: Stored, payload: dict[str, Any], files: zipfile.ZipFile) -> None:
    import csv
    import io

    name = payload["additional_params"].get("fileName", "")
    content = files.read(payload["file_path"]) if payload["file_path"] in files.namelist() else None
    if payload["upload_type"] == "visualization":
        found.pictures.add(payload["additional_params"]["figName"])
    elif name.endswith(".csv"):
        assert content is not None
        found.tables[Path(name).stem] = [*csv.reader(io.StringIO(content.decode()))][1:]
    else:
        found.weights[Path(name).name] = content


READERS: dict[str, Callable[[Path], Stored]] = {
    "mlflow": mlflow,
    "swanlab": swanlab,
    "trackio": trackio,
    "comet": comet,
}


def history_of(folder: Path, tracker: str) -> Series:
    """history.jsonl by the names that the Hugging Face Trainer gives to its integrations; null is NaN."""
    found: Series = {}
    for text in (folder / "history.jsonl").read_text().splitlines():
        line = json.loads(text)
        step = line.pop("step")
        for name, value in line.items():
            name = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            series = found.setdefault(name, [])
            # SwanLab has one value of a name at each step: the epoch of an evaluation is that of its step's training line
            if tracker != "swanlab" or step not in dict(series):
                series.append((step, math.nan if value is None else value))
    return found
