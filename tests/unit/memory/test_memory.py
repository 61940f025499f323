"""What a training takes of memory: parts that can be worked out, what moves them, and what follows from them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import built, config_of

from glmtuner.config.compose import compose
from glmtuner.errors import ConfigError
from glmtuner.families.experts import expert_parameters
from glmtuner.families.hub import read_config
from glmtuner.launch.arguments import training_arguments
from glmtuner.launch.build import resolve_family
from glmtuner.launch.register import register_presets
from glmtuner.memory.estimate import GIB, Estimate, estimate
from glmtuner.memory.ledger import grouped_shape
from glmtuner.memory.meta_model import build_meta_model, stored_nbytes
from glmtuner.memory.policy import checkpointing_notice, does_not_fit, upper_bound_fits
from glmtuner.models.sizes import active_summary
from glmtuner.run_folder.folder import RunFolder

register_presets()
CPU = torch.device("cpu")


def estimated(*words: str, rows: int = 2, longest: int = 64) -> Estimate:
    run = compose(["model=tiny_glm", "tracker=none", *words]).run
    family, finetuning = resolve_family(run, read_config(run.model))
    model = build_meta_model(run, finetuning, family, CPU, torch.float32)
    arguments = training_arguments(run, RunFolder(Path("outputs")), model, CPU)
    return estimate(model, arguments, CPU, rows=rows, longest=longest, baseline=0, without_logits=not run.stage.policy)


def test_full_training_has_a_copy_two_states_and_a_gradient_for_every_weight():
    found = estimated("finetuning=full", rows=1, longest=8)
    weights = 4 * found.total_parameters
    assert found.trained_parameters == found.total_parameters
    assert found.parts["frozen weights"] == 0 and found.parts["trained weights"] == weights
    assert found.parts["optimizer states"] == pytest.approx(2 * weights, rel=1e-3)  # and a step count a tensor
    assert weights / 2 < found.parts["gradients"] <= weights  # the last ones are on their way when it holds most
    assert found.peak > 4 * weights


def test_gradients_stay_while_they_are_summed_up():
    alone, summed = (
        estimated("finetuning=full", f"trainer.gradient_accumulation_steps={steps}", rows=4, longest=256)
        for steps in (1, 2)
    )
    assert alone.parts["gradients"] < summed.parts["gradients"] == 4 * summed.total_parameters


def test_activations_grow_with_the_rows_and_shrink_with_checkpointing():
    one, two = (estimated("finetuning=lora", rows=rows, longest=256) for rows in (1, 2))
    saving = estimated("finetuning=lora", "trainer.gradient_checkpointing=true", rows=2, longest=256)
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"], rel=0.02)
    assert saving.parts["activations"] < two.parts["activations"] / 4
    assert saving.peak < two.peak


@pytest.mark.parametrize("method", ["lora", "freeze", "p_tuning"])
@pytest.mark.parametrize("precision", [(), ("trainer.bf16=true", "trainer.use_cpu=true")])
def test_every_method_is_estimated(method, precision):
    found = estimated(f"finetuning={method}", *precision)
    assert 0 < found.trained_parameters < found.total_parameters
    assert all(size >= 0 for size in found.parts.values())


def test_quantized_weights_count_as_much_as_bitsandbytes_makes_them():
    from bitsandbytes.functional import quantize_4bit

    matrix = torch.randn(512, 1024)
    packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True, blocksize=64)
    there = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    matrix.stored_bits = 4  # type: ignore[attr-defined]
    assert stored_nbytes(matrix) == pytest.approx(there, rel=0.01)


def test_int4_stores_less_and_trains_the_same():
    plain, packed = estimated("finetuning=lora"), estimated("finetuning=lora", "quant=int4")
    assert packed.parts["frozen weights"] < plain.parts["frozen weights"]
    assert (packed.total_parameters, packed.trained_parameters) == (plain.total_parameters, plain.trained_parameters)


def moe(name: str, tmp_path: Path) -> str:
    """The word that names a mixture of experts, of which config.json alone is there."""
    config_of(name).save_pretrained(tmp_path)
    return f"model.model_name_or_path={tmp_path}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "mixtral", "gpt_oss", "qwen3_next"])
def test_experts_are_estimated_in_every_precision(name, dtype, tmp_path):
    found = estimated("model=causal_lm", moe(name, tmp_path), f"model.dtype={dtype}", "finetuning=full")
    plain = built(name)
    assert found.total_parameters == sum(value.numel() for value in plain.parameters())
    assert found.parts["trained weights"] == 4 * found.total_parameters  # trained in float32
    assert found.active_parameters == active_summary(plain)
    assert ("active", found.active_parameters) in found.table_rows()


def test_products_by_groups_have_the_shapes_that_torch_gives_them():
    ends = torch.tensor([1, 3, 8], dtype=torch.int32)
    rows, matrices, columns = torch.randn(8, 16), torch.randn(3, 16, 8), torch.randn(8, 8)
    for one, other in ((rows, matrices), (rows.T.contiguous(), columns)):
        expected = torch.nn.functional.grouped_mm(one, other, offs=ends)
        assert grouped_shape(one, other, ends) == [*expected.shape]
    assert grouped_shape(torch.randn(3, 4, 16), matrices) == [3, 4, 8]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts_are_stored_small_and_computed_one_block_at_a_time(bits, tmp_path):
    words = ("model=causal_lm", moe("mixtral", tmp_path), "model.dtype=float32", "finetuning=lora")
    plain, packed = estimated(*words), estimated(*words, f"quant=int{bits}")
    assert (packed.total_parameters, packed.active_parameters) == (plain.total_parameters, plain.active_parameters)
    experts = sum(value.numel() for value in expert_parameters(built("mixtral")).values())
    saved = plain.parts["frozen weights"] - packed.parts["frozen weights"]
    assert saved > experts * (4 - bits / 8 - 0.3)  # of 4 bytes, but for the scales
    assert packed.parts["activations"] < 1.2 * plain.parts["activations"]  # computed values are not kept


def test_the_peak_in_the_forward_pass_is_made_of_activations(tmp_path):
    words = ("model=causal_lm", moe("mixtral", tmp_path), "model.dtype=float32", "finetuning=lora", "quant=int4")
    assert estimated(*words, longest=512).parts["activations"] > 2**20


def test_rows_are_no_longer_than_the_positions_of_the_model(tmp_path):
    from glmtuner.launch.memory_check import estimate_run

    for name, longest in (("gpt_neo", 512), ("gpt2", 512), ("llama", 1024)):
        words = [
            "model=causal_lm",
            moe(name, tmp_path),
            "tracker=none",
            "finetuning=lora",
            "data.dataset=identity_sample",
        ]
        found, notice = estimate_run(compose(words), CPU, None)
        assert found.longest == longest
        assert (notice is None) == (longest == 1024)
    assert notice is None or "at most 512 tokens" in notice


def test_chatglm_is_estimated_without_its_special_tokens(golden_folder):
    for name in ("chatglm_v1", "chatglm2"):
        folder = golden_folder / name
        found = estimated("model=causal_lm", f"model.model_name_or_path={folder}", "finetuning=lora")
        assert found.parts["activations"] > 0


def test_a_process_holds_its_share():
    whole = estimated("finetuning=full")
    part = whole.per_process(("gradients", "optimizer states"), 4)
    assert part.parts["optimizer states"] == whole.parts["optimizer states"] // 4
    assert part.parts["trained weights"] == whole.parts["trained weights"]


# -- gradient checkpointing only when memory needs it ----------------------------------------------------------------


def sized(peak_gib: float, **changes: Any) -> Estimate:
    parts = {"frozen weights": int(peak_gib * GIB)}
    plain = Estimate(
        device="GPU",
        total_parameters=9,
        trained_parameters=1,
        active_parameters=None,
        parts=parts,
        rows=8,
        longest=512,
        checkpointing=False,
    )
    return dataclasses.replace(plain, **changes)


def decided(available: float | None, *words: str) -> tuple[str | None, list[bool]]:
    """The line, and how often the memory was estimated; 10 GiB without checkpointing, 4 GiB with it."""
    asked: list[bool] = []

    def estimate_of(checkpointing: bool) -> Estimate:
        asked.append(checkpointing)
        return sized(4 if checkpointing else 10)

    memory = None if available is None else int(available * GIB)
    return checkpointing_notice(compose(["model=tiny_glm", *words]), estimate_of, memory), asked


def test_checkpointing_is_turned_on_only_where_the_batch_does_not_fit_without_it():
    assert decided(12) == (None, [False])
    line, asked = decided(8)
    assert asked == [False, True]
    assert line is not None
    for number in ("10.00 GiB", "4.00 GiB", "8.00 GiB", "trainer.gradient_checkpointing=false"):
        assert number in line


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("value", ["false", "true"])
def test_what_was_typed_is_obeyed(name, value):
    assert decided(1, f"trainer.{name}={value}") == (None, [])


def test_nothing_is_decided_where_it_cannot_be():
    assert decided(None) == (None, [])

    def cannot(checkpointing: bool) -> Estimate:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$"):  # and a run says so
        checkpointing_notice(compose(["model=tiny_glm"]), cannot, 1)


def test_what_surely_fits_is_never_less_than_the_estimate():
    run = compose(["model=tiny_glm"]).run
    config = read_config(run.model)
    for words in (["finetuning=lora"], ["finetuning=full"]):
        run = compose(["model=tiny_glm", *words]).run
        needed = estimated(*words, rows=8, longest=512).peak
        assert not upper_bound_fits(config, run, 8, 512, needed)
    assert upper_bound_fits(config, run, 8, 512, 64 * GIB)
    assert not upper_bound_fits({**config, "num_experts": 8}, run, 8, 512, 64 * GIB)
    assert not upper_bound_fits({"hidden_size": 8}, run, 8, 512, 64 * GIB)


def test_what_does_not_fit_is_told_with_what_to_type():
    run = compose(["model=tiny_glm", "finetuning=full", "trainer.per_device_train_batch_size=8"]).run
    told = str(does_not_fit(run, sized(10), 8 * GIB))
    for part in ("10.00 GiB", "GPU has 8.00 GiB", "frozen weights", "trainer.gradient_checkpointing=true", "finetuning=lora",
                 "trainer.per_device_train_batch_size=4 with trainer.gradient_accumulation_steps=2"):  # fmt: skip
        assert part in told
    assert "quant=int4" not in told  # full fine-tuning cannot train on it


def test_a_reward_model_makes_no_logits():
    scoring, choosing = (
        estimated("finetuning=lora", stage, rows=4, longest=256) for stage in ("stage=rm", "stage=dpo")
    )
    assert scoring.parts["logits, loss and temporary"] < choosing.parts["logits, loss and temporary"] / 2


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_a_gpu_elsewhere_is_told_in_the_precision_that_it_would_have(method, monkeypatch):
    """On a machine without a GPU, for one with: bfloat16 products between float32 adapters, as a run there takes them."""
    from glmtuner.launch.memory_check import estimate_run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [
        "model=tiny_glm",
        "tracker=none",
        "model.dtype=bfloat16",
        f"finetuning={method}",
        "data.dataset=identity_sample",
    ]
    elsewhere, _ = estimate_run(compose(words), torch.device("cuda"), None)
    here, _ = estimate_run(compose([*words, "trainer.bf16=true", "trainer.use_cpu=true"]), torch.device("cuda"), None)
    assert elsewhere.device == "GPU" and elsewhere.parts == here.parts
    assert 0 < elsewhere.parts["allocator"] < elsewhere.peak / 10


# -- trainer.activation_checkpointing and its earlier name -------------------------------------------------------------

SHORT = ["model=tiny_glm", "tracker=none", "finetuning=lora", "data.dataset=identity_sample"]


def checked(*words: str, available: int | None = None) -> tuple[Estimate, str | None]:
    """What `--check` estimates, and the notice of checkpointing that it turns on."""
    from glmtuner.launch.memory_check import estimate_run

    return estimate_run(compose([*SHORT, *words]), CPU, available)


def test_both_names_of_checkpointing_are_obeyed_by_the_check_and_the_decision():
    plain, _ = checked()
    old, _ = checked("trainer.gradient_checkpointing=true")
    new, notice = checked("trainer.activation_checkpointing=true", available=1)
    assert new.checkpointing and new.parts["activations"] == old.parts["activations"] < plain.parts["activations"] / 4
    assert notice is None
    decided, notice = checked(available=1)
    assert decided.checkpointing and notice is not None
    off, notice = checked("trainer.activation_checkpointing=false", available=1)
    assert not off.checkpointing and notice is None and off.parts["activations"] == plain.parts["activations"]


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_every_nth_layer_is_checkpointed_in_the_estimate_as_in_the_run(name):
    plain, every = (checked(*words)[0] for words in ((), (f"trainer.{name}=true",)))
    some, _ = checked(f"trainer.{name}=true", f"trainer.{name}_kwargs={{every_n_layers: 2}}")
    assert every.parts["activations"] < some.parts["activations"] < plain.parts["activations"]


def test_activations_cannot_be_moved_from_the_cpu_to_the_cpu():
    words = ("trainer.activation_checkpointing=true", "trainer.activation_checkpointing_kwargs={offload: true}")
    with pytest.raises(ConfigError, match="this run is on the CPU; leave offload out"):
        checked(*words)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("{every_n_layer: 2}", "did you mean 'every_n_layers'?"),
        ("{every_n_layers: 0}", "a number of layers, at least 1"),
        ("{every_n_layers: true}", "a number of layers, at least 1"),
        ("{use_reentrant: 3}", "true or false"),
        ("{determinism_check: strict}", "default or none"),
        ("{use_reentrant: true, debug: true}", "for use_reentrant: false only"),
        ("{foo: 1}", "legal: use_reentrant"),
    ],
)
def test_options_of_checkpointing_that_do_not_exist_are_named(options, told):
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        with pytest.raises(ConfigError) as refused:
            compose(["model=tiny_glm", f"trainer.{key}={options}"])
        assert f"trainer.{key}=" in str(refused.value) and told in str(refused.value)


@pytest.mark.parametrize(
    "options",
    ["null", "{}", "{use_reentrant: false, early_stop: false}", "{preserve_rng_state: false, every_n_layers: 3}"],
)
def test_options_of_checkpointing_that_exist_are_legal(options):
    compose(["model=tiny_glm", f"trainer.activation_checkpointing_kwargs={options}"])


def test_checkpointing_is_not_reentrant_unless_it_is_asked_for():
    from glmtuner.memory.checkpointing import enable_checkpointing

    class Model:
        supports_gradient_checkpointing = True

        def activation_checkpointing_enable(self, **options: Any) -> None:
            self.options = options

    class Arguments:
        activation_checkpointing = True
        activation_checkpointing_kwargs: Any = None

    model, arguments = Model(), Arguments()
    enable_checkpointing(model, arguments)  # type: ignore[arg-type]  # what it uses of them
    assert model.options == {"activation_checkpointing_kwargs": None, "every_n_layers": 1, "offload": False}
    arguments.activation_checkpointing_kwargs = {"preserve_rng_state": False, "every_n_layers": 2}
    enable_checkpointing(model, arguments)  # type: ignore[arg-type]
    kept = {"preserve_rng_state": False, "use_reentrant": False}
    assert model.options == {"activation_checkpointing_kwargs": kept, "every_n_layers": 2, "offload": False}
    assert arguments.activation_checkpointing_kwargs == {**kept, "every_n_layers": 2}  # for transformers' own call
