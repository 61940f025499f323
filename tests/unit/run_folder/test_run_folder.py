"""Run folders: which checkpoints are complete, when a folder may be used, how it is locked, what is redacted."""

import errno
import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from glmtuner.errors import CheckpointError, ConfigError, FolderBusy
from glmtuner.run_folder import files, locks
from glmtuner.run_folder.acquire import acquire_run_folder, default_folder, differing_keys
from glmtuner.run_folder.checkpoints import (
    checkpoint_problem,
    checkpoints,
    latest_complete_checkpoint,
    mark_complete,
    step_of,
)
from glmtuner.run_folder.files import read_json, read_lines, write_json, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import LOCK, MARKER, RUN_ENTRIES
from glmtuner.run_folder.provenance import git_state, provenance
from glmtuner.run_folder.redaction import flatten, redact_config, redact_overrides

FILES = {
    "adapter_model.safetensors": "weights", "optimizer.pt": "moments", "scheduler.pt": "rates", "trainer_state.json": "{}",
    "rng_state.pth": "random", "progress.json": "{}",
}  # fmt: skip


def checkpoint(run, step, files=FILES, complete=True):
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if complete:
        mark_complete(folder, {"step": step})
    return folder


# Checkpoints


def test_a_complete_checkpoint_has_no_problem(tmp_path):
    folder = checkpoint(tmp_path, 10)
    about = read_json(folder / MARKER)
    assert checkpoint_problem(folder) is None
    assert about["step"] == 10 and about["files"] == {name: len(text) for name, text in FILES.items()}


def test_a_checkpoint_of_several_ranks_is_complete(tmp_path):
    files = {name: text for name, text in FILES.items() if not name.startswith("rng")}
    assert (
        checkpoint_problem(checkpoint(tmp_path, 10, {**files, "rng_state_0.pth": "a", "rng_state_1.pth": "b"})) is None
    )


def test_a_checkpoint_without_its_marker_is_incomplete(tmp_path):
    problem = checkpoint_problem(checkpoint(tmp_path, 10, complete=False))
    assert "incomplete" in problem and MARKER in problem


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"step": 10}', '"text"', "\udcff"])
def test_a_damaged_marker_is_a_problem(tmp_path, text):
    folder = checkpoint(tmp_path, 10)
    (folder / MARKER).write_bytes(text.encode("utf-8", "surrogateescape"))
    problem = checkpoint_problem(folder)
    assert MARKER in problem and "damaged" in problem


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_truncated_file_is_a_problem(tmp_path, name):
    folder = checkpoint(tmp_path, 10)
    content = (folder / name).read_bytes()
    for kept in (content[:-1], b""):
        (folder / name).write_bytes(kept)
        problem = checkpoint_problem(folder)
        assert name in problem and "truncated" in problem and f"{len(kept)} of {len(content)} bytes" in problem


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_a_problem(tmp_path, name):
    folder = checkpoint(tmp_path, 10)
    (folder / name).unlink()
    problem = checkpoint_problem(folder)
    assert name.partition(".")[0] in problem and ("it has no" in problem or "is missing" in problem)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", "optimizer"),
        ("scheduler.pt", "scheduler"),
        ("trainer_state.json", "trainer state"),
        ("rng_state.pth", "RNG state"),
    ],
)
def test_a_checkpoint_that_never_had_what_a_resume_needs(tmp_path, name, content):
    files = {other: text for other, text in FILES.items() if other != name}
    problem = checkpoint_problem(checkpoint(tmp_path, 10, files))
    assert "it has no" in problem and content in problem and name in problem


def test_a_checkpoint_is_resumed_by_as_many_ranks_as_saved_it(tmp_path):
    folder = checkpoint(tmp_path, 10, complete=False)
    mark_complete(folder, {"step": 10, "ranks": 4})
    assert checkpoint_problem(folder, ranks=4) is None and checkpoint_problem(folder) is None
    problem = checkpoint_problem(folder, ranks=2)
    assert "4 processes" in problem and "2" in problem


