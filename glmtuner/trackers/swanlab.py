"""SwanLab."""

import secrets
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.run_folder.files import write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.trackers.client import ClientSession, Description, one_line
from glmtuner.trackers.experiment import ExperimentTracker, pictures, report_page, tables


@preset("tracker", "swanlab")
@dataclass(kw_only=True)
class Swanlab(ExperimentTracker):
    """Logs online if logged in, offline otherwise; it never prompts. A resumed run resumes its SwanLab run."""

    workspace: str | None = None

    title: ClassVar[str] = "SwanLab"
    package: ClassVar[str] = "swanlab"
    defaults: ClassVar[dict[str, str]] = {
        "name": "SWANLAB_EXPERIMENT_NAME",
        "group": "SWANLAB_EXPERIMENT_GROUP",
        "job_type": "SWANLAB_EXPERIMENT_JOB_TYPE",
    }


class Session(ClientSession):
    """A run of SwanLab, whose id is in swanlab/run_id.txt.

    Online, SwanLab itself leaves out the steps that its server has. Offline, the last session writes the whole history again and
    replaces the earlier ones when the run ends.
    """

    def __init__(self, about: Description, note: Callable[[str], None]) -> None:
        super().__init__(about, note)
        import swanlab

        id_file = self.logs / "run_id.txt"
        if not id_file.is_file():
            write_text(id_file, secrets.token_hex(4))
        self._earlier = sessions(self.logs)
        self._logged: dict[tuple[str, int], float] = {}
        options = swanlab.Settings
        mode = self._mode()
        # the command line and git's remote may hold secrets; the packages and the commit are in the config
        probe = options.Probe(runtime=False, git=False, requirements=False, conda=False)
        config = {name: value for name, value in about.config.items() if value is not None}  # SwanLab shows null as {}
        settings = options(interactive=False, terminal=options.Terminal(proxy_type="none"), probe=probe)
        self.run = swanlab.init(
            mode=mode, project=about.project, workspace=about.options["workspace"], name=about.name, group=about.group,
            job_type=about.job_type, tags=about.tags, id=id_file.read_text(encoding="utf-8").strip(), config=config,
            resume="allow" if mode == "online" else None, log_dir=str(self.logs), settings=settings,
        )  # fmt: skip
        if mode == "online":
            self.address = self.run.url

    def _mode(self) -> Any:
        """SwanLab's mode by its environment and settings files, or `offline` if that is online and the login fails."""
        import swanlab

        settings = swanlab.Settings()
        if settings.mode != "online":
            return settings.mode
        if not settings.api_key:
            return "offline"
        try:
            swanlab.login(api_key=settings.api_key, host=settings.api_host)
        except Exception as error:
            self.note(f"the login to SwanLab failed ({one_line(error)}): this run is written offline")
            return "offline"
        return "online"

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log one line; of several values of a name at one step SwanLab keeps the first, and if they differ that is printed."""
        for name, value in values.items():
            first = self._logged.setdefault((name, step), value)
            if first != value and first == first:
                self.note(
                    f"SwanLab keeps {name}={first:g} of step {step}, and not the later {value:g}; history.jsonl has both"
                )
        self.run.log(values, step=step)

    def finish(self, metrics: dict[str, float]) -> str | None:
        import swanlab

        shown: dict[str, Any] = {name: swanlab.Image(str(path)) for name, path in pictures(self.folder).items()}
        for name, (columns, rows) in tables(self.folder).items():
            shown[name] = swanlab.echarts.Table().add(columns, rows)
        if self.about.is_report and (page := report_page(self.folder)):
            shown["report"] = swanlab.Html(page.read_text(encoding="utf-8"))
        self.run.log({**metrics, **shown}, step=self.last_step)
        trained = RunFolder(self.folder).trained()
        if self.about.log_artifact and trained is not None:
            self.run.save(str(trained / "**"), base_path=str(self.folder), policy="end")
        return self._close("success")

    def abandon(self, preempted: bool) -> None:
        """Close the run as aborted if `preempted`, else as crashed."""
        self._close("aborted" if preempted else "crashed")

    def _close(self, state: Any) -> str | None:
        mode, written = self.run.mode, self.run.dir
        url = self.run.url if mode == "online" else None
        self.run.finish(state=state, error="the run failed" if state == "crashed" else None)
        if state == "success" or mode == "online":  # this session, or the server, has everything
            for folder in self._earlier:
                shutil.rmtree(folder, ignore_errors=True)
        if mode == "offline":
            return f"offline; upload it with `swanlab sync {shlex.quote(str(written))}`"
        return url


def sessions(logs: Path) -> list[Path]:
    """The folders of the run's sessions, run-<time>-<id>, oldest first."""
    return sorted(path for path in logs.glob("run-*") if path.is_dir())
