"""New tokens: names in the tokenizer, and rows of the embeddings and the output head that start at the mean of their pieces."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer
from glmtuner.models.unwrap import unwrapped
from glmtuner.templates.new_tokens import NEW_TOKENS, new_tokens_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KNOB = "data.new_tokens"
ROWS = "new_token_rows"  # an attribute of the model: the ids whose rows a LoRA trains
ADDED = "added_new_tokens"  # an attribute of the tokenizer: those that its files do not have


def add_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Add tokens to the tokenizer, each with the next free id; those that it has already are said and left as they are.

    Raises ConfigError for the name of a control token, or of an entry of the vocabulary that stands for other text.
    """
    from transformers import AddedToken

    before = new_tokens_of(tokenizer)
    vocabulary, special = tokenizer.get_vocab(), control_tokens(tokenizer)
    pieces: dict[str, list[int]] = {}
    for token in tokens:
        if token in special:
            raise ConfigError(
                f"{KNOB}: {token!r} is a control token of this tokenizer; name another one, or leave it out"
            )
        ids: list[int] = list(tokenizer(token, add_special_tokens=False).input_ids)
        own = ids if len(ids) == 1 else [vocabulary[token]] if token in vocabulary else []
        if own and (token in before or str(tokenizer.decode(own)).strip() == token.strip()):
            say(
                f"{KNOB}: {token!r} is one token of this tokenizer already ({own[0]}); it is used as it is, and not added"
            )
        elif token in vocabulary:
            raise ConfigError(
                f"{KNOB}: {token!r} is how the vocabulary of this tokenizer writes token {vocabulary[token]}, which stands for "
                "other text; name another one"
            )
        elif not ids:
            raise ConfigError(
                f"{KNOB}: {token!r} has no pieces in this tokenizer, whose mean it would start at; leave it out"
            )
        else:
            pieces[token] = ids
    setattr(tokenizer, ADDED, pieces)
    if not pieces:
        return
    if isinstance(tokenizer, ChatGLMTokenizer):
        tokenizer.add_new(pieces)
        return
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in pieces])
    tokenizer.init_kwargs[NEW_TOKENS] = {**before, **pieces}


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The names of the tokenizer's control tokens."""
    own: Iterable[str] = getattr(tokenizer, "control", ())  # ChatGLM's
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {*own, *added, *map(str, tokenizer.all_special_tokens)}


def add_rows(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, learned: Sequence[str] = ()) -> None:
    """Give each token that was added a row of the embeddings and of the head, the mean of its pieces' rows.

    `learned` are tokens whose rows the loaded weights have already. Rows that the vocabulary was padded by are used first.
    """
    import torch

    tokens: dict[str, list[int]] = getattr(tokenizer, ADDED, {})
    if not tokens:
        return
    ids = {token: row_of(tokenizer, token) for token in tokens}
    embeddings: Any = model.get_input_embeddings()
    rows, needed = embeddings.weight.shape[0], max(ids.values()) + 1
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        for matrix in matrices(model):
            for token, pieces in tokens.items():
                if token not in learned:
                    matrix[ids[token]] = matrix[pieces].float().mean(0).to(matrix.dtype)
    setattr(model, ROWS, [*ids.values()])
    fresh = {token: each for token, each in ids.items() if token not in learned}
    if not fresh:
        return
    spare = sum(each < rows for each in fresh.values())
    padded = f"; {spare} of the rows had been padding of the vocabulary" if spare and not learned else ""
    say(
        f"{KNOB}: {len(fresh)} tokens ({', '.join([*fresh][:6])}{', …' if len(fresh) > 6 else ''}), "
        f"{max(needed - rows, 0)} rows added to {rows:,}, each at the mean of its pieces{padded}"
    )


def row_of(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    """The id of a token of the tokenizer."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def matrices(model: "PreTrainedModel") -> "list[torch.Tensor]":
    """The weights with a row a token: the embeddings and, unless it is the same one, the head, with its bias."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    found = [embeddings.weight.data]
    if head is not None and head.weight is not embeddings.weight:
        found.append(head.weight.data)
    if head is not None and getattr(head, "bias", None) is not None:
        found.append(head.bias.data)
    return found


def new_rows(model: "nn.Module") -> dict[str, list[int]]:
    """The path of the embeddings, and of a head with weights of its own -> the ids of the new rows; empty without new tokens.

    Raises ConfigError for a head with a bias, which PEFT leaves out where it trains rows.
    """
    ids = getattr(model, ROWS, None)
    if not ids:
        return {}
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{KNOB} with finetuning=lora: the output head of this model has a bias, which PEFT leaves out where it trains rows of "
            "it; type finetuning=full"
        )
    separate = head is not None and head.weight is not embeddings.weight
    wanted = [embeddings, *([head] if separate else [])]
    return {path: [*ids] for path, module in model.named_modules() if any(module is each for each in wanted)}


def say_untrained(model: Any, method: str) -> None:
    """Say where a training changes none of the model's new rows."""
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    embeddings: Any = model.get_input_embeddings()
    weight: Any = getattr(embeddings, "weight", None)
    if (
        getattr(unwrapped(model), ROWS, None)
        and not any("trainable_tokens" in name for name in trained)
        and not weight.requires_grad
    ):
        say(f"{KNOB}: finetuning={method} does not train them; their rows stay at the mean of their pieces")
