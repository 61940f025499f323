"""`--check` against what twelve runs take that nothing was fitted to: processor seconds and peak memory of whole processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = ("model=tiny_glm", "tracker=none", "trainer.use_cpu=true", "data.dataset_dir=data")
WORDS = "春天来了，花儿开了，小鸟在枝头唱歌。孩子们到田野里去放风筝，老人坐在门前晒太阳。"
# arguments of runs that differ in method, batch, length of rows, stage, quantization, and in what is done besides training
RUNS = {
    "lora, 8 rows": ("data.dataset=mixed.json", "trainer.num_train_epochs=1"),
    "full, 2 rows, accumulation 4": (
        "data.dataset=mixed.json", "finetuning=full", "trainer.per_device_train_batch_size=2", "trainer.max_steps=30",
        "trainer.gradient_accumulation_steps=4",
    ),
    "freeze, 16 rows, short cutoff": (
        "data.dataset=mixed.json", "finetuning=freeze", "trainer.per_device_train_batch_size=16", "data.max_source_length=64",
        "data.max_target_length=64", "trainer.num_train_epochs=3",
    ),
    "p_tuning, 4 rows": (
        "data.dataset=mixed.json", "finetuning=p_tuning", "trainer.per_device_train_batch_size=4", "trainer.max_steps=50",
    ),
    "lora, int8": ("data.dataset=mixed.json", "quant=int8", "trainer.per_device_train_batch_size=4", "trainer.max_steps=40"),
    "lora, packed": ("data.dataset=mixed.json", "data.packing=true", "trainer.per_device_train_batch_size=2", "trainer.num_train_epochs=2"),
    "lora, padded": ("data.dataset=mixed.json", "data.padding_free=false", "trainer.per_device_train_batch_size=4", "trainer.max_steps=40"),
    "lora, evaluations and checkpoints": (
        "data.dataset=mixed.json", "data.dev_ratio=0.2", "trainer.do_eval=true", "trainer.eval_strategy=steps", "trainer.eval_steps=10",
        "trainer.save_steps=5", "trainer.max_steps=40", "trainer.per_device_train_batch_size=4",
    ),
    "lora, prediction": (
        "data.dataset=mixed.json", "data.dev_ratio=0.3", "trainer.do_predict=true", "trainer.predict_with_generate=true",
        "data.max_target_length=48", "trainer.max_steps=10",
    ),
    "dpo": ("stage=dpo", "data.dataset=preference_sample", "trainer.num_train_epochs=4"),
    "kto, full": ("stage=kto", "finetuning=full", "data.dataset=feedback_sample", "trainer.num_train_epochs=3"),
    "pt, rslora, gradient checkpointing": (
        "stage=pt", "data.dataset=text_sample", "finetuning=rslora", "trainer.gradient_checkpointing=true", "trainer.max_steps=40",
        "trainer.per_device_train_batch_size=4", "data.max_source_length=256",
    ),
}  # fmt: skip
ERRORS: dict[
    str, tuple[float, float, float, float]
] = {}  # run -> forecast and measured seconds, forecast and measured GiB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 240 records of very different lengths."""
    place = tmp_path_factory.mktemp("runs")
    (place / "data").mkdir()
    draw = random.Random(7)
    rows = []
    for _ in range(240):
        length = min(int(draw.lognormvariate(4.5, 0.9)), 900)
        text = (WORDS * 30)[draw.randrange(40) :][:length]
        rows.append({"instruction": text[: length // 2 + 1], "output": text[length // 2 :] + "。"})
    (place / "data" / "mixed.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return place


def taken(folder: Path, *words: str) -> tuple[float, str]:
    """The processor seconds of the command line in a process of its own, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    with (
        (folder / "out.txt").open("w+", encoding="utf-8") as out,
        (folder / "err.txt").open("w+", encoding="utf-8") as err,
    ):
        child = subprocess.Popen(
            [sys.executable, "-m", "glmtuner", *words], cwd=folder, env=environment, stdout=out, stderr=err
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0, (folder / "err.txt").read_text(encoding="utf-8")
    return usage.ru_utime + usage.ru_stime, (folder / "out.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_what_was_forecast(folder, name, record_property):
    words = (*BASE, *RUNS[name])
    _, told = taken(folder, "--check", "--json", *words)
    (job,) = json.loads(told)["jobs"]
    output = folder / f"run-{len(ERRORS)}"
    seconds, _ = taken(folder, *words, f"trainer.output_dir={output}")
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    gib = metrics["peak_memory_gib"]
    forecast, memory = job["cpu_hours"] * 3600, job["memory_bytes"] / 2**30
    ERRORS[name] = forecast, seconds, memory, gib
    print(
        f"\n{name:<36}{forecast:7.1f} s {seconds:7.1f} s {forecast / seconds - 1:+6.1%}   {memory:5.2f} GiB {gib:5.2f} GiB "
        f"{memory / gib - 1:+6.1%}   probe {job['measured_bytes'] / 2**30:5.2f} GiB {job['measured_bytes'] / 2**30 / gib - 1:+6.1%} ",
        {k: round(v["cpu"], 2) for k, v in job["parts"].items()},
        file=sys.__stderr__,
    )
    assert job["steps"] == pytest.approx(metrics.get("steps", job["steps"]))
    assert forecast == pytest.approx(seconds, rel=0.20)
    assert memory == pytest.approx(gib, rel=0.15)
