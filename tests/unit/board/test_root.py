"""Ids of a board's folder: what is inside is found, and no name, link or pipe leads outside."""

import os
from pathlib import Path

import pytest

from glmtuner.board.root import Root
from glmtuner.errors import CheckpointError

NAMES = [
    "one",
    "sweeps/a/x=1,y=[2]",
    "运行",
    "a b",
    "..a",
    "x\u202ey",
    "<img src=x>",
    "a%2fb",
    "a\nb",
    "javascript:alert(1)",
]


def make_run(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with runs and a sweep; beside it, a run that is not in it, and a file."""
    inside = tmp_path / "outputs"
    for name in NAMES[:4] + NAMES[5:]:
        make_run(inside / name)
    (inside / "sweeps/a/sweep.json").write_text("{}", encoding="utf-8")
    make_run(inside / ".trash/old")
    make_run(tmp_path / "outside/run")
    (tmp_path / "outside/run/sweep.json").write_text("{}", encoding="utf-8")
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    return inside


@pytest.mark.parametrize("name", NAMES[:4] + NAMES[5:])
def test_a_run_inside_is_found_by_its_id_whatever_its_name(folder: Path, name: str) -> None:
    root = Root(folder)
    found = root.run(name)
    assert found.path == folder / name and root.id_of(found.path) == name


def test_a_sweep_and_the_folder_itself_have_ids(folder: Path) -> None:
    assert Root(folder).sweep("sweeps/a") == folder / "sweeps/a"
    assert Root(folder / "sweeps/a").sweep(".") == folder / "sweeps/a"
    assert Root(folder / "one").run(".").path == folder / "one"
    with pytest.raises(CheckpointError, match="'one' is no sweep"):
        Root(folder).sweep("one")
    with pytest.raises(CheckpointError, match="'sweeps/a' is no run"):
        Root(folder).run("sweeps/a")


@pytest.mark.parametrize(
    "name",
    [
        "", "..", "../outside/run", "one/../../outside/run", "one/..", "./one", "one/", "/one", "//one", "one//", ".trash/old",
        "%2e%2e/outside/run", "..%2foutside%2frun", "..\\outside\\run", "one\0", "one\0/../../outside/run", "..;/outside/run", "~",
        "~root", "$HOME", "file:one", "x" * 300, "x/" * 3000 + "x", "\ud800", "one/\udcff", "…/outside/run", "．．/outside/run",
        "none", "sweeps", "one/config.yaml", "one/config.yaml/x", "{outside}/run", "*", "on?",
    ],
    ids=lambda name: ascii(name)[:40],
)  # fmt: skip
def test_a_name_that_is_no_plain_path_inside_is_refused(folder: Path, name: str) -> None:
    root = Root(folder)
    for look_up in (root.run, root.sweep):
        with pytest.raises(CheckpointError, match=r"is no (folder|run|sweep) in") as error:
            look_up(name.replace("{outside}", str(folder.parent / "outside")))
        assert "\n" not in str(error.value) and len(str(error.value)) < 700
        str(error.value).encode()  # it is sent as JSON


def test_a_link_that_leads_outside_is_refused_and_one_that_stays_inside_is_followed(folder: Path) -> None:
    outside = folder.parent / "outside"
    for name, target in {
        "linked": outside / "run", "up": Path(".."), "chain": folder / "linked", "loop": folder / "loop", "dangling": folder / "none",
        "proc": Path("/proc/self/root"), "trash": folder / ".trash/old", "relative": Path("../outside/run"),
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    (folder / "inside").symlink_to(folder / "one")
    root = Root(folder)
    for name in (
        "linked",
        "up/outside/run",
        "up",
        "chain",
        "loop",
        "dangling",
        "proc",
        "proc/etc",
        "trash",
        "relative",
    ):
        for look_up in (root.run, root.sweep):
            with pytest.raises(CheckpointError):
                look_up(name)
    assert root.run("inside").path == folder / "one"
    assert Root(folder / "linked").run(".").path == outside / "run"  # who names a link means what it leads to


def test_a_folder_beside_with_the_same_beginning_is_outside(folder: Path) -> None:
    make_run(folder.parent / "outputs2/run")
    (folder / "near").symlink_to(folder.parent / "outputs2/run")
    with pytest.raises(CheckpointError):
        Root(folder).run("near")


def test_only_regular_files_of_the_folder_are_read(folder: Path) -> None:
    root, run = Root(folder), Root(folder).run("one").path
    (run / "plots").mkdir()
    (run / "plots/loss.png").write_bytes(b"x")
    (run / "report.html").symlink_to(folder.parent / "secret")
    (run / "config").symlink_to("config.yaml")
    (run / "other").symlink_to(folder / "运行/config.yaml")
    (run / "null").symlink_to("/dev/null")
    os.mkfifo(run / "pipe")
    assert root.file(run, "plots/loss.png") == run / "plots/loss.png"
    assert root.file(run, "config") == run / "config.yaml"
    for name in (
        "report.html", "other", "null", "pipe", "plots", "none", "", ".", "..", "../运行/config.yaml", "/etc/passwd", "x" * 300, "\0",
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="is no file in"):
            root.file(run, name)


def test_a_folder_that_vanishes_is_an_error_of_one_request(folder: Path) -> None:
    root = Root(folder)
    folder.rename(folder.parent / "gone")
    with pytest.raises(CheckpointError):
        root.run("one")
    (folder.parent / "gone").rename(folder)
    assert root.run("one").path == folder / "one"


def test_a_folder_that_may_not_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, strict: bool = False) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    root = Root(folder)
    monkeypatch.setattr(Path, "resolve", forbidden)  # root may read everything, so that chmod does not do
    with pytest.raises(CheckpointError):
        root.run("one")
