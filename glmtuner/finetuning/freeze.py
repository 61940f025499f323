"""Freeze tuning: only parts of a few layers are trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from glmtuner.config.groups import LayerPart, ModelFamily, preset
from glmtuner.errors import ConfigError
from glmtuner.finetuning.full import Full
from glmtuner.finetuning.trained import freeze_all, make_trainable

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def trainable_layer_ids(num_layer_trainable: int, total_layers: int) -> range:
    """Layers to train, counted from 0: the last ones when positive, the first ones when negative."""
    if not 0 < abs(num_layer_trainable) <= total_layers:
        raise ConfigError(
            f"finetuning.num_layer_trainable={num_layer_trainable} does not fit a model of {total_layers} layers; "
            f"type 1 to {total_layers} for the last layers, -1 to -{total_layers} for the first ones"
        )
    if num_layer_trainable > 0:
        return range(total_layers - num_layer_trainable, total_layers)
    return range(-num_layer_trainable)


@preset("finetuning", "freeze")
@dataclass(kw_only=True)
class Freeze(Full):
    """The MLPs, or the query, key and value projections, of the last n layers (of the first n when n is negative)."""

    num_layer_trainable: int
    name_module_trainable: LayerPart

    on_quantized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_layer_trainable == 0:
            raise ConfigError(
                "finetuning.num_layer_trainable=0 trains nothing; type 3 for the last three layers, -3 for the first three"
            )

    def resolved(self, family: ModelFamily, layers: int) -> Self:
        """The method unchanged; raises ConfigError where the model has fewer layers."""
        trainable_layer_ids(self.num_layer_trainable, layers)
        return self

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        freeze_all(model)
        blocks = family.blocks(model)
        for layer_id in trainable_layer_ids(self.num_layer_trainable, len(blocks)):
            for module in self._parts(blocks[layer_id], family):
                for parameter in module.parameters():
                    make_trainable(parameter)
        return model

    def _parts(self, block: "nn.Module", family: ModelFamily) -> "list[nn.Module]":
        if self.name_module_trainable is LayerPart.mlp:
            if not family.mlp:
                raise ConfigError(
                    f"finetuning.name_module_trainable=mlp: the blocks of this model ({type(block).__name__}) have no MLP "
                    "as one module; type finetuning.name_module_trainable=qkv"
                )
            return [block.get_submodule(family.mlp)]
        attention = block.get_submodule(family.attention_block)
        return [module for path, module in attention.named_modules() if path.rpartition(".")[2] in family.attention]
