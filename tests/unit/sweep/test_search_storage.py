"""Journals and databases: damaged, foreign, missing ones, and what is refused."""

import pytest
from stub_search import StubSweeper, bowl, trials_of

from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.sweep import search_storage
from glmtuner.sweep.search_storage import check_storage


def test_a_damaged_journal_is_named_and_a_lost_one_is_drawn_again(tmp_path, capsys):
    StubSweeper(tmp_path, n_trials=4).run()
    journal = tmp_path / "search.journal"
    values = [trial.params for trial in trials_of(tmp_path)]
    lines = journal.read_bytes().split(b"\n")
    whole = journal.read_bytes()
    for damaged in (b"\x00" * 40, b"{}", b"[1]", b'{"op_code": 4', b"\xff\xfe"):
        journal.write_bytes(b"\n".join([*lines[:3], damaged, *lines[3:]]))
        for check in (lambda: check_storage(None, tmp_path), StubSweeper(tmp_path, n_trials=6).run):
            with pytest.raises(
                CheckpointError, match=r"search.journal is damaged .line 4 is not an entry of a journal.; move it"
            ):
                check()
    journal.write_bytes(b"\n".join([lines[0].replace(b'"directions":[1]', b'"directions":"up"'), *lines[1:]]))
    with pytest.raises(CheckpointError, match=r"search.journal is damaged \(ValueError"):
        StubSweeper(tmp_path, n_trials=6).run()
    journal.unlink()
    capsys.readouterr()
    StubSweeper(tmp_path, n_trials=5).run()  # finished jobs give their results again
    assert [trial.params for trial in trials_of(tmp_path)][:4] == values
    assert len((tmp_path / "started.log").read_text().split()) == 5
    journal.write_bytes(whole + b'{"op_code":4,"work')
    check_storage(None, tmp_path)
    StubSweeper(tmp_path, n_trials=5).run()
    assert "the last line was not finished when its process ended, and is removed" in capsys.readouterr().out
    assert len(trials_of(tmp_path)) == 5


def test_a_writer_that_is_killed_spoils_nothing_for_one_that_goes_on(tmp_path):
    journal = tmp_path / "search.journal"

    def torn(drawn):
        with journal.open("ab") as file:
            file.write(b'{"op_code":5,"worker_id":"x","stu')  # as of another process that was killed
        return bowl(drawn)

    StubSweeper(tmp_path, torn, n_trials=4).run()
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE"] * 4
    check_storage(None, tmp_path)


def test_a_journal_stands_where_it_is_asked_for(tmp_path):
    path = str(tmp_path / "mine.journal")
    StubSweeper(tmp_path / "a", storage=path, study_name="x", n_trials=2).run()
    StubSweeper(tmp_path / "b", storage=path, study_name="x", n_trials=3).run()
    StubSweeper(tmp_path / "b", storage=path, study_name="y", n_trials=1).run()
    assert not (tmp_path / "a/search.journal").exists()
    assert (
        len((tmp_path / "a/started.log").read_text().split())
        == len((tmp_path / "b/started.log").read_text().split())
        == 2
    )


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("redis://localhost", "Optuna keeps pickles in Redis, and nothing is unpickled here"),
        (
            "nonsense",
            "legal: a URL of SQLAlchemy such as sqlite:///study.db, .* or the path of a file that ends in .journal",
        ),
        ("no/such/folder/x.journal", "the folder no/such/folder does not exist"),
        ("postgresql://me:hunter22@127.0.0.1:1/db", "driver"),
    ],
)
def test_what_cannot_be_opened_is_refused(storage, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as raised:
        check_storage(storage, tmp_path)
    assert "hunter22" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_in_the_journals_place_is_named(tmp_path):
    (tmp_path / "search.journal").mkdir()
    with pytest.raises(CheckpointError, match=r"search.journal is no file"):
        check_storage(None, tmp_path)


def test_a_database_of_another_program_is_refused(tmp_path):
    (tmp_path / "x.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match="file is not a database"):
        check_storage(f"sqlite:///{tmp_path}/x.db", tmp_path)


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def unsupported(path):
        raise search_storage.LocksUnsupported(95, "not supported")

    monkeypatch.setattr(search_storage, "try_lock", unsupported)
    StubSweeper(tmp_path, n_trials=2).run()
    assert capsys.readouterr().out.count("let only one process at a time take part in the search") == 1
    assert len(trials_of(tmp_path)) == 2


def test_optunas_messages_are_lines_of_our_console(tmp_path, capsys):
    import logging

    StubSweeper(tmp_path, n_trials=1).run()
    logging.getLogger("optuna.samplers").warning("a \x1b[31mwarning")
    captured = capsys.readouterr()
    assert "optuna: a \\x1b[31mwarning" in captured.out and captured.err == ""
