"""No quantization."""

from dataclasses import dataclass

from glmtuner.config.groups import Quant, preset


@preset("quant", "none")
@dataclass(kw_only=True)
class NoQuant(Quant):
    """The base weights in the precision that they are loaded in."""
