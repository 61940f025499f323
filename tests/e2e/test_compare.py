"""`diff` and `reproduce` by the command line: planted changes are named, equal runs are called equal, and nothing of a run is touched."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from documented import ROOT, commands
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from glmtuner.cli.main import main

ASSETS = Path(__file__).parent.parent.parent / "glmtuner/assets"
WORDS = [
    "model=tiny_glm", "model.model_name_or_path=base", "tracker=none", "data.dataset=mine.json", "data.eval_dataset=held.json", "trainer.max_steps=4",
    "trainer.logging_steps=1", "trainer.learning_rate=1e-3", "trainer.per_device_train_batch_size=4", "trainer.do_eval=true",
    "trainer.do_predict=true", "trainer.predict_with_generate=true", "trainer.disable_tqdm=true",
]  # fmt: skip
HOSTILE = "<script>alert(1)</script> [link](http://example.org) \x1b[31m"


def records() -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((ASSETS / "data/identity_sample.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, two data sets, and a finished run in runs/first, which was typed with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ASSETS / "tiny_glm", folder / "base")
    (folder / "mine.json").write_text(json.dumps(records()[:16], ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "held.json").write_text(json.dumps(records()[40:46], ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "trainer.output_dir=runs/first"]) == 0
    return folder


@pytest.fixture(scope="module")
def other_data(project: Path) -> Path:
    """The run of `reproduce` after record 4 was changed, in runs/other_data; the data is then as it was."""
    with pytest.MonkeyPatch.context() as patch, changed_record(project):
        patch.chdir(project)
        assert main(["reproduce", "runs/first", "--output", "runs/other_data"]) == 1
    return project / "runs/other_data"


@contextmanager
def put(path: Path, content: bytes) -> Iterator[None]:
    """While this lasts, the file has this content."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextmanager
def changed_record(project: Path) -> Iterator[None]:
    """While this lasts, the answer of the fourth record is another, in a file that is otherwise the same."""
    changed = records()[:16]
    changed[3]["output"] = f"Blau ist alle Theorie. {HOSTILE}"
    with put(project / "mine.json", json.dumps(changed, ensure_ascii=False, indent=1).encode()):
        yield


def copy_of(run: Path, to: Path, **files: dict[str, object]) -> Path:
    """A copy of a run, with other values in its provenance.json or config.yaml."""
    shutil.copytree(run, to)
    for name, values in files.items():
        path = to / ("config.yaml" if name == "config" else f"{name}.json")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in values.items():
            *parents, leaf = key.split("/")
            inner = content
            for parent in parents:
                inner = inner[parent]
            if value is None:
                del inner[leaf]
            else:
                inner[leaf] = value
        dump = yaml.safe_dump if name == "config" else json.dumps
        path.write_text(dump(content, allow_unicode=True) if name == "config" else dump(content), encoding="utf-8")
    return to


