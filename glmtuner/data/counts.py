"""What became of a dataset's records, in numbers."""

from dataclasses import asdict, dataclass


@dataclass(kw_only=True)
class Counts:
    """What became of a dataset's records; tokens of prompts and answers together unless stated otherwise.

    If each answer is a row of its own, tokens and truncations are counted over all rows of a record.
    """

    records: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    prompts_cut: int = 0  # prompts that lost text or turns
    turns_dropped: int = 0  # the oldest question-answer pairs of those
    answers_cut: int = 0  # answers that lost their end
    tokens_cut: int = 0
    bad_records: int = 0
    undesirable: int = 0  # records left out because their answer is marked as a bad one
    unlearned: int = 0  # records left out because their marks leave no answer to learn
    reasoning_dropped: int = 0  # thoughts of earlier answers, which the chat template leaves out
    thinking: int = 0  # records learned behind the prompt with thinking on, of a template that has both
    not_thinking: int = 0  # those with thinking off
    unrendered: int = 0  # records of whose answers the chat template renders nothing
    undescribed: int = 0  # records that call tools and describe none
    uncalled: int = 0  # records with a result of a tool behind an answer that calls none
    texts_dropped: int = 0  # texts before tool calls, which the chat template leaves out
    weighted: int = 0  # rows in which something weighs other than 1

    def __add__(self, other: "Counts") -> "Counts":
        left, right = asdict(self), asdict(other)
        return Counts(**{name: left[name] + right[name] for name in left})

    def summary(self) -> str:
        """The counts in one line; truncations only if there were any."""
        parts = [f"{self.records:,} records, {self.tokens:,} tokens, {self.learned_tokens:,} of them learned"]
        if self.prompts_cut:
            dropped = f" ({self.turns_dropped:,} old turns dropped)" if self.turns_dropped else ""
            parts.append(f"{self.prompts_cut:,} prompts shortened{dropped}")
        if self.answers_cut:
            parts.append(f"{self.answers_cut:,} answers shortened")
        if self.tokens_cut:
            parts.append(f"{self.tokens_cut:,} tokens cut in all")
        if self.bad_records:
            parts.append(f"{self.bad_records:,} broken records skipped")
        if self.undesirable:
            parts.append(f"{self.undesirable:,} records with an answer marked false left out")
        if self.unlearned:
            parts.append(f"{self.unlearned:,} records without an answer to learn left out")
        if self.unrendered:
            parts.append(
                f"{self.unrendered:,} records left out, of whose last answer the chat template renders nothing"
            )
        if self.thinking or self.not_thinking:
            parts.append(f"thinking on in {self.thinking:,} records, off in {self.not_thinking:,}")
        if self.undescribed:
            parts.append(f"{self.undescribed:,} records call tools and describe none")
        if self.uncalled:
            parts.append(f"{self.uncalled:,} records have results behind an answer that calls no tool")
        if self.texts_dropped:
            parts.append(f"{self.texts_dropped:,} texts before tool calls left out by the chat template")
        if self.reasoning_dropped:
            parts.append(f"{self.reasoning_dropped:,} thoughts of earlier answers left out by the chat template")
        if self.weighted:
            parts.append(f"{self.weighted:,} rows with weights")
        return "; ".join(parts)
