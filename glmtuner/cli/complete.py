"""What can stand at the cursor of a command line, for the scripts of `completion`: a line for each, with its description.

It is run at each TAB, and so imports neither Hydra nor PyYAML: what it knows is in an index, a JSON file in the cache that is made
again when the package or a folder of presets has changed.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtuner.config.key_meanings import language_of_locale
from glmtuner.config.paths import PACKAGE, cache_root, conf_dir, is_run_folder
from glmtuner.console import UNPRINTABLE, plain

Candidate = tuple[str, str]  # the whole word, and what it means

ROOT = PACKAGE.parent  # what Python finds the package in
OPEN_ENDS = ("=", ".", "/", ",")  # after these the word goes on
MOST_RUNS = 20  # run folders that are offered before a path is begun
INDEX_SECONDS = 60  # for making the index
CONFIG_DIR = ("--config-dir", "-cd")
DATASETS = ("data.dataset", "data.eval_dataset")
PATHS = {
    "model.model_name_or_path", "model.checkpoint_dir", "model.reward_model", "model.config_name", "model.tokenizer_name",
    "model.cache_dir", "data.dataset_dir", "trainer.output_dir", "trainer.resume_from_checkpoint",
    "benchmark.data_dir", "benchmark.include_path", "hydra.sweeper.storage", *DATASETS,
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Print the candidates: `words WORD…` with the one at the cursor last, or `line TEXT [BREAKS]` with the text before the cursor.

    BREAKS are the characters at which bash begins a word: of the last word, what is before the last one of them is left out.
    """
    how, *rest = arguments
    words = rest if how == "words" else split(rest[0])
    behind = after_program(words)
    if behind is None or not behind:
        return
    cut = 0
    if how == "line" and len(rest) > 1:
        cut = max((behind[-1].rfind(sign) + 1 for sign in rest[1]), default=0)
    found = candidates(behind[:-1], behind[-1])
    # a file's name that a terminal would obey is left out: a shell prints what it is given
    lines = [
        f"{text[cut:]}\t{plain(meaning)}"
        for text, meaning in found
        if not UNPRINTABLE.search(text) and "\n" not in text
    ]
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())


def split(text: str) -> list[str]:
    """The words of a line as a shell reads them; the last one, at the cursor, may be empty or lack its closing quote."""
    if (len(text) - len(text.rstrip("\\"))) % 2:  # of what is not typed yet
        text = text[:-1]
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(text + closing)
        except ValueError:
            continue
        return words if closing or (words and not text[-1:].isspace()) else [*words, ""]
    return text.split(" ")


def after_program(words: Sequence[str]) -> list[str] | None:
    """The words after `glmtuner`, or after `python -m glmtuner`; None where neither is there."""
    for index, word in enumerate(words[:-1]):
        is_module = word == "glmtuner" and index > 0 and words[index - 1] == "-m"
        if is_module or (os.path.basename(word) == "glmtuner" and (index == 0 or "=" in words[index - 1])):
            return [*words[index + 1 :]]
    return None


def candidates(before: Sequence[str], word: str) -> list[Candidate]:
    """What the word at the cursor can become, given those before it."""
    index = Index(read_index(config_dir_of(before)), before)
    found = dict(index.candidates(word))  # the first meaning of each
    return [(text, " ".join(meaning.split())) for text, meaning in found.items() if text.startswith(word)]


def config_dir_of(words: Sequence[str]) -> Path | None:
    """The folder that --config-dir names; None without one, or where there is no such folder."""
    for index, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name in CONFIG_DIR:
            folder = Path(value if sign else words[index + 1] if index + 1 < len(words) else "").expanduser()
            return folder.absolute() if str(folder) != "." and folder.is_dir() else None
    return None


