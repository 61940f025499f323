"""What a run was computed from, as values by kind and name, and where those of several runs differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from glmtuner.compare.loaded import LoadedRun
from glmtuner.config.schema import key_defaults
from glmtuner.report.jobs import IRRELEVANT_KEYS
from glmtuner.run_folder.acquire import DERIVED_KEYS, differing_keys
from glmtuner.run_folder.provenance import PACKAGES
from glmtuner.run_folder.redaction import flatten, redact_text

ABSENT = "(none)"
LONGEST = 300  # characters of a value that are shown
HASH = 12  # hexadecimal digits of a hash that are shown
# of a dataset's entry in provenance.json
DATA_FACTS = (
    "sha256", "records_sha256", "records", "bad_records", "read", "share", "tokens", "learned_tokens", "prompts_cut", "answers_cut",
)  # fmt: skip
DATA_NAMES = {"sha256": "file", "records_sha256": "content of the records"}
KINDS = ("configuration", "data", "weights", "tokenizer", "template", "plugins", "packages", "code", "git", "machine")

Facts = Mapping[str, Mapping[str, Any]]  # kind -> name -> value


class Difference(NamedTuple):
    """Something of a kind that is not the same in all of several runs; the values are in the runs' order, and absent ones are None."""

    kind: str
    name: str
    values: tuple[Any, ...]

    def shown(self) -> list[str]:
        """The values as texts, hashes shortened, without secrets."""
        return [shown(value, self.kind) for value in self.values]


def shown(value: Any, kind: str = "") -> str:
    """A value as an override or a hash is written, on one line."""
    if value is None:
        return "null" if kind == "configuration" else ABSENT
    if isinstance(value, str):
        text = value[:HASH] if _is_hash(value) else value
        text = text if text.strip() and "\n" not in text else json.dumps(text, ensure_ascii=False)
    elif isinstance(value, bool):
        text = str(value).lower()
    else:
        text = f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    text = redact_text(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _is_hash(text: str) -> bool:
    return len(text) in (16, 40, 64) and all(character in "0123456789abcdef" for character in text)


def facts_of(provenance: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All that provenance.json says of the inputs, by kind; a kind that it does not record is missing."""
    facts: dict[str, dict[str, Any]] = {}
    if data := provenance.get("data"):
        facts["data"] = {}
        for name, entry in data.items():
            for fact in DATA_FACTS:
                if fact == "sha256":
                    files = entry.get(fact) if isinstance(entry.get(fact), dict) else {}
                    facts["data"] |= {f"{name}: file {label}": value for label, value in files.items()}
                elif fact in entry:
                    facts["data"][f"{name}: {DATA_NAMES.get(fact, fact)}"] = entry[fact]
    if "weights" in provenance:
        facts["weights"] = {
            f"{key}: {file}": value for key, files in provenance["weights"].items() for file, value in files.items()
        }
    if "tokenizer" in provenance:
        facts["tokenizer"] = {"tokenizer": provenance["tokenizer"]}
    if template := provenance.get("template"):
        facts["template"] = flatten(template) if isinstance(template, dict) else {"template": template}
        facts["template"]["thinking"] = provenance.get("thinking")
    facts["plugins"] = {
        str(plugin.get("name")): plugin.get("sha256")
        for plugin in provenance.get("plugins") or []
        if isinstance(plugin, dict)
    }
    if "packages" in provenance:
        facts["packages"] = {"python": provenance.get("python"), **provenance["packages"]}
    if "code" in provenance:
        facts["code"] = {f"glmtuner/{room}": value for room, value in provenance["code"].items()}
    if "git" in provenance:
        git = provenance["git"] or {}
        facts["git"] = {name: git.get(name) for name in ("commit", "diff_sha256")}
    if "machine" in provenance:
        facts["machine"] = dict(provenance["machine"])
    return facts


def input_differences(each: Sequence[Facts]) -> tuple[list[Difference], list[str]]:
    """Where facts differ, by kind, and the kinds that some of them do not record, in words: those are not compared."""
    found: list[Difference] = []
    unknown: list[str] = []
    for kind in KINDS[1:]:
        if not any(kind in facts for facts in each):
            continue
        if not all(kind in facts for facts in each):
            unknown.append(kind)
            continue
        by_run = [facts[kind] for facts in each]
        names = dict.fromkeys(name for facts in by_run for name in facts)
        if kind == "packages" and any(facts.keys() <= {*PACKAGES, "python"} for facts in by_run):
            partial = [name for name in names if all(name in facts for facts in by_run)]
            if len(partial) < len(names):
                unknown.append("most packages")
            names = dict.fromkeys(partial)
        for name in names:
            values = tuple(facts.get(name) for facts in by_run)
            if any(value != values[0] for value in values[1:]):
                found.append(Difference(kind, name, values))
    return found, unknown


def config_differences(runs: Sequence[LoadedRun]) -> tuple[list[Difference], list[Difference]]:
    """The keys whose values differ: those that results may depend on, and the others, such as trainer.output_dir.

    A key that an earlier version had not has its default there; two spellings of one path are equal.
    """
    defaults = key_defaults()
    keys: set[str] = set()
    for run in runs[1:]:
        keys |= {*differing_keys(runs[0].config, run.config, defaults)}
        keys |= {key for key in DERIVED_KEYS if runs[0].values.get(key) != run.values.get(key)}
    found = [
        Difference("configuration", key, tuple(run.values.get(key, defaults.get(key)) for run in runs)) for key in keys
    ]
    found.sort(key=lambda difference: difference.name)
    matters = [difference for difference in found if not is_irrelevant(difference.name)]
    return matters, [difference for difference in found if is_irrelevant(difference.name)]


def is_irrelevant(key: str) -> bool:
    """Whether no result depends on the key."""
    return key in IRRELEVANT_KEYS or key.startswith("tracker.")


def flat(config: Any) -> dict[str, Any]:
    """A configuration by dotted keys, enums as text."""
    return flatten(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
