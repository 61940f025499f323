"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA whose A starts at the main directions of each layer's inputs, by PEFT.

The directions are right singular vectors of the inputs of the run's own training rows; the ranks go to the layers whose
inputs they explain most, at most `eva_rho` times the rank each, the same number in all. B starts at zero, so that the model is
unchanged. Rank 0 computes, and the others get its values; a resumed training takes ranks and values from its checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glmtuner.console import say
from glmtuner.distributed import ranks
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.finetuning.adapter import ADAPTER
from glmtuner.finetuning.targets import adapted_ranks, ranks_summary
from glmtuner.finetuning.trained import load_tensors
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
Rows = Sequence[Mapping[str, Any]]
KNOB = "finetuning.init_lora_weights=eva"


class EvaKeys(Protocol):
    """The fields of `Lora` that EVA has."""

    lora_rank: int
    rank_pattern: dict[str, int]
    eva_rho: float
    eva_tau: float
    eva_use_label_mask: bool
    eva_whiten: bool
    eva_adjust_scaling_factors: bool
    eva_batch_size: int
    eva_max_batches: int


def eva_config(lora: EvaKeys) -> Any:
    """PEFT's configuration."""
    from peft import EvaConfig

    names = ("rho", "tau", "use_label_mask", "whiten", "adjust_scaling_factors")
    return EvaConfig(**{name: getattr(lora, f"eva_{name}") for name in names})


def start_at_inputs(
    adapted: Any, lora: EvaKeys, rows: Rows, collate: Callable[[Any], Batch], seed: int, checkpoint: Path | None
) -> None:
    """Give the adapter its ranks and A; on every rank the same. Raises ConfigError where the rows do not suffice.

    `rows` have `input_ids`, and `labels` if they are learned. With a `checkpoint` only the ranks are those of its adapter, whose
    values `restore` loads.
    """
    if checkpoint is not None:
        _apply(adapted, _from_checkpoint(adapted, checkpoint))
        return
    values = ranks.broadcast_from_rank0(lambda: computed(adapted, lora, rows, collate, seed))
    _apply(adapted, values)
    say(f"{KNOB}: by the inputs of the layers, the ranks are {ranks_summary(adapted_ranks(adapted))}")


def computed(
    adapted: Any, lora: EvaKeys, rows: Rows, collate: Callable[[Any], Batch], seed: int
) -> "dict[str, torch.Tensor]":
    """Path of a layer -> its A, float32 [rank, inputs] on the CPU, by PEFT's get_eva_state_dict on batches of the rows."""
    from peft.tuners.lora.eva import get_eva_state_dict

    largest = round(max([lora.lora_rank, *lora.rank_pattern.values()]) * lora.eva_rho)
    batches = Batches(rows, collate, seed, lora, largest)
    passes = 0

    def mask_of(batch: Batch, config: Any) -> "torch.Tensor":
        return batch["mask"]

    def forward(model: Any, batch: Batch) -> None:
        nonlocal passes
        passes += 1
        if passes > lora.eva_max_batches + 1:  # the first batch is passed twice
            raise ConfigError(
                f"{KNOB}: after {lora.eva_max_batches} batches the directions still turn by more than finetuning.eva_tau="
                f"{lora.eva_tau:g} allows; type finetuning.eva_tau=0.9, or raise finetuning.eva_max_batches or finetuning.eva_batch_size"
            )
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    try:
        found = get_eva_state_dict(
            adapted,
            batches,
            forward_fn=forward,
            prepare_model_inputs_fn=mask_of,
            prepare_layer_inputs_fn=inputs_of,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except (ValueError, AssertionError, RuntimeError) as error:  # more directions than inputs have features
        raise ConfigError(
            f"{KNOB} with finetuning.lora_rank={lora.lora_rank} and finetuning.eva_rho={lora.eva_rho:g}: PEFT does not find {largest} "
            f"directions of each layer's inputs ({' '.join(str(error).split())[:200] or type(error).__name__}); type a smaller rank, or "
            "finetuning.eva_rho=1"
        ) from None
    return {path: value.float().cpu() for path, value in found.items()}


def inputs_of(given: Any, mask_BT: "torch.Tensor", path: str) -> "torch.Tensor":
    """What a layer is given for the tokens of the mask, [tokens, inputs]; raises ValueError for a layer that sees others."""
    value: torch.Tensor = given[0] if isinstance(given, tuple) else given
    flat = value.reshape(-1, value.shape[-1])
    if len(flat) != mask_BT.numel():
        raise ValueError(f"{path} is not given every token; leave it out of finetuning.lora_target")
    return flat[mask_BT.flatten()]


class Batches:
    """Batches of the rows in an order drawn from the seed, the same each time, without those that have too few tokens."""

    def __init__(
        self, rows: Rows, collate: Callable[[Any], Batch], seed: int, lora: EvaKeys, least_tokens: int
    ) -> None:
        import torch

        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        self.rows, self.collate, self.lora, self.least_tokens = rows, collate, lora, least_tokens
        size = min(lora.eva_batch_size, len(order))
        self.parts = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        some = False
        for part in self.parts:
            rows = [self.rows[index] for index in part]
            batch = self.collate([{**row, "labels": row.get("labels", row["input_ids"])} for row in rows])
            mask_BT = batch["attention_mask"].bool()
            if self.lora.eva_use_label_mask:
                mask_BT = mask_BT & batch["labels"].ne(IGNORE_INDEX)
            if int(mask_BT.sum()) >= self.least_tokens:
                some = True
                yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "mask": mask_BT}
        if not some:
            what = "learned tokens" if self.lora.eva_use_label_mask else "tokens"
            raise ConfigError(
                f"{KNOB}: no batch of finetuning.eva_batch_size={self.lora.eva_batch_size} rows has the {self.least_tokens} {what} that "
                f"as many directions take; type finetuning.eva_batch_size={4 * self.lora.eva_batch_size}, a smaller finetuning.lora_rank"
                f"{', or finetuning.eva_use_label_mask=false' if self.lora.eva_use_label_mask else ''}"
            )


def _from_checkpoint(adapted: Any, folder: Path) -> "dict[str, torch.Tensor]":
    """Path of a layer -> A of a checkpoint's adapter; a layer without one has the rank 0."""
    import torch
    from peft.tuners.lora.layer import LoraLayer

    saved = load_tensors(folder / ADAPTER)
    found = {}
    for path, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            value = saved.pop(f"{path}.lora_A.weight", torch.zeros(0, int(module.in_features or 0)))
            if value.ndim != 2 or value.shape[1] != module.in_features:
                raise CheckpointError(
                    f"the adapter in {folder} does not fit this model: {path} has {module.in_features} inputs; use another checkpoint"
                )
            found[path] = value
    return found


def _apply(adapted: Any, values: "dict[str, torch.Tensor]") -> None:
    """Set ranks, A and PEFT's configuration, by PEFT; the adapter stays float32 on a half-precision base."""
    import torch
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    with torch.random.fork_rng(devices=[]):  # PEFT draws values for the layers of another rank first
        initialize_lora_eva_weights(adapted, eva_state_dict=dict(values), show_progress_bar=False)
    modules = dict(adapted.named_modules())
    with torch.no_grad():
        for path, value in values.items():
            if not value.shape[0]:
                continue
            for part in (modules[path].lora_A["default"], modules[path].lora_B["default"]):
                if part.weight.element_size() < 4:
                    part.weight.data = part.weight.data.float()
            modules[path].lora_A["default"].weight.copy_(value)
