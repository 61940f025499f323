"""`chat RUN`: chat with a run's model in the terminal."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmtuner.inference.conversation import Conversation

HELP = "chat with its model"
COMMANDS = {
    "/clear": "start a new conversation",
    "/system": "TEXT  set the system message (without TEXT: remove it) and start a new conversation",
    "/help": "this list",
    "/exit": "leave (Ctrl-D too); Ctrl-C stops an answer",
}
HISTORY = 1000  # questions kept for the up key


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder; overrides such as generation.temperature=0.2 may follow")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say
    from glmtuner.inference.conversation import Conversation
    from glmtuner.launch.build import finished_run

    finished = finished_run([arguments.run], overrides)
    conversation = Conversation(finished)
    say(f"{finished.run.model.model_name_or_path} as in {arguments.run}; /help lists the commands")
    history = history_file()
    load_history(history)
    try:
        while (line := read_line()) is not None:
            if line and not answer_line(conversation, line):
                break
    finally:
        save_history(history)
    return 0


def answer_line(conversation: "Conversation", line: str) -> bool:
    """Run the line if it is a command, else print the model's answer to it; False for /exit."""
    from glmtuner.console import plain, say
    from glmtuner.errors import ConfigError, did_you_mean

    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/clear":
        conversation.turns = []
        say("(a new conversation)")
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
            _, dropped = conversation.ask(line, lambda text: print(plain(text), end="", flush=True))
        except ConfigError as error:
            say(f"({error})")
            return True
        print(flush=True)
        if dropped:
            say(f"({dropped // 2} of the oldest questions were dropped to fit into generation.max_length)")
    return True


def read_line() -> str | None:
    """The next line of standard input; None at its end. Ctrl-C discards the current line.

    A pipe is read as UTF-8, whatever the locale. A line that is not valid UTF-8 is named and left out.
    """
    while True:
        try:
            if sys.stdin.isatty() or not hasattr(sys.stdin, "buffer"):
                line = input("> " if sys.stdin.isatty() else "")
                line.encode()  # what is not UTF-8 may be in it as lone surrogates
            elif raw := sys.stdin.buffer.readline():
                line = raw.decode("utf-8-sig")
            else:
                raise EOFError
            return line.strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None
        except UnicodeError:
            print("(the line is not valid UTF-8 and is left out)")


def history_file() -> Path:
    """`$GLMTUNER_CACHE`/chat_history, by default ~/.cache/glmtuner/chat_history."""
    return Path(os.environ.get("GLMTUNER_CACHE") or Path.home() / ".cache" / "glmtuner") / "chat_history"


def load_history(path: Path) -> None:
    """Turn on line editing, with the questions of earlier chats in its history."""
    if not sys.stdin.isatty():
        return
    try:
        import readline

        readline.set_history_length(HISTORY)
        readline.read_history_file(path)
    except (ImportError, OSError):
        pass  # no readline on this system, or no history yet


def save_history(path: Path) -> None:
    """Write the questions of this chat and of earlier ones."""
    if not sys.stdin.isatty():
        return
    try:
        import readline

        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)
    except (ImportError, OSError):
        pass  # a history that cannot be written is no reason to fail
