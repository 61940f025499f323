"""The private members of transformers' Trainer that training/{trainer,checkpointing,loaders}.py override, call or set.

An upgrade of transformers that renames one, or changes its parameters, fails here and says which. What is used besides these
is public: `get_train_dataloader`, `evaluation_loop`, `prediction_step`, `training_step`, `compute_loss`, `log`.
"""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
from transformers import Trainer

from glmtuner.training import checkpointing, loaders, trainer
from glmtuner.training.trainer import GlmTrainer

METHODS = {  # name -> parameters, without annotations
    "_determine_best_metric": "(self, metrics, trial)",
    "_finalize_training": "(self, trial, num_train_samples, start_time)",
    "_get_eval_sampler": "(self, eval_dataset)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_get_learning_rate": "(self)",
    "_get_num_items_in_batch": "(self, batch_samples, device)",
    "_get_train_sampler": "(self, train_dataset=None)",
    "_load_best_model": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_load_rng_state": "(self, checkpoint)",
    "_maybe_log_save_evaluate": (
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None)"
    ),
    "_move_model_to_device": "(self, model, device)",
    "_prepare_inputs": "(self, inputs)",
    "_run_epoch": (
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, "
        "start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
    ),
    "_save_checkpoint": "(self, model, trial)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_save_rng_state": "(self, output_dir)",
    "_save_scaler": "(self, output_dir)",
}
# Read and set; those of the loop must be initialized before `on_train_begin`, where a resumed run restores them.
ATTRIBUTES = {
    "_globalstep_last_logged": "_inner_training_loop",
    "_initial_global_step": "_inner_training_loop",
    "_loss_shifts_labels": "__init__",
    "_total_loss_scalar": "_inner_training_loop",
    "_tr_loss": "_inner_training_loop",
    "is_distributed_loading_by_transformers": "__init__",
    "model_accepts_loss_kwargs": "__init__",
    "neftune_noise_alpha": "__init__",
}
OUR_OWN = {
    "_complete", "_divides", "_drop_old_checkpoints", "_end_epoch", "_evened", "_is_done", "_is_stopping", "_loss_of_batch", "_optimizer_shards", "_progress", "_restore", "_session_start", "_share",
}  # fmt: skip


def parameters_of(function: object) -> str:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def changed_methods(trainer: type) -> list[str]:
    """A sentence for each method that is gone or has other parameters."""
    sentences = []
    for name, parameters in METHODS.items():
        if not hasattr(trainer, name):
            sentences.append(f"{name}: not a member of transformers' Trainer any more")
        elif (now := parameters_of(getattr(trainer, name))) != parameters:
            sentences.append(f"{name}: {now}, expected {parameters}")
    return sentences


def assignments(method: str) -> tuple[dict[str, int], int | None]:
    """Attributes that a method of transformers' Trainer sets on self, by line, and the line of its on_train_begin call."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(Trainer, method))))
    lines: dict[str, int] = {}
    begin = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            lines.setdefault(node.attr, node.lineno)
        if isinstance(node, ast.Attribute) and node.attr == "on_train_begin":
            begin = node.lineno
    return lines, begin


def private_names(source: str) -> set[str]:
    """The single-underscore attributes that a module uses, and the methods of its classes."""
    tree = ast.parse(source)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names |= {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_private_methods_have_the_expected_parameters() -> None:
    assert changed_methods(Trainer) == []


@pytest.mark.parametrize("name", METHODS)
def test_our_overrides_take_the_same_parameters(name: str) -> None:
    if getattr(GlmTrainer, name) is not getattr(Trainer, name):
        passes_all_on = "(self, *args, **kwargs)"
        assert parameters_of(getattr(GlmTrainer, name)) in (METHODS[name], passes_all_on)


@pytest.mark.parametrize(("name", "method"), ATTRIBUTES.items())
def test_private_attributes_are_set_where_we_expect_it(name: str, method: str) -> None:
    lines, begin = assignments(method)
    assert name in lines, f"Trainer.{method} does not set {name} any more"
    assert begin is None or lines[name] < begin, f"Trainer.{method} sets {name} only after on_train_begin"


def test_every_private_member_that_is_used_is_listed() -> None:
    used = set[str]().union(
        *(private_names(Path(each.__file__).read_text(encoding="utf-8")) for each in (trainer, checkpointing, loaders))
    )
    listed = {name for name in (*METHODS, *ATTRIBUTES, *OUR_OWN) if name.startswith("_")}
    assert used == listed


@pytest.mark.parametrize("name", sorted(OUR_OWN))
def test_transformers_does_not_use_our_own_private_names(name: str) -> None:
    assert not hasattr(Trainer, name) and f"self.{name}" not in inspect.getsource(Trainer)


def test_a_renamed_or_changed_method_is_named() -> None:
    members = dict(vars(Trainer))
    members["_save_scaler_state"] = members.pop("_save_scaler")
    members["_load_best_model"] = lambda self, model: None
    renamed = type("Trainer", Trainer.__bases__, members)
    assert changed_methods(renamed) == [
        "_load_best_model: (self, model), expected (self)",
        "_save_scaler: not a member of transformers' Trainer any more",
    ]


def test_an_unlisted_member_is_seen() -> None:
    source = "class A(B):\n    def _x(self):\n        super()._y(self._z)\n        other._w = 1"
    assert private_names(source) == {"_x", "_y", "_z", "_w"}
