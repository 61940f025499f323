"""LoRA, by PEFT."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from glmtuner.config.groups import Finetuning, Model, ModelFamily, preset
from glmtuner.config.ranges import range_errors
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.experts import ALL_EXPERTS
from glmtuner.families.family import READ
from glmtuner.finetuning.adapter import (
    ADAPTER,
    adapter_parameters,
    is_pattern,
    load_adapter,
    peft_config,
    read_lora_config,
    settings_of,
    sort_names,
)
from glmtuner.finetuning.eva import eva_config, start_at_inputs
from glmtuner.finetuning.experts import Targets, adapted_by_peft, set_dropout, settle, targets_matching, targets_of
from glmtuner.finetuning.initial import (
    changes_base,
    first_halves,
    initial_factors,
    keep_initial,
    known_to_peft,
    start_at_quantization_error,
    write_as_plain_lora,
)
from glmtuner.finetuning.lora_keys import (
    check_names,
    check_patterns,
    check_precision,
    check_rows_of_eva,
    excluded,
    exclusive_keys,
    names_parts,
)
from glmtuner.finetuning.loraplus import loraplus_rates
from glmtuner.finetuning.new_rows import ROWS, keep_rows_exact, train_new_rows
from glmtuner.finetuning.targets import check_attachment, excluded_modules, no_module_named
from glmtuner.finetuning.trained import load_tensors
from glmtuner.run_folder.folder import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Bias(str, Enum):
    """Which biases of the base are trained."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


