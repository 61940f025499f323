"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ranks that move to the layers that need them, by PEFT's own allocator.

An update is P Λ Q; after each optimizer step the allocator scores its triplets (a column of P, an entry of Λ, a row of Q) and
sets the Λ of the least important ones to zero, down to the budget of the step. The loss has a penalty that keeps P and Q
orthogonal. In a model without AdaLoRA the functions of this module do nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.finetuning.adapter import ADAPTER, adapter_parameters, read_adapter_config
from glmtuner.finetuning.trained import assign, load_tensors, save_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

NAME = "default"  # the adapter's, in PEFT
ALLOCATOR = "allocator.safetensors"  # what a checkpoint has beside the adapter
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # of the sensitivities, and of their uncertainties
UNKNOWN = 2**31 - 1  # total_step, until the training has begun
KNOB = "finetuning.config"
# The fields of PEFT's class that its code reads; it inherits the others from that of LoRA.
READ = {
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern", "lora_alpha",
    "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias",
    "modules_to_save", "init_lora_weights", "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip


def config_errors(config: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each value that PEFT would ignore, or fail on in the middle of a training."""
    for name in config.keys() - READ:
        yield f"{KNOB}.{name} has no effect on finetuning.peft_type=ADALORA; leave it out"
    if not isinstance(config.get("init_lora_weights", True), bool):
        yield f"{KNOB}.init_lora_weights={config['init_lora_weights']}: ADALORA has one initialization; leave it out"
    target, first = config.get("target_r", 8), config.get("init_r", 12)
    if not 1 <= target < first:
        yield (
            f"{KNOB}.target_r={target} with {KNOB}.init_r={first}: the mean rank falls from init_r to target_r, which is 1 or more; "
            f"type {KNOB}.init_r={max(target + target // 2, 2)}"
        )
    for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1), ("total_step", 1)):
        if config.get(name) is not None and config[name] < least:
            yield f"{KNOB}.{name}={config[name]}: {least} or more"
    for name in ("beta1", "beta2"):
        if not 0 < config.get(name, 0.85) < 1:
            yield f"{KNOB}.{name}={config[name]}: in (0, 1)"


def tuner_of(model: Any) -> Any | None:
    """PEFT's AdaLoRA around a model; None for any other model."""
    from peft.tuners.adalora import AdaLoraModel

    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, AdaLoraModel) else None


def prepare(adapted: Any) -> None:
    """Mark the ranks of an attached adapter as those that a training may change."""
    if (tuner := tuner_of(adapted)) is not None:
        tuner.ranks_are_final = False


def begin(model: Any, steps: int, *, is_given: bool) -> None:
    """Set the length of the schedule, if it is not given, to the training's number of optimizer steps; raises ConfigError."""
    tuner = tuner_of(model)
    if tuner is None:
        return
    if tuner.ranks_are_final:
        say("the ranks of this AdaLoRA adapter were chosen by the training that it is from, and stay as they are")
        return
    config = tuner.peft_config[NAME]
    if not is_given:
        config.total_step = steps
    last = config.total_step - config.tfinal
    if config.tinit >= last:
        raise ConfigError(
            f"{KNOB}.tinit={config.tinit} and {KNOB}.tfinal={config.tfinal} of {config.total_step} steps leave none in which ranks "
            f"fall; type {KNOB}.tinit={config.total_step // 10} {KNOB}.tfinal={config.total_step // 3}, or train longer"
        )
    if last > steps:
        say(
            f"{KNOB}.total_step={config.total_step}: the training has {steps} steps, so the ranks will not fall to "
            f"{KNOB}.target_r={config.target_r}"
        )


def allocate(model: Any, step: int) -> None:
    """Score the triplets by the gradients, and set the least important ones to zero; `step` is that of the update, from 1."""
    tuner = tuner_of(model)
    if tuner is not None and not tuner.ranks_are_final:
        tuner.update_and_allocate(step)


def orthogonality(model: Any) -> "torch.Tensor | None":
    """orth_reg_weight times the mean of ‖PᵀP - I‖ and ‖QQᵀ - I‖ over all layers, a float32 scalar (arXiv:2303.10512, eq. 4, as in PEFT).

    None without a weight. PEFT takes the norm, and not its square.
    """
    import torch

    tuner = tuner_of(model)
    weight = 0.0 if tuner is None else tuner.peft_config[NAME].orth_reg_weight
    if tuner is None or not weight:
        return None
    norms = []
    for name, value in tuner.model.named_parameters():
        is_q = f"lora_A.{NAME}" in name
        if not (is_q or f"lora_B.{NAME}" in name):
            continue
        with torch.autocast(value.device.type, enabled=False):
            matrix = value.float()
            gram_RR = matrix @ matrix.T if is_q else matrix.T @ matrix
            norms.append(torch.linalg.norm(gram_RR - torch.eye(len(gram_RR), device=gram_RR.device)))
    return weight * torch.stack(norms).mean()


@contextmanager
def whole(model: Any, folder: Path) -> Iterator[None]:
    """While this lasts, PEFT saves all triplets, also those of rank zero, which may come back; then the allocator's state is written."""
    import torch

    tuner = tuner_of(model)
    if tuner is None or tuner.ranks_are_final:
        yield
        return
    config, allocator = tuner.peft_config[NAME], tuner.rankallocator
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern
    state = {f"{part}/{name}": value for part in AVERAGES for name, value in getattr(allocator, part).items()}
    masks = {f"rank_pattern/{name}": torch.tensor(mask, dtype=torch.bool) for name, mask in (pattern or {}).items()}
    save_tensors(state | masks, folder / ALLOCATOR)


def restored(model: Any, folder: Path) -> bool:
    """Load an adapter, and the allocator's state if a checkpoint has it, bit by bit; False for another method. Raises CheckpointError."""
    tuner = tuner_of(model)
    if tuner is None:
        return False
    config, pattern = tuner.peft_config[NAME], read_adapter_config(folder).get("rank_pattern")
    saved = load_tensors(folder / ADAPTER)
    try:
        if pattern and any(len(value) != sum(_mask(pattern, name)) for name, value in _values(tuner)):
            tuner.resize_modules_by_rank_pattern(pattern, NAME)
            _exact(tuner)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the adapter in {folder} does not fit this model: its rank_pattern is that of other layers or ranks "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    config.rank_pattern = None  # PEFT would apply it to the names and values that are loaded
    assign(adapter_parameters(model), saved, folder)
    config.rank_pattern, tuner.ranks_are_final = pattern, bool(pattern)
    if (folder / ALLOCATOR).is_file():
        _restore_allocator(tuner, load_tensors(folder / ALLOCATOR), folder)
    return True


def _restore_allocator(tuner: Any, saved: "Mapping[str, torch.Tensor]", folder: Path) -> None:
    import torch

    allocator, parameters = tuner.rankallocator, dict(tuner.model.named_parameters())
    allocator.reset_ipt()
    masks: dict[str, list[bool]] = {}
    for key, value in saved.items():
        part, _, name = key.partition("/")
        if name not in parameters or (part in AVERAGES and value.shape != parameters[name].shape):
            raise CheckpointError(
                f"{folder / ALLOCATOR} is not of this model (it holds {name}); use another checkpoint"
            )
        if part in AVERAGES:
            getattr(allocator, part)[name] = value.to(parameters[name].device)
            allocator.ipt[name] = torch.zeros_like(parameters[name])
        else:
            masks[name] = value.tolist()
    tuner.peft_config[NAME].rank_pattern = masks or None


def drop_masked(model: Any) -> None:
    """Remove the triplets that the last allocation set to zero, so that the adapter is as small as its ranks.

    Where the training ended between two allocations, in which they were trained again, all are kept.
    """
    tuner = tuner_of(model)
    if tuner is None or tuner.ranks_are_final:
        return
    config = tuner.peft_config[NAME]
    pattern = config.rank_pattern
    if not pattern:
        return
    import torch

    for name, value in _values(tuner):
        if bool(value[~torch.tensor(_mask(pattern, name), device=value.device)].ne(0).any()):
            config.rank_pattern = None
            say("the training ended before the ranks of AdaLoRA were final: the adapter keeps those that it began with")
            return
    tuner.resize_modules_by_rank_pattern(pattern, NAME)
    _exact(tuner)
    tuner.ranks_are_final = True


def _values(tuner: Any) -> "Iterator[tuple[str, nn.Parameter]]":
    """Name -> Λ, [rank, 1], of each layer."""
    return ((name, value) for name, value in tuner.model.named_parameters() if f"lora_E.{NAME}" in name)


def _mask(pattern: Mapping[str, Any], name: str) -> list[bool]:
    """Which triplets of a layer are kept; PEFT leaves the adapter's name out of a pattern that it has saved."""
    mask: list[bool] = pattern[name] if name in pattern else pattern[name.replace(f".{NAME}", "")]
    return mask


def _exact(tuner: Any) -> None:
    """Keep the adapter float32 on a half-precision base, as PEFT makes it at first."""
    for name, value in tuner.model.named_parameters():
        if "lora_" in name and value.requires_grad and value.element_size() < 4:
            value.data = value.data.float()
