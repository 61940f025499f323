"""ZeRO stage 3, by DeepSpeed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run
from glmtuner.parallel.zero2 import Zero2


@preset("parallel", "zero3")
@dataclass(kw_only=True)
class Zero3(Zero2):
    """Every process holds a shard of weights, gradients and optimizer states (arXiv:1910.02054)."""

    offload_parameters: bool = False

    sharded = True
    whole_modules = False
    shares = ("frozen weights", "trained weights", "gradients", "optimizer states")
    zero_stage = 3

    def impossible(self, run: Run) -> Iterator[str]:
        if run.quant.quantization_bit is not None:
            yield (
                f"parallel=zero3 with quant=int{run.quant.quantization_bit}: integer weights cannot be sharded; type "
                "parallel=zero2, or quant=none"
            )

    def configuration(self) -> dict[str, Any]:
        """DeepSpeed's configuration of stage 3."""
        config = super().configuration()
        config["zero_optimization"] |= {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": False,  # glmtuner gathers the trained weights
        }
        if self.offload_parameters:
            config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
        return config
