"""The GPU check: its faults are found, its page says what was found, its parts are there; nothing is timed here."""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from gpu_parts import kernels, models, record, runs  # noqa: E402
from gpu_parts.record import Check, Finding  # noqa: E402


def check_in(folder: Path, part: str = "kernels", **options: Any) -> Check:
    options = {"device": torch.device("cpu"), "miniature": True, **options}
    return Check(part, folder / f"{part}.jsonl", folder, None, **options)


def missed(check: Check) -> list[str]:
    return [finding.what for finding in record.read(check.path) if finding.met is False]


# -- faults are found ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def faulty(change: Callable[..., Any]) -> Iterator[None]:
    """The attention of all samples in one call, as `change` makes it of the right one and its arguments."""
    from torch.nn.attention import varlen

    with kernels.cpu_varlen_attention():
        right = varlen.varlen_attn
        varlen.varlen_attn = lambda *args, **options: change(right, *args, **options)
        yield


def another_scale(right: Any, query: Any, *args: Any, scale: Any = None, **options: Any) -> Any:
    usual = scale if scale is not None else query.shape[-1] ** -0.5
    return right(query, *args, scale=1.05 * usual, **options)


def one_token_more(right: Any, *args: Any, window_size: tuple[int, int], **options: Any) -> Any:
    more = window_size[0] + 1 if window_size[0] >= 0 else -1
    return right(*args, window_size=(more, window_size[1]), **options)


def without_the_last_sample(
    right: Any, query: Any, key: Any, value: Any, bounds: Any, *args: Any, **options: Any
) -> Any:
    found = right(query, key, value, bounds, *args, **options)
    return torch.where(torch.arange(len(found))[:, None, None] >= bounds[-2], torch.zeros_like(found), found)


def samples_that_see_each_other(
    right: Any, query: Any, key: Any, value: Any, bounds: Any, *args: Any, **options: Any
) -> Any:
    return right(query, key, value, bounds[[0, -1]], *args, **options)


def the_scale_by_another_head_size(right: Any, query: Any, *args: Any, scale: Any = None, **options: Any) -> Any:
    return right(query, *args, scale=scale if scale is not None else 64**-0.5, **options)


