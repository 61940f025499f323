"""`export`: every method in both layouts, merged on the unquantized base, loaded again and compared before it is called done."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hub_server
import pytest
import torch
from upstream import write_checkpoint

from glmtuner.cli import export
from glmtuner.cli.main import main

SHORT = (
    "tracker=none", "data.dataset=belle_sample", "data.max_samples=8", "data.max_target_length=16", "trainer.max_steps=4",
    "trainer.per_device_train_batch_size=4", "trainer.learning_rate=1e-2", "trainer.disable_tqdm=true",
)  # fmt: skip
METHODS = {
    "lora": ("finetuning=lora", "finetuning.lora_target=all"),
    "freeze": ("finetuning=freeze", "finetuning.num_layer_trainable=1"),
    "full": ("finetuning=full",),
    "p_tuning": ("finetuning=p_tuning", "finetuning.pre_seq_len=4"),
}
ANSWER = """\
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
turns = [{"role": "user", "content": sys.argv[2]}]
prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print(json.dumps([type(model).__name__, out[0, prompt.input_ids.shape[1] :].tolist()]), "glmtuner" in sys.modules)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_words(model: str, here: Path, upstream_files: Path) -> list[str]:
    if model == "tiny_glm":
        return ["model=tiny_glm"]
    if not (here / "base").exists():
        write_checkpoint(model, here / "base", upstream_files)
    return [f"model={model}", "model.model_name_or_path=base"]


def receipt(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["tiny_glm", "chatglm2_6b", "chatglm_6b"])
def test_every_method_in_both_layouts(here: Path, upstream_files: Path, model: str, method: str) -> None:
    assert main([*model_words(model, here, upstream_files), *SHORT, *METHODS[method], "trainer.output_dir=run"]) == 0
    for layout in ("transformers", "published"):
        assert main(["export", "run", "--to", layout, "--layout", layout, "--dtype", "float32"]) == 0
        about = receipt(here / layout)
        assert about["drift"] < 1e-4 and about["same_greedy_answer"]
        assert (about["method"], about["layout"]) == (method, layout)
        assert (here / layout / "tokenizer_config.json").is_file()
    config = json.loads((here / "transformers/config.json").read_text()) if method != "p_tuning" else {}
    if method == "p_tuning":
        saved = torch.load(here / "published/pytorch_model.bin", weights_only=True)
        assert all(name.startswith("transformer.prefix_encoder.") for name in saved)
    elif model == "chatglm2_6b":
        assert config["architectures"] == ["GlmForCausalLM"]
    assert not list(here.glob(".*partial"))


def test_several_adapters_are_merged_in_order_and_a_quantized_run_on_the_unquantized_base(
    here: Path, upstream_files: Path
) -> None:
    words = [*model_words("chatglm2_6b", here, upstream_files), *SHORT]
    assert main([*words, "trainer.output_dir=one"]) == 0
    again = ["model.checkpoint_dir=one", "model.resume_lora_training=false", "quant=int4", "finetuning.lora_rank=2"]
    assert main([*words, *again, "trainer.output_dir=two"]) == 0
    assert main(["export", "two", "--to", "both", "--dtype", "float32"]) == 0
    assert main(["export", "one", "--to", "first", "--dtype", "float32"]) == 0
    assert receipt(here / "both")["drift"] < 1e-4
    from safetensors.torch import load_file

    base = load_file(here / "base/model.safetensors")
    both, first = (load_file(here / name / "model.safetensors") for name in ("both", "first"))
    name, fused = (
        "model.layers.0.self_attn.q_proj.weight",
        "transformer.encoder.layers.0.self_attention.query_key_value.weight",
    )
    rows = len(both[name])
    updates = []
    for run in ("one", "two"):
        adapter = load_file(here / run / "adapter/adapter_model.safetensors")
        stem = f"base_model.model.{fused.removesuffix('.weight')}"
        scale = 32 / len(adapter[f"{stem}.lora_A.weight"])
        updates.append(scale * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"])
    assert (first[name] - (base[fused].float() + updates[0])[:rows]).abs().max() < 1e-5
    assert (both[name] - (base[fused].float() + sum(updates))[:rows]).abs().max() < 1e-5
    assert updates[1].abs().max() > 1e-3


@pytest.mark.parametrize(("model", "kind"), [("tiny_glm", "GlmForCausalLM"), ("chatglm3_6b", "GlmForCausalLM")])
def test_plain_transformers_loads_an_export_and_gives_the_run_s_answers(
    here: Path, upstream_files: Path, model: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*model_words(model, here, upstream_files), *SHORT, "trainer.output_dir=run"]) == 0
    assert main(["export", "run", "--to", "out", "--dtype", "float32"]) == 0
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, "out", export.PROMPT], capture_output=True, text=True, cwd=here, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found, _, ours = done.stdout.strip().rpartition(" ")
    assert ours == "False"
    name, ids = json.loads(found)
    assert name == kind
    from glmtuner.launch.build import finished_run

    finished = finished_run([here / "run"], ["quant=none", "model.dtype=float32"])
    wanted = export.answer(finished, finished.model).ids
    stops = [place for place, token in enumerate(ids) if token in finished.stops]
    assert ids[: stops[0] if stops else 8] == wanted[:8]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "nothing", "--to", "out"], "no such folder"),
        (["export", "run"], "required: --to"),
        (["export", "run", "--to", "full"], "--to full: it exists and is not empty"),
        (["export", "run", "--to", "out", "quant=int4"], "quant=int4: "),
        (["export", "run", "--to", "out", "model.dtype=float16"], "type --dtype"),
        (["export", "run", "--to", "out", "--layout", "gguf"], "invalid choice: 'gguf'"),
        (["export", "run", "--to", "out", "generation.temprature=1"], "did you mean 'temperature'"),
        (["exprot", "run"], "did you mean 'export'"),
    ],
)
def test_mistakes_are_one_paragraph(here: Path, capsys: pytest.CaptureFixture, words: list[str], told: str) -> None:
    (here / "full").mkdir()
    (here / "full/mine.txt").write_text("mine")
    (here / "run").mkdir()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("glmtuner: ") and told in said and "Traceback" not in said
    assert sorted(path.name for path in here.iterdir()) == ["full", "run"]


