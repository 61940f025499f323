"""Applies `model.rope_scaling` to a model's config, as transformers would read it from config.json."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from glmtuner.config.rope import EXAMPLE, by_layer_type, knob_of
from glmtuner.console import say
from glmtuner.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section")  # of the model's own parameters, where none are given
OF_ORIGINAL = ("yarn", "longrope", "llama3")  # types that transformers tells the pretrained length


def apply_rope_scaling(config: "PreTrainedConfig", given: Mapping[str, Any] | None) -> None:
    """Set the config's `rope_parameters` to those given, with the model's own theta; nothing for None, or where they are set already.

    max_position_embeddings becomes the extended length, except for `dynamic`, which computes from the pretrained one. Raises
    ConfigError for a model without such parameters, and for values that transformers finds wrong.
    """
    if given is None:
        return
    text = config.get_text_config(decoder=True)
    current = getattr(text, "rope_parameters", None)
    if not isinstance(current, dict) or not current:
        raise ConfigError(
            f"{knob_of(given)}: model_type={text.model_type} has no rotary positions that transformers scales; leave "
            "model.rope_scaling out, or choose another model"
        )
    layers = text.nested_rope_parameter_keys(current)
    if layers != [] and not by_layer_type(given):
        raise ConfigError(
            f"{knob_of(given)}: model_type={text.model_type} has rotary positions of its own for each of {', '.join(layers)}; type "
            f"'model.rope_scaling={{{layers[0]}: {{rope_type: yarn, factor: 4.0}}}}'"
        )
    if by_layer_type(given):
        for layer in given:
            if layer not in layers:
                legal = f"legal: {', '.join(layers)}" if layers else f"this model has none; {EXAMPLE}"
                raise ConfigError(f"{knob_of(given)}: no type of layer {layer!r}{did_you_mean(layer, layers, legal)}")
        scaled = {layer: current[layer] for layer in current} | {
            layer: _merged(current[layer] or {}, own, text) for layer, own in given.items()
        }
        changed = [(current[layer] or {}, scaled[layer]) for layer in given]
    else:
        scaled = _merged(current, given, text)
        changed = [(current, scaled)]
    if all(_is_set(before, after) for before, after in changed):
        return  # the config of a model that was trained with them
    lengths = [_extended(after, text.max_position_embeddings) for _, after in changed]
    text.rope_parameters = scaled
    text.max_position_embeddings = max(lengths)
    if getattr(text, "rope_interpolation", False) and scaled.get("rope_type") == "linear":
        text.rope_ratio = float(scaled["factor"])  # ChatGLM2's own name for it, which its config computes from
    with _judged(given) as problems:
        text.standardize_rope_params()
        text.validate_rope()
    if problems:
        raise ConfigError(f"{knob_of(given)}: {'; '.join(problems)}; change these fields, or {EXAMPLE}")


def _merged(current: Mapping[str, Any], given: Mapping[str, Any], text: "PreTrainedConfig") -> dict[str, Any]:
    """The parameters that are given, with those of the model that say nothing about its length."""
    kept = {name: current[name] for name in KEPT if current.get(name) is not None}
    merged = kept | dict(given)
    if merged["rope_type"] in OF_ORIGINAL:
        is_same = all(current.get(name) == value for name, value in given.items())
        known = current.get("original_max_position_embeddings") if is_same else None
        merged.setdefault("original_max_position_embeddings", known or text.max_position_embeddings)
    return merged


def _is_set(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return all(before.get(name) == value for name, value in after.items())


def _extended(parameters: Mapping[str, Any], length: int) -> int:
    """The length that positions are scaled to; the model's own where the type does not say it."""
    factor = parameters.get("factor")
    if parameters["rope_type"] == "dynamic" or not isinstance(factor, int | float):
        return length
    return max(length, int(factor * parameters.get("original_max_position_embeddings", length)))


class _Problems(list[str]):
    """Takes the place of the logger of transformers' validation: what it would warn of, a user has typed."""

    def warning(self, message: str, *_: Any) -> None:
        self.append(message)

    def warning_once(self, message: str, *_: Any) -> None:
        """Advice about values that are legal."""
        say(f"model.rope_scaling: {' '.join(message.split())}")


@contextmanager
def _judged(given: Mapping[str, Any]) -> Iterator[list[str]]:
    """Within it, transformers' validation adds what is wrong to the list that is returned."""
    from transformers import modeling_rope_utils

    problems, logger = _Problems(), modeling_rope_utils.logger
    modeling_rope_utils.logger = problems  # type: ignore[assignment]  # it has what validation calls
    try:
        yield problems
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of fields that are missing, or no numbers
        problems.append(str(error.args[0] if error.args else error))
    finally:
        modeling_rope_utils.logger = logger


def require_scaled(model: "nn.Module", given: Mapping[str, Any] | None) -> None:
    """Raise ConfigError where no rotary module of the model has taken the types that are given; else print what it computes with."""
    if given is None:
        return
    asked = {own["rope_type"] for own in given.values()} if by_layer_type(given) else {given["rope_type"]}
    found: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        found |= {*kind.values()} if isinstance(kind, dict) else {kind} if isinstance(kind, str) else set()
    if not asked <= found:
        raise ConfigError(
            f"{knob_of(given)}: {type(model).__name__} computes its positions in its own code, which does not read "
            f"rope_type={', '.join(sorted(asked - found))}; leave model.rope_scaling out, or choose another model"
        )
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]  # a PreTrainedModel has a config
    say(
        f"model.rope_scaling: rope_parameters={text.rope_parameters}, max_position_embeddings={text.max_position_embeddings}"
    )
