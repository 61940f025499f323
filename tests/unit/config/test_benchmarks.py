"""benchmark=…: a short form, ranges, and what it cannot be combined with; without lm-evaluation-harness."""

import importlib.metadata
import importlib.util

import pytest

from glmtuner.benchmarks.tasks import check_benchmarks, roots_of
from glmtuner.config.benchmarks import Benchmark
from glmtuner.config.compose import compose, compose_every_job
from glmtuner.config.objective import less_is_better, measured_as
from glmtuner.config.overrides import bracket_lists
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()
ASKS = ("model=tiny_glm", "finetuning=none", "trainer=benchmark", "tracker=none")


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose([*ASKS, *words])
    return str(error.value)


@pytest.mark.parametrize(
    ("typed", "run", "sweep"),
    [
        ("benchmark=ceval", "benchmark.tasks=[ceval]", "benchmark.tasks=[ceval]"),
        ("benchmark=ceval,mmlu", "benchmark.tasks=[ceval,mmlu]", "benchmark.tasks=[ceval],[mmlu]"),
        ("benchmark=[ceval,mmlu]", "benchmark.tasks=[ceval,mmlu]", "benchmark.tasks=[ceval,mmlu]"),
        ("benchmark.tasks=ceval", "benchmark.tasks=[ceval]", "benchmark.tasks=[ceval]"),
        ("benchmark.limit=3", "benchmark.limit=3", "benchmark.limit=3"),
    ],
)
def test_a_comma_is_and_in_a_run_and_each_in_a_sweep(typed: str, run: str, sweep: str) -> None:
    assert bracket_lists([typed], multirun=False) == [run]
    assert bracket_lists([typed], multirun=True) == [sweep]


def test_a_run_that_only_asks_benchmarks_is_one() -> None:
    run = compose([*ASKS, "benchmark=ceval-valid_law,mmlu", "benchmark.num_fewshot=0"]).run
    assert run.benchmark == Benchmark(tasks=["ceval-valid_law", "mmlu"], num_fewshot=0)
    jobs = compose_every_job([*ASKS, "benchmark=ceval,mmlu"])
    assert "benchmark.tasks=[ceval],[mmlu]" in jobs
    assert "nothing to do" in refused() and "benchmark=ceval" in refused()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("benchmark=ceval", "benchmark.num_fewshot=-1"), "benchmark.num_fewshot=-1: 0 or more"),
        (("benchmark=ceval", "benchmark.limit=0"), "benchmark.limit=0: 1 or more"),
        (("benchmark=ceval,ceval",), "ceval is named twice"),
        (("benchmark.limit=3", "trainer=train", "finetuning=lora"), "without a benchmark: type benchmark=ceval"),
        (("benchmark=ceval", "benchmark.limt=3"), "did you mean 'limit'"),
        (("benchmark=ceval", "stage=rm"), "stage=rm: it trains no model that generates answers"),
        (("benchmark=ceval", "generation.engine=vllm"), "benchmarks are asked of the loaded model"),
        (("benchmark=ceval", "parallel=fsdp2"), "parallel=fsdp2: sharded models are not scored"),
        (("benchmark=ceval", "benchmark_dir=sets"), "type benchmark.data_dir=sets"),
        (("benchmark=ceval", "benchmark_tasks=mine"), "type benchmark.include_path=mine"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], said: str) -> None:
    assert said in refused(*words)


@pytest.mark.parametrize("installed", [None, "0.4.8"])
def test_without_the_package_it_says_what_to_install(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    with pytest.raises(ConfigError, match=r"pip install 'glmtuner\[benchmark\]'") as error:
        check_benchmarks(Benchmark(tasks=["ceval"]))
    assert ("is not installed" if installed is None else "lm_eval 0.4.8 is too old") in str(error.value)
    check_benchmarks(Benchmark())  # asks for nothing


def test_the_folder_of_sets_is_the_key_or_the_variable(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLMTUNER_BENCHMARKS", raising=False)
    assert roots_of(Benchmark(tasks=["ceval"])) == []
    monkeypatch.setenv("GLMTUNER_BENCHMARKS", str(tmp_path))
    assert roots_of(Benchmark(tasks=["ceval"])) == [tmp_path]
    (tmp_path / "other").mkdir()
    assert roots_of(Benchmark(tasks=["ceval"], data_dir=str(tmp_path / "other"))) == [tmp_path / "other"]
    with pytest.raises(ConfigError, match=r"benchmark.data_dir=.*nowhere: no such folder"):
        roots_of(Benchmark(tasks=["ceval"], data_dir=str(tmp_path / "nowhere")))
    monkeypatch.setenv("GLMTUNER_BENCHMARKS", "nowhere")
    with pytest.raises(ConfigError, match="GLMTUNER_BENCHMARKS=nowhere: no such folder"):
        roots_of(Benchmark(tasks=["ceval"]))


def test_objectives_name_benchmarks_their_metrics_and_their_tasks() -> None:
    measured = {"benchmark_ceval": 0.3, "benchmark_ceval_acc_norm": 0.2, "subject_ceval-valid_law": 0.4}
    assert measured_as("ceval", measured) == "benchmark_ceval"
    assert measured_as("ceval_acc_norm", measured) == "benchmark_ceval_acc_norm"
    assert measured_as("ceval-valid_law", measured) == "subject_ceval-valid_law"
    assert measured_as("mmlu", measured) is None
    assert less_is_better("benchmark_wikitext_word_perplexity") and not less_is_better("benchmark_ceval")