def test_the_latest_complete_checkpoint_is_chosen_and_later_ones_are_reported(tmp_path):
    assert latest_complete_checkpoint(tmp_path) == (None, [])
    good = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 100, complete=False)
    (checkpoint(tmp_path, 20) / "optimizer.pt").write_text("short", encoding="utf-8")
    checkpoint(tmp_path, 3)
    (tmp_path / "checkpoints" / ".partial-checkpoint-110").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-best").mkdir()
    found, skipped = latest_complete_checkpoint(tmp_path)
    assert found == good
    for sentence, facts in zip(
        skipped,
        [
            (".partial-checkpoint-110", "incomplete"),
            ("checkpoint-100", "incomplete", MARKER),
            ("checkpoint-20", "optimizer.pt", "truncated", "5 of 7 bytes"),
        ],
        strict=True,
    ):
        assert "skipped" in sentence and all(fact in sentence for fact in facts)


def test_no_complete_checkpoint_is_none(tmp_path):
    checkpoint(tmp_path, 1, complete=False)
    assert latest_complete_checkpoint(tmp_path)[0] is None and len(latest_complete_checkpoint(tmp_path)[1]) == 1


def test_steps_are_numbers(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [9, 10, 100]
    assert [step_of(tmp_path / name) for name in ("checkpoint-x", "checkpoint-", "other-3")] == [-1] * 3


# Which folders may be used


def config(**changed):
    values = {
        "model": {
            "model_name_or_path": "m",
            "checkpoint_dir": [],
            "family": "glm",
            "template": None,
            "cache_dir": None,
        },
        "quant": {"quantization_bit": None},
        "finetuning": {"finetuning_type": "lora", "lora_rank": 8, "lora_target": []},
        "stage": {"name": "sft"},
        "generation": {},
        "trainer": {"learning_rate": 5e-5, "output_dir": None, "overwrite_output_dir": False, "hub_token": None},
        "data": {"dataset": ["a"], "overwrite_cache": False},
    }
    made = OmegaConf.create(values)
    for key, value in changed.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


def run(path, made=None, finished=False):
    write_text(path / "config.yaml", OmegaConf.to_yaml(redact_config(made or config())))
    if finished:
        write_json(path / "metrics.json", {"train_loss": 1.0})
    return path


def files_of(path):
    files = [file for file in path.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_is_fresh(tmp_path, overwrite):
    assert acquire_run_folder(tmp_path / "new", config(), overwrite) is False
    assert acquire_run_folder(tmp_path, config(), overwrite) is False
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_of_the_same_config_is_resumed(tmp_path):
    before = files_of(run(tmp_path))
    assert acquire_run_folder(tmp_path, config(), overwrite=False) is True
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"trainer__output_dir": "x"},
        {"trainer__overwrite_output_dir": True},
        {"model__cache_dir": "x"},
        {"data__overwrite_cache": True},
        {"trainer__hub_token": "hf_secret"},
        {"finetuning__lora_target": ["q_proj"]},  # what the run filled in itself
        {"model__template": "glm4"},
    ],
    ids=str,
)
def test_keys_that_no_result_depends_on_may_differ(tmp_path, changed):
    run(tmp_path, config(**changed))
    assert acquire_run_folder(tmp_path, config(), overwrite=False) is True


def test_a_model_folder_may_be_written_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    made = config(model__model_name_or_path=str(tmp_path / "model"), model__checkpoint_dir=[str(tmp_path / "model")])
    run(tmp_path / "run", made)
    same = config(model__model_name_or_path="model", model__checkpoint_dir=["./model"])
    assert acquire_run_folder(tmp_path / "run", same, overwrite=False) is True


@pytest.mark.parametrize(
    "changed",
    [
        {"trainer__learning_rate": 1e-4},
        {"finetuning__lora_rank": 4},
        {"data__dataset": ["b"]},
        {"model__model_name_or_path": "other"},
    ],
    ids=str,
)
def test_an_unfinished_run_of_another_config_is_refused(tmp_path, changed):
    key = next(iter(changed)).replace("__", ".")
    checkpoint(run(tmp_path), 10)
    before = files_of(tmp_path)
    facts = (
        rf"trainer\.output_dir=.* unfinished run of another configuration .*{key}.* trainer\.overwrite_output_dir=true"
    )
    with pytest.raises(CheckpointError, match=facts):
        acquire_run_folder(tmp_path, config(**changed), overwrite=False)
    assert files_of(tmp_path) == before


