"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174), also called gradient checkpointing, of a model."""

from typing import TYPE_CHECKING

from glmtuner.config.checkpointing import checkpointing_options, configured_checkpointing
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments


def check_offload(trainer: TrainerArguments, device: "torch.device") -> None:
    """Raise ConfigError where activations are to be moved from a device to the memory that they are in already."""
    if device.type == "cpu" and configured_checkpointing(trainer) and checkpointing_options(trainer).get("offload"):
        raise ConfigError(
            "trainer.activation_checkpointing_kwargs={offload: true}: it moves activations from a GPU to the host's memory, and this "
            "run is on the CPU; leave offload out"
        )


def enable_checkpointing(model: "PreTrainedModel", arguments: "TrainingArguments") -> None:
    """Enable it in the model if the arguments ask for it, with the options that transformers' Trainer takes from them.

    Without a `use_reentrant` it is False in the arguments from now on, as it is without any options; torch's own default cuts
    the graph of a model whose embeddings are frozen. Raises ConfigError for a model without.
    """
    if not arguments.activation_checkpointing:
        return
    if not model.supports_gradient_checkpointing:
        from glmtuner.models.unwrap import unwrapped

        raise ConfigError(
            f"trainer.gradient_checkpointing=true: transformers has none for {type(unwrapped(model)).__name__}; leave it out, and if memory "
            "does not suffice, type a smaller trainer.per_device_train_batch_size"
        )
    options = dict(arguments.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]  # parsed, no longer a str
    if options.keys() - {"every_n_layers", "offload"}:
        options.setdefault("use_reentrant", False)
    arguments.activation_checkpointing_kwargs = dict(options) or None
    layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=options or None, every_n_layers=layers, offload=offload
    )