@dataclass(frozen=True)
class Index:
    """What `completion_index` has gathered, and the words before the cursor."""

    known: dict[str, Any]
    before: Sequence[str]

    @property
    def verb(self) -> str | None:
        """The verb of the line."""
        first = self.before[0] if self.before else ""
        return first if first in self.known["verbs"] else None

    def candidates(self, word: str) -> Iterator[Candidate]:
        options: dict[str, Any] = self.known["verbs"][self.verb]["options"] if self.verb else self.known["options"]
        last = self.before[-1] if self.before else ""
        if options.get(last, {}).get("takes"):
            yield from self._option_values(options[last], word)
        elif word.startswith("-"):
            name, sign, value = word.partition("=")
            if sign and name in options:
                yield from ((f"{name}={text}", meaning) for text, meaning in self._option_values(options[name], value))
            yield from ((flag, about["help"]) for flag, about in options.items())
        elif "=" in word:
            yield from self._values(word)
        elif self.verb is None:
            if not self.before:
                yield from ((f"{verb}", about["help"]) for verb, about in self.known["verbs"].items())
            yield from self._keys(word)
        else:
            yield from self._of_verb(self.known["verbs"][self.verb], word)

    def _option_values(self, option: dict[str, Any], word: str) -> Iterator[Candidate]:
        if option["choices"]:
            yield from ((text, "") for text in option["choices"])
        elif option["takes"] == "PACKAGE":
            yield from ((group, "") for group in self.known["groups"])
        elif option["takes"] in ("DIR", "FILE"):
            yield from paths(word, folders_only=option["takes"] == "DIR")

    def _of_verb(self, verb: dict[str, Any], word: str) -> Iterator[Candidate]:
        if verb["choices"]:
            yield from ((text, "") for text in verb["choices"])
        if verb["takes_keys"]:
            yield from ((key["name"], key["meaning"]) for key in self.known["keys"])
        if verb["takes_folders"]:
            if not word:
                yield from runs()
            yield from paths(word, folders_only=True)
        if verb["takes_overrides"]:
            yield from self._keys(word)

    def _keys(self, word: str) -> Iterator[Candidate]:
        sign = word[: len(word) - len(word.lstrip("+~"))]
        name = word[len(sign) :]
        if "." in name:
            group = name.partition(".")[0]
            allowed = self._classes_on_the_line(group)
            for key in self.known["keys"]:
                if not allowed or not key["classes"] or allowed & {*key["classes"]}:
                    yield f"{sign}{key['name']}=", key["meaning"]
            return
        for group, about in self.known["groups"].items():
            if group.startswith("hydra") and not name.startswith("h"):
                continue
            yield f"{sign}{group}=", about["meaning"]
            if about["has_keys"]:
                yield f"{sign}{group.replace('/', '.')}.", about["meaning"]
        yield from ((f"{sign}{key['name']}=", key["meaning"]) for key in self.known["keys"] if "." not in key["name"])

    def _classes_on_the_line(self, group: str) -> set[str]:
        """The classes of the presets that the line chooses in a group; empty where it chooses none."""
        about = self.known["groups"].get(group, {"presets": {}})
        chosen = [word.partition("=")[2] for word in self.before if word.partition("=")[0] == group]
        names = [name.strip() for text in chosen for name in text.strip("[]").split(",")]
        return {about["presets"][name]["class"] for name in names if name in about["presets"]} - {None}

    def _values(self, word: str) -> Iterator[Candidate]:
        key, _, value = word.partition("=")
        name = key.lstrip("+~")
        begun = max(value.rfind("["), value.rfind(",")) + 1  # of the item at the cursor
        head, item = f"{key}={value[:begun]}", value[begun:]
        used = {*value[:begun].strip("[").split(",")}
        found = [(text, meaning) for text, meaning in self._items(name, item) if text not in used]
        yield from ((head + text, meaning) for text, meaning in found)

    def _items(self, name: str, item: str) -> Iterator[Candidate]:
        if name in self.known["groups"]:
            presets = self.known["groups"][name]["presets"]
            yield from ((preset, about["meaning"]) for preset, about in presets.items())
            return
        key = next((key for key in self.known["keys"] if key["name"] == name), None)
        yield from ((text, "") for text in (key["choices"] if key else ()))
        if name in DATASETS:
            yield from self.known["datasets"].items()
            yield from ((entry, "") for entry in own_datasets(self.before))
        if name in PATHS:
            yield from paths(item, folders_only=False)


