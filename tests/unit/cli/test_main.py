"""Errors of the operating system are one paragraph; what is not UTF-8 is refused by name."""

import errno
import io
import os
import sys

import pytest

from glmtuner.cli.chat import read_line
from glmtuner.cli.main import check_encodable, main, system_problem
from glmtuner.errors import ConfigError


class SafetensorError(Exception):
    """Named like the one of safetensors, which is no OSError."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/a"), 1, "the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 1, "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
        (SafetensorError("I/O error: File too large (os error 27)"), 1, "ulimit -f"),
        (OSError(errno.EMFILE, "x", "run/a"), 1, "ulimit -n"),
        (OSError(errno.EIO, "x", "run/a"), 1, "run/a: input/output error"),
        (PermissionError(errno.EACCES, "x", "run/a"), 2, "run/a: permission denied"),
        (OSError(errno.EROFS, "x", b"run/\xff"), 2, "run/\\udcff: read-only file system"),
        (NotADirectoryError(errno.ENOTDIR, "x", "run/a"), 2, "run/a: not a directory"),
        (IsADirectoryError(errno.EISDIR, "x", "run/a"), 2, "run/a: is a directory"),
        (OSError(errno.ELOOP, "x", "run/a"), 2, "run/a: too many levels"),
        (OSError(errno.ENAMETOOLONG, "x", "a" * 300), 2, "file name too long"),
        (FileNotFoundError(errno.ENOENT, "x", "/nowhere/at/all"), 1, "has been removed meanwhile"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_of_the_system_is_told(error, code, said):
    message, exit_code = system_problem(error)
    assert exit_code == code and said in message and "\n" not in message


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("a"), FileNotFoundError(errno.ENOENT, "x", "/etc/no"),
                                   OSError("without a number"), PermissionError(errno.EACCES, "x"), BrokenPipeError()],
                         ids=repr)  # fmt: skip
def test_other_errors_keep_their_traceback(error):
    assert system_problem(error) is None


@pytest.mark.parametrize("words", [["data.dataset=a\udcff.json"], ["show", "\udc80"], ["chat", "run", "name=\ud800"]])
def test_an_argument_that_is_not_utf8_is_refused(words, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "not valid UTF-8" in told and "\\ud" in told and told.count("\n") == 1


def test_folders_that_are_not_utf8_or_gone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMTUNER_CACHE", "/tmp/\udcff")
    with pytest.raises(ConfigError, match="GLMTUNER_CACHE"):
        check_encodable([])
    monkeypatch.delenv("GLMTUNER_CACHE")
    monkeypatch.setenv("HOME", "/tmp/\udcff")
    with pytest.raises(ConfigError, match="HOME"):
        check_encodable([])
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(ConfigError, match="the current folder"):
        check_encodable([])
    odd.rmdir()
    with pytest.raises(ConfigError, match="has been removed"):
        check_encodable([])


def test_a_piped_line_that_is_not_utf8_is_named_and_the_next_is_read(monkeypatch, capsys):
    raw = io.BytesIO("\ufeff你好\n".encode() + b"abc\xff\n" + "\ud800\n".encode(errors="surrogatepass") + "尾".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="ascii"))
    assert [read_line(), read_line(), read_line()] == ["你好", "尾", None]
    assert capsys.readouterr().out == "(the line is not valid UTF-8 and is left out)\n" * 2 + "\n"
