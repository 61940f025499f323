"""Benchmarks score a model as lm-evaluation-harness' own model of transformers does, on the same weights and tasks.

The harness is no dependency; `make test-benchmarks` installs it beside the environment. Its model is built as its users build it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmark_tasks import write_tasks
from family_models import ASSET
from json_lines import lines
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from upstream import write_checkpoint

import glmtuner.models  # noqa: F401  (makes ChatGLM known to the Auto classes)
from glmtuner.benchmarks.model import LoadedModel
from glmtuner.benchmarks.run import ask
from glmtuner.benchmarks.tasks import local_sets
from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer

TASKS = ("words_choice", "words_letter", "sums", "texts")
EXACT = 1e-4  # of a log-likelihood in nats


def qwen3(folder: Path) -> Path:
    """A Qwen3 of random weights with the shipped tokenizer."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=3000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((ASSET / name).read_bytes())
    return folder


@pytest.fixture(params=["tiny_glm", "ChatGLM2", "Qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path, upstream_files: Path) -> tuple[str, Path]:
    """The words that name a model, and its folder."""
    if request.param == "tiny_glm":
        return "model=tiny_glm", ASSET
    if request.param == "Qwen3":
        return "model=causal_lm", qwen3(tmp_path / "base")
    return "model=chatglm2_6b", write_checkpoint("chatglm2_6b", tmp_path / "base", upstream_files)


def first_token(folder: Path) -> int | None:
    """A token that both models take for the one before texts without a context and for the one that ends an answer; None for their own.

    Those of ChatGLM2's tokenizer decode to "", with which every text begins and ends: the harness then takes every text for one
    that has its special tokens already, and every answer for one that has ended behind its first token.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return None if tokenizer.decode(own) else int(tokenizer.encode("A", add_special_tokens=False)[-1])


def theirs(folder: Path, tasks: Path, names: tuple[str, ...] = TASKS, **options: Any) -> Any:
    """What the harness' own model scores."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = first_token(folder)
    kind = HFLM if first is None else type("WithVisibleEnd", (HFLM,), {"eot_token_id": first})
    harness = kind(pretrained=loaded, tokenizer=tokenizer, batch_size=4, device="cpu", prefix_token_id=first)
    manager = TaskManager(include_defaults=False, include_path=[tasks / "tasks"])
    with local_sets("tests", [tasks / "sets"]):
        found = simple_evaluate(harness, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)
    return found


def asked(glmtuner: Callable, tasks: Path, *words: str, names: tuple[str, ...] = TASKS, output: str = "run") -> Path:
    """The folder of a run that asks the tasks."""
    done = glmtuner(
        *words, "trainer=benchmark", "finetuning=none", "tracker=none", f"benchmark={','.join(names)}",
        f"benchmark.include_path={tasks / 'tasks'}", f"benchmark.data_dir={tasks / 'sets'}", "trainer.disable_tqdm=true",
        f"trainer.output_dir={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(output)


def same_answers(one: Any, other: Any) -> bool:
    """Whether answers are the same texts, and log-likelihoods the same numbers, of the same greedy continuations."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same_answers(*pair) for pair in zip(one, other, strict=True))
    return abs(one - other) < EXACT if isinstance(one, float) else one == other


@pytest.mark.parametrize("shots", [None, 0])
def test_scores_and_log_likelihoods_are_the_harness_own(
    glmtuner: Callable, tmp_path: Path, model: tuple[str, Path], shots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_tasks(tmp_path)
    if (first := first_token(model[1])) is not None:
        monkeypatch.setattr(LoadedModel, "prefix_token_id", first)
        monkeypatch.setattr(LoadedModel, "eot_token_id", first)
    base = () if model[1] == ASSET else (f"model.model_name_or_path={model[1]}",)
    words = () if shots is None else (f"benchmark.num_fewshot={shots}",)
    run = tmp_path / asked(glmtuner, tasks, model[0], *base, *words)
    expected = theirs(model[1], tasks, num_fewshot=shots)
    metrics = json.loads((run / "metrics.json").read_text())
    for name in TASKS:
        by_filter: dict[Any, Any] = {}
        for sample in expected["samples"][name]:
            by_filter.setdefault(sample["doc_id"], {})[sample["filter"]] = sample["filtered_resps"]
        ours = {line["index"]: line["answers"] for line in lines(run / f"benchmarks/{name}.jsonl")}
        assert ours.keys() == by_filter.keys() and len(ours) == 10
        for index, answers in by_filter.items():
            for kind, answer in answers.items():
                assert same_answers(answer, ours[index][kind]), (name, index, kind, answer, ours[index][kind])
        for key, value in expected["results"][name].items():
            metric, _, kind = key.partition(",")
            if not kind or "stderr" in metric:
                continue
            label = metric if kind == "none" else f"{metric}_{kind}"
            assert metrics[f"benchmark_{name}_{label}"] == pytest.approx(value, abs=EXACT, rel=EXACT)


def test_a_group_has_the_harness_own_mean_and_prompts_without_a_template_are_the_harness_own(
    glmtuner: Callable, tmp_path: Path
) -> None:
    tasks = write_tasks(tmp_path)
    run = tmp_path / asked(glmtuner, tasks, "model=tiny_glm", "benchmark.limit=5", names=("words",))
    expected = theirs(ASSET, tasks, names=("words",), limit=5)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["benchmark_words"] == metrics["benchmark_words_acc"] == expected["results"]["words"]["acc,none"]
    for name in ("words_choice", "words_letter"):
        assert metrics[f"subject_{name}"] == expected["results"][name]["acc,none"]
        about = json.loads((run / f"benchmarks/{name}.json").read_text())
        assert about["records"] == 5 and about["of"] == 10
        assert about["first_prompt"] == expected["samples"][name][0]["arguments"][0][0]
    report = (run / "report.md").read_text()
    assert "## Benchmarks" in report and "| words |  | acc |" in report and "|  | words_letter | acc |" in report


def test_a_task_that_is_finished_is_not_asked_again(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, names = write_tasks(tmp_path), ("words_choice", "words_letter", "sums")
    whole = tmp_path / asked(glmtuner, tasks, "model=tiny_glm", names=names, output="whole")
    called: list[str] = []

    def interrupted(context: Any, model: Any, name: str, task: Any) -> Any:
        called.append(name)
        if name == "words_letter" and len(called) == 2:
            raise KeyboardInterrupt
        return ask(context, model, name, task)

    monkeypatch.setattr("glmtuner.benchmarks.run.ask", interrupted)
    with pytest.raises(AssertionError, match=r"Interrupt|130"):
        asked(glmtuner, tasks, "model=tiny_glm", names=names)
    assert not (tmp_path / "run/metrics.json").exists()
    run = tmp_path / asked(glmtuner, tasks, "model=tiny_glm", names=names)
    assert called == ["words_choice", "words_letter", "words_letter", "sums"]
    for name in names:
        assert (run / f"benchmarks/{name}.jsonl").read_bytes() == (whole / f"benchmarks/{name}.jsonl").read_bytes()
    scores, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, whole))
    assert {key: value for key, value in scores.items() if "benchmark" in key}.items() <= expected.items()


def test_turns_are_those_of_the_runs_template(glmtuner: Callable, tmp_path: Path) -> None:
    """The prompt's tokens are the template's, and the options stand where the answer begins."""
    tasks = write_tasks(tmp_path)
    words = ("model=tiny_glm", "benchmark.chat_template=true", "benchmark.limit=2")
    run = tmp_path / asked(glmtuner, tasks, *words, names=("words_choice", "sums"))
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    loaded = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).eval()
    shots, questions = (
        lines(tasks / f"sets/ORG/words/colours/{name}-00000-of-00001.jsonl") for name in ("dev", "test")
    )
    turns: list[dict[str, str]] = [{"role": "system", "content": "The following are questions about words.\n\n"}]
    for shot in shots[:3]:
        turns.append({"role": "user", "content": f"{shot['question']}\nAnswer:"})
        turns.append({"role": "assistant", "content": shot["choices"][shot["answer"]]})
    turns.append({"role": "user", "content": f"{questions[0]['question']}\nAnswer:"})
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    (first, _) = lines(run / "benchmarks/words_choice.jsonl")
    for option, (logprob, _) in zip(questions[0]["choices"], first["answers"]["none"], strict=True):
        target = tokenizer.encode(option, add_special_tokens=False)
        with torch.no_grad():
            logits = loaded(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=EXACT)


def test_behind_a_tokenizer_that_closes_a_text_stand_the_options(
    glmtuner: Callable, tmp_path: Path, upstream_files: Path
) -> None:
    """ChatGLM-6B's tokenizer puts [gMASK] <sop> behind a text, where the harness' own model looks for the options."""
    tasks, folder = write_tasks(tmp_path), write_checkpoint("chatglm_6b", tmp_path / "base", upstream_files)
    words = ("model=chatglm_6b", f"model.model_name_or_path={folder}", "benchmark.limit=2", "benchmark.num_fewshot=0")
    run = tmp_path / asked(glmtuner, tasks, *words, names=("words_choice",))
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    (question, *_) = lines(tasks / "sets/ORG/words/colours/test-00000-of-00001.jsonl")
    context = f"The following are questions about words.\n\n{question['question']}\nAnswer:"
    prompt = tokenizer.encode(context)
    plain = tokenizer.encode(context, add_special_tokens=False)
    assert prompt == [*plain, *tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])]
    (first, _) = lines(run / "benchmarks/words_choice.jsonl")
    for option, (logprob, _) in zip(question["choices"], first["answers"]["none"], strict=True):
        target = tokenizer.encode(f"{context} {option}", add_special_tokens=False)[len(plain) :]
        with torch.no_grad():
            logits = loaded(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=EXACT)


def test_a_sweep_is_ranked_by_a_benchmark_with_paired_intervals(glmtuner: Callable, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    done = glmtuner(
        "-m", "model=tiny_glm", "tracker=none", "data.dataset=identity_sample", "trainer.max_steps=2", "trainer.learning_rate=1e-4,1e-2",
        "trainer.disable_tqdm=true", "benchmark=[words]", f"benchmark.include_path={tasks / 'tasks'}",
        f"benchmark.data_dir={tasks / 'sets'}", "objective=words", "name=rates",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "outputs/sweeps/rates/report.md").read_text()
    assert "Ranked by words, higher is better." in report and "20 records" in report
    rows = (tmp_path / "outputs/sweeps/rates/leaderboard.csv").read_text().splitlines()
    header = rows[0].split(",")
    for name in ("benchmark_words", "benchmark_words_low", "subject_words_choice", "difference_low"):
        assert name in header
    assert all(row.split(",")[header.index("benchmark_words_low")] for row in rows[1:])
    for words, said in (
        (("objective=wrods",), "did you mean 'words'"),
        (("benchmark=words_chioce",), "did you mean 'words_choice'"),
    ):
        failed = glmtuner(
            "model=tiny_glm", "trainer=benchmark", "finetuning=none", "tracker=none", f"benchmark.include_path={tasks / 'tasks'}",
            f"benchmark.data_dir={tasks / 'sets'}", *(words if "benchmark" in words[0] else ("-m", "benchmark=[words]", *words)),
        )  # fmt: skip
        assert failed.returncode != 0 and said in failed.stdout + failed.stderr


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("choice.yaml", "dataset_name: colours\n=dataset_name: shapes\n", "of shapes; legal are shapes/<split>"),
        ("choice.yaml", "test_split: test\n=test_split: tset\n", "has the splits dev, test, and the task reads tset"),
        ("choice.yaml", 'doc_to_choice: "{{choices}}"=doc_to_choice: "{{options}}"', "the task"),
        ("choice.yaml", "dataset_path: ORG/words=dataset_path: ORG/none", "hf download ORG/none --repo-type dataset"),
        ("sums.yaml", "do_sample: false=do_sample: true, top_p: 0.5", "generation_kwargs have top_p: 0.5"),
        ("sums.yaml", "max_gen_toks: 24=max_gen_toks: 2000000", "answers of 2,000,000 tokens"),
    ],
)
def test_a_task_that_cannot_be_asked_says_why(
    glmtuner: Callable, tmp_path: Path, file: str, text: str, said: str
) -> None:
    tasks = write_tasks(tmp_path)
    path, (before, after) = tasks / "tasks" / file, text.split("=", 1)
    source = path.read_text()
    assert before in source
    path.write_text(source.replace(before, after))
    done = glmtuner(
        "model=tiny_glm", "trainer=benchmark", "finetuning=none", "tracker=none", f"benchmark={'sums' if 'sums' in file else 'words_choice'}",
        f"benchmark.include_path={tasks / 'tasks'}", f"benchmark.data_dir={tasks / 'sets'}",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_sampled_answers_are_the_same_each_time(glmtuner: Callable, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    path = tasks / "tasks/sums.yaml"
    path.write_text(path.read_text().replace("do_sample: false", "do_sample: true, temperature: 0.9"))
    found = [
        lines(
            tmp_path / asked(glmtuner, tasks, "model=tiny_glm", names=("sums",), output=name) / "benchmarks/sums.jsonl"
        )
        for name in ("one", "two")
    ]
    assert found[0] == found[1]
    assert len({line["answers"]["whole"][0] for line in found[0]}) > 1
