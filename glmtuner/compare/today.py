"""What a run would be computed from today, as provenance.json would have it, without running it."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from glmtuner.config.compose import Composed
from glmtuner.config.paths import PACKAGE_DATA
from glmtuner.config.plugins import loaded_plugins
from glmtuner.config.schema import Run
from glmtuner.data import DatasetSpec, load
from glmtuner.data.columns import description
from glmtuner.data.files import LocalFiles
from glmtuner.data.prepare import digest
from glmtuner.data.read import read
from glmtuner.data.record_hashes import record_hash, split_hashes
from glmtuner.data.splits import dataset_entries
from glmtuner.distributed import ranks
from glmtuner.errors import GlmtunerError
from glmtuner.families.hub import read_config
from glmtuner.launch.build import resolve_family, resolve_template
from glmtuner.launch.device import device_of
from glmtuner.launch.inputs import machine, starting_weights, tokenizer_hash, weight_hashes
from glmtuner.launch.places import catalogue_dirs
from glmtuner.run_folder.provenance import environment


class Today:
    """The inputs of a run today: `provenance` as a run would write it, the hashes of the records, and what cannot be had."""

    def __init__(self, composed: Composed, stored: Mapping[str, Any]) -> None:
        run = composed.run
        self.problems: list[str] = []
        self.hashes: dict[str, list[bytes]] = {}
        self.provenance: dict[str, Any] = {**environment(), "thinking": stored.get("thinking")}
        self.specs: dict[str, DatasetSpec] = {}
        with redirect_stdout(io.StringIO()):  # what these have to say, the run says
            self._try("weights", lambda: weight_hashes(run))
            self._try("tokenizer", lambda: self._tokenizer(run))
            self._try("data", lambda: self._data(composed, stored.get("data", {})))
        device = device_of(run)
        self.provenance["machine"] = machine(device) | {
            "ranks": max(ranks.processes_to_start(run.parallel), ranks.world_size())
        }
        if plugins := loaded_plugins(run.plugins):
            self.provenance["plugins"] = [plugin.about() for plugin in plugins]

    def _try(self, name: str, compute: Any) -> None:
        """The value under its name; what is wrong with its files is a problem, and its kind is not there."""
        try:
            self.provenance[name] = compute()
        except GlmtunerError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{name}: {error}")

    def _tokenizer(self, run: Run) -> str:
        from glmtuner.models.load import load_tokenizer

        tokenizer = load_tokenizer(run.model, run.data.new_tokens)
        family, _ = resolve_family(run, read_config(run.model))
        _, template = resolve_template(run, family, tokenizer)
        self.provenance["template"] = template.describe()
        return tokenizer_hash(tokenizer)

    def _data(self, composed: Composed, stored: Mapping[str, Any]) -> dict[str, Any]:
        run = composed.run
        self.specs = dataset_entries(run, catalogue_dirs(composed))
        names = [name for name in self.specs if name in stored] or [
            *self.specs
        ]  # one that only an evaluation would read is not stored
        names += [name for name in run.data.dataset if name not in names and run.trainer.do_train]
        return {name: {**stored.get(name, {}), **self._dataset(run, name)} for name in names}

    def _dataset(self, run: Run, name: str) -> dict[str, Any]:
        spec, data = self.specs[name], run.data
        try:
            loaded = load(
                spec, dataset_dir=data.dataset_dir, package_data=PACKAGE_DATA, split=data.split, max_samples=data.max_samples,
                cache_dir=run.model.cache_dir, token=run.model.use_auth_token,
            )  # fmt: skip
            content = b"".join(map(record_hash, loaded.examples))
        except GlmtunerError as error:
            self.problems.append(str(error))
            return {"sha256": {}, "records_sha256": None}
        self.hashes[name] = split_hashes(content)
        read_as = description(spec, [*loaded.columns])
        return {
            "sha256": loaded.files,
            "records_sha256": digest(content),
            "read": read_as,
            "bad_records": len(loaded.bad),
        }

    def changed_at(self, run: Run) -> dict[str, str]:
        """When each local file of the data and of the weights was changed last, by the name of its fact."""
        times: dict[str, str] = {}
        for name, spec in self.specs.items():
            with suppress(GlmtunerError, OSError), redirect_stdout(io.StringIO()):
                source = (
                    read(spec, dataset_dir=run.data.dataset_dir, package_data=PACKAGE_DATA, split=run.data.split)
                    if spec.file_name
                    else None
                )
                if isinstance(source, LocalFiles):
                    times |= {f"{name}: file {label}": last_change(path) for label, path in source.paths.items()}
        with suppress(GlmtunerError, OSError):
            times |= {
                f"{key}: {path.name}": last_change(path) for key, files in starting_weights(run) for path in files
            }
        return times


def last_change(path: Path) -> str:
    """The local time of a file's last change, to the second."""
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")
