"""`model.rope_scaling`: rotary positions beyond the pretrained length, by transformers' names of types and fields."""

from collections.abc import Iterator, Mapping
from typing import Any

from glmtuner.errors import did_you_mean

TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
FIELDS = (
    "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
KNOB = "model.rope_scaling"
EXAMPLE = f"type '{KNOB}={{rope_type: yarn, factor: 4.0}}'"


def knob_of(given: Mapping[str, Any] | None) -> str:
    """The key with its value, as it is typed."""
    return f"{KNOB}={_as_typed(given)}"


def _as_typed(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_as_typed(own)}' for name, own in value.items())}}}"
    return "null" if value is None else str(value)


def by_layer_type(given: Mapping[str, Any]) -> bool:
    """Whether the value has a dictionary for each type of layer, such as full_attention, as Gemma's configs have."""
    return bool(given) and all(isinstance(value, Mapping) for value in given.values())


def rope_scaling_errors(given: Any) -> Iterator[str]:
    """What is wrong about the names in `model.rope_scaling`; values are for transformers to judge, once it is imported."""
    if given is None:
        return
    if not isinstance(given, Mapping) or not given:
        yield f"{KNOB}={given}: expected a dictionary of transformers' rope_parameters, or null; {EXAMPLE}"
        return
    for own in given.values() if by_layer_type(given) else [given]:
        for name in own:
            if name not in FIELDS:
                yield f"{knob_of(given)}: no field {name!r}{did_you_mean(str(name), FIELDS, 'legal: ' + ', '.join(FIELDS))}"
        kind = own.get("rope_type")
        if kind is None:
            yield f"{knob_of(given)}: rope_type is missing, one of {', '.join(TYPES)}; {EXAMPLE}"
        elif kind not in TYPES:
            hint = did_you_mean(str(kind), TYPES, "legal: " + ", ".join(TYPES))
            yield f"{knob_of(given)}: no rope_type {kind!r}{hint}; {EXAMPLE}"
