"""How long a row may be for a model that has learned, or tabulated, a fixed number of positions."""

from typing import TYPE_CHECKING

from glmtuner.errors import ConfigError
from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    from torch import nn

TABLES = ("embed_positions",)  # buffers with a row a position: GPT-J, CodeGen
OFFSETS = (0, 2)  # rows of a table before position 0: OPT has two


def most_positions(model: "nn.Module") -> int | None:
    """The largest number of tokens in a row; None where positions are computed, and there is one for every token."""
    from torch import nn

    base = unwrapped(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    lengths = {limit + offset for offset in OFFSETS}
    for path, module in base.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in name or name == "wpe") and module.num_embeddings in lengths:
            return limit
        for own, buffer in module.named_buffers(recurse=False):
            is_mask = buffer.ndim == 4 and buffer.shape[-2:] == (limit, limit)
            if is_mask or (own in TABLES and buffer.shape[0] == limit):
                return limit
    return None


def check_positions(model: "nn.Module", longest: int) -> None:
    """Raise ConfigError where a row of `longest` tokens has more than the model has positions for."""
    most = most_positions(model)
    if most is not None and longest > most:
        raise ConfigError(
            f"the longest row has {longest:,} tokens, and {type(unwrapped(model)).__name__} has positions for {most:,} "
            f"(max_position_embeddings={most}); type data.max_source_length and data.max_target_length with a sum of at most {most}"
        )