FAULTS = {
    another_scale: ("head size 64", "window of 16", "many short samples"),
    one_token_more: ("window of 2", "window of 16", "window of 32"),
    without_the_last_sample: ("head size 256", "32 heads on 2", "one long sample"),
    samples_that_see_each_other: ("head size 128", "many short samples"),
    the_scale_by_another_head_size: ("head size 80", "head size 256"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_kernel_is_found(tmp_path: Path, fault: Callable[..., Any]) -> None:
    check, cases = check_in(tmp_path), kernels.attention_cases(miniature=True)
    with faulty(fault):
        for name in FAULTS[fault]:
            kernels.check_attention(check, name, **cases[name])
    assert missed(check) == [f"attention, {name}" for name in FAULTS[fault]]


def test_the_right_kernel_passes(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    with kernels.cpu_varlen_attention():
        for name, case in kernels.attention_cases(miniature=True).items():
            kernels.check_attention(check, name, **case)
    assert missed(check) == []
    assert len(record.read(check.path)) == len(kernels.attention_cases(miniature=True))


def test_spelled_out_attention_is_torch_s_own() -> None:
    query, key, value = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    found = kernels.reference_attention(query, key, value, [9], None, None)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(states.transpose(0, 1)[None] for states in (query, key, value)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_a_broken_path_of_a_whole_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glmtuner.kernels import fused_lora as lora

    right = lora._LoraLinear.apply
    monkeypatch.setattr(lora._LoraLinear, "apply", lambda *args: right(*args[:-1], 1.3 * args[-1]))
    check = check_in(tmp_path)
    kernels.check_model(check, "GLM", kernels.models(miniature=True)["GLM"])
    assert {"GLM: fused LoRA", "GLM: all three"} <= set(missed(check))
    assert "GLM: chunked cross-entropy" not in missed(check)


def test_gradients_that_are_lost_in_compiled_blocks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kernels.loss_and_gradients
    turns = iter(range(6))
    monkeypatch.setattr(
        kernels, "loss_and_gradients", lambda *args, **options: (lambda loss, grads: (loss, grads * (next(turns) < 4)))(*plain(*args, **options))
    )  # fmt: skip
    check = check_in(tmp_path)
    kernels.check_compiled_blocks(check)
    assert missed(check) == [
        "GLM: compiled blocks and all three",
        "GLM: compiled blocks and all three, a smaller batch",
    ]


# -- models and records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_folder_without_weights_is_loaded_with_random_ones(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import glmtuner.models  # noqa: F401

    folder = models.model_folder(name, tmp_path, miniature=True)
    config = AutoConfig.from_pretrained(folder)
    with models.random_models(torch.device("cpu")):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    matrices = [value for value in model.parameters() if value.dim() > 1]
    assert all(0.5 * models.STD < value.std() < 2 * models.STD for value in matrices)
    assert torch.isfinite(model(input_ids=torch.tensor([[10, *_end_of_context(config), 11, 12]])).logits).all()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)  # the patch is gone


def _end_of_context(config: Any) -> list[int]:
    return [config.gmask_token_id, config.bos_token_id] if hasattr(config, "gmask_token_id") else []


def test_real_sizes_are_the_published_ones() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import glmtuner.models  # noqa: F401

    billions = {}
    for name in models.CONFIGS:
        content = models.config_of(name, miniature=False)
        config = AutoConfig.for_model(content["model_type"]).from_dict(content)
        with torch.device("meta"):
            billions[name] = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters()) / 1e9
    # 6,173,286,400, 6,243,584,000 and 9,399,951,360 of the published checkpoints
    assert billions["ChatGLM-6B"] == pytest.approx(6.173, abs=2e-3)
    assert billions["ChatGLM3-6B"] == pytest.approx(6.244, abs=2e-3)
    assert billions["GLM-4-9B"] == pytest.approx(9.400, abs=2e-3)
    assert 1.4 < billions["GLM-Edge-1.5B"] < 1.7


def test_full_rows_are_cut_to_their_very_length(tmp_path: Path) -> None:
    from glmtuner.data.records import Message
    from glmtuner.templates.glm import TEMPLATES

    models.write_records(tmp_path / "records.json", [(200, 100)] * 3)
    records = json.loads((tmp_path / "records.json").read_text(encoding="utf-8"))
    turns = [[Message("user", it["instruction"]), Message("assistant", it["output"])] for it in records]
    for encoded in TEMPLATES["glm4"].encode(models.tokenizer(), turns):
        start, end = encoded.answers[0]
        assert 95 <= end - start <= 105 and 200 <= start <= 210


def test_the_memory_table_has_its_rows() -> None:
    assert len(runs.TABLE) == len(runs.PUBLISHED) == 11
    assert runs.PUBLISHED["LoRA int4, batch 4"] == 8  # SPEC.md 5


# -- the record and the page ------------------------------------------------------------------------------------------


def test_an_error_is_a_finding_and_ends_nothing(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    with check.item("this"):
        raise RuntimeError("no\nkernel")
    with check.item("that"):
        check.add("that", 2.0, at_most=1.0)
    found = record.read(check.path)
    assert [(it.what, it.met, it.note) for it in found] == [
        ("this", False, "RuntimeError: no kernel"),
        ("that", False, ""),
    ]


def test_nan_meets_no_goal(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    check.add("worst", float("nan"), at_most=1.0)
    check.add("best", float("nan"), at_least=1.0)
    assert missed(check) == ["worst", "best"]


def test_what_has_no_time_left_is_left_out_and_told(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    check.until = time.monotonic() + 5
    assert check.begins("short", 1.0) and not check.begins("long", 60.0)
    assert [(it.what, it.met) for it in record.read(check.path)] == [("long", None)]


def test_only_what_matches_is_begun(tmp_path: Path) -> None:
    check = check_in(tmp_path, match="int[48]")
    assert check.begins("LoRA int8, batch 4") and not check.begins("LoRA fp16, batch 4")
    assert record.read(check.path) == []


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    check.add("whole", 1.0)
    with check.path.open("a") as file:
        file.write('{"part": "kernels", "wh')
    assert [it.what for it in record.read(check.path)] == ["whole"]


def test_parts_are_modules_and_share_the_minutes() -> None:
    for name in gpu_check.PARTS:
        assert callable(importlib.import_module(f"gpu_parts.{name}").run)
    groups = gpu_check.groups_of(list(gpu_check.PARTS))
    assert groups[0] == ["right", "kernels", "whole", "ranks"] and [name for group in groups for name in group] == list(
        gpu_check.PARTS
    )
    assert sum(map(gpu_check.group_seconds, groups)) == 60 * gpu_check.MINUTES


def finding(**values: Any) -> Finding:
    return replace(Finding(part="fast", what="speed", value=2.0, unit="tokens/s"), **values)


def test_the_page_has_a_table_a_part_and_says_where() -> None:
    about = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "memory": "81559 MiB",
        "driver": "580.1",
        "torch": "2.11.0",
        "date": "2026-11-26",
    }
    found = [
        finding(beside=1.0, against="plain", goal="faster", met=True),
        finding(part="small", what="a|b", met=False, value=None),
    ]
    text = gpu_check.render_page(about, found)
    for part in ("NVIDIA H100 80GB HBM3", "driver 580.1", "torch 2.11.0", "### Fast", "### Small"):
        assert part in text
    assert "| speed | 2 tokens/s | 1 (plain) | faster | yes |  |" in text
    assert "| a\\|b |  |  |  | **no** |  |" in text
    assert "### Right" not in text


def test_later_findings_replace_earlier_ones_but_not_by_nothing() -> None:
    def content(gpu: str, *found: Finding) -> dict[str, Any]:
        return {"about": {"gpu": gpu}, "findings": [vars(it) for it in found]}

    first = content("a", finding(value=1.0), finding(what="memory", value=3.0))
    second = content("a", finding(value=2.0), finding(what="memory", value=None, note="left out"), finding(what="new"))
    about, found = gpu_check.merge_findings([first, second])
    assert about == {"gpu": "a"}
    assert [(it.what, it.value) for it in found] == [("speed", 2.0), ("memory", 3.0), ("new", 2.0)]


def test_our_page_has_the_markers() -> None:
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert 0 < text.find(gpu_check.BEGIN) < text.find(gpu_check.END)


def test_the_page_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{gpu_check.BEGIN}\nold\n{gpu_check.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        gpu_check.write_page(page, "new")
    assert page.read_text(encoding="utf-8") == f"before\n{gpu_check.BEGIN}\nnew\n{gpu_check.END}\nafter\n"


# -- processes --------------------------------------------------------------------------------------------------------


def child(tmp_path: Path, code: str) -> gpu_check.Child:
    for name in ("findings", "logs"):
        (tmp_path / name).mkdir(exist_ok=True)
    log = (tmp_path / "logs/fast.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        start_new_session=True,
    )  # fmt: skip
    return gpu_check.Child("fast", process, log)


READY = "import sys, time; print('ready', flush=True); seconds = float(sys.stdin.readline()); "


@pytest.mark.parametrize(
    ("code", "seconds", "why"),
    [
        (READY + "sys.exit(0)", 20.0, None),
        (READY + "print('boom', file=sys.stderr); sys.exit(3)", 20.0, "exit code 3; the log ends: boom"),
        (READY + "time.sleep(60)", 0.2, "its time was over"),
        ("import sys; sys.exit(1)", 20.0, "exit code 1"),
    ],
    ids=["ends well", "fails", "hangs", "never ready"],
)
def test_a_part_that_fails_or_hangs_is_a_finding(tmp_path: Path, code: str, seconds: float, why: str | None) -> None:
    part, options = child(tmp_path, code), gpu_check.parse(["--output", str(tmp_path)])
    gpu_check.release_child(part, seconds)
    gpu_check.wait_for_child(part, options)
    found = gpu_check.findings_of(["fast"], tmp_path)
    assert part.process.returncode is not None
    assert [it.met for it in found] == ([] if why is None else [False])
    assert why is None or why in found[0].note


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "fats"], "no part is called fats; the parts: right, kernels"),
        (["--match", "("], "not a regular expression"),
        (["--minutes", "soon"], "soon"),
    ],
)
def test_wrong_words_are_named(words: list[str], told: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/gpu_check.py"), *words], capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr


def test_without_a_gpu_the_rehearsal_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py")],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 1 and "--cpu-rehearsal" in done.stderr


def test_help_needs_no_torch() -> None:
    code = (
        f"import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'scripts/gpu_check.py')!r}, run_name='__main__')\n"
        f"finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--cpu-rehearsal" in done.stdout
