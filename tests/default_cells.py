"""Of matrices in tests/e2e, the cells that `make test` runs; the others have the mark `heavy`, and `make test-heavy` runs them."""

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
# cells that are heavy, of matrices that run but for these
HEAVY = {"test_the_offline_commands_of_a_page_work_as_written": ("forecast", "memory", "shared", "stages")}


def mark_heavy(items: Sequence[pytest.Item]) -> list[str]:
    """Mark the cells that the default suite leaves out; returns the cells of the tables above that no collected matrix has."""
    cells: dict[str, set[str]] = {}
    for item in items:
        name, is_cell, rest = item.name.partition("[")
        if is_cell and "/e2e/" in item.path.as_posix() and name in DEFAULT | HEAVY:
            cell = rest.removesuffix("]")
            cells.setdefault(name, set()).add(cell)
            if cell not in DEFAULT.get(name, (cell,)) or cell in HEAVY.get(name, ()):
                item.add_marker(pytest.mark.heavy)
    named = {name: {*DEFAULT.get(name, ()), *HEAVY.get(name, ())} for name in cells}
    return sorted(f"{name}[{cell}]" for name, known in named.items() for cell in known - cells[name])
