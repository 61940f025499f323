"""`trainer=predict`: answers stand in the order of the records at any time, and nothing that is answered is lost."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from json_lines import lines
from upstream import write_checkpoint
from warm_server import WarmServer

WORDS = (
    "trainer=predict", "model=tiny_glm", "finetuning=none", "tracker=none", "data.dataset=identity_sample", "data.max_samples=30",
    "data.max_target_length=40", "trainer.disable_tqdm=true",
)  # fmt: skip


@pytest.mark.parametrize("other", ["trainer.per_device_eval_batch_size=1", "trainer.per_device_eval_batch_size=30"])
def test_any_batch_size_gives_the_same_file(glmtuner: Callable, tmp_path: Path, other: str) -> None:
    for words in (("trainer.output_dir=eight",), ("trainer.output_dir=other", other)):
        done = glmtuner(*WORDS, *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "eight/predictions.jsonl").read_text() == (tmp_path / "other/predictions.jsonl").read_text()
    assert [line["index"] for line in lines(tmp_path / "eight/predictions.jsonl")] == list(range(30))
    assert not list((tmp_path / "eight/evaluations").iterdir())


def test_beams_and_a_penalty_go_through_the_command_line(glmtuner: Callable, tmp_path: Path) -> None:
    found = {}
    for name, word in (
        ("greedy", "data.max_samples=30"),
        ("beams", "data.eval_num_beams=3"),
        ("penalty", "generation.repetition_penalty=1.5"),
    ):
        done = glmtuner(*WORDS, word, f"trainer.output_dir={name}")
        assert done.returncode == 0, done.stderr
        found[name] = [line["predict"] for line in lines(tmp_path / name / "predictions.jsonl")]
    assert len({*map(tuple, found.values())}) == 3 and all(len(answers) == 30 for answers in found.values())


def test_a_killed_prediction_goes_on_where_it_was(
    glmtuner: Callable, warm_server: WarmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.inference import generate

    done = glmtuner(*WORDS, "trainer.output_dir=whole")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "killed"
    path, early = folder / "predictions.jsonl", folder / "evaluations/predictions.early.jsonl"
    put = "glmtuner.inference.predict:OrderedFile.put"
    killed = warm_server.run(*WORDS, "trainer.output_dir=killed", cwd=tmp_path, kill_at_call=(put, 15))
    assert killed.code == -signal.SIGKILL, killed.output
    seen = [line["index"] for line in lines(path)]
    assert seen == list(range(len(seen))), "in order at any time"
    kept = {*seen, *(line["index"] for line in lines(early))}
    assert len(kept) == 14
    asked = []
    real = generate.answers

    def spied(model: Any, prompts: Any, *given: Any) -> Any:
        asked.extend(prompts)
        return real(model, prompts, *given)

    monkeypatch.setattr(generate, "answers", spied)
    done = glmtuner(*WORDS, "trainer.output_dir=killed")
    assert done.returncode == 0, done.stderr
    assert len(asked) == 30 - len(kept)
    assert path.read_text() == (tmp_path / "whole/predictions.jsonl").read_text()
    assert not early.exists()


def test_an_answer_that_comes_early_waits_in_a_file_of_its_own(tmp_path: Path) -> None:
    from glmtuner.inference.predict import OrderedFile, recover_answers

    path, early = tmp_path / "predictions.jsonl", tmp_path / "evaluations/predictions.early.jsonl"
    assert recover_answers(path, early, [], kept=True) == {}
    with OrderedFile(path, early, [0, 1, 2, 3, 4]) as file:
        for index, shown in ((2, []), (0, [0]), (4, [0]), (1, [0, 1, 2])):
            file.put({"index": index})
            assert [line["index"] for line in lines(path)] == shown
    (tmp_path / "evaluations/predictions.rank1.jsonl").write_text('{"index": 9}\n{"index": 1')
    assert [*recover_answers(path, early, [], kept=True)] == [0, 1, 2, 4, 9]
    assert [line["index"] for line in lines(early)] == [0, 1, 2, 4, 9], "whatever happens next, they are kept"
    assert recover_answers(path, early, [], kept=False) == {} and lines(early) == []


def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every answer is made of the tokens that its record teaches."""
    from glmtuner.inference import generate, predict

    real, rows = predict.answer_all, []

    def answer_all(context: Any, *given: Any, **options: Any) -> Any:
        rows[:] = context.data.evaluation
        return real(context, *given, **options)

    def answers(model: Any, prompts: Any, *given: Any) -> Any:
        for place, row in enumerate(rows):
            yield place, row["input_ids"][len(row["prompt_ids"]) : -1]

    monkeypatch.setattr(predict, "answer_all", answer_all)
    monkeypatch.setattr(generate, "answers", answers)