def own_datasets(before: Sequence[str]) -> list[str]:
    """The names in the dataset_info.json of data.dataset_dir, as the line has it."""
    folder = next((word.partition("=")[2] for word in before if word.startswith("data.dataset_dir=")), "data")
    try:
        entries = json.loads((Path(folder).expanduser() / "dataset_info.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return []
    return [*entries] if isinstance(entries, dict) else []


def runs() -> Iterator[Candidate]:
    """The newest run folders and sweeps below outputs/."""
    found = []
    for folder in (*Path("outputs").glob("*/*"), *Path("outputs").glob("*"), *Path("outputs/sweeps").glob("*/*")):
        if is_run_folder(folder) or folder.parent == Path("outputs/sweeps"):
            found.append((folder.stat().st_mtime, str(folder)))
    yield from ((name, "") for _, name in sorted(found, reverse=True)[:MOST_RUNS])


def paths(word: str, *, folders_only: bool) -> Iterator[Candidate]:
    """The paths that begin with the word; folders end in a slash."""
    start, _, rest = word.rpartition("/")
    folder = Path(f"{start}/" if "/" in word else ".").expanduser()
    try:
        inside = sorted(os.scandir(folder), key=lambda each: each.name)
    except OSError:
        return
    for each in inside:
        if each.name.startswith(rest) and (not each.name.startswith(".") or rest.startswith(".")):
            if each.is_dir():
                yield f"{word[: len(word) - len(rest)]}{each.name}/", ""
            elif not folders_only:
                yield f"{word[: len(word) - len(rest)]}{each.name}", ""


def read_index(config_dir: Path | None) -> dict[str, Any]:
    """The index, made again where the package or the presets are not those that it was made of."""
    language = language_of_locale()
    state = state_of([PACKAGE, conf_dir(), *([config_dir] if config_dir else [])])
    where = hashlib.sha256(f"{PACKAGE}\0{config_dir}\0{language}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    file = cache_root() / "completion" / f"{where}.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["state"] == state:
            return dict(stored["index"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = make_index(config_dir, language)
    write_index(file, {"state": state, "index": made})
    return made


def state_of(folders: Sequence[Path]) -> str:
    """A hash of the names and times of all modules and presets in the folders."""
    state = hashlib.sha256()
    waiting = [*map(str, folders)]
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder) as inside:
            for each in sorted(inside, key=lambda it: it.name):
                if each.name.endswith((".py", ".yaml")):
                    state.update(f"{each.path}\0{each.stat().st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
                elif each.is_dir(follow_symlinks=False) and not each.name.startswith((".", "__")):
                    waiting.append(each.path)
    return state.hexdigest()


def make_index(config_dir: Path | None, language: str) -> dict[str, Any]:
    """The index, made by a process of its own, which has all packages; one without anything where that fails."""
    code = "import sys; sys.path.append(sys.argv.pop(1)); from glmtuner.cli.completion_index import main; main()"
    command = [sys.executable, "-P", "-c", code, str(ROOT), language, *([str(config_dir)] if config_dir else [])]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=INDEX_SECONDS, stdin=subprocess.DEVNULL)
        made: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {"verbs": {}, "options": {}, "groups": {}, "keys": [], "datasets": {}}
    return made


def write_index(file: Path, content: dict[str, Any]) -> None:
    """Store the index, unless nothing is in it or the cache cannot be written."""
    if not content["index"]["keys"]:
        return
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)
