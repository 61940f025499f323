"""The report of real sweeps and runs, by the command line: at the end, while they run, on the wrong folder."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=24", "data.max_target_length=32",
    "trainer.max_steps=4", "trainer.logging_steps=2", "trainer.disable_tqdm=true", "data.dev_ratio=0.25",
    "trainer.do_eval=true", "trainer.do_predict=true", "trainer.predict_with_generate=true",
]  # fmt: skip
FILES = ("report.md", "report.html", "leaderboard.csv")


def test_a_sweep_ends_with_its_report_which_can_be_made_again_at_any_time(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner("-m", *WORDS, "finetuning=lora,freeze", "trainer.learning_rate=1e-3,1e-2", "name=reported")
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "outputs/sweeps/reported"
    lines = [*csv.DictReader((sweep / "leaderboard.csv").open())]
    assert [line["rank"] for line in lines] == ["1", "2", "3", "4"]
    scores = [float(line["predict_rouge-l"]) for line in lines]
    assert scores == sorted(scores, reverse=True) and all(line["predict_rouge-l_samples"] == "6" for line in lines)
    assert all(float(line["difference_low"]) <= 0 for line in lines[1:])
    pictures = {"loss.png", "predict_rouge-l_by_finetuning.png", "predict_rouge-l_by_learning_rate.png"}
    assert {path.name for path in (sweep / "pictures").iterdir()} == pictures
    command = f"python -m glmtuner export outputs/sweeps/reported/{lines[0]['job']} --to reported_best"
    for text in (done.stdout, *((sweep / name).read_text() for name in FILES[:2])):
        assert command in text
    exported = glmtuner(*command.split()[3:])
    assert exported.returncode == 0, exported.stderr

    before = (sweep / "leaderboard.csv").read_bytes()
    again = glmtuner("report", "outputs/sweeps/reported")
    assert again.returncode == 0, again.stderr
    assert (sweep / "leaderboard.csv").read_bytes() == before

    best, second, third, last = (sweep / line["job"] for line in lines)
    (best / "metrics.json").unlink()  # as if it were still running
    (second / "metrics.json").write_text('{"train_lo')
    shutil.rmtree(third)
    half = glmtuner("report", "outputs/sweeps/reported")
    assert half.returncode == 0, half.stderr
    assert "step 4 of 4" in half.stdout and "is damaged" in half.stdout
    found = {line["job"]: line["state"] for line in csv.DictReader((sweep / "leaderboard.csv").open())}
    assert found == {last.name: "finished", best.name: "unfinished", second.name: "failed"}


def test_a_report_that_fails_hides_nothing_of_the_sweep(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.report import sweep

    def broken(root: Path) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(sweep, "write_sweep_report", broken)
    words = [word for word in WORDS if not word.startswith(("data.dev", "trainer.do_", "trainer.predict"))]
    done = glmtuner("-m", *words, "trainer.seed=1,2", "name=unreported")
    assert done.returncode == 0 and "(2 finished, 0 did not fit into memory, 0 failed)" in done.stdout
    assert "the report was not written (RuntimeError: no ink); python -m glmtuner report outputs/sweeps/unreported" in done.stderr  # fmt: skip
    assert "Traceback" not in done.stderr


def test_a_run_has_a_report_and_a_wrong_folder_a_sentence(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(*WORDS, "trainer.output_dir=one")
    assert done.returncode == 0, done.stderr
    told = glmtuner("report", "one")
    assert told.returncode == 0, told.stderr
    page = (tmp_path / "one/report.html").read_text()
    rouge = json.loads((tmp_path / "one/metrics.json").read_text())["predict_rouge-l"]
    assert f"{rouge:.2f} [" in page or f"{rouge:.4f} [" in page
    assert "report: one/report.html" in told.stdout and "data:image/png;base64," in page
    afresh = glmtuner(*WORDS, "trainer.output_dir=one", "trainer.overwrite_output_dir=true")
    assert afresh.returncode == 0 and not (tmp_path / "one/report.html").exists()

    (tmp_path / "outputs/empty").mkdir(parents=True)
    for words, sentence in (
        (["outputs/empty"], "report outputs/empty: it is neither a sweep nor a run; type python -m glmtuner report"),
        (["nowhere"], "report nowhere: no such folder; type python -m glmtuner report outputs/sweeps/<sweep>"),
        (["one", "metric=none"], "type python -m glmtuner report one"),
        ([], "report: the following arguments are required: folder; type python -m glmtuner report"),
    ):
        wrong = glmtuner("report", *words)
        assert wrong.returncode == 2 and sentence in wrong.stderr, wrong.stderr
        assert wrong.stderr.count("\n") == 1