@preset("finetuning", "lora")
@dataclass(kw_only=True)
class Lora(Finetuning):
    """Low-rank update, W + (alpha / rank) B A, on chosen linear layers (Hu et al. 2021, arXiv:2106.09685).

    With `use_rslora` it is scaled by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732); with `use_dora` the columns' lengths are
    trained apart from their directions (Liu et al. 2024, arXiv:2402.09353). Keys without `lora_` have PEFT's names and meanings.
    """

    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target: list[str]
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: list[str] = field(default_factory=list)
    layers_to_transform: list[int] = field(default_factory=list)
    layers_pattern: list[str] = field(default_factory=list)
    lora_bias: bool = False
    bias: Bias = Bias.none
    modules_to_save: list[str] = field(default_factory=list)
    trainable_token_indices: list[int] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    eva_rho: float = 2.0
    eva_tau: float = 0.99
    eva_use_label_mask: bool = True
    eva_whiten: bool = False
    eva_adjust_scaling_factors: bool = True
    eva_batch_size: int = 4
    eva_max_batches: int = 1000

    def __post_init__(self) -> None:
        wrong = [
            *range_errors(
                "finetuning",
                self,
                (
                    ("lora_rank", self.lora_rank >= 1, "a rank is at least 1"),
                    ("lora_alpha", self.lora_alpha > 0, "above 0; the update is scaled by alpha / rank"),
                    ("lora_dropout", 0 <= self.lora_dropout < 1, "a share in [0, 1)"),
                    (
                        "loraplus_lr_ratio",
                        self.loraplus_lr_ratio is None or self.loraplus_lr_ratio >= 1,
                        "1 or more, such as 16, or null for one learning rate",
                    ),
                    ("loraplus_lr_embedding", self.loraplus_lr_embedding > 0, "a learning rate above 0"),
                    (
                        "eva_rho",
                        1 <= self.eva_rho <= 1000,
                        "1 (all ranks stay) or more: the largest rank over lora_rank",
                    ),
                    ("eva_tau", 0 <= self.eva_tau < 1, "a cosine in [0, 1)"),
                    ("eva_batch_size", self.eva_batch_size >= 1, "1 row or more"),
                    ("eva_max_batches", self.eva_max_batches >= 2, "2 or more"),
                ),
            ),
            *exclusive_keys(self),
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))

    def resolved(self, family: ModelFamily, layers: int) -> Self:
        """The method with the family's targets for an empty list, all linear layers and experts for [all]; raises ConfigError.

        Names are checked as far as the family knows them; `attach` checks all of them by the model's own modules.
        """
        if not self.lora_target:
            targets = family.lora_targets or family.attention
            if not targets:
                raise ConfigError(
                    "finetuning.lora_target=[]: no projections of attention or of a recurrent state were recognised in the blocks of "
                    f"this model, so there is no default; name layers of its blocks ({', '.join(family.linears)}), or type "
                    "finetuning.lora_target=[all]"
                )
            return replace(self, lora_target=list(targets))
        if self.lora_target == ["all"]:
            return replace(self, lora_target=[*family.linears, *([ALL_EXPERTS] if family.experts else [])])
        known = (*family.linears, *family.experts, *family.left_out)
        if family.name != READ and not is_pattern(self.lora_target):
            for name in self.lora_target:
                if not {name, name.rpartition(".")[2]} & {*known}:
                    raise no_module_named(name, known, family, self.lora_target)
        return self

    def check_model(self, model: Model, family: ModelFamily | None) -> None:
        by_family = family is not None and not is_pattern(self.lora_target) and {*self.lora_target} <= {*family.linears}
        if not by_family or names_parts(self):
            check_attachment(self, model, family)

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        from peft import LoraConfig, TaskType

        check_names(self, model, family)
        pattern = self.lora_target[0] if is_pattern(self.lora_target) else None
        found = targets_matching(model, pattern) if pattern else targets_of(model, self.lora_target)
        targets = found or Targets([], [], [])
        left_out = excluded_modules(model, family, [pattern] if pattern else targets.modules, is_pattern=bool(pattern))
        on_meta = next(model.parameters()).is_meta
        config = LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts fractions, too
            lora_dropout=self.lora_dropout,
            target_modules=targets.modules if found else pattern,
            target_parameters=sorted({*targets.parameters, *self.target_parameters}) or None,
            exclude_modules=excluded(self.exclude_modules, left_out),
            task_type=TaskType.CAUSAL_LM,
            init_lora_weights=known_to_peft(self.init_lora_weights, on_meta=on_meta),  # type: ignore[arg-type]
            **self._further(),
            **({"eva_config": eva_config(self)} if self.init_lora_weights == "eva" and not on_meta else {}),
        )
        train_new_rows(config, model)
        check_rows_of_eva(self.init_lora_weights, config)
        try:
            settle(config, model)
            adapted: Any = adapted_by_peft(model, config)  # PEFT keeps adapters in float32 on a half-precision base
        except (ValueError, TypeError, NotImplementedError) as error:  # no path matches, or one that is no linear layer
            wrong = f"finetuning.lora_target=[{','.join(self.lora_target)}]: {' '.join(str(error).split())[:300]}"
            raise ConfigError(
                f"{wrong}; name linear layers, or type a regular expression that matches their whole paths"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"finetuning.lora_rank={self.lora_rank}: not enough memory for the adapter ({reason}); type a smaller one"
            ) from error
        keep_rows_exact(adapted)
        check_patterns(self, adapted)
        check_precision(adapted)
        if changes_base(self.init_lora_weights) and not on_meta:
            keep_initial(adapted)
        if self.init_lora_weights == "loftq" and not on_meta:
            start_at_quantization_error(adapted)
        if config.target_parameters and self.lora_dropout:
            set_dropout(adapted, self.lora_dropout)
        if targets.left_out and not on_meta:  # said once, of the model with values
            say(
                f"{len(targets.left_out)} linear layers (such as {targets.left_out[0]}) are not adapted: PEFT reads their names as "
                f"those of the routed experts of {model.config.model_type}, and their weights are quantized"
            )
        return adapted

    def _further(self) -> dict[str, Any]:
        """PEFT's settings with keys of the same name, where they are not at their defaults."""
        switches = {"use_rslora": self.use_rslora, "use_dora": self.use_dora, "lora_bias": self.lora_bias}
        names = (
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
            "trainable_token_indices",
        )
        given = {name: value for name in names if (value := getattr(self, name))}
        return {**{name: True for name, is_on in switches.items() if is_on}, "bias": Bias(self.bias).value, **given}

    def impossible(self, bits: int | None, sharded: bool) -> Iterator[str]:
        knob = f"finetuning.init_lora_weights={self.init_lora_weights}"
        if changes_base(self.init_lora_weights) and bits is not None:
            yield (
                f"{knob} with quant=int{bits}: it takes the adapter's first product off the base, which integer weights do not hold; "
                "type quant=none, or finetuning.init_lora_weights=loftq with quant=int4"
            )
        if changes_base(self.init_lora_weights) and sharded:
            yield f"{knob} with sharded weights: it needs whole matrices; type parallel=ddp, or leave it out"
        if self.init_lora_weights == "eva" and sharded:
            yield f"{knob} with sharded weights: one process computes it, with whole weights; type parallel=ddp, or leave it out"
        if self.init_lora_weights == "mica" and (bits is not None or sharded):
            yield f"{knob} with quantized or sharded weights: it needs their singular vectors; type quant=none, or leave it out"
        if self.init_lora_weights == "loftq" and bits != 4:
            yield f"{knob} without quant=int4: it starts the adapter at what int4 rounds off; type quant=int4, or leave it out"

    def needs_values(self) -> str | None:
        if self.use_dora:
            return "use_dora=true"
        copies = ("modules_to_save", "trainable_token_indices")  # of whole modules, of rows of the embeddings
        return next((name for name in copies if getattr(self, name)), None)

    def initialize(
        self,
        model: "nn.Module",
        rows: Sequence[Mapping[str, Any]],
        collate: "Callable[[Any], dict[str, torch.Tensor]]",
        seed: int,
        checkpoint: Path | None,
    ) -> None:
        if self.init_lora_weights == "eva":
            start_at_inputs(model, self, rows, collate, seed, checkpoint)

    def learning_rates(self, model: "nn.Module", rate: float) -> "dict[nn.Parameter, float]":
        if self.loraplus_lr_ratio is None:
            return {}
        return loraplus_rates(model, rate, self.loraplus_lr_ratio, self.loraplus_lr_embedding)

    def save(self, model: "PreTrainedModel", folder: Path) -> None:
        if not adapter_parameters(model):
            raise AssertionError("an adapter without tensors")
        has_rows = any(ROWS in name for name, _ in model.named_parameters())  # else PEFT decides on whole embeddings
        model.save_pretrained(folder, save_embedding_layers=False if has_rows else "auto")
        if initial_factors(model):
            write_as_plain_lora(model, folder)
        sort_names(folder)

    def save_trained(self, model: "PreTrainedModel", folder: Path) -> None:
        self.save(model, folder)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        if not initial_factors(model):
            load_adapter(model, folder)
            return
        load_adapter(model, folder, first_halves(model, load_tensors(folder / ADAPTER), folder))


class SavedLora(Lora):
    """The LoRA of a saved adapter, with all settings of its adapter_config.json, also those without a key."""

    saved: Mapping[str, Any]  # not fields, which config.yaml would list
    folder: Path

    def __post_init__(self) -> None:
        """Nothing: `read_lora_config` has checked the settings, of which PEFT allows more than the keys do."""

    @classmethod
    def of(cls, folder: Path, finetuning_type: str = "lora") -> Self:
        """The method that a saved adapter was trained with; raises CheckpointError."""
        saved = read_lora_config(folder)
        method = cls(finetuning_type=finetuning_type, **settings_of(saved))
        method.saved, method.folder = saved, folder
        return method

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        import torch

        on_meta = any(parameter.is_meta for parameter in model.parameters())
        config = peft_config(self.saved, self.folder, on_meta=on_meta)
        try:
            settle(config, model)
            adapted: Any = adapted_by_peft(model, config)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CheckpointError(
                f"the adapter in {self.folder} does not fit this model: {' '.join(str(error).split())[:300]}"
            ) from None
        keep_rows_exact(adapted)
        return adapted

    def initialize(self, *_: Any, **__: Any) -> None:
        """Nothing: its weights are those that were saved."""
