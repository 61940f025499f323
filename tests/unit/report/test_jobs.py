"""The jobs of a sweep from its folders: states, varied knobs, and damaged folders."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmtuner.errors import ConfigError
from glmtuner.report import jobs
from glmtuner.report.jobs import State, format_value, read_jobs, short_names, unquoted, value_of, varied_knobs
from glmtuner.run_folder.folder import RunFolder

METRICS = {"train_loss": 1.0}


def states(sweep):
    return {job.name: (job.state, job.reason) for job in read_jobs(sweep)}


def test_what_became_of_each_job(sweep, job, failed):
    job("done", metrics=METRICS)
    job("half")
    (job("new") / "history.jsonl").unlink()
    job("epochs", {"trainer.max_steps": -1})
    failed("wrong", [])
    failed("big", [], kind="infeasible", reason="CUDA out of memory")
    assert states(sweep) == {
        "done": (State.finished, ""),
        "half": (State.unfinished, "step 4 of 4"),
        "new": (State.unfinished, "no step logged yet"),
        "epochs": (State.unfinished, "step 4 of about 4"),
        "wrong": (State.failed, "a cable was pulled"),
        "big": (State.infeasible, "CUDA out of memory"),
    }


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.json", '{"train_loss": 1.'),
        ("metrics.json", "[]"),
        ("config.yaml", "a: [1"),
        ("config.yaml", "7"),
        ("config.yaml", "trainer: {seed: '${nothing.here}'}\nx: '${'"),
        ("failed.json", "{"),
        ("failed.json", "[1]"),
        ("failed.json", "7"),
    ],
)
def test_a_damaged_folder_is_a_failed_job_that_says_so(sweep, job, file, text):
    job("whole", metrics=METRICS)
    (job("broken", metrics=METRICS) / file).write_text(text)
    found = states(sweep)
    assert found["whole"] == (State.finished, "")
    assert found["broken"][0] is State.failed and "damaged" in found["broken"][1] and "\n" not in found["broken"][1]


def test_bytes_that_are_no_text_are_damage_too(sweep, job):
    for name in ("config.yaml", "metrics.json", "failed.json"):
        (job(name, metrics=METRICS) / name).write_bytes(b"\xff\xfe\x00")
    (job("fine", metrics=METRICS) / "history.jsonl").write_bytes(
        b'\xff\n{"step": 2, "loss": 1.0}\n[1]\n{"step": "x"}\n{"ste'
    )
    found = {each.name: each for each in read_jobs(sweep)}
    assert found["fine"].state is State.finished and found["fine"].history == [{"step": 2, "loss": 1.0}]
    assert {each.state for name, each in found.items() if name != "fine"} == {State.failed}


def test_a_folder_that_goes_away_while_it_is_read_is_left_out(sweep, job, monkeypatch):
    job("stays", metrics=METRICS)
    gone = job("vanishes", metrics=METRICS)
    read = RunFolder.metrics

    def metrics(folder):
        if folder.path == gone:
            shutil.rmtree(gone)
            raise FileNotFoundError(gone)
        return read(folder)

    monkeypatch.setattr(RunFolder, "metrics", metrics)
    assert [each.name for each in read_jobs(sweep)] == ["stays"]
    shutil.rmtree(sweep)
    assert read_jobs(sweep) == []


def test_the_typed_keys_that_differ_were_varied_in_the_order_they_were_typed(sweep, job):
    for rate, rank in ((1e-3, 8), (1e-3, 16), (5e-4, 8)):
        values = {"trainer.learning_rate": rate, "finetuning.lora_rank": rank, "trainer.max_steps": 4}
        job(f"{rate}_{rank}", values)
    found = read_jobs(sweep)
    assert varied_knobs(found) == ["trainer.learning_rate", "finetuning.lora_rank"]
    assert short_names(varied_knobs(found)) == {
        "trainer.learning_rate": "learning_rate",
        "finetuning.lora_rank": "lora_rank",
    }
    assert short_names(["a.rank", "b.rank"]) == {"a.rank": "a.rank", "b.rank": "b.rank"}


def methods(job):
    lora = {"finetuning.finetuning_type": "lora", "finetuning.lora_rank": 8, "finetuning.lora_alpha": 32.0}
    freeze = {"finetuning.finetuning_type": "freeze", "finetuning.num_layer_trainable": 3}
    job("l8", lora, ["finetuning=lora"])
    job("l16", {**lora, "finetuning.lora_rank": 16}, ["finetuning=lora", "finetuning.lora_rank=16"])
    job("f", freeze, ["finetuning=freeze"], without=("finetuning.lora_rank",))


def test_a_method_is_shown_as_the_method_and_not_as_its_keys(sweep, job):
    methods(job)
    found = {each.name: each for each in read_jobs(sweep)}
    assert varied_knobs([*found.values()]) == ["finetuning", "finetuning.lora_rank"]
    assert [format_value(value_of(found[name], "finetuning.lora_rank")) for name in ("l8", "l16", "f")] == [
        "8",
        "16",
        "-",
    ]
    assert varied_knobs([found["l8"], found["f"]]) == ["finetuning"]


def test_without_overrides_the_knobs_are_of_the_configs(sweep, job):
    methods(job)
    for path in sweep.glob("*/overrides.txt"):
        path.unlink()
    assert varied_knobs(read_jobs(sweep)) == ["finetuning", "finetuning.lora_rank"]


def test_the_model_and_the_quantization_are_shown_by_their_names(sweep, job):
    job("a", {"model.model_name_or_path": "THUDM/chatglm-6b", "model.family": "chatglm", "quant.quantization_bit": 4},
        ["model=chatglm_6b", "quant=int4"])  # fmt: skip
    job("b", {"finetuning.lora_target": ["q_proj"]}, [])
    found = read_jobs(sweep)
    assert varied_knobs(found) == ["model", "quant"]
    assert [[format_value(value_of(each, knob)) for knob in ("model", "quant")] for each in found] == [
        ["chatglm_6b", "int4"], ["tiny_glm", "none"],
    ]  # fmt: skip


def test_what_an_experiment_brings_along_is_the_experiment(sweep, job):
    job("a", {"trainer.weight_decay": 0.1, "trainer.learning_rate": 0.1}, ["experiment=one"])
    job("b", {"trainer.weight_decay": 0.2, "trainer.learning_rate": 0.2}, ["experiment=two"])
    assert varied_knobs(read_jobs(sweep)) == ["experiment"]


def test_a_preset_that_was_edited_between_two_commands_shows(sweep, job):
    job("a", {"trainer.weight_decay": 0.1}, ["trainer.learning_rate=0.001"])
    job("b", {"trainer.weight_decay": 0.2, "trainer.learning_rate": 0.1}, ["trainer.learning_rate=0.1"])
    assert varied_knobs(read_jobs(sweep)) == ["trainer.learning_rate", "trainer.weight_decay"]


def test_what_changes_no_number_and_seeds_are_no_knobs(sweep, job):
    for seed in (1, 2):
        typed = [f"trainer.seed={seed}", f"name=n{seed}", f"trainer.output_dir=o{seed}", f"hydra.job.num={seed}"]
        job(f"s{seed}", {"trainer.seed": seed, "trainer.output_dir": f"o{seed}", "name": f"n{seed}"}, typed)
    found = read_jobs(sweep)
    assert varied_knobs(found) == [] and [each.seed for each in found] == ["1", "2"]


def test_a_failed_job_has_its_knobs_from_its_overrides(sweep, job, failed):
    job("a", {"trainer.learning_rate": 1e-3, "data.dataset": ["one", "two"]},
        ["trainer.learning_rate=1e-3", "data.dataset=[one,two]", "trainer.max_steps=4"])  # fmt: skip
    failed("b", ["trainer.learning_rate=1e-2", "data.dataset=['three 3']", "hub_token=<hidden>", "strange", 7])
    found = {each.name: each for each in read_jobs(sweep)}
    assert varied_knobs([*found.values()]) == ["trainer.learning_rate", "data.dataset"]
    assert [format_value(value_of(found["b"], knob)) for knob in ("trainer.learning_rate", "data.dataset")] == [
        "0.01",
        "three 3",
    ]
    assert format_value(value_of(found["a"], "data.dataset")) == "one,two"
    assert value_of(found["b"], "trainer.learning_rate") == 0.01


def test_a_number_typed_in_two_ways_is_one_value(sweep, job, failed):
    job("a", {"trainer.learning_rate": 0.001}, ["trainer.learning_rate=1e-3"])
    failed("b", ["trainer.learning_rate=0.001"])
    assert varied_knobs(read_jobs(sweep)) == []


def test_values_are_formatted_as_in_an_override():
    assert [format_value(value) for value in (None, True, 1e-05, 2.0, 3, ["a", "b"], "x")] == ["-", "true", "1e-05", "2", "3", "a,b", "x"]  # fmt: skip
    assert unquoted([True, None, 1.5]) == [True, None, 1.5]


TEXTS = st.text(alphabet="aeltruNof01-_.+x/ =,[]'E", max_size=12) | st.from_regex(
    r"-?[0-9.]{1,6}(e-?[0-9])?", fullmatch=True
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    key=st.sampled_from(["a.b_1", "trainer.max_steps", "hydra/launcher", "a/b.c", "x", "+x", "~x", "a.0b", "A"]),
    value=TEXTS,
)
def test_what_is_read_without_hydra_is_what_hydra_reads(key, value):
    def parsed(read):
        try:
            return repr(read(f"{key}={value}"))
        except (ConfigError, ValueError):
            return "not accepted"

    assert parsed(jobs._parsed) == parsed(jobs._parsed_by_hydra)
