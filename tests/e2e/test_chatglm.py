"""ChatGLM through the command line: every generation trains and predicts, from a folder and from a hub, without remote code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import serve
from json_lines import lines
from safetensors.torch import load_file, save_file
from stand_ins import write_parity
from upstream import write_checkpoint

from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer

MODELS = {
    "chatglm_6b": "THUDM/chatglm-6b",
    "chatglm2_6b": "zai-org/chatglm2-6b",
    "chatglm3_6b": "zai-org/chatglm3-6b",
}
SHORT = (
    "tracker=none", "data.dataset=alpaca_zh_sample", "data.eval_dataset=identity_sample", "data.max_samples=12", "data.max_target_length=16",
    "trainer.max_steps=6", "trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=12",
    "trainer.disable_tqdm=true",
)  # fmt: skip
PREDICTS = ("trainer.do_predict=true", "trainer.predict_with_generate=true")


def predict_again(glmtuner: Callable, tmp_path: Path) -> None:
    """The finished run's folder alone gives the same answers."""
    done = glmtuner(
        "trainer=predict", "model.checkpoint_dir=run", "data.dataset=identity_sample", *(word for word in SHORT if "max_steps" not in word and "data.dataset" not in word),
        "trainer.output_dir=predicted",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(tmp_path / "predicted/predictions.jsonl") == lines(tmp_path / "run/predictions.jsonl")


@pytest.mark.parametrize("preset", [*MODELS, "glm4_9b_chat"])
def test_trains_and_predicts_from_a_folder(
    glmtuner: Callable, tmp_path: Path, upstream_files: Path, preset: str
) -> None:
    write_checkpoint(preset, tmp_path / "base", upstream_files)
    done = glmtuner(
        f"model={preset}", "model.model_name_or_path=base", *SHORT, *PREDICTS, "trainer.learning_rate=3e-2",
        "trainer.max_steps=18", "trainer.logging_steps=1", "trainer.output_dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss"] for line in lines(tmp_path / "run/history.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3])  # an epoch is three steps
    about = json.loads((tmp_path / "run/provenance.json").read_text())
    templates = {"chatglm_6b": "chatglm", "chatglm2_6b": "chatglm2", "chatglm3_6b": "chatglm3", "glm4_9b_chat": "glm4"}
    assert about["template"]["name"] == templates[preset]
    predict_again(glmtuner, tmp_path)


@pytest.mark.parametrize("preset", ["chatglm_6b", "chatglm2_6b"])
@pytest.mark.parametrize(("typed", "asked"), [((), "译成英文\n早"), (("data.input_separator=",), "译成英文早")])
def test_a_prompt_begins_with_the_prefix_and_its_input_is_joined_as_typed(
    glmtuner: Callable, tmp_path: Path, upstream_files: Path, preset: str, typed: tuple[str, ...], asked: str
) -> None:
    """As in the original project: `prefix + build_prompt(instruction + input)`, where nothing stands between the two."""
    write_checkpoint(preset, tmp_path / "base", upstream_files)
    record = {"instruction": "译成英文", "input": "早", "output": "Morning"}
    (tmp_path / "records.jsonl").write_text(f"{json.dumps(record)}\n", encoding="utf-8")
    done = glmtuner(
        "--preview", "--json", f"model={preset}", "model.model_name_or_path=base", "tracker=none", "data.dataset=records.jsonl",
        "data.source_prefix=请认真：", *typed,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout)
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path / "base")
    text, answer = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (f"请认真：[Round 1]\n\n问：{asked}\n\n答：", "Morning")
    )
    special = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>" if preset == "chatglm_6b" else "sop"])
    prompt = [*text, *special] if preset == "chatglm_6b" else [*special, *text]
    assert row["input_ids"][:-1] == [*prompt, *answer]


