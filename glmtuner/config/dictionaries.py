"""Dictionaries of the configuration, such as finetuning.config: their keys are free, and checked by the class that has them."""

import typing

from omegaconf import DictConfig, OmegaConf


def schema_of(cls: type) -> DictConfig:
    """The class as OmegaConf's schema, in which its dictionaries take any key."""
    schema: DictConfig = OmegaConf.structured(cls)
    for name in dictionary_fields(cls):
        OmegaConf.set_struct(schema._get_node(name), False)  # type: ignore[arg-type]  # a dictionary's node is a DictConfig
    return schema


def dictionary_fields(cls: type) -> list[str]:
    """The fields of a group's class that are dictionaries."""
    return [name for name, hint in typing.get_type_hints(cls).items() if is_dictionary(hint)]


def is_dictionary(hint: object) -> bool:
    """Whether an annotation is that of a dictionary with free keys."""
    return typing.get_origin(hint) is dict
