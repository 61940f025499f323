"""Of matrices in tests/e2e, the cells that `make test` runs; the others have the mark `heavy`.

Of those, `make test-heavy` runs what the default suite has no cell of the kind of; the rest of the matrices has the mark `matrix`,
too, and `make test-matrix` runs it.
"""

from collections.abc import Sequence

import pytest

# by the name of the test, the ids of its cells in the default suite
DEFAULT = {
    "test_a_quantized_run_from_training_to_export": ("tiny_glm-int8-lora", "chatglm_6b-int4-lora", "chatglm2_6b-int4-p_tuning"),
    "test_a_resumed_run_of_every_kind_of_adapter_is_the_undisturbed_one": ("dora", "parts", "vera"),
    "test_trains_and_predicts": ("freeze-false", "full-true", "lora-true", "p_tuning-false"),
    "test_trains_and_predicts_on_a_half_precision_base": ("lora",),
    "test_a_run_that_was_killed_behind_its_last_checkpoint_trains_nothing": ("lora-ends0", "full-ends2"),
    "test_every_method_in_both_layouts": ("tiny_glm-lora", "chatglm2_6b-p_tuning", "chatglm_6b-freeze", "chatglm_6b-full"),
    "test_a_run_cut_short_ends_in_the_same_bytes": ("dpo", "ppo"),
    "test_ppo_runs_on_the_layers_of_its_reward_model": ("lora+int4",),
    "test_a_reward_model_ranks_pairs_that_it_has_not_seen": ("lora", "full"),
    "test_preferences_and_feedback_are_learned": ("dpo-preference_sample-lora", "kto-feedback_sample-freeze"),
    "test_preferences_are_learned_without_a_reference": ("orpo-lora", "simpo-freeze"),
    "test_accumulation_equals_the_big_batch": ("dpo", "simpo"),
    "test_every_method": ("freeze-chatglm_6b", "p_tuning-chatglm2_6b", "full-chatglm_6b", "lora_quantized-chatglm2_6b"),
    "test_trains_and_predicts_from_a_hub": ("chatglm2_6b",),
    "test_trains_and_predicts_from_a_folder": ("chatglm_6b", "glm4_9b_chat"),
    "test_pairs_have_weights": ("dpo",),
    "test_resumes_bit_equal": ("adamw_torch_fused", "muon", "lion_8bit"),
    "test_prediction": ("deepseek-r1-distill-8", "glm-4.5-1", "qwen3-8"),
    "test_chatglm": ("chatglm_6b",),
}  # fmt: skip
# the templates that tests/e2e/test_by_heart.py tries in `make test-heavy`
TEMPLATES = ("chatglm3-6b", "glm-5.2", "glm-z1-9b-0414", "llama-3.1-instruct", "mistral-nemo-instruct-2407")
# by the name of the test, the cells that `make test-heavy` adds; no line: all of them
HEAVY = {
    "test_a_quantized_run_from_training_to_export": ("tiny_glm-int4-p_tuning", "chatglm_6b-int8-lora"),
    "test_a_resumed_run_of_every_kind_of_adapter_is_the_undisturbed_one": ("loftq", "eva_int4", "adalora"),
    "test_trains_and_predicts": ("peft-false",),
    "test_trains_and_predicts_on_a_half_precision_base": ("full",),
    "test_a_run_that_was_killed_behind_its_last_checkpoint_trains_nothing": ("full-ends1",),
    "test_every_method_in_both_layouts": ("chatglm2_6b-full", "tiny_glm-freeze"),
    "test_a_run_cut_short_ends_in_the_same_bytes": (),  # tests/stages resumes every stage
    "test_ppo_runs_on_the_layers_of_its_reward_model": ("full", "p_tuning+int8"),
    "test_a_reward_model_ranks_pairs_that_it_has_not_seen": ("freeze", "p_tuning+int8"),
    "test_preferences_and_feedback_are_learned": ("dpo-preference_sample-lora+int4",),
    "test_preferences_are_learned_without_a_reference": ("cpo-full",),
    "test_accumulation_equals_the_big_batch": ("orpo", "cpo"),
    "test_every_method": ("p_tuning_quantized-chatglm_6b",),
    "test_trains_and_predicts_from_a_hub": ("chatglm_6b",),
    "test_trains_and_predicts_from_a_folder": ("chatglm2_6b", "chatglm3_6b"),
    "test_resumes_bit_equal": ("sgd", "adafactor", "ademamix_8bit"),
    "test_the_others_resume_bit_equal": ("adamw_bnb_8bit", "adagrad", "paged_lion_8bit", "rmsprop"),
    "test_the_exported_model_has_the_logits_of_plain_peft": (
        "BOFT", "C3A", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "OFT", "RANDLORA", "SHIRA", "VBLORA",
        "TRAINABLE_TOKENS", "pissa", "loftq",
    ),
    "test_what_stages_and_quantizations_do_to_the_base_is_undone": ("words0", "words3", "words4"),
    "test_prediction": tuple(f"{name}-{batch}" for name in TEMPLATES for batch in (1, 8)),
    "test_every_stage_and_method_on_ranks_is_that_of_one_process": (),
    "test_sums_are_learned_by_reward": ("3",),  # a seed
    "test_runs_of_several_ranks_are_those_of_one_process": (
        "packs, two groups, accumulated", "fsdp2, two groups", "four ranks a row, checkpointing", "int4",
    ),
}  # fmt: skip
# cells that are heavy, of matrices that run but for these
LEFT_OUT = {"test_the_offline_commands_of_a_page_work_as_written": ("forecast", "memory", "shared", "stages")}


def mark_heavy(items: Sequence[pytest.Item]) -> list[str]:
    """Mark the cells that the default suite leaves out; returns the cells of the tables above that no collected matrix has."""
    cells: dict[str, set[str]] = {}
    for item in items:
        name, is_cell, rest = item.name.partition("[")
        if is_cell and "/e2e/" in item.path.as_posix() and name in DEFAULT | HEAVY | LEFT_OUT:
            cell = rest.removesuffix("]")
            cells.setdefault(name, set()).add(cell)
            if cell not in DEFAULT.get(name, (cell,)) or cell in LEFT_OUT.get(name, ()):
                item.add_marker(pytest.mark.heavy)
            if item.get_closest_marker("heavy") and cell not in HEAVY.get(name, (cell,)):
                item.add_marker(pytest.mark.matrix)
    named = {name: {cell for table in (DEFAULT, HEAVY, LEFT_OUT) for cell in table.get(name, ())} for name in cells}
    return sorted(f"{name}[{cell}]" for name, known in named.items() for cell in known - cells[name])
