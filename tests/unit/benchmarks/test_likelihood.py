"""Log-likelihoods of continuations: those of each row alone by plain transformers, whatever stands beside it."""

import random
from typing import Any

import pytest
import torch
from small_models import built

from glmtuner.benchmarks import likelihood
from glmtuner.benchmarks.likelihood import Continuation, Scorer, rows_of


def drawn(name: str) -> list[Continuation]:
    """Few-shot questions: a common beginning, a question each, and options of one token and of several."""
    words = random.Random(0)

    def some(count: int) -> list[int]:
        return [words.randrange(10, 400) for _ in range(count)]

    ends = [6, 4] if name == "ChatGLM" else []  # its context ends in [gMASK] <sop>
    examples = some(30)
    found = []
    for _ in range(3):
        question = [*examples, *some(words.randrange(4, 9)), *ends]
        options = [some(1), some(1), some(words.randrange(2, 6)), some(3)]
        found += [Continuation(question, option) for option in options]
    return found


def alone(model: Any, each: Continuation) -> tuple[float, bool]:
    """The continuation's log-likelihood and whether it is greedy, of its row alone and all of its logits."""
    ids = torch.tensor([[*each.context, *each.target]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(each.context) - 1 : -1].double()
    target = torch.tensor(each.target)
    logprobs = logits.log_softmax(-1).gather(1, target[:, None])
    return float(logprobs.sum()), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("name", ["Glm", "Mistral", "GPT2", "Lfm2", "ChatGLM", "ChatGLM2"])
@pytest.mark.parametrize("tokens", [60, 4096])
def test_they_are_those_of_each_row_alone(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "TOKENS_CPU", tokens)  # several batches, or one
    model, asked = built(name), drawn(name)
    greedy = model(input_ids=torch.tensor([asked[0].context])).logits[0, -1].argmax()
    asked.append(Continuation(asked[0].context, [int(greedy)]))
    expected = [alone(model, each) for each in asked]
    scorer = Scorer(model, 3, 512)
    padded = dict(scorer.scores(asked))
    scorer.choose(asked)
    chosen = dict(scorer.scores(asked))
    assert scorer.shortest is not None
    for found in (padded, chosen):
        assert [found[index].is_greedy for index in range(len(asked))] == [is_greedy for _, is_greedy in expected]
        for index, (logprob, _) in enumerate(expected):
            assert found[index].logprob == pytest.approx(logprob, abs=1e-5)
    assert expected[-1][1]


def test_common_beginnings_are_computed_once() -> None:
    model, asked = built("Glm"), drawn("Glm")
    scorer = Scorer(model, 3, 512)
    scorer.choose(asked)
    widths = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
    dict(scorer.scores(asked))
    hook.remove()
    rows = rows_of(asked, 512)
    assert len(rows) < len(asked)  # options of one token are read as one row
    assert sum(widths) < sum(len(row.ids) for row in rows) / 2  # of which the beginnings are most tokens


def test_rows_lose_their_beginning_where_they_are_too_long() -> None:
    (row,) = rows_of([Continuation([1, 2, 3, 4], [5, 6])], 4)
    assert row.ids == (2, 3, 4, 5) and row.requests == ((0, (5, 6)),)
    model = built("Glm")
    found = dict(Scorer(model, 3, 4).scores([Continuation([11, 12, 13, 14], [15, 16])]))
    assert found[0].logprob == pytest.approx(alone(model, Continuation([12, 13, 14], [15, 16]))[0], abs=1e-5)
