"""Hours, energy, money and submissions of jobs, by hand; what is measured once; and what is not measured, with the reason."""

import dataclasses
import json

import pytest

from glmtuner.config.compose import compose
from glmtuner.errors import ConfigError
from glmtuner.launch.forecast import jobs as jobs_module
from glmtuner.launch.forecast.cost import Line, Probe, Rows, Seconds
from glmtuner.launch.forecast.jobs import Job, cost_key, forecast_job, not_probed, probes_of
from glmtuner.launch.forecast.schedule import Launcher
from glmtuner.launch.forecast.table import duration, sentences
from glmtuner.launch.forecast.whole import Forecast, json_of, refuse, require_right_hours
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.spent import Hours

register_presets()

WORDS = ("model=tiny_glm", "tracker=none", "trainer.max_steps=100", "trainer.save_strategy=no")
# 100 s of start-up and 36 s a step: 3,700 s
PROBE = Probe(
    device="NVIDIA H100", libraries=Seconds(60, 30), loading=Seconds(40, 20), batch=Line(Seconds(36, 18)), train=Rows(batches=100, records=800)
)  # fmt: skip


def job(*words: str) -> Job:
    return Job(composed=compose([*WORDS, *words]), label="job")


def found(launcher: Launcher, *words: str, probe: Probe | str = PROBE, **given: object):
    arguments = {"follows": False, "seen": None} | given
    return forecast_job(job(*words), probe, launcher, None, **arguments)


def test_gpu_hours_money_and_energy_by_hand():
    each = found(Launcher(), "budget.price_per_gpu_hour=3.6", "budget.watts=700")
    assert each.gpu_hours == pytest.approx(3700 / 3600) and each.cpu_hours == 0
    assert each.money == pytest.approx(3.7) and each.kilowatt_hours == pytest.approx(0.7 * 3700 / 3600)
    measured = found(Launcher(), "budget.watts=700", probe=dataclasses.replace(PROBE, watts=350.0))
    assert measured.kilowatt_hours == pytest.approx(0.35 * 3700 / 3600)  # what the machine tells comes first
    assert found(Launcher()).kilowatt_hours is None and found(Launcher()).money is None


def test_jobs_of_several_gpus_take_as_many_hours_as_gpus():
    assert found(Launcher(remote=True, gpus=8)).gpu_hours == pytest.approx(8 * 3700 / 3600)


def test_without_a_gpu_hours_are_those_of_the_processor():
    each = found(
        Launcher(at_once=2),
        "budget.price_per_cpu_hour=2",
        "budget.watts=100",
        probe=dataclasses.replace(PROBE, device="cpu"),
    )
    assert (each.gpu_hours, each.cpu_hours) == (0, pytest.approx(1850 / 3600))
    assert each.money == pytest.approx(2 * 1850 / 3600)
    assert each.kilowatt_hours == pytest.approx(0.1 * 3700 / 3600 / 2)  # two jobs share the machine


def test_each_submission_starts_again():
    """1,200 s with a notice of 100 s: 1,000 s of work in each but the last, 1,100 in that: 4, with 300 s of start-up more."""
    each = found(Launcher(limit_s=1200, notice_s=100, most_submissions=3))
    assert each.submissions == 4 and each.gpu_hours == pytest.approx(4000 / 3600)
    told = sentences(
        Forecast(jobs=[each], launcher=Launcher(limit_s=1200, most_submissions=3), budget=job().composed.run.budget)
    )
    assert "job: 4 submissions of 20 min, and hydra.launcher.max_num_timeout allows 3" in told
    endless = found(Launcher(limit_s=150, notice_s=100))
    assert endless.submissions is None and not endless.known
    told = sentences(Forecast(jobs=[endless], launcher=Launcher(limit_s=150), budget=job().composed.run.budget))
    assert "type a larger hydra.launcher.timeout_min" in told[-1]


def test_jobs_of_one_process_load_its_libraries_once():
    assert found(Launcher(), follows=True).gpu_hours == pytest.approx(3640 / 3600)


def test_what_an_equal_job_took_comes_before_the_probe():
    each = found(Launcher(), seen=Seconds(1800, 900))
    assert each.source == "finished run" and each.gpu_hours == pytest.approx(0.5)


