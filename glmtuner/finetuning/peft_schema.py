"""JSON Schema of finetuning.config, whose keys are the fields of the method that finetuning.peft_type names."""

from typing import Any

from glmtuner.finetuning.peft_fields import Kind, stored, stored_fields

SIMPLE: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "null": {"type": "null"},
    "dict": {"type": "object"},
    "any": {},
}


def peft_rules() -> list[dict[str, Any]]:
    """For each method: what `config` can be; empty where the installed PEFT is another than the one that its fields are known of."""
    rules = []
    for name in stored()[1]:
        if (known := stored_fields(name)) is None:
            return []
        properties = {
            key: {**kind_schema(kind), "description": f"of PEFT's {known.owner}"} for key, kind in known.kinds.items()
        }
        config = {"type": "object", "properties": properties, "additionalProperties": False}
        chosen = {"required": ["peft_type"], "properties": {"peft_type": {"enum": [name, name.lower()]}}}
        rules.append({"if": chosen, "then": {"properties": {"config": config}}})
    return rules


def kind_schema(kind: Kind) -> dict[str, Any]:
    """The values of a field's type."""
    return {"anyOf": [*map(_one, kind), {"$ref": "#/$defs/later"}]}


def _one(each: Any) -> dict[str, Any]:
    if isinstance(each, str):
        return SIMPLE[each]
    ((name, inner),) = each.items()
    if name == "words":
        return {"enum": list(inner)}
    return {"type": "array", "items": kind_schema(inner)} if name == "list" else {"type": "object"}
