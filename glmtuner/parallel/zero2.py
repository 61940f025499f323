"""ZeRO stage 2, by DeepSpeed."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.schema import Parallel
from glmtuner.errors import ConfigError


@preset("parallel", "zero2")
@dataclass(kw_only=True)
class Zero2(Parallel):
    """Every process holds the full model, and a shard of gradients and optimizer states (arXiv:1910.02054)."""

    offload_optimizer: bool = False
    deepspeed_config: str | None = None

    zero_stage: ClassVar[int | None] = 2
    shares: ClassVar[tuple[str, ...]] = ("gradients", "optimizer states")

    def check_machine(self) -> None:
        if find_spec("deepspeed") is None:
            raise ConfigError(
                f"parallel={self.name} needs the package deepspeed, which is not installed; type pip install deepspeed, or "
                "parallel=fsdp2"
            )

    def arguments(self) -> dict[str, Any]:
        """The user's DeepSpeed configuration, or our own; transformers replaces `auto` by the trainer's values."""
        return {"deepspeed": self.deepspeed_config or self.configuration()}

    def configuration(self) -> dict[str, Any]:
        """DeepSpeed's configuration of this ZeRO stage."""
        zero: dict[str, Any] = {"stage": self.zero_stage, "overlap_comm": True, "contiguous_gradients": True}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "gradient_clipping": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        }
