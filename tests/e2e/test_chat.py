"""`chat`: turns, commands, streaming, Ctrl-C, in process and in a real terminal."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_models import run_of_one_step

from glmtuner.cli.chat import answer_line
from glmtuner.data.records import Message
from glmtuner.errors import ConfigError
from glmtuner.inference.conversation import Conversation
from glmtuner.launch.build import finished_run
from glmtuner.templates.glm import TEMPLATES

ROOT = Path(__file__).parent.parent.parent
GREEDY = ["generation=greedy"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the shipped model, trained for a step."""
    return run_of_one_step(tmp_path_factory.mktemp("chat") / "run")


def talk(run: Path, *words: str) -> Conversation:
    return Conversation(finished_run([run], [*GREEDY, *words]))


def test_an_answer_streams_and_stays_in_the_conversation(run: Path) -> None:
    conversation = talk(run)
    pieces: list[str] = []
    answer, dropped = conversation.ask("你是谁？", pieces.append)
    assert "".join(pieces).strip() == answer
    assert "TinyGLM" in answer and len(pieces) > 3 and dropped == 0
    assert not any("\ufffd" in piece for piece in pieces)  # characters of several tokens come whole
    assert conversation.turns == [Message("user", "你是谁？"), Message("assistant", answer)]
    second, _ = conversation.ask("再说一遍", lambda text: None)
    fresh, _ = talk(run).ask("再说一遍", lambda text: None)
    assert second and fresh and len(conversation.turns) == 4


def test_greedy_chat_gives_the_predicted_answer(run: Path) -> None:
    from glmtuner.inference.generate import Decoding, answers

    conversation = talk(run)
    finished = conversation.finished
    (found,) = finished.template.encode(finished.tokenizer, [[Message("user", "3 + 4 = ?")]])
    decoding = Decoding(max_new_tokens=64, num_beams=1, repetition_penalty=1.0, stop_ids=finished.stops,
                        pad_id=finished.tokenizer.pad_token_id)  # fmt: skip
    ((_, tokens),) = answers(finished.model, [found.input_ids], decoding, 1)
    wanted = finished.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert conversation.ask("3 + 4 = ?", lambda text: None)[0] == wanted


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(run: Path) -> None:
    conversation = talk(run)
    told: list[str] = []

    def emit(text: str) -> None:
        told.append(text)
        if len(told) == 2:
            raise KeyboardInterrupt

    answer, _ = conversation.ask("你是谁？", emit)
    whole, _ = talk(run).ask("你是谁？", lambda text: None)
    assert 0 < len(answer) < len(whole) and whole.startswith(answer)
    assert conversation.turns[-1] == Message("assistant", answer)
    assert conversation.ask("你好", lambda text: None)[0]


def test_old_turns_make_room_and_a_question_that_cannot_fit_is_told(run: Path) -> None:
    conversation = talk(run, "generation.max_length=60", "generation.max_new_tokens=8")
    dropped = [conversation.ask(f"第{number}个问题是什么？", lambda text: None)[1] for number in range(6)]
    assert dropped[0] == 0 and max(dropped) >= 2
    before = list(conversation.turns)
    with pytest.raises(
        ConfigError, match=r"generation\.max_length=60: .*no room.* type a larger generation\.max_length"
    ):
        conversation.ask("很长的问题" * 40, lambda text: None)
    assert conversation.turns == before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("no_such_file", None, "no_such_file: No such file or directory"),
        ("~no_such_user_of_this_machine/tools.json", None, "Could not determine home directory"),
        ("a\0b", None, "null byte"),
        (".", None, "Is a directory"),
        ("a.json", b"\xff", "a.json: not UTF-8"),
        ("a.json", b"[", "a.json: tools: a list of descriptions of tools is expected, or its JSON, got '['"),
        ("a.json", b'[{"name": 1}]', "a.json: tools[0].name: text is expected"),
    ],
)
def test_a_file_that_names_no_tools_is_told_and_the_conversation_stays(
    name: str,
    content: bytes | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    conversation = Conversation(SimpleNamespace(template=TEMPLATES["glm4"], tokenizer=None))  # type: ignore[arg-type]
    conversation.turns = [Message("user", "a"), Message("assistant", "b")]
    assert answer_line(conversation, f"/tools {name}")
    (line,) = capsys.readouterr().out.splitlines()
    assert told in line and "data." not in line
    assert conversation.tools == () and len(conversation.turns) == 2


def test_beams_and_sampling(run: Path) -> None:
    pieces: list[str] = []
    answer, _ = talk(run, "generation.num_beams=3").ask("你好", pieces.append)
    assert answer and "".join(pieces).strip() == answer
    sampled = Conversation(
        finished_run([run], ["generation.temperature=5", "generation.top_p=1", "generation.max_new_tokens=12"])
    )
    assert len({sampled.ask("你好", lambda text: None)[0] for _ in range(4)}) > 1


def test_commands_and_a_pipe(run: Path, glmtuner: Callable, tmp_path: Path) -> None:
    lines = "你是谁？\n/system 你是小格\n/clear\n/halp\n/help\n\n/exit\nnever read\n"
    done = subprocess.run(
        [sys.executable, "-m", "glmtuner", "chat", str(run), *GREEDY], input=lines, text=True, capture_output=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TinyGLM" in done.stdout
    for said in (
        "(system: 你是小格)",
        "(a new conversation)",
        "unknown command '/halp'; did you mean '/help'?",
        "Ctrl-C",
    ):
        assert said in done.stdout
    assert "never" not in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_in_a_terminal(run: Path, tmp_path: Path) -> None:
    """Chinese typed, Ctrl-C at the prompt is no end, the up key finds earlier questions, Ctrl-D leaves."""
    master, slave = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLMTUNER_CACHE": str(tmp_path), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    child = subprocess.Popen(
        # a suite that was started in the background has SIGINT ignored, and so would have the child
        ["env", "--default-signal=INT", "setsid", "--ctty", sys.executable, "-m", "glmtuner", "chat", str(run), *GREEDY],
        stdin=slave, stdout=slave, stderr=slave, env=env,
    )  # fmt: skip
    os.close(slave)

    unread = b""

    def until(word: str, seconds: float = 600, again: bytes = b"") -> None:
        """Read up to the word; what follows it is kept for the next call. Every few seconds `again` is typed."""
        nonlocal unread
        end, typed = time.monotonic() + seconds, time.monotonic()
        while word.encode() not in unread and time.monotonic() < end:
            if select.select([master], [], [], 0.2)[0]:
                unread += os.read(master, 65536)
            if again and time.monotonic() > typed + 3:
                os.write(master, again)
                typed = time.monotonic()
        assert word.encode() in unread, unread.decode(errors="replace")
        unread = unread.partition(word.encode())[2]

    until("> ")
    os.write(master, "你是谁？\n".encode())
    until("TinyGLM")
    until("> ")
    os.write(master, "半句话".encode())
    until("话")
    time.sleep(0.5)  # the terminal must be waiting for a key, and not on its way there
    os.write(master, b"\x03")
    until("> ", again=b"\x03")
    os.write(master, b"\x1b[A\n")  # the up key: the first question again
    until("TinyGLM")
    until("> ")
    os.write(master, b"\x04")
    assert child.wait(120) == 0
    os.close(master)
    assert "你是谁？" in (tmp_path / "chat_history").read_text(encoding="utf-8")


def test_what_a_newer_version_has_saved_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("\ngeneration:\n", "\ngeneration:\n  min_p: 0.1\n"))
    finished_run([copy], [])
    assert f"{config}: generation.min_p=0.1 is unknown to this version of glmtuner" in capsys.readouterr().err
