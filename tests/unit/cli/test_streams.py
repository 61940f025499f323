"""Standard streams: a reader that goes away, closed ones, an encoding that lacks characters."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent.parent
PREPARED = "import os, sys\nfrom glmtuner.cli import streams\nstreams.prepare()\n"


def python(code, closes_stdout=False, **more):
    """How a Python process with this code ended; `closes_stdout` closes the reading end before it prints."""
    with subprocess.Popen(
        [sys.executable, "-c", PREPARED + code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **more,
    ) as process:  # fmt: skip
        if closes_stdout:
            process.stdout.close()
        process.stdin.close()
        out = b"" if closes_stdout else process.stdout.read()
        return process.wait(), out.decode(errors="replace"), process.stderr.read().decode()


RICH = "from glmtuner.console import table\ntable('', ('a', 'b'), [('x' * 50, 'y')] * 500, show_header=False)\n"


@pytest.mark.parametrize(
    "printing", ["print('a' * 100_000)\n", "print('a', flush=True)\n", RICH], ids=["big", "small", "rich"]
)
def test_a_reader_that_goes_away_ends_a_command_that_only_prints(printing):
    code = f"try:\n    {printing.rstrip().replace(chr(10), chr(10) + '    ')}\nexcept streams.ReaderGone:\n    os._exit(141)\n"
    assert python(code, closes_stdout=True) == (141, "", "")


@pytest.mark.parametrize("printing", ["print('a' * 100_000)\n", RICH], ids=["big", "rich"])
def test_a_command_whose_results_are_files_goes_on(printing, tmp_path):
    body = printing.rstrip().replace("\n", "\n    ")
    code = f"with streams.results_in_files('the run goes on'):\n    {body}\n    print('more', flush=True)\nopen({str(tmp_path / 'result')!r}, 'w')\n"
    status, _, err = python(code, closes_stdout=True)
    assert status == 0 and (tmp_path / "result").exists()
    assert err == "glmtuner: the reader of standard output has gone; the run goes on\n"


def test_closed_standard_error_is_no_error():
    code = "r, w = os.pipe()\nos.dup2(w, 2)\nos.close(w)\nos.close(r)\nprint('x' * 100_000, file=sys.stderr)\nprint('done')\n"
    assert python(code)[:2] == (0, "done\n")


def test_closed_streams_are_the_null_device(tmp_path):
    code = (
        f"file = open({str(tmp_path / 'file')!r}, 'w')\nassert file.fileno() > 2, file.fileno()\nprint('to nobody')\n"
        "print('to nobody', file=sys.stderr)\nassert sys.stdin.read() == ''\nfile.write('ok')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(PREPARED + code, encoding="utf-8")
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {script} <&- >&- 2>&-"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "ok"


def test_what_the_encoding_lacks_is_escaped():
    status, out, err = python("print('你 \\udcff')\nprint('你', file=sys.stderr)\n", env={"PYTHONIOENCODING": "ascii"})
    assert (status, out, err) == (0, "\\u4f60 \\udcff\n", "\\u4f60\n")