@pytest.mark.parametrize("preset", MODELS)
def test_trains_and_predicts_from_a_hub(
    glmtuner_process: Callable, tmp_path: Path, upstream_files: Path, preset: str
) -> None:
    write_checkpoint(preset, tmp_path / "hub/models" / MODELS[preset], upstream_files)
    server = serve(tmp_path / "hub")
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    try:
        done = glmtuner_process(f"model={preset}", *SHORT, *PREDICTS, "trainer.output_dir=run", env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(lines(tmp_path / "run/predictions.jsonl")) == 12
    finally:
        server.shutdown()


@pytest.mark.parametrize("preset", ["chatglm_6b", "chatglm2_6b"])
@pytest.mark.parametrize(
    "words",
    [
        ("finetuning=freeze", "finetuning.num_layer_trainable=2"),
        ("finetuning=p_tuning", "finetuning.pre_seq_len=8", "finetuning.prefix_projection=true"),
        ("finetuning=full",),
        ("finetuning=lora", "finetuning.lora_target=all", "quant=int4"),
        ("finetuning=p_tuning", "finetuning.pre_seq_len=8", "quant=int8", "trainer.gradient_checkpointing=true"),
    ],
    ids=lambda words: words[0].partition("=")[2] + ("_quantized" if any("quant" in word for word in words) else ""),
)
def test_every_method(
    glmtuner: Callable, tmp_path: Path, upstream_files: Path, preset: str, words: tuple[str, ...]
) -> None:
    write_checkpoint(preset, tmp_path / "base", upstream_files)
    done = glmtuner(
        f"model={preset}", "model.model_name_or_path=base", *SHORT, *PREDICTS, "trainer.learning_rate=1e-3",
        "trainer.output_dir=run", *words,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    predict_again(glmtuner, tmp_path)


@pytest.mark.parametrize("records", ["its own", "spelled in ids"])
@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_twenty_steps_of_the_original_project(
    glmtuner: Callable, tmp_path: Path, golden_folder: Path, request: pytest.FixtureRequest, method: str, records: str
) -> None:
    """Every step's loss, gradient norm and the final weights are those of ChatGLM-Efficient-Tuning 0.1.5.

    On its own records with the published tokenizer, and on the ids of its rows alone (see `stand_ins.write_parity`).
    """
    golden = golden_folder / "parity_v2" / method
    if records == "its own":
        request.getfixturevalue("published_file")("tokenizer.model")
        base = request.getfixturevalue("upstream_files") / "chatglm2_realvocab"
        dataset = request.getfixturevalue("real_records")("self_cognition")
    else:
        dataset = write_parity(tmp_path / "parity", golden_folder)
        base = dataset.parent
    words = {"lora": ["finetuning=lora", "finetuning.lora_dropout=0", "model.checkpoint_dir=start"],
             "freeze": ["finetuning=freeze", "finetuning.num_layer_trainable=-2"]}[method]  # fmt: skip
    if method == "lora":
        (tmp_path / "start").mkdir()
        shutil.copyfile(golden / "adapter_peft040/adapter_config.json", tmp_path / "start/adapter_config.json")
        start = load_file(golden / "initial_trainable.safetensors")
        save_file({name.replace(".default.", "."): value for name, value in start.items()},
                  tmp_path / "start/adapter_model.safetensors")  # fmt: skip
    done = glmtuner(
        "model=chatglm2_6b", f"model.model_name_or_path={base}", "model.dtype=float32",
        *words, f"data.dataset={dataset}", "data.max_source_length=64", "data.max_target_length=64",
        "trainer.max_steps=20", "trainer.per_device_train_batch_size=4", "trainer.learning_rate=1e-2",
        "trainer.train_sampling_strategy=sequential", "trainer.logging_steps=1", "tracker=none", "trainer.output_dir=run",
        "trainer.disable_tqdm=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((golden / "parity.json").read_text(encoding="utf-8"))["steps"]
    history = lines(tmp_path / "run/history.jsonl")
    assert len(history) == len(steps) == 20
    for found, wanted in zip(history, steps, strict=True):
        assert abs(found["loss"] - wanted["loss"]) < 1e-4, wanted["step"]
        assert abs(found["grad_norm"] - wanted["grad_norm_preclip"]) < 1e-3, wanted["step"]
    final = load_file(
        golden / ("adapter_peft040/adapter_model.safetensors" if method == "lora" else "final_trainable.safetensors")
    )
    trained = load_file(
        tmp_path / ("run/adapter/adapter_model.safetensors" if method == "lora" else "run/model/model.safetensors")
    )
    for name, value in final.items():
        assert (trained[name] - value).abs().max() < 1e-3, name
