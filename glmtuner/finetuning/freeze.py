"""Freeze tuning: only parts of a few layers are trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from glmtuner.config.groups import LayerPart, Model, ModelFamily, preset
from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.finetuning.full import Full
from glmtuner.finetuning.targets import check_attachment
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

    def check_model(self, model: Model, family: ModelFamily | None) -> None:
        if family is None:
            check_attachment(self, model, family)

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        freeze_all(model)
        blocks = family.blocks(model)
        part, layers = self.name_module_trainable, trainable_layer_ids(self.num_layer_trainable, len(blocks))
        parts_in = family.mlps_in if part is LayerPart.mlp else family.projections_in
        parts = {layer_id: parts_in(blocks[layer_id]) for layer_id in layers}
        without = [layer_id for layer_id, modules in parts.items() if not modules]
        if without == [*layers]:
            raise ConfigError(
                f"finetuning.name_module_trainable={part.value}: {lacking(blocks, without, part)}; {self._others(blocks, family)}"
            )
        if without and not next(model.parameters()).is_meta:  # said once, of the model with values
            say(
                f"finetuning.name_module_trainable={part.value}: {lacking(blocks, without, part)}, so nothing is trained there"
            )
        for modules in parts.values():
            for module in modules:
                for parameter in module.parameters():
                    make_trainable(parameter)
        return model

    def _others(self, blocks: "list[nn.Module]", family: ModelFamily) -> str:
        """What to type where none of the layers has the part: more layers, the other part, or another method."""
        part = self.name_module_trainable
        of_part = family.mlps_in if part is LayerPart.mlp else family.projections_in
        having = [layer_id for layer_id, block in enumerate(blocks) if of_part(block)]
        if having and self.num_layer_trainable > 0:
            return f"type finetuning.num_layer_trainable={len(blocks) - having[-1]} to include layer {having[-1]}, which has"
        if having:
            return f"type finetuning.num_layer_trainable={-having[0] - 1} to include layer {having[0]}, which has"
        other = LayerPart.qkv if part is LayerPart.mlp else LayerPart.mlp
        of_other = family.mlps_in if other is LayerPart.mlp else family.projections_in
        if any(of_other(block) for block in blocks):
            return f"type finetuning.name_module_trainable={other.value}"
        return "type finetuning=lora or finetuning=full"


PARTS = {LayerPart.mlp: "MLP", LayerPart.qkv: "projections of queries, keys and values"}


def lacking(blocks: "list[nn.Module]", layer_ids: list[int], part: LayerPart) -> str:
    """That these layers, counted from 0, lack a part, as a phrase."""
    shown = ", ".join(map(str, layer_ids[:8])) + ("" if len(layer_ids) <= 8 else f" and {len(layer_ids) - 8} more")
    kinds = ", ".join(dict.fromkeys(type(blocks[layer_id]).__name__ for layer_id in layer_ids))
    layers, have = ("layers", "have") if len(layer_ids) > 1 else ("layer", "has")
    return f"{layers} {shown} ({kinds}) {have} no {PARTS[part]}"