@pytest.mark.parametrize("most", ["512", "8"])
def test_a_perfect_answer_scores_100_though_the_tokenizer_writes_other_punctuation(
    glmtuner: Callable, tmp_path: Path, upstream_files: Path, monkeypatch: pytest.MonkeyPatch, most: str
) -> None:
    """ChatGLM-6B turns full-width punctuation into ASCII; against the label as it is written, BLEU-4 was 50.7."""
    write_checkpoint("chatglm_6b", tmp_path / "base", upstream_files)
    labels = ["你好，见到你很高兴！要问什么：天气？", "再见，一路顺风！"]
    records = [{"instruction": "你好", "output": label} for label in labels]
    (tmp_path / "records.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    perfect(monkeypatch)
    words = [word for word in WORDS if not word.startswith(("model=", "data."))]
    words += ["model=chatglm_6b", "model.model_name_or_path=base", "data.dataset=records.json"]
    done = glmtuner(*words, f"data.max_target_length={most}", "trainer.output_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert all(metrics[f"predict_{name}"] == pytest.approx(100, abs=0.01) for name in ("bleu-4", "rouge-1", "rouge-l"))
    found = lines(tmp_path / "run/predictions.jsonl")
    assert [line["label"] for line in found] == labels
    whole = ["你好,见到你很高兴!要问什么:天气?", "再见,一路顺风!"]
    assert all(line["predict"] == line["reference"] for line in found)
    assert all(text.startswith(line["reference"]) for text, line in zip(whole, found, strict=True))
    assert ([line["reference"] for line in found] == whole) is (most == "512")
    assert "scored against" in done.stdout and "，见到" in done.stdout and ",见到" in done.stdout
    assert glmtuner("report", "run").returncode == 0
    assert "100.00 [" in (tmp_path / "run/report.html").read_text(), "the report scores the same texts"


def test_answers_of_an_earlier_version_are_kept_and_those_to_other_records_are_not(
    glmtuner: Callable, tmp_path: Path
) -> None:
    words = [*WORDS, "trainer.output_dir=run", "data.max_samples=8"]
    assert glmtuner(*words).returncode == 0
    path, metrics = tmp_path / "run/predictions.jsonl", tmp_path / "run/metrics.json"
    kept, scores = lines(path), json.loads(metrics.read_text())
    earlier = [{name: value for name, value in line.items() if name != "reference"} for line in kept[:6]]
    earlier[5]["prompt"] += "?"  # the data set was edited meanwhile
    path.write_text("".join(f"{json.dumps(line)}\n" for line in earlier), encoding="utf-8")
    metrics.unlink()
    done = glmtuner(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lines that are not answers to the records as they are now, which are answered again: 1" in done.stdout
    assert lines(path) == kept and all(line["reference"] == line["label"] for line in kept)
    again = json.loads(metrics.read_text())
    assert {name: again[name] for name in scores if name.startswith("predict_")} == {
        name: value for name, value in scores.items() if name.startswith("predict_")
    }


def test_an_answer_that_is_lost_is_named_and_never_left_out_of_the_scores(
    glmtuner: Callable, warm_server: WarmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.inference import generate

    words, real = [*WORDS, "data.max_samples=8", "trainer.output_dir=run"], generate.answers
    path, metrics = tmp_path / "run/predictions.jsonl", tmp_path / "run/metrics.json"
    with monkeypatch.context() as patched:
        patched.setattr(generate, "answers", lambda *given: (each for each in real(*given) if each[0] != 3))
        done = glmtuner(*words)
    assert done.returncode == 2 and not metrics.exists(), done.stdout + done.stderr
    assert "7 answers for 8 records (record 3 is the first" in " ".join(done.stderr.split())
    assert glmtuner(*words).returncode == 0
    kept, scores = path.read_text(encoding="utf-8"), json.loads(metrics.read_text())
    assert [line["index"] for line in lines(path)] == list(range(8))
    path.write_text(kept.replace('{"index": 2,', '{"index": 2;'), encoding="utf-8")  # a line that cannot be read
    metrics.unlink()
    done = glmtuner(*words)
    assert done.returncode == 0 and "line 3 is not a JSON object" in done.stdout, done.stdout + done.stderr
    assert path.read_text(encoding="utf-8") == kept
    again = json.loads(metrics.read_text())
    assert all(again[name] == value for name, value in scores.items() if name.startswith("predict_"))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for vLLM, which answers with transformers and keeps what it was given."""
    given = SimpleNamespace(llm=[], sampling=[], prompts=[])

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            from transformers import AutoModelForCausalLM

            given.llm.append(options)
            self.model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)

        def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
            import torch
            from transformers import GenerationConfig

            given.prompts.append(prompts)
            found = []
            for prompt in prompts:
                ids = torch.tensor([prompt["prompt_token_ids"]])
                config = GenerationConfig(
                    max_new_tokens=sampling.max_tokens, eos_token_id=sampling.stop_token_ids, pad_token_id=0, do_sample=False,
                    repetition_penalty=sampling.repetition_penalty,
                )  # fmt: skip
                out = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
                tokens = out[0, ids.shape[1] :].tolist()
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]))
            return found

    def sampling_params(**values: Any) -> SimpleNamespace:
        given.sampling.append(values)
        return SimpleNamespace(**values)

    module = ModuleType("vllm")
    module.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    module.LLM, module.SamplingParams = LLM, sampling_params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return given


def test_vllm_gets_token_ids_and_merged_weights(
    glmtuner: Callable, tmp_path: Path, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.inference import vllm as vllm_engine

    train = [word for word in WORDS if not word.startswith(("trainer=", "finetuning="))]
    done = glmtuner(*train, "trainer.max_steps=4", "trainer.learning_rate=1e-2", "trainer.output_dir=run")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(vllm_engine, "PROMPTS_PER_CALL", 20)
    words = [word for word in WORDS if not word.startswith(("model=", "finetuning="))]
    for name in ("transformers", "vllm"):
        done = glmtuner(*words, "model.checkpoint_dir=run", f"generation.engine={name}", f"trainer.output_dir={name}")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "transformers/predictions.jsonl").read_text() == (
        tmp_path / "vllm/predictions.jsonl"
    ).read_text()
    assert [len(prompts) for prompts in vllm.prompts] == [20, 10]
    assert all(prompt.keys() == {"prompt_token_ids"} for prompts in vllm.prompts for prompt in prompts)
    (sampling,), (options,) = vllm.sampling, vllm.llm
    assert sampling["temperature"] == 0 and sampling["max_tokens"] == 40 and len(sampling["stop_token_ids"]) > 1
    longest = max(len(prompt["prompt_token_ids"]) for prompts in vllm.prompts for prompt in prompts)
    assert options["skip_tokenizer_init"] and options["max_model_len"] == longest + 40


def test_vllm_must_be_installed_and_know_the_model(glmtuner: Callable, tmp_path: Path) -> None:
    from small_models import built

    from glmtuner.errors import ConfigError
    from glmtuner.inference.vllm import vllm_answers

    done = glmtuner(*WORDS, "generation.engine=vllm", "trainer.output_dir=run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    message = " ".join(done.stderr.replace("│", " ").split())
    assert "vLLM is not installed" in message
    assert "type pip install 'glmtuner[vllm]', or type generation.engine=transformers" in message
    with pytest.raises(ConfigError, match=r"does not know the first ChatGLM-6B; type generation\.engine=transformers"):
        next(vllm_answers(built("ChatGLM"), [[20]], None, 0))  # type: ignore[arg-type]


def test_texts_with_other_line_separators_are_one_line_each(glmtuner: Callable, tmp_path: Path) -> None:
    """U+2028, U+2029 and U+0085 end no line of JSON; they did, and the answers beside them vanished with their scores."""
    texts = ["a\u2028b", "c\u2029d", "e\x85f", "g\x0b\x0ch"]
    records = [{"instruction": text, "output": text} for text in texts]
    (tmp_path / "records.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    words = [
        "trainer=predict",
        "model=tiny_glm",
        "tracker=none",
        "data.dataset=records.json",
        "data.max_target_length=4",
    ]
    done = glmtuner(*words, "trainer.disable_tqdm=true", "trainer.output_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run/predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["label"] for line in lines] == texts and "left out" not in done.stdout
    assert glmtuner("report", "run").returncode == 0
    kept = (tmp_path / "run/predictions.jsonl").read_bytes()
    (tmp_path / "run/metrics.json").unlink()
    again = glmtuner(*words, "trainer.disable_tqdm=true", "trainer.output_dir=run")
    assert again.returncode == 0 and (tmp_path / "run/predictions.jsonl").read_bytes() == kept