def test_an_export_that_is_not_the_run_s_model_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(["model=tiny_glm", *SHORT, "trainer.output_dir=run"]) == 0
    whole = export.write_model

    def spoiled(finished, folder, *rest):
        with torch.no_grad():
            finished.model.get_output_embeddings().weight[5] += 0.5
        whole(finished, folder, *rest)

    monkeypatch.setattr(export, "write_model", spoiled)
    assert main(["export", "run", "--to", "out"]) == 2
    message = capsys.readouterr().err
    assert ".out.partial" in message and "differs from the run's model, as PEFT loads it: a logit by" in message
    assert not (here / "out").exists()
    monkeypatch.setattr(export, "write_model", whole)
    assert main(["export", "run", "--to", "out"]) == 0  # what the failure left behind is in nobody's way


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_is_exported_as_peft_computes_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """rsLoRA and an alpha_pattern: without them a logit is off by several units."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from glmtuner.config.paths import ASSETS
    from glmtuner.finetuning.lora import SavedLora

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_glm", dtype=torch.float32)

    settings = {
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 64},
        "rank_pattern": {"v_proj": 2},
        "modules_to_save": ["norm"],
    }
    pattern = r".*layers\.[12]\.self_attn\.(q|v)_proj"
    torch.manual_seed(1)
    adapted = get_peft_model(base(), LoraConfig(r=8, target_modules=pattern, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained("adapter")
    ids = torch.tensor([[10, 20, 30, 40, 50, 60]])
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base(), "adapter").eval()(ids).logits
        assert (wanted - base()(ids).logits).abs().max() > 1
        assert main(["export", "adapter", "--to", "out", "model=tiny_glm", "tracker=none"]) == 0
        told = capsys.readouterr().out
        assert "is used with its own alpha_pattern=" in told and "use_rslora=true" in told
        found = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)(ids).logits
    assert (found - wanted).abs().max() < 1e-4

    # trained further, its run folder keeps all of it, and starts another run
    assert main(["model=tiny_glm", *SHORT, "model.checkpoint_dir=adapter", "trainer.output_dir=run"]) == 0
    kept = json.loads((here / "run/adapter/adapter_config.json").read_text())
    assert {**kept, **settings, "target_modules": pattern} == kept
    assert main(["export", "run", "--to", "further"]) == 0
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base(), "run/adapter").eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained("further", dtype=torch.float32)(ids).logits
    assert (found - wanted).abs().max() < 1e-4

    # the comparison is with PEFT, not with what this program has loaded
    of = SavedLora.of

    def without_its_scale(folder: Path, finetuning_type: str = "lora") -> SavedLora:
        method = of(folder, finetuning_type)
        method.saved = {**method.saved, "use_rslora": False}
        return method

    monkeypatch.setattr(SavedLora, "of", without_its_scale)
    assert main(["export", "adapter", "--to", "wrong", "model=tiny_glm", "tracker=none"]) == 2
    assert "differs from the run's model, as PEFT loads it: a logit by" in capsys.readouterr().err


def test_an_export_is_pushed_to_a_hub(here: Path, glmtuner_process: Callable) -> None:
    hub = hub_server.serve(here / "hub")
    try:
        (here / "hub").mkdir()
        assert main(["model=tiny_glm", *SHORT, "trainer.output_dir=run"]) == 0
        endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        env = {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": None,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(here / "home"),
        }
        words = ["export", "run", "--push-to", "me/xiaoge", "--to"]
        done = glmtuner_process(*words, "out", env={**env, "HF_TOKEN": "good"})
        assert done.returncode == 0, done.stderr
        assert f"uploaded to {endpoint}/me/xiaoge" in done.stdout
        there = here / "hub" / "models" / "me" / "xiaoge"
        assert {path.name: path.read_bytes() for path in there.iterdir()} == {
            path.name: path.read_bytes() for path in (here / "out").iterdir()
        }
        assert json.loads((here / "hub" / "created.json").read_text())["visibility"] == "private"
        done = glmtuner_process(*words, "again", env={**env, "HF_TOKEN": "bad"})
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "--push-to me/xiaoge: " in done.stderr and "again is complete" in done.stderr
        assert "hf upload me/xiaoge again" in done.stderr
        assert (here / "again" / "export.json").is_file()
    finally:
        hub.shutdown()
    done = glmtuner_process(*words, "third", env={**env, "HF_TOKEN": "good", "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 2 and "third is complete" in done.stderr, done.stderr
