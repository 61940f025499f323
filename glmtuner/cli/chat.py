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
    "/tools": "FILE  the functions that the model may call: a JSON list in OpenAI's form (without FILE: none); a new conversation",
    "/help": "this list",
    "/exit": "leave (Ctrl-D too); Ctrl-C stops an answer",
}
HISTORY = 1000  # questions kept for the up key
DIM, NORMAL = "\x1b[2m", "\x1b[22m"


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
    from glmtuner.console import say
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
    elif command == "/tools":
        set_tools(conversation, rest.strip())
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            say(f"  {name} {meaning}")
    elif command in COMMANDS or (command.startswith("/") and command[1:].isalpha()):
        say(f"unknown command {command!r}{did_you_mean(command, COMMANDS, 'known: ' + ', '.join(COMMANDS))}")
    else:
        shown = Shown()
        before = conversation.turns
        try:
            _, dropped = conversation.ask(line, shown.text, shown.thought)
        except ConfigError as error:
            say(f"({error})")
            return True
        finally:
            shown.end_thought()
        show_calls(conversation, shown)
        if questions := sum(turn.role == "user" for turn in before[:dropped]):
            say(f"({questions} of the oldest questions were dropped to fit into generation.max_length)")
    return True


class Shown:
    """Prints an answer as it comes: its thought, dimmed on a terminal, on lines of its own before the text."""

    def __init__(self) -> None:
        self.dims = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.has_text = self.thinks = False

    def thought(self, text: str) -> None:
        """Print a piece of the thought."""
        from glmtuner.console import plain

        if not self.thinks:
            self.dim(DIM)
            print("(thinking) ", end="")
        self.thinks = True
        print(plain(text), end="", flush=True)

    def dim(self, code: str) -> None:
        """Have the terminal dim what follows, or no longer."""
        if self.dims:
            sys.stdout.write(code)

    def end_thought(self) -> None:
        """End the line of the thought, if there is one."""
        if self.thinks:
            self.dim(NORMAL)
            print(flush=True)
        self.thinks = False

    def text(self, text: str) -> None:
        """Print a piece of the answer."""
        from glmtuner.console import plain

        self.end_thought()
        self.has_text = True
        print(plain(text), end="", flush=True)


def show_calls(conversation: "Conversation", shown: Shown) -> None:
    """End the line of the answer, and print its calls, or how many results are still to be typed."""
    from glmtuner.console import say

    calls = conversation.open_calls
    answered = conversation.turns[-1].role == "assistant"
    if shown.has_text or (answered and not calls):
        print(flush=True)
    if answered:
        for call in calls:
            say(f"-> {call.name}({call.arguments_json})")
    if len(calls) == 1:
        say(f"(type the result of {calls[0].name} on the next line)")
    elif calls:
        say(
            f"(type the results of {', '.join(call.name for call in calls)} on the next {len(calls)} lines, in this order)"
        )


def set_tools(conversation: "Conversation", name: str) -> None:
    """Read the functions that the model may call from a file, and start a new conversation; without a name there are none."""
    from glmtuner.console import say
    from glmtuner.data.records import BadRecord
    from glmtuner.data.tools import described

    finished = conversation.finished
    if name and not finished.template.renders_tools(finished.tokenizer):
        say(f"(model.template={finished.template.name} renders no descriptions of tools, so the model cannot see them)")
        return
    try:
        tools = described(Path(name).expanduser().read_text(encoding="utf-8-sig"), "tools") if name else ()
    except BadRecord as error:
        problem = error.reason.partition("; type data.")[0]  # of a record
        say(f"({name}: {error.field}: {problem})")
    except (OSError, RuntimeError, ValueError) as error:  # no such file or home directory, not UTF-8, no name of a file
        problem = (
            "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or str(error)
        )
        say(f"({name}: {problem})")
    else:
        conversation.tools, conversation.turns = tools, []
        say(f"(tools: {', '.join(tool['function']['name'] for tool in tools) or 'none'})")


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
