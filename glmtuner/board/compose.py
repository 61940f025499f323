"""The board's side of composing: a child composes, so that neither plugins nor Hydra's globals are of this process."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from glmtuner.board.processes import child_environment
from glmtuner.errors import ConfigError

SECONDS = 60.0  # for one answer; the first one imports Hydra
MOST_WORDS, MOST_LENGTH = 400, 8000


class Composer:
    """Composes the words of the page in the folder `cwd`, one request at a time; its child ends with this process."""

    def __init__(self, root: Path, cwd: Path) -> None:
        self.root, self.cwd = root, cwd
        self.lock = threading.Lock()
        self.child: subprocess.Popen[str] | None = None
        self.forms: dict[str | None, dict[str, Any]] = {}

    def form(self, config_dir: str | None) -> dict[str, Any]:
        """What the form is made of; see form.py."""
        if config_dir not in self.forms:
            found = self._ask({"what": "form", "config_dir": config_dir, "cwd": str(self.cwd)})
            if found.get("errors"):
                raise ConfigError(found["errors"][0]["message"])
            if config_dir is not None:  # its files may change
                return found
            self.forms[config_dir] = found
        return self.forms[config_dir]

    def compose(
        self,
        words: list[str],
        *,
        multirun: bool,
        config_dir: str | None = None,
        config_name: str = "config",
        cwd: Path | None = None,
        full: bool = False,
    ) -> dict[str, Any]:
        """What the words describe, or the errors in them; see composer.py. With `full` all jobs of a sweep are looked at."""
        if errors := [{"word": word, "message": problem} for word in words if (problem := problem_of(word))]:
            return {"ok": False, "errors": errors}
        if len(words) > MOST_WORDS:
            return {
                "ok": False, "errors": [{"word": None, "message": f"{len(words)} words; legal are {MOST_WORDS} at most"}]
            }  # fmt: skip
        return self._ask(
            {
                "what": "compose",
                "words": words,
                "multirun": multirun,
                "config_dir": config_dir,
                "config_name": config_name,
                "cwd": str(cwd or self.cwd),
                "root": str(self.root),
                "full": full,
            }
        )

    def close(self) -> None:
        """End the child."""
        child, self.child = self.child, None
        if child is not None:
            child.kill()
            child.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            for _ in range(2):  # a child that was killed meanwhile is started again
                if self.child is None or self.child.poll() is not None:
                    self.child = subprocess.Popen(
                        [sys.executable, "-m", "glmtuner.board.composer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        text=True, encoding="utf-8", env=child_environment(), start_new_session=True,
                    )  # fmt: skip
                answer = self._answer(self.child, request)
                if answer:
                    found: dict[str, Any] = json.loads(answer)
                    if found.pop(
                        "plugins", False
                    ):  # what a plugin has registered must not be known to the next request
                        self.close()
                    return found
                self.close()
        raise ConfigError(
            f"the words could not be composed within {SECONDS:g} s, or the process that composes them died; its output is that of the board"
        )

    def _answer(self, child: subprocess.Popen[str], request: dict[str, Any]) -> str:
        """The child's line; empty if it died, or took too long and was killed."""
        assert child.stdin is not None and child.stdout is not None
        watch = threading.Timer(SECONDS, child.kill)
        watch.daemon = True
        watch.start()
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            return child.stdout.readline()
        except OSError:
            return ""
        finally:
            watch.cancel()


def problem_of(word: str) -> str | None:
    """Why the word of a request cannot stand in a command line as an override; None if it can."""
    if len(word) > MOST_LENGTH:
        return f"{word[:60]}…: a word has at most {MOST_LENGTH} characters"
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in word):
        return "a word holds a line break or another control character; type it as one line"
    try:
        word.encode()
    except UnicodeEncodeError:
        return "a word holds half a surrogate pair, which is no text"
    if word.startswith("-"):
        return f"{word}: the board takes key=value, and no options; a sweep, presets of your own and the memory check have their own controls"
    if "=" not in word and not word.startswith("~"):
        return f"{word!r} has no '=': values are given as key=value"
    return None
