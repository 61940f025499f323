"""An answer ends where the caller says, as behind a stop text, and those beside it go on."""

from collections.abc import Sequence

import pytest
from small_models import STOP, alone, built, prompt

from glmtuner.inference.generate import Decoding, answers


@pytest.mark.parametrize("rows", [1, 4])
def test_an_answer_ends_behind_the_first_token_that_the_caller_names(rows: int) -> None:
    model, prompts = built("Llama"), [prompt("Llama", number) for number in range(6)]
    whole = [alone(model, words) for words in prompts]
    wanted = {tokens[index % len(tokens)] for index, tokens in enumerate(whole)}

    def ends(tokens: Sequence[int]) -> bool:
        return tokens[-1] in wanted

    decoding = Decoding(max_new_tokens=12, num_beams=1, repetition_penalty=1.0, stop_ids=(STOP,), pad_id=3)
    found = dict(answers(model, prompts, decoding, rows, ends=ends))
    for index, tokens in enumerate(whole):
        end = next(place for place, token in enumerate(tokens) if token in wanted) + 1
        assert found[index] == [token for token in tokens[:end] if token != STOP]
    assert len({len(tokens) for tokens in found.values()}) > 1
