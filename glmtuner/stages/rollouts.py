"""What samples the answers of stages that learn from answers of their own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmtuner.inference.context import RunContext
    from glmtuner.inference.sampling import Sampler


def sampler_of(context: "RunContext", max_new_tokens: int | None, temperature: float) -> "Sampler":
    """The sampler of a run's model; None is data.max_target_length tokens."""
    from glmtuner.families.stop_tokens import stop_ids
    from glmtuner.inference.sampling import Sampler

    run, tokenizer = context.run, context.tokenizer
    return Sampler(
        context.model,
        max_new_tokens=max_new_tokens or run.data.max_target_length,
        stop_ids=stop_ids(context.template, tokenizer, context.family.name, context.model),
        pad_id=tokenizer.pad_token_id,
        temperature=temperature,
        max_rows=run.generation.max_batch_size,
    )
