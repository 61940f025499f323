"""Token ids of an answer to its text: control tokens are left out, except those that answers are written in."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from glmtuner.templates.guards import MEANT
from glmtuner.templates.tool_calls import Syntax, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# by tokenizer and the name of the syntax ("": none): the ids that are left out, None for those of all special tokens
_LEFT_OUT: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, frozenset[int] | None]]" = WeakKeyDictionary()


def decode_answer(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], syntax: Syntax | None = None) -> str:
    """The text of the ids; special tokens are left out, except `<think>` and the like, and those of the tool calls' `syntax`.

    Tokenizers differ in which of these they call special: DeepSeek-R1's `<think>` is not, Mistral's `[TOOL_CALLS]` is.
    """
    left_out = _left_out(tokenizer, syntax)
    if left_out is None:
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
    else:
        text = tokenizer.decode([token for token in ids if token not in left_out], skip_special_tokens=False)
    assert isinstance(text, str)  # of one sequence
    return text


def _left_out(tokenizer: "PreTrainedTokenizerBase", syntax: Syntax | None) -> frozenset[int] | None:
    """The ids of the special tokens that are left out of an answer; None where that is all of them."""
    made = _LEFT_OUT.setdefault(tokenizer, {})
    name = syntax.name if syntax else ""
    if name not in made:
        written = _written(syntax)
        ids = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        ids |= getattr(tokenizer, "control_names", {})  # of ChatGLMTokenizer, which decodes by itself
        kept = {token_id for token_id, token in ids.items() if token and (MEANT.fullmatch(token) or token in written)}
        made[name] = frozenset(ids.keys() - kept) if kept else None
    return made[name]


def _written(syntax: Syntax | None) -> str:
    """A text with all markers of the syntax."""
    if syntax is None:
        return ""
    calls = [ToolCall("a", {"b": "c"}, "call00001")] * (2 if syntax.parallel else 1)
    return syntax.write("", calls) + syntax.opening + syntax.closing + syntax.separator
