"""`chat RUN`: talk with a run's model in the terminal."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmtuner.inference.conversation import Conversation

HELP = "talk with its model"
COMMANDS = {
    "/clear": "forget what was said",
    "/system": "TEXT  tell the model who it is (nothing: no more); forgets what was said",
    "/help": "this list",
    "/exit": "leave (Ctrl-D too); Ctrl-C stops an answer",
}
HISTORY = 1000  # questions that the up key finds again


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder; generation.temperature=0.2 and its like may follow")


def run(given: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say
    from glmtuner.inference.conversation import Conversation
    from glmtuner.launch.build import finished_run

    finished = finished_run([given.run], overrides)
    conversation = Conversation(finished)
    say(f"{finished.run.model.model_name_or_path} as in {given.run}; /help lists what can be typed besides questions")
    history = history_file()
    remember(history)
    try:
        while (line := read_line()) is not None:
            if line and not obey(conversation, line):
                break
    finally:
        keep(history)
    return 0


def obey(conversation: "Conversation", line: str) -> bool:
    """Do what the line says, a command or a question; False when it is /exit."""
    from glmtuner.console import say
    from glmtuner.errors import ConfigError, did_you_mean

    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/clear":
        conversation.turns = []
        say("(nothing was said so far)")
    elif command == "/system":
        conversation.system, conversation.turns = rest.strip(), []
        say(f"(system: {conversation.system or 'none'})")
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            say(f"  {name} {meaning}")
    elif command in COMMANDS or (command.startswith("/") and command[1:].isalpha()):
        say(f"unknown command {command!r}{did_you_mean(command, COMMANDS, 'known: ' + ', '.join(COMMANDS))}")
    else:
        try:
            _, dropped = conversation.ask(line, lambda text: print(text, end="", flush=True))
        except ConfigError as error:
            say(f"({error})")
            return True
        print(flush=True)
        if dropped:
            say(f"({dropped // 2} of the oldest questions were left out: no room in generation.max_length)")
    return True


def read_line() -> str | None:
    """The next line typed; None at its end. Ctrl-C empties the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None
        except UnicodeDecodeError:
            print("(that was no UTF-8 text)")


def history_file() -> Path:
    """`$GLMTUNER_CACHE`/chat_history, or below ~/.cache/glmtuner."""
    return Path(os.environ.get("GLMTUNER_CACHE") or Path.home() / ".cache" / "glmtuner") / "chat_history"


def remember(path: Path) -> None:
    """Line editing, with the questions of earlier chats under the up key."""
    if not sys.stdin.isatty():
        return
    try:
        import readline

        readline.set_history_length(HISTORY)
        readline.read_history_file(path)
    except (ImportError, OSError):
        pass  # no readline on this system, or no history yet


def keep(path: Path) -> None:
    if not sys.stdin.isatty():
        return
    try:
        import readline

        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)
    except (ImportError, OSError):
        pass  # a history that cannot be kept is no reason to fail
