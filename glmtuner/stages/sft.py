from dataclasses import dataclass
from glmtuner.config.schema import Stage, preset
@preset("stage", "sft")
@dataclass(kw_only=True)
class Sft(Stage):
    """x"""
