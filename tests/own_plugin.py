"""A metric, a method and a record format outside of the package, as a user writes them; tests copy this file."""

from dataclasses import dataclass
from typing import Any

from glmtuner.config.groups import Metric, preset
from glmtuner.data.formats import register_format
from glmtuner.data.records import BadRecord, Example, Message
from glmtuner.errors import ConfigError
from glmtuner.finetuning.full import Full
from glmtuner.finetuning.trained import freeze_all, make_trainable


@preset("metric", "same_length")
@dataclass(kw_only=True)
class SameLength(Metric):
    """How close an answer's length is to its label's, from 0 to `scale`."""

    scale: float = 100.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ConfigError(f"metric.scale={self.scale}: above 0")

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        longer = max(len(prediction), len(reference), 1)
        return {"same_length": self.scale * (1 - abs(len(prediction) - len(reference)) / longer)}


@preset("finetuning", "norms")
@dataclass(kw_only=True)
class Norms(Full):
    """Only the weights of normalization layers are trained."""

    def attach(self, model: Any, family: Any) -> Any:
        freeze_all(model)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                make_trainable(parameter)
        return model


def parse_ask_reply(raw: dict[str, Any], spec: Any) -> Example:
    if "ask" not in raw or "reply" not in raw:
        raise BadRecord("ask", "ask and reply are expected")
    return Example(messages=[Message("user", raw["ask"]), Message("assistant", raw["reply"])])


register_format("ask_reply", parse_ask_reply, {"prompt": "ask", "response": "reply"})
