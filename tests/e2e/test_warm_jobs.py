"""Jobs that share a base model in memory end with the bytes of runs of their own, whatever the job before did to the weights."""

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glmtuner.run_folder.folder import job_folders

RUN = [
    "tracker=none", "data.dataset=belle_sample", "data.max_samples=8", "trainer.max_steps=2", "trainer.logging_steps=1",
    "trainer.disable_tqdm=true", "trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=4",
]  # fmt: skip
KEPT = "base model: kept from the job before"


def weights(folder: Path) -> dict[str, bytes]:
    """The trained tensors of a run, by file, and its losses."""
    files = {path.name: path.read_bytes() for path in folder.glob("*/*.safetensors")}
    assert files
    return files | {"history": (folder / "history.jsonl").read_bytes()}


def same_as_alone(glmtuner: Callable, sweep: Path, key: str, fixed: list[str]) -> None:
    for job in job_folders(sweep):
        value = re.fullmatch(rf"{key.rpartition('.')[2]}-(.+)_[0-9a-f]{{8}}", job.path.name)
        assert value, job.path.name
        alone = sweep.parent / f"alone-{value[1]}"
        assert glmtuner(*fixed, *RUN, f"{key}={value[1]}", f"trainer.output_dir={alone}").returncode == 0
        assert weights(alone) == weights(job.path), job.path.name


def test_each_job_ends_as_a_run_of_its_own(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner("-m", "model=tiny_glm", *RUN, "finetuning=full,pissa,freeze,lora", "name=warm")
    assert done.returncode == 0 and done.stdout.count(KEPT) == 3, done.stdout + done.stderr
    same_as_alone(glmtuner, tmp_path / "outputs/sweeps/warm", "finetuning", ["model=tiny_glm"])


@pytest.mark.heavy
def test_a_merge_in_place_and_another_file_load_the_base_again(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.config.paths import PACKAGE_MODEL, model_source
    from glmtuner.launch import run as launch

    base = tmp_path / "base"
    shutil.copytree(model_source(f"{PACKAGE_MODEL}tiny_glm"), base)
    trained, seen = launch.train, []

    def train(context, *given):
        result = trained(context, *given)
        seen.append(context.run.trainer.seed)
        if len(seen) == 2:  # what a job does to weights that it was not going to train
            frozen = next(value for value in context.model.parameters() if not value.requires_grad)
            frozen.data.view(-1)[0] += 1
        if len(seen) == 4:
            os.utime(base / "model.safetensors", ns=(0, 0))
        return result

    monkeypatch.setattr(launch, "train", train)
    fixed = ["model=tiny_glm", f"model.model_name_or_path={base}"]
    done = glmtuner("-m", *fixed, *RUN, "trainer.seed=1,2,3,4,5", "name=changed")
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("base model")]
    assert [line.partition(",")[0] for line in told] == [KEPT, "base model: loaded again", KEPT]
    assert "changed 1 of its tensors" in told[1]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "outputs/sweeps/changed"
    for job in job_folders(sweep):
        job.path.rename(job.path.with_name(job.path.name.replace("model_name_or_path", "")))
    same_as_alone(glmtuner, sweep, "trainer.seed", fixed)


@pytest.mark.heavy
@pytest.mark.parametrize("words", [["quant=int4"], ["quant=int8"], ["stage=rm", "data.dataset=preference_sample"],
                                   ["stage=dpo", "data.dataset=preference_sample", "finetuning=freeze"],
                                   ['data.new_tokens=["<a>","<b>"]'], ["finetuning=p_tuning"], ["model.dtype=bfloat16"]])  # fmt: skip
def test_what_stages_and_quantizations_do_to_the_base_is_undone(
    glmtuner: Callable, tmp_path: Path, words: list[str]
) -> None:
    rates = [*RUN[:6], *words, "trainer.seed=3"]
    done = glmtuner("-m", "model=tiny_glm", *rates, "trainer.learning_rate=0.01,0.02,0.03", "name=warm")
    assert done.returncode == 0 and done.stdout.count(KEPT) == 2, done.stdout + done.stderr
    for job in job_folders(tmp_path / "outputs/sweeps/warm"):
        rate = job.path.name.split("_")[1].removeprefix("rate-")
        alone = tmp_path / rate
        assert (
            glmtuner(
                "model=tiny_glm", *rates, f"trainer.learning_rate={rate}", f"trainer.output_dir={alone}"
            ).returncode
            == 0
        )
        assert weights(alone) == weights(job.path), rate


@pytest.mark.heavy
def test_workers_of_joblib_live_on_until_a_job_kills_its_own(glmtuner: Callable, tmp_path: Path) -> None:
    words = ["-m", "model=tiny_glm", *RUN, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "name=workers"]
    sweep = tmp_path / "outputs/sweeps/workers"

    def kill_the_second() -> None:
        while not any(sweep.glob("seed-2_*/history.jsonl")):
            time.sleep(0.02)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (
                    b"glmtuner.cli.worker" in (process / "cmdline").read_bytes()
                    and (process / "cwd").readlink() == tmp_path
                ):
                    os.kill(int(process.name), signal.SIGKILL)

    killer = threading.Thread(target=kill_the_second, daemon=True)
    killer.start()
    done = glmtuner(*words, "trainer.seed=1,2,3,4", "trainer.max_steps=20")
    killer.join(10)
    assert done.returncode == 1 and "killed by SIGKILL" in done.stdout + done.stderr, done.stdout + done.stderr
    logs = {job.path.name[:6]: (job.path / "output.log").read_text() for job in job_folders(sweep)}
    assert [KEPT in logs[f"seed-{seed}"] for seed in (1, 2, 3, 4)] == [False, True, False, True]
    done = glmtuner(*words, "trainer.seed=1,2,3,4", "trainer.max_steps=20")
    assert done.returncode == 0 and "(4 finished" in done.stdout, done.stdout + done.stderr


def test_checksums_see_a_bit_and_the_order() -> None:
    from glmtuner.models.warm import BLOCK, block_hashes, checksum

    drawn = torch.randn(3 * BLOCK // 4 + 5, generator=torch.Generator().manual_seed(0))
    for kind in (torch.float32, torch.bfloat16, torch.int8):
        values = (drawn * 9).to(kind)
        for place in (0, len(values) // 2, len(values) - 1):
            other = values.clone()
            other[place] += 1
            assert checksum(values) == checksum(values.clone()) != checksum(other)
            flat, changed = values.view(torch.uint8), other.view(torch.uint8)
            assert block_hashes(flat).equal(block_hashes(flat.clone())) and not block_hashes(flat).equal(
                block_hashes(changed)
            )
    assert checksum(drawn) != checksum(drawn.flip(0))
    assert checksum(torch.tensor(1.0)) == checksum(torch.tensor([1.0]))  # a scalar is no special case