def test_the_sum_and_the_elapsed_time_of_a_sweep():
    one = found(Launcher(at_once=2), "budget.price_per_gpu_hour=3.6")
    done = dataclasses.replace(one, state="finished")
    whole = Forecast(
        jobs=[one, done, dataclasses.replace(one, count=4)], launcher=Launcher(at_once=2), budget=job().composed.run.budget,
        spent=Hours(gpu=2),
    )  # fmt: skip
    assert whole.hours.gpu == pytest.approx(5 * 3700 / 3600)
    assert whole.elapsed_s == pytest.approx(3 * 3700)  # five jobs on two places
    assert whole.sum_of("money") == pytest.approx(5 * 3.7)
    values = json_of(whole)
    assert values["to_come"] == 5 and json.loads(json.dumps(values))["gpu_hours"] == pytest.approx(whole.hours.gpu)


def test_a_limit_counts_what_is_spent():
    one = found(Launcher())
    budget = compose([*WORDS, "budget.gpu_hours=3"]).run.budget
    fits = Forecast(jobs=[one], launcher=Launcher(), budget=budget, spent=Hours(gpu=1.9))
    refuse(fits, "the sweep")
    over = dataclasses.replace(fits, spent=Hours(gpu=2))
    with pytest.raises(
        ConfigError,
        match=r"budget.gpu_hours=3 is reached by 3\.028: the sweep is forecast to take 3\.03 GPU-hours, of which 2 ",
    ):
        refuse(over, "the sweep")
    refuse(
        dataclasses.replace(over, jobs=[dataclasses.replace(one, state="finished")]), "the sweep"
    )  # nothing is left to run


def test_hours_of_the_wrong_kind_are_refused():
    budget = compose([*WORDS, "budget.cpu_hours=3"]).run.budget
    with pytest.raises(ConfigError, match=r"budget.cpu_hours=3: the jobs run on a GPU; type budget.gpu_hours="):
        require_right_hours(Forecast(jobs=[found(Launcher())], launcher=Launcher(), budget=budget))


def test_what_differs_in_rate_or_seed_or_length_of_training_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path))
    probed = []

    def probe(composed):
        probed.append(composed.run.finetuning.finetuning_type)
        return PROBE

    monkeypatch.setattr(jobs_module, "probed", probe)
    sweep = [
        job("trainer.seed=1"), job("trainer.seed=2", "trainer.learning_rate=1e-2"), job("trainer.max_steps=7"),
        job("finetuning=full"), job("finetuning=full", "trainer.save_strategy=epoch"),
    ]  # fmt: skip
    found = probes_of(sweep, Launcher())
    assert probed == ["lora", "full"] and len(found) == 2 and {*found.values()} == {PROBE}
    probes_of(sweep, Launcher())
    assert probed == ["lora", "full"]  # from the cache
    (file, *_) = (tmp_path / "forecasts").iterdir()
    file.write_text("{}", encoding="utf-8")
    probes_of(sweep, Launcher())
    assert len(probed) == 3  # a damaged one is measured again


@pytest.mark.parametrize(
    "words",
    [
        ("finetuning=full",), ("trainer.per_device_train_batch_size=2",), ("trainer.gradient_accumulation_steps=2",),
        ("data.max_source_length=64",), ("finetuning.lora_rank=3",), ("trainer.gradient_checkpointing=true",),
        ("data.dev_ratio=0.1", "trainer.eval_strategy=epoch"),
    ],
)  # fmt: skip
def test_what_changes_the_cost_of_a_step_is_measured_again(words):
    assert cost_key(job(*words).composed) != cost_key(job().composed)


@pytest.mark.parametrize(
    ("words", "launcher", "told"),
    [
        ((), Launcher(remote=True), "the jobs run on other machines, and this one has no GPU"),
        (("parallel=fsdp2",), Launcher(), "parallel=fsdp2 shards a model"),
        (("model=chatglm3_6b",), Launcher(), "its weights are not on this machine yet"),
        ((), Launcher(), None),
    ],
)
def test_what_is_not_measured_says_why(words, launcher, told, monkeypatch):
    monkeypatch.setattr(jobs_module, "visible_gpus", lambda: [])
    reason = not_probed(job(*words).composed.run, launcher)
    assert (reason is None) if told is None else told in reason
    if reason is not None:
        each = found(launcher, *words, probe=reason)
        assert not each.known and each.reason == reason


def test_durations_are_in_words():
    assert [duration(seconds) for seconds in (4.23, 600, 12_000, 200_000)] == [
        "4.23 s",
        "10 min",
        "3 h 20 min",
        "2 d 7 h",
    ]