HOLD = """
import sys, time
from pathlib import Path
from glmtuner.run_folder.folder import RunFolder
RunFolder(Path(sys.argv[1])).lock()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_uses_is_refused_until_that_process_ends(tmp_path):
    before = files_of(run(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert RunFolder(tmp_path).is_running
    for overwrite in (False, True):
        with pytest.raises(FolderBusy, match=r"trainer\.output_dir=.* another process .* trainer\.output_dir"):
            acquire_run_folder(tmp_path, config(), overwrite)
    assert files_of(tmp_path) == before
    other.kill()
    other.communicate()
    assert not RunFolder(tmp_path).is_running
    assert acquire_run_folder(tmp_path, config(), overwrite=False) is True
    assert RunFolder(tmp_path).is_running
    RunFolder(tmp_path).unlock()
    assert not RunFolder(tmp_path).is_running


def test_a_lock_file_of_an_earlier_process_means_nothing(tmp_path):
    (run(tmp_path) / LOCK).write_text("of an earlier version, or of a process that was killed", encoding="utf-8")
    assert not RunFolder(tmp_path).is_running
    assert acquire_run_folder(tmp_path, config(), overwrite=False) is True
    assert RunFolder(tmp_path).is_running
    RunFolder(tmp_path).unlock()
    assert (tmp_path / LOCK).is_file() and not RunFolder(tmp_path).is_running


def test_checks_do_not_take_each_other_for_the_process_that_runs(tmp_path):
    path = tmp_path / LOCK
    path.touch()
    path.chmod(0o444)
    with path.open("rb") as file:
        assert locks._try_lock_shared(file.fileno())  # another process is checking
        assert not RunFolder(tmp_path).is_running


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_disk_without_locks_a_run_goes_unlocked(tmp_path, monkeypatch, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    run(tmp_path)
    (tmp_path / LOCK).touch()
    monkeypatch.setattr("fcntl.flock", unsupported)
    assert acquire_run_folder(tmp_path, config(), overwrite=False) is True
    assert not RunFolder(tmp_path).is_running
    RunFolder(tmp_path).unlock()
    with pytest.raises(locks.LocksUnsupported):
        locks.try_lock(tmp_path / "other.lock")


def test_the_failure_of_an_earlier_attempt_is_gone_with_the_next(tmp_path):
    RunFolder(run(tmp_path)).record_failure(ValueError("a"), [])
    RunFolder(tmp_path).record_failure(ValueError("b"), [], first_wins=True)
    assert RunFolder(tmp_path).failure()["reason"] == "ValueError: a"
    acquire_run_folder(tmp_path, config(), overwrite=False)
    assert RunFolder(tmp_path).failure() is None


def test_a_finished_run_is_refused(tmp_path):
    before = files_of(run(tmp_path, finished=True))
    with pytest.raises(
        CheckpointError, match=r"trainer\.output_dir=.* finished run; .*trainer\.overwrite_output_dir=true"
    ):
        acquire_run_folder(tmp_path, config(), overwrite=False)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("mine", encoding="utf-8")
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"trainer\.output_dir=.*thesis\.tex.*type another trainer\.output_dir"):
        acquire_run_folder(tmp_path, config(), overwrite)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("finished", [False, True])
def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path, finished):
    run(tmp_path, config(trainer__learning_rate=1.0), finished)
    checkpoint(tmp_path, 10)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "kept").write_text("mine", encoding="utf-8")
    (tmp_path / "wandb").symlink_to(outside)
    before = files_of(tmp_path)
    assert acquire_run_folder(tmp_path, config(), overwrite=True) is False
    assert files_of(tmp_path) == before  # until the new run has its data and its model
    RunFolder(tmp_path).prepare(resumes=False, trains=True)
    RunFolder(tmp_path).unlock()
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    assert (outside / "kept").is_file() and {"config.yaml", "checkpoints", "wandb"} <= {*RUN_ENTRIES}


def test_only_a_run_with_numbers_is_finished(tmp_path):
    folder = RunFolder(tmp_path)
    assert (folder.is_run, folder.is_finished, folder.metrics(), folder.history()) == (False, False, {}, [])
    with pytest.raises(CheckpointError, match=r"no run.* config\.yaml; name a folder under outputs/"):
        folder.config()
    run(tmp_path)
    assert (folder.is_run, folder.is_finished, folder.trained()) == (True, False, None)
    run(tmp_path, finished=True)
    assert folder.is_finished and folder.metrics() == {"train_loss": 1.0}
    assert folder.config() == OmegaConf.load(tmp_path / "config.yaml")
    write_text(tmp_path / "adapter" / "adapter_config.json", "{}")
    assert folder.trained() == tmp_path / "adapter"


def test_two_runs_of_one_second_have_two_folders(tmp_path):
    names = []
    for _ in range(3):
        folder = default_folder(tmp_path, "x")
        folder.mkdir(parents=True)
        names.append(folder)
    assert len({*names}) == 3 and all(name.parent.parent == tmp_path for name in names)


# Secrets


def test_secrets_are_redacted_in_the_config_and_in_the_overrides():
    made = OmegaConf.create(
        {
            "trainer": {"hub_token": "hf_abc", "hub_model_id": "me/m", "include_num_input_tokens_seen": "no"},
            "tracker": {"api_key": "k", "password": "p", "nested": {"client_secret": "s"}},
            "model": {"use_auth_token": True, "tokenizer_name": "t"},
        }
    )
    before = OmegaConf.to_yaml(made)
    kept = OmegaConf.to_container(redact_config(made))
    assert kept["trainer"] == {"hub_token": None, "hub_model_id": "me/m", "include_num_input_tokens_seen": "no"}
    assert kept["tracker"] == {"api_key": None, "password": None, "nested": {"client_secret": None}}
    assert kept["model"] == {"use_auth_token": True, "tokenizer_name": "t"}
    assert OmegaConf.to_yaml(made) == before
    overrides = ["trainer.hub_token=hf_abc", "+tracker.api_key=k=l", "trainer.seed=3", "model.tokenizer_name=t"]
    assert redact_overrides(overrides) == ["trainer.hub_token=<hidden>", "+tracker.api_key=<hidden>", *overrides[2:]]
    assert "hf_abc" not in json.dumps(provenance(overrides))


def test_provenance_has_command_versions_and_start_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = provenance(["a=b"], seed=3)
    assert found["command"] == "python -m glmtuner a=b" and found["seed"] == 3
    assert found["packages"]["torch"] and found["git"] is None and "+" in found["started"] + "+"
    json.dumps(found)


def test_the_state_of_the_repository(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    (tmp_path / "file").write_text("one", encoding="utf-8")
    git("add", "file")
    git("commit", "-m", "x")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40 and (clean["dirty"], clean["diff_sha256"]) == (False, None)
    (tmp_path / "file").write_text("two", encoding="utf-8")
    changed = git_state(tmp_path)
    assert changed["commit"] == clean["commit"] and changed["dirty"] and len(changed["diff_sha256"]) == 64


# Files


def test_a_file_is_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_text(path, "前")
    assert path.read_text(encoding="utf-8") == "前"

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "half of something longer")
    assert path.read_text(encoding="utf-8") == "前"
    monkeypatch.undo()
    write_text(path, "after")
    assert [(file.name, file.read_text(encoding="utf-8")) for file in path.parent.iterdir()] == [("file.json", "after")]


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "old"


def test_json_reads_back_and_a_damaged_file_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"词": [1, 2.5, None]})
    assert read_json(path) == {"词": [1, 2.5, None]} and "词" in path.read_text(encoding="utf-8")
    for damaged in (b'{"a": ', b"\xff\xfe", b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.json is damaged"):
            read_json(path)


def test_a_truncated_line_is_skipped(tmp_path):
    path = tmp_path / "history.jsonl"
    assert list(read_lines(path)) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b'{"step": 1}\n{"text": "\xe4\xbd')
    assert list(read_lines(path)) == [{"step": 1}]


def test_flat_keys_are_dotted():
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": {}}) == {"a.b": 1, "a.c.d": [1], "e": {}}
    assert differing_keys(config(), config(finetuning__lora_rank=4, data__dataset=[])) == [
        "data.dataset",
        "finetuning.lora_rank",
    ]


@pytest.mark.parametrize(
    ("override", "redacted"),
    [
        ("a.kwargs={api_key: hf_1, n: 2}", "a.kwargs={api_key: <hidden>, n: 2}"),
        ("a.kwargs={'hub_token': 'hf_1', n: 2}", "a.kwargs={'hub_token': <hidden>, n: 2}"),
        ("a.kwargs={b: {password: x y}}", "a.kwargs={b: {password: <hidden>}}"),
        ("a.kwargs={mytoken: 3, tokens: 4}", "a.kwargs={mytoken: 3, tokens: 4}"),
    ],
)
def test_a_secret_inside_a_dictionary_is_redacted(override, redacted):
    assert redact_overrides([override]) == [redacted]


# Folders that never block, and folders that are never touched


@pytest.mark.parametrize("traces", [
    [".config.yaml.partial"], [".lock"], [".lock", ".config.yaml.partial"], ["failed.json", ".failed.json.partial"],
    [".failed.json.4711"], [".failed.json.4711.partial", "output.log", ".lock"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_killed_attempt_leaves_is_an_unused_folder(tmp_path, traces, overwrite):
    for name in traces:
        (tmp_path / name).write_text("half", encoding="utf-8")
    assert acquire_run_folder(tmp_path, config(), overwrite) is False
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", "output.log"}
    RunFolder(tmp_path).prepare(resumes=False, trains=True)
    assert RunFolder(tmp_path).is_running
    RunFolder(tmp_path).unlock()


NO_RESULTS = {
    "nothing": {},
    "an evaluation before the first step": {"history.jsonl": '{"step": 0, "eval_loss": 1.0}\n', "losses.jsonl": "{}\n",
                                            "evaluations/step-0.jsonl": '{"index": 0}\n'},
    "an empty history": {"history.jsonl": ""},
    "an error": {"failed.json": '{"kind": "error", "reason": "x", "time": "t", "words": []}'},
    "a checkpoint that was not renamed": {"checkpoints/.partial-checkpoint-1/optimizer.pt": "x"},
    "weights that were not renamed": {".adapter.partial/adapter_config.json": "{}"},
    "no answer yet": {"predictions.jsonl": ""},
}  # fmt: skip
RESULTS = {
    "a logged step": {"history.jsonl": '{"step": 0, "eval_loss": 1}\n{"step": 1, "loss": 1}\n'},
    "a first line that is cut": {"history.jsonl": '{"step": 1, "lo'},
    "a checkpoint": {"checkpoints/checkpoint-1/complete.json": "{}"},
    "an adapter": {"adapter/adapter_config.json": "{}"},
    "a model": {"model/config.json": "{}"},
    "answers": {"predictions.jsonl": '{"index": 0}\n'},
}


def write_all(folder, files):
    for name, text in files.items():
        write_text(folder / name, text)


@pytest.mark.parametrize("files", NO_RESULTS.values(), ids=NO_RESULTS)
def test_a_run_without_a_trained_step_does_not_block_the_corrected_command(tmp_path, files, capsys):
    write_all(run(tmp_path), files)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert acquire_run_folder(tmp_path, config(trainer__learning_rate=1e-4), overwrite=False) is False
    said = capsys.readouterr().out
    assert "had not trained a step and is replaced (different: trainer.learning_rate)" in said
    RunFolder(tmp_path).prepare(resumes=False, trains=True)
    RunFolder(tmp_path).unlock()
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("files", RESULTS.values(), ids=RESULTS)
def test_a_run_with_results_is_not_replaced_by_another_configuration(tmp_path, files):
    write_all(run(tmp_path), files)
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="unfinished run of another configuration"):
        acquire_run_folder(tmp_path, config(trainer__learning_rate=1e-4), overwrite=False)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["server: {port: 80}\n", "", "- a\n", "model: resnet\ntrainer: {max_epochs: 3}\n", "a: ["]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_config_of_another_program_is_never_touched(tmp_path, text, overwrite):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "train.py").write_text("mine", encoding="utf-8")
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        acquire_run_folder(tmp_path, config(), overwrite)
    assert files_of(tmp_path) == before


def test_a_damaged_run_is_replaced_only_when_asked(tmp_path):
    write_all(tmp_path, {"config.yaml": "[", "provenance.json": "{}", "overrides.txt": ""})
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged .*trainer\.overwrite_output_dir=true"):
        acquire_run_folder(tmp_path, config(), overwrite=False)
    assert acquire_run_folder(tmp_path, config(), overwrite=True) is False
    RunFolder(tmp_path).prepare(resumes=False, trains=True)
    RunFolder(tmp_path).unlock()
    assert files_of(tmp_path) == {}


def test_a_process_killed_while_it_empties_a_folder_leaves_one_that_the_same_command_empties(tmp_path, monkeypatch):
    from glmtuner.run_folder import folder as module

    class Killed(BaseException):
        pass

    removed = module._remove
    for count in range(0, len(RUN_ENTRIES) - 1, 3):
        path = run(tmp_path / str(count), finished=True)
        checkpoint(path, 10)
        write_all(path, {name: "{}" for name in ("overrides.txt", "provenance.json", "history.jsonl", "adapter/a")})
        left = iter(range(count))

        def kill(entry, left=left):
            if next(left, None) is None:
                raise Killed
            removed(entry)

        acquire_run_folder(path, config(), overwrite=True)
        monkeypatch.setattr(module, "_remove", kill)
        with pytest.raises(Killed):
            RunFolder(path).prepare(resumes=False, trains=True)
        monkeypatch.setattr(module, "_remove", removed)
        RunFolder(path).unlock()
        assert RunFolder(path).is_finished == (count == 0)  # never finished with a part of its files
        acquire_run_folder(path, config(), overwrite=True)
        RunFolder(path).prepare(resumes=False, trains=True)
        RunFolder(path).unlock()
        assert files_of(path) == {}


def test_a_folder_that_another_process_used_meanwhile_is_busy(tmp_path):
    assert acquire_run_folder(tmp_path, config(), overwrite=False) is False
    before = files_of(run(tmp_path, finished=True))  # the other process, which started and ended meanwhile
    with pytest.raises(FolderBusy, match=r"trainer\.output_dir=.*meanwhile"):
        RunFolder(tmp_path).prepare(resumes=False, trains=True)
    RunFolder(tmp_path).unlock()
    assert files_of(tmp_path) == before


def test_a_resume_removes_what_was_half_written_and_names_the_checkpoint(tmp_path, capsys):
    run(tmp_path)
    checkpoint(tmp_path, 5)
    kept = files_of(tmp_path)
    write_all(
        tmp_path, {".history.jsonl.partial": "x", ".adapter.partial/a": "x", "checkpoints/.partial-checkpoint-7/a": "x"}
    )
    (tmp_path / ".mine.partial").write_text("mine", encoding="utf-8")
    assert acquire_run_folder(tmp_path, config(), overwrite=False) is True
    RunFolder(tmp_path).unlock()
    assert files_of(tmp_path) == kept | {".mine.partial": b"mine"}
    assert ".partial-checkpoint-7 is skipped: incomplete" in capsys.readouterr().out


def test_an_evaluation_that_starts_again_does_not_log_twice(tmp_path):
    write_all(run(tmp_path), {"history.jsonl": '{"step": 0, "eval_loss": 1}\n'})
    RunFolder(tmp_path).prepare(resumes=True, trains=True)
    assert len(RunFolder(tmp_path).history()) == 1
    RunFolder(tmp_path).prepare(resumes=True, trains=False)
    RunFolder(tmp_path).unlock()
    assert RunFolder(tmp_path).history() == []


# Paths


def test_paths_that_cannot_be_a_run_folder_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    cases = {
        "file": "file is not a folder", "file/below/it": "file is not a folder", "fifo": "fifo is not a folder",
        "loop": "symbolic links", "loop/x": "symbolic links", "dangling": "does not exist", "dangling/x": "does not exist",
        "x" * 300: "name too long", "/".join(["long" * 30] * 34): "name too long", "a\nb": "control character",
        "a\x1b[0m": "control character", "\udcff": "not valid UTF-8", "a${b}": "interpolation",
    }  # fmt: skip
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, said in cases.items():
        with pytest.raises(ConfigError, match=r"^trainer\.output_dir=.*type another trainer\.output_dir$") as raised:
            acquire_run_folder(tmp_path / name, config(), overwrite=True)
        assert said in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["it's", 'a"b', "a b", "a=b,c", "{x}[y]", "$HOME %d ~", "中文 😀", "-x", ".", "a.", "a\\b", "x" * 255]
)
def test_any_other_name_will_do(tmp_path, name):
    assert acquire_run_folder(tmp_path / name / "sub", config(), overwrite=False) is False


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # what access(2) says of a read-only disk, root included
    with pytest.raises(ConfigError, match=r"cannot be written .*type another trainer\.output_dir"):
        acquire_run_folder(tmp_path / "new", config(), overwrite=False)


def test_the_error_of_a_run_is_not_lost_on_a_full_disk(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("glmtuner.run_folder.folder.write_json", full)
    assert RunFolder(tmp_path).record_failure(ValueError("a"), [])["reason"] == "ValueError: a"
    assert "failed.json could not be written (No space left on device)" in capsys.readouterr().out


def test_a_write_that_fails_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a", "new")
    assert files_of(tmp_path) == {"a": b"old"}


# Damaged files


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("metrics.json", "[]", "metrics"), ("metrics.json", '{"train_loss": "x"}', "metrics"),
        ("metrics.json", '{"a": [1]}', "metrics"), ("metrics.json", '{"a": true}', "metrics"), ("metrics.json", "", "metrics"),
        ("provenance.json", "7", "provenance"), ("provenance.json", '{"data": []}', "provenance"),
        ("provenance.json", '{"data": {"x": 7}}', "provenance"), ("provenance.json", '{"git": "abc"}', "provenance"),
        ("provenance.json", '{"packages": null}', "provenance"), ("provenance.json", '{"command": {}}', "provenance"),
        ("provenance.json", "[" * 5000, "provenance"), ("failed.json", "{}", "failure"), ("failed.json", '{"kind": 7}', "failure"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, text, read):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        getattr(RunFolder(run(tmp_path)), read)()


@pytest.mark.parametrize(
    ("name", "read"), [("metrics.json", "metrics"), ("provenance.json", "provenance"), ("history.jsonl", "history")]
)
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, name, read):
    for number, make in enumerate(
        (os.mkdir, os.mkfifo, lambda path: os.symlink(name, path), lambda path: os.symlink("a", path))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / name)
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(it is not a file\)"):
            getattr(RunFolder(folder), read)()


def test_lines_of_other_types_are_named_and_left_out(tmp_path, capsys):
    lines = (
        '{"step": 1, "loss": 0.5}\n{"loss": 1}\n{"step": "2"}\n{"step": 3, "loss": [1]}\n{"step": 4, "loss": null}\n'
    )
    (tmp_path / "history.jsonl").write_text(lines, encoding="utf-8")
    assert RunFolder(tmp_path).history() == [{"step": 1, "loss": 0.5}, {"step": 4, "loss": None}]
    assert "3 lines are not of numbers with a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "about",
    [
        {"files": 7}, {"files": {"a": "x"}}, {"files": None}, {"step": 1, "files": {"a": []}}, [1], {"files": {}, "ranks": ""},
        {"files": {}, "ranks": 0}, {"files": {}, "ranks": True}, {"files": {}, "ranks": 2, "rows_per_step": "8"},
        {"files": {}, "rows_per_step": 0.5},
    ],
)  # fmt: skip
def test_a_marker_of_other_types_is_a_problem(tmp_path, about):
    folder = checkpoint(tmp_path, 10)
    write_json(folder / MARKER, about)
    assert checkpoint_problem(folder) == f"its {MARKER} is damaged"
