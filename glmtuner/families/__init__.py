"""Model families, one file each; importing this package registers them. Nothing heavy is imported here."""

import importlib
import pkgutil

from omegaconf import OmegaConf

from glmtuner.families.family import FAMILIES, family_named

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _attention_projections(name: str) -> list[str]:
    """`${attention_projections:<family>}` of conf/finetuning/lora.yaml; [] for `auto`, which is resolved once the model is loaded."""
    return [] if name == "auto" else list(family_named(name).attention)


OmegaConf.register_new_resolver("attention_projections", _attention_projections, replace=True)

__all__ = ["FAMILIES", "family_named"]