def bytes_in(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flat(text: str) -> str:
    """What was printed, without the frames and the line breaks of tables."""
    return re.sub(r"[\s│╭╮╰╯├┤┬┴┼─]+", " ", text)


def test_a_run_is_reproduced_to_the_same_bytes_and_then_called_equal(
    glmtuner: Callable, project: Path, tmp_path: Path
) -> None:
    first, again = project / "runs/first", project / "runs/first_again"
    before = bytes_in(first)
    done = glmtuner(
        "reproduce", str(first), "--markdown", str(tmp_path / "again.md"), "--html", str(tmp_path / "again.html")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing that is recorded differs." in done.stdout
    assert (
        "Reproduced to the same bytes: logged steps, evaluations/step-4.jsonl, losses.jsonl, predictions.jsonl, metrics, trained weights."
        in done.stdout
    )
    for name in (
        "adapter/adapter_model.safetensors",
        "predictions.jsonl",
        "losses.jsonl",
        "evaluations/step-4.jsonl",
        "records/0",
    ):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert before == bytes_in(first)
    assert "same bytes" in (tmp_path / "again.md").read_text() and "same bytes" in (tmp_path / "again.html").read_text()

    done = glmtuner("diff", str(first), str(again), str(first))
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1].startswith(
        "The runs are equal: configuration, data, packages, code, 4 logged steps"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        done = glmtuner("reproduce", str(first))
        assert done.returncode == 2 and "was started as 2 processes" in done.stderr
    done = glmtuner("reproduce", str(first))
    assert done.returncode == 2 and "holds a finished run" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_changed_record_is_named_by_both(glmtuner: Callable, project: Path, other_data: Path, tmp_path: Path) -> None:
    first = project / "runs/first"
    old = hashlib.sha256((project / "mine.json").read_bytes()).hexdigest()[:12]
    with changed_record(project):
        new = hashlib.sha256((project / "mine.json").read_bytes()).hexdigest()[:12]
        done = glmtuner("reproduce", str(first), "--check-only")
        said = flat(done.stdout)
        assert (
            done.returncode == 1
            and "mine.json: record 4 of 16 changed" in said
            and f"mine.json: file mine.json {old} {new}" in said
        )
        assert "record 4 of now: user: " in said and "Blau ist alle Theorie." in said
        assert "record 4 of then: its text is no longer there" in said
        assert "changed last at 20" in said and not (project / "runs/first_again_again").exists()
        pages = [tmp_path / "both.md", tmp_path / "both.html"]
        done = glmtuner("diff", str(first), str(other_data), "--markdown", str(pages[0]), "--html", str(pages[1]))
    said = flat(done.stdout)
    assert done.returncode == 1 and "mine.json: record 4 of 16 changed" in said and f"{old} {new}" in said
    assert "The runs differ in: data, history, metrics, " in said

    histories = [lines(run / "history.jsonl") for run in (first, other_data)]
    step = next(one["step"] for one, other in zip(*histories, strict=True) if one.get("loss") != other.get("loss"))
    assert f"first and other_data: first different at step {step}, loss" in said
    weights = [load_file(run / "adapter/adapter_model.safetensors") for run in (first, other_data)]
    largest = max((weights[0][name].double() - weights[1][name].double()).abs().max().item() for name in weights[0])
    assert f"by at most {largest:.2g} in " in said
    sums = [
        [sum(line[name] for line in lines(run / "losses.jsonl")) for name in ("loss", "tokens")]
        for run in (first, other_data)
    ]
    means = [total / tokens for total, tokens in sums]
    found = re.search(
        r"eval_loss ([\d.]+) ([\d.]+) (?:≈ )?([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] \(6 records\)", said
    )
    assert found, said
    assert [float(found[1]), float(found[2])] == pytest.approx(means, rel=1e-5)
    assert float(found[3]) == pytest.approx(means[1] - means[0], rel=0.02)
    assert float(found[4]) <= float(found[3]) <= float(found[5])
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script>" not in text and "\x1b" not in text and "Blau ist alle Theorie." in text
    assert "[link](" not in pages[0].read_text(encoding="utf-8")


def test_results_that_differ_are_told_from_the_step_on_with_what_differs(
    glmtuner: Callable, project: Path, other_data: Path
) -> None:
    first = project / "runs/first"
    histories = [lines(run / "history.jsonl") for run in (first, other_data)]
    pairs = [(one, other) for one, other in zip(*histories, strict=True) if "loss" in one]
    step = next(
        one["step"] for one, other in pairs if abs(one["loss"] - other["loss"]) > 1e-4 * max(one["loss"], other["loss"])
    )
    shutil.copytree(other_data, project / "runs/kept")
    shutil.rmtree(other_data)
    with changed_record(project):
        done = glmtuner("reproduce", str(first), "--output", str(other_data))
    assert done.returncode == 1, done.stderr
    assert f"Not reproduced: other results from step {step} on; what differs: data." in done.stdout
    assert f"other from step {step} on: " in flat(done.stdout)
    done = glmtuner("diff", str(project / "runs/kept"), str(other_data))
    assert done.returncode == 0, done.stdout


def test_a_seed_and_a_key_are_named(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    first = project / "runs/first"
    done = glmtuner("reproduce", str(first), "--check-only", "trainer.seed=7", "finetuning.lora_rank=4")
    said = flat(done.stdout)
    assert (
        done.returncode == 1
        and "configuration trainer.seed 42 7" in said
        and "configuration finetuning.lora_rank 8 4" in said
    )

    copy = copy_of(first, tmp_path / "copy", config={"trainer/seed": 7, "finetuning/lora_rank": 4})
    done = glmtuner("diff", str(first), str(copy))
    assert done.returncode == 1 and "The runs differ in: configuration." in done.stdout
    assert "trainer.seed 42 7" in flat(done.stdout) and "finetuning.lora_rank 8 4" in flat(done.stdout)
    assert "learning_rate" not in done.stdout
    done = glmtuner("reproduce", str(copy), "--check-only")  # config.yaml has what ran, whatever its overrides say
    assert "trainer.seed is 7 in its config.yaml, and 42 by its overrides today; the former is used" in flat(
        done.stdout
    )
    done = glmtuner("reproduce", str(copy), "--output", str(tmp_path / "again"))
    assert (
        done.returncode == 1
        and "Not reproduced: other results from step 1 on; nothing that is recorded differs." in done.stdout
    )
    assert yaml.safe_load((tmp_path / "again/config.yaml").read_text())["trainer"]["seed"] == 7


def test_a_run_of_a_strategy_that_was_removed(
    glmtuner: Callable, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run of parallel=zero3, as its version recorded it: its weights are ordinary, and it is repeated by fsdp2."""
    strategy = {
        "name": "zero3", "processes": 2, "offload_optimizer": True, "deepspeed_config": None, "offload_parameters": False,
    }  # fmt: skip
    copy = copy_of(project / "runs/first", tmp_path / "copy", config={"parallel": strategy})
    typed = "parallel=zero3\nparallel.processes=2\nparallel.offload_optimizer=true\n"
    (copy / "overrides.txt").write_text(f"{(copy / 'overrides.txt').read_text().rstrip()}\n{typed}")
    why = "DeepSpeed was removed, since its checkpoints could not be resumed safely; type parallel=fsdp2"
    done = glmtuner("reproduce", str(copy), "--check-only")
    assert done.returncode == 2 and f"cannot be composed today: parallel=zero3: {why}" in flat(done.stderr)
    done = glmtuner("reproduce", str(copy), "--check-only", "parallel=fsdp2", "parallel.cpu_offload=true")
    said = flat(done.stdout)
    assert done.returncode == 1 and f"left out: parallel=zero3: {why}" in said and "former is used" not in said
    assert f"left out: parallel.offload_optimizer=true: {why} parallel.cpu_offload=true" in said
    for row in ("name zero3 fsdp2", "offload_optimizer true null", "cpu_offload false true"):
        assert f"configuration parallel.{row} " in said
    assert "parallel.processes" not in said and "ranks 1 2" in said  # both have two

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main(["export", str(copy), "--to", str(tmp_path / "exported")]) == 0
        assert main(["report", str(copy)]) == 0
        assert main(["show", str(copy)]) == 0
        capsys.readouterr()
        assert main(["diff", "runs/first", str(copy)]) == 1
    assert "parallel.name none zero3" in flat(capsys.readouterr().out)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project / "base")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert any(not torch.equal(value, exported[name]) for name, value in base.state_dict().items())


def test_three_runs_stand_side_by_side(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    first = project / "runs/first"
    seeds = [copy_of(first, tmp_path / f"seed{seed}", config={"trainer/seed": seed}) for seed in (7, 8)]
    done = glmtuner("diff", str(first), *map(str, seeds))
    assert (
        done.returncode == 1
        and "key first seed7 seed8" in flat(done.stdout)
        and "trainer.seed 42 7 8" in flat(done.stdout)
    )


def test_a_package_and_a_machine_are_named(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    first, installed = project / "runs/first", metadata.version("torch")
    changes = {"packages/torch": "1.0", "packages/attrs": None, "machine/ranks": 2, "machine/device": "NVIDIA H100"}
    copy = copy_of(first, tmp_path / "copy", provenance=changes)
    done = glmtuner("diff", str(first), str(copy))
    assert done.returncode == 1 and f"torch {installed} 1.0" in flat(done.stdout)
    assert f"attrs {metadata.version('attrs')} (none)" in flat(done.stdout)
    assert "The runs differ in: packages, machine." in done.stdout
    done = glmtuner("reproduce", str(copy), "--check-only")
    assert done.returncode == 1 and f"packages torch 1.0 {installed}" in flat(done.stdout)
    assert "Bytes cannot be expected: sums are added up in another order on another machine" in done.stdout
    assert "device NVIDIA H100 then, cpu now" in done.stdout and "2 ranks then, 1 now" in done.stdout


def test_a_changed_base_weight_is_named(glmtuner: Callable, project: Path) -> None:
    first, file = project / "runs/first", project / "base/model.safetensors"
    old = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    weights, name = load_file(file), "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] += 0.25
    before = file.read_bytes()
    try:
        save_file(weights, file, {"format": "pt"})
        new = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        done = glmtuner("reproduce", str(first), "--check-only")
        assert done.returncode == 1 and f"weights model.model_name_or_path: model.safetensors {old} {new}" in flat(
            done.stdout
        )
        done = glmtuner("reproduce", str(first), "--output", str(project / "runs/other_base"))
        assert done.returncode == 1 and "; what differs: weights." in done.stdout
        done = glmtuner("diff", str(first), str(project / "runs/other_base"))
        assert done.returncode == 1 and f"{old} {new}" in flat(done.stdout)
        assert "which tensors differ is not known: the files of first are no longer there as they were" in done.stdout
        copy = project / "base_of_then"
        copy.mkdir()
        (copy / "model.safetensors").write_bytes(before)
        run = copy_of(first, project / "runs/first_there", config={"model/model_name_or_path": str(copy)})
        done = glmtuner("diff", str(run), str(project / "runs/other_base"))
        assert f"1 of {len(weights)} tensors differ, by at most 0.25 in {name}" in flat(done.stdout)
    finally:
        file.write_bytes(before)


def test_an_earlier_version_of_the_record_is_said_to_say_less(
    glmtuner: Callable, project: Path, tmp_path: Path
) -> None:
    first = project / "runs/first"
    gone = dict.fromkeys(("cwd", "code", "weights", "tokenizer", "machine"))
    nine = json.loads((first / "provenance.json").read_text())["packages"]
    old = copy_of(
        first, tmp_path / "old", provenance={**gone, "packages": {name: nine[name] for name in ("glmtuner", "torch")}}
    )
    done = glmtuner("diff", str(first), str(old))
    assert done.returncode == 0 and "The runs are equal" in done.stdout
    assert "weights, tokenizer, most packages, code, machine: not recorded by old" in done.stdout
    for name in ("mine.json", "held.json"):
        shutil.copyfile(project / name, tmp_path / name)
    done = glmtuner("reproduce", str(old), "--check-only")
    assert (
        done.returncode == 0
        and "it does not record where it was started" in done.stdout
        and "not recorded" in done.stdout
    )


def test_a_run_whose_folder_and_data_moved(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    moved = copy_of(project / "runs/first", tmp_path / "moved", provenance={"cwd": str(tmp_path / "gone")})
    done = glmtuner("reproduce", str(moved), "--check-only")
    assert done.returncode == 1 and "no dataset named 'mine.json'" in done.stdout
    assert (
        f"Relative paths are looked up in the current folder: {tmp_path / 'gone'}, where it was started, is gone."
        in done.stdout
    )
    for name in ("mine.json", "held.json"):
        shutil.copyfile(project / name, tmp_path / name)
    done = glmtuner("reproduce", "moved")
    assert done.returncode == 0 and "Reproduced to the same bytes" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "moved_again/metrics.json").is_file()


def test_the_requirements_of_then(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    copy = copy_of(project / "runs/first", tmp_path / "copy", provenance={"packages/torch": "2.9.0+cu130"})
    done = glmtuner("reproduce", str(copy), "--same-env")
    file = tmp_path / "copy_requirements.txt"
    assert (
        done.returncode == 0
        and str(file) in done.stdout
        and "-m venv" in done.stdout
        and f"pip install -r {file}" in done.stdout
    )
    listed = [line for line in file.read_text().splitlines() if not line.startswith(("#", "--"))]
    pinned = {each.name: str(each.specifier) for each in map(Requirement, listed)}
    assert (
        pinned["torch"] == "==2.9.0+cu130"
        and pinned["transformers"] == f"=={metadata.version('transformers')}"
        and "glmtuner" not in pinned
    )
    assert "--extra-index-url https://download.pytorch.org/whl/cu130" in file.read_text()
    assert not (tmp_path / "copy_again").exists()


def test_an_unfinished_run_is_compared_as_far_as_it_got(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    first = project / "runs/first"
    stopped = copy_of(first, tmp_path / "stopped")
    for name in ("metrics.json", "predictions.jsonl", "losses.jsonl"):
        (stopped / name).unlink()
    shutil.rmtree(stopped / "adapter")
    (stopped / "history.jsonl").write_text("".join((first / "history.jsonl").read_text().splitlines(keepends=True)[:2]))
    done = glmtuner("diff", str(first), str(stopped))
    assert done.returncode == 1 and "unfinished: step 2 of 4" in flat(done.stdout)
    assert "only first logged 2 steps, 3 to 4" in done.stdout and "first different" not in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["diff", "RUN"], "diff compares two or more folders, and 1 was named"),
        (["diff"], "diff compares two or more folders, and 0 was named"),
        (["diff", "RUN", "nowhere"], "diff nowhere: no such folder"),
        (["diff", "RUN", "empty"], "diff empty: it holds neither a run"),
        (["diff", "RUN", "file.txt"], "diff file.txt: it is a file, and a run is a folder"),
        (["diff", "RUN", "failed"], "diff failed: the run failed before it started: no luck"),
        (["diff", "RUN", "sweep"], "diff compares runs with runs and sweeps with sweeps"),
        (["diff", "RUN", "RUN", "trainer.seed=1"], "trainer.seed=1: diff takes folders and no overrides"),
        (["diff", "RUN", "RUN", "--html", "empty"], "--html empty: it is a folder"),
        (["diff", "RUN", "no_config"], "diff no_config: it holds neither a run"),
        (["diff", "RUN", "bad_config"], "bad_config/config.yaml is damaged"),
        (["diff", "RUN", "bad_provenance"], "bad_provenance/provenance.json is damaged"),
        (["diff", "RUN", "bad_metrics"], "bad_metrics/metrics.json is damaged"),
        (["reproduce", "nowhere"], "reproduce nowhere: no such folder"),
        (["reproduce", "empty"], "reproduce empty: it holds neither a run"),
        (["reproduce", "sweep"], "reproduce sweep: it is a sweep, and a run is reproduced; type python -m glmtuner reproduce sweep/job"),
        (["reproduce", "bad_config"], "bad_config/config.yaml is damaged"),
        (["reproduce", "no_overrides", "--check-only"], "overrides.txt cannot be read (it is missing)"),
        (["reproduce", "RUN", "--output", "RUN/inside"], "inside of it; name another folder"),
        (["reproduce", "RUN", "--output", "other"], "other: it holds other files; name another folder"),
        (["reproduce", "RUN", "--check-only", "trainer.sead=7"], "did you mean 'seed'?"),
        (["reproduce", "bad_packages", "--same-env"], "its provenance.json has no packages"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_end_in_one_paragraph(
    glmtuner: Callable, project: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    first = project / "runs/first"
    for name in ("empty", "failed", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "file.txt").write_text("no run")
    (tmp_path / "failed/failed.json").write_text(json.dumps({"kind": "error", "reason": "no luck"}))
    copy_of(first, tmp_path / "sweep/job")
    (tmp_path / "sweep/sweep.json").write_text("{}")
    for word in {word for word in words if word.startswith(("no_", "bad_"))}:
        kind, _, file = word.partition("_")
        copy = copy_of(first, tmp_path / word, **({"provenance": {"packages": {}}} if file == "packages" else {}))
        path = next((path for path in copy.iterdir() if path.stem == file), None)
        if path is not None:
            path.unlink() if kind == "no" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\n}{")
    done = glmtuner(*(word.replace("RUN", str(first)) for word in words))
    assert done.returncode == 2 and told in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def sweep_of(first: Path, folder: Path, rates: list[float], **settings: object) -> Path:
    """A sweep over the learning rate, of copies of a run."""
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"typed": ["python -m glmtuner -m"], "cwd": "."}))
    for rate in rates:
        config = {"trainer/learning_rate": rate, **settings}
        job = copy_of(first, folder / f"rate-{rate}", config=config)
        (job / "overrides.txt").write_text(f"trainer.learning_rate={rate}\n")
    return folder


def test_jobs_of_sweeps_are_matched_by_their_swept_values(
    glmtuner: Callable, project: Path, other_data: Path, tmp_path: Path
) -> None:
    first = project / "runs/first"
    one = sweep_of(first, tmp_path / "one", [0.1, 0.2])
    other = sweep_of(other_data, tmp_path / "other", [0.3, 0.2], **{"trainer/weight_decay": 0.5})
    done = glmtuner("diff", str(one), str(other))
    said = flat(done.stdout)
    assert done.returncode == 1, done.stderr
    assert (
        "learning_rate 0.1 one finished" in said
        and "learning_rate 0.3 other finished" in said
        and "0.2 one" not in said
    )
    assert "trainer.weight_decay 0 0.5 1" in said and "mine.json: record 4 of 16 changed" in said
    means = [
        sum(line["loss"] for line in found) / sum(line["tokens"] for line in found)
        for found in (lines(run / "losses.jsonl") for run in (first, other_data))
    ]
    row = re.search(r"learning_rate 0.2 ([\d.]+) ([\d.]+) (?:≈ )?[+-]", said)
    if "eval_loss of one" in said:
        assert row and [float(row[1]), float(row[2])] == pytest.approx(means, rel=1e-5)
    else:
        assert "eval_loss differs in 1 of 1 pairs of jobs" in said
    assert "those of 1 of 1 pairs of jobs differ" in said
    done = glmtuner("diff", str(one), str(one))
    assert done.returncode == 0 and "The sweeps are equal: 2 pairs of jobs" in done.stdout
    lonely = sweep_of(first, tmp_path / "lonely", [0.7])
    done = glmtuner("diff", str(one), str(lonely))
    assert (
        done.returncode == 1
        and "no job of one has the swept values of one of lonely: trainer.learning_rate" in done.stdout
    )


def test_a_secret_that_was_typed_is_left_out_and_said(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    copy = copy_of(project / "runs/first", tmp_path / "copy")
    with (copy / "overrides.txt").open("a") as file:
        file.write("model.cache_dir=https://me:<hidden>@host\n")
    done = glmtuner("reproduce", str(copy), "--check-only")
    assert "model.cache_dir was a secret, which is stored nowhere, and is left out" in done.stdout


def test_the_commands_of_the_page(glmtuner: Callable, project: Path, other_data: Path, tmp_path: Path) -> None:
    first = copy_of(project / "runs/first", tmp_path / "outputs/mine")
    copy_of(other_data, tmp_path / "outputs/other")
    (tmp_path / "outputs/sweeps").mkdir()
    sweep_of(first, tmp_path / "outputs/sweeps/before", [0.1, 0.2])
    sweep_of(other_data, tmp_path / "outputs/sweeps/after", [0.1])
    todo = commands(ROOT / "docs/compare.md")
    assert len(todo) == 6
    for command in todo:
        done = glmtuner(*(command.arguments or []))
        assert done.returncode == ("diff" in command.words), f"{command}\n{done.stdout}\n{done.stderr}"
    made = ["diff.md", "diff.html", "outputs/mine_again/metrics.json", "outputs/mine_requirements.txt"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
    assert "data:image/png;base64," in (tmp_path / "diff.html").read_text(encoding="utf-8")  # the losses


def test_code_that_only_the_run_folder_names_is_not_executed(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    copy = copy_of(
        project / "runs/first", tmp_path / "copy", config={"plugins": ["evil"]}, provenance={"cwd": str(tmp_path)}
    )
    (copy / "overrides.txt").write_text("model=tiny_glm\nplugins=[evil]\n")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    done = glmtuner("reproduce", str(copy), "--check-only")
    assert done.returncode == 2 and "type plugins=evil behind the run if you trust it" in done.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.heavy
def test_a_job_of_a_sweep_is_reproduced(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    for name in ("mine.json", "held.json"):
        shutil.copyfile(project / name, tmp_path / name)
    words = [word for word in WORDS if "model_name_or_path" not in word]
    assert glmtuner("-m", *words, "finetuning=lora,freeze", "name=both").returncode == 0
    (job,) = (tmp_path / "outputs/sweeps/both").glob("*freeze*")
    os.chdir(project)
    done = glmtuner("reproduce", str(job), "--output", str(tmp_path / "again"))
    assert done.returncode == 0 and "Reproduced to the same bytes" in done.stdout, done.stdout + done.stderr
    for path in (job / "model").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again/model" / path.name).read_bytes()


@pytest.mark.heavy
def test_a_resumed_run_is_reproduced_in_one_go(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    for name in ("mine.json", "held.json"):
        shutil.copyfile(project / name, tmp_path / name)
    words = [
        *(word for word in WORDS if "model_name_or_path" not in word),
        "trainer.save_steps=2",
        "trainer.output_dir=run",
    ]
    assert glmtuner(*words).returncode == 0
    whole = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    for name in ("metrics.json", "predictions.jsonl", "losses.jsonl"):
        (tmp_path / "run" / name).unlink()
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    path = tmp_path / "run/provenance.json"
    about = json.loads(path.read_text())
    about["packages"]["torch"] = "1.0"  # that its first steps were computed with
    path.write_text(json.dumps(about))
    assert glmtuner(*words).returncode == 0
    about = json.loads(path.read_text())
    assert len(about["resumed"]) == 1 and about["earlier"][0]["packages"]["torch"] == "1.0"
    done = glmtuner("reproduce", "run")
    assert done.returncode == 0 and "Reproduced to the same bytes" in done.stdout, done.stdout + done.stderr
    assert "It was resumed 1 time, and is repeated in one go." in done.stdout
    assert "Its steps before it was resumed were computed with other packages: torch 1.0." in done.stdout
    assert (tmp_path / "run_again/adapter/adapter_model.safetensors").read_bytes() == whole


@pytest.mark.heavy
def test_a_run_of_two_ranks_is_reproduced_and_said_not_to_be_expected_on_one(
    glmtuner_process: Callable, project: Path, tmp_path: Path
) -> None:
    shutil.copyfile(project / "mine.json", tmp_path / "mine.json")
    words = [
        "model=tiny_glm",
        "tracker=none",
        "data.dataset=mine.json",
        "trainer.max_steps=3",
        "trainer.logging_steps=1",
        "trainer.output_dir=run",
    ]
    done = glmtuner_process(*words, "parallel=ddp", "parallel.processes=2")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/provenance.json").read_text())["machine"]["ranks"] == 2
    done = glmtuner_process("reproduce", "run")
    assert done.returncode == 0 and "Reproduced to the same bytes" in done.stdout, done.stdout + done.stderr
    done = glmtuner_process("reproduce", "run", "--check-only", "parallel=none", "parallel.processes=null")
    assert done.returncode == 1 and "2 ranks then, 1 now" in done.stdout


def test_rounding_is_told_with_its_size(glmtuner: Callable, project: Path, tmp_path: Path) -> None:
    first = project / "runs/first"
    near = copy_of(first, tmp_path / "near")
    history = lines(near / "history.jsonl")
    history[2]["loss"] *= 1 + 2e-6
    (near / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in history))
    file = near / "adapter/adapter_model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    largest = max(weights, key=lambda name: weights[name].abs().max().item())
    weights[largest] *= 1 + 1e-6
    save_file(weights, file, {"format": "pt"})
    expected = (
        (weights[largest].double() - load_file(first / "adapter/adapter_model.safetensors")[largest].double())
        .abs()
        .max()
    )
    from glmtuner.compare.loaded import load_run
    from glmtuner.compare.outcome import Kind, outcomes, overall

    found = {each.name: each for each in outcomes(load_run(first), load_run(near))}
    assert overall(list(found.values())) is Kind.rounding
    assert "the same up to step 2; within 2e-06 of the value" in found["logged steps"].words
    assert (
        f"1 of {len(weights)} tensors differ, by at most {expected.item():.2g} in {largest}"
        in found["trained weights"].words
    )
    assert found["predictions.jsonl"].kind is Kind.same and isinstance(expected, torch.Tensor)
