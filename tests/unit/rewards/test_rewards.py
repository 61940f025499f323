"""Rewards: what each says of an answer, and which keys are legal."""

import time
from fractions import Fraction

import pytest

from glmtuner.config.compose import compose
from glmtuner.config.rewards import Sampled
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets
from glmtuner.rewards.exact import Exact
from glmtuner.rewards.format import Format
from glmtuner.rewards.length import Length
from glmtuner.rewards.number import Number, last_number

register_presets()
GRPO = ["model=tiny_glm", "tracker=none", "stage=grpo"]


def sampled(answer: str, label: str = "", tokens: int = 4, max_tokens: int = 16) -> Sampled:
    return Sampled(prompt="?", answer=answer, label=label, tokens=tokens, max_tokens=max_tokens, stopped=True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.50.", "1234.5"), ("#### 72", "72"), ("2,024 and 5", "5"), ("5.", "5"), (".5", "0.5"),
        ("答案是负3", "-3"), ("= -5", "-5"), ("3-5", "5"), ("5 - 3", "3"), ("- 5 apples", "5"), ("\u22127", "-7"), ("(-8)", "-8"),
        ("$-1,000$", "-1000"), ("x=3/4", "3/4"), ("1 1/2", "3/2"), (r"\boxed{-\frac{1}{2}}", "-1/2"), (r"\dfrac{-1}{2}", "-1/2"),
        ("4分之3", "3/4"), ("四分之三", "3/4"), ("负三分之一", "-1/3"), ("1.2万", "12000"), ("3亿", "300000000"), ("１２", "12"), ("３．５", "3.5"),
        ("½", "1/2"), ("3½ cups", "7/2"), ("1e5", "100000"), ("2.5e-1", "0.25"), ("-3.50%", "-3.5"), ("二〇二六", "2026"), ("一千零五", "1005"),
        ("十二", "12"), ("一万二千", "12000"), ("两百", "200"), ("三点一四", "3.14"), ("我们一起得到 7 个", "7"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "3/0", "9" * 301, "一" * 301])
def test_what_is_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    "text", ["9" * 50_000, "1," * 25_000, "1 " * 25_000, "1/" * 25_000, "-" * 50_000, "一" * 50_000, "分之" * 25_000]
)
def test_a_long_text_takes_no_time(text):
    start = time.process_time()
    last_number(text)
    assert time.process_time() - start < 5


def test_number():
    assert Number(name="number").score(sampled("so 1,000.0", "#### 1000")) == 1
    assert Number(name="number").score(sampled("<think>2</think>It is 3.", "3")) == 1
    assert Number(name="number").score(sampled("<think>It is 3, I", "2")) == 0
    assert Number(name="number").score(sampled("3.14", "3.1415")) == 0
    assert Number(name="number", tolerance=0.01).score(sampled("3.14", "3.1415")) == 1
    assert Number(name="number").score(sampled("I do not know", "3")) == 0
    assert Number(name="number").label_problem("three") == "holds no number"
    assert Number(name="number").label_problem("3") is None


def test_exact():
    assert Exact(name="exact").score(sampled(" 北京 \n", "北京")) == 1
    assert Exact(name="exact").score(sampled("<think>\na\n</think>\n\nParis", "Paris")) == 1
    assert Exact(name="exact").score(sampled("paris", "Paris")) == 0
    assert Exact(name="exact", ignore_case=True).score(sampled("paris", "Paris")) == 1
    assert Exact(name="exact").label_problem(" \n") is not None


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("<think>a</think>b", 1), ("\n<think>\na\n</think>\n\nb\n", 1), ("b", 0), ("<think>a</think>", 0), ("<think> </think>b", 0),
        ("<think>a", 0), ("c<think>a</think>b", 0), ("<think>a</think>b</think>", 0), ("<think>a<think>c</think>b", 0),
    ],
)  # fmt: skip
def test_format(answer, score):
    assert Format(name="format").score(sampled(answer)) == score


def test_length_is_the_soft_punishment_of_dapo():
    """arXiv:2503.14476, eq. 13, with the lengths 16 and 4."""
    reward = Length(name="length", buffer_tokens=4)
    assert [reward.score(sampled("", tokens=tokens)) for tokens in (1, 12, 13, 15, 16)] == [0, 0, -0.25, -0.75, -1]
    assert Length(name="length", buffer_tokens=2, max_tokens=8).score(sampled("", tokens=9)) == -1


# -- several in a run ----------------------------------------------------------------------------------------------------


def test_rewards_are_mixed_by_name_and_weighted():
    rewards = compose(
        [*GRPO, "reward=[number,format]", "reward.format.weight=0.2", "reward.number.tolerance=0.1"]
    ).run.reward
    assert [*rewards] == ["number", "format"]
    assert (rewards["number"].weight, rewards["number"].tolerance, rewards["format"].weight) == (1.0, 0.1, 0.2)
    assert [*compose([*GRPO, "reward=number,format"]).run.reward] == ["number", "format"]
    assert [*compose([*GRPO, "reward=exact"]).run.reward] == ["exact"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward=numbr"], "reward=numbr: no reward preset of that name; did you mean 'number'"),
        (["reward=[number,fromat]"], "reward=fromat: no reward preset of that name; did you mean 'format'"),
        (["reward=number", "reward.number.wieght=2"], "unknown key 'reward.number.wieght'; did you mean"),
        (["reward=number", "reward.number.weight=a"], "reward.number.weight=a: expected a number"),
        (["reward=number", "reward.number.weight=0"], "reward.number.weight=0.0: any number but 0"),
        (["reward=number", "reward.number.tolerance=-1"], "reward.number.tolerance=-1.0: 0 or more"),
        (
            ["reward=number", "reward.format.weight=2"],
            "reward.format: this run has no reward=format; type reward=format",
        ),
        (["reward=length", "reward.length.max_tokens=9999"], "reward.length.max_tokens=9999 is more than the"),
        (["reward=length", "stage.max_new_tokens=16"], "reward.length.buffer_tokens=64 is more than the 16 tokens"),
        (["reward=model"], "reward=model without model.reward_model"),
        (["reward=number", "model.reward_model=x"], "model.reward_model=x without reward=model"),
        ([], "stage=grpo without a reward"),
        (["reward=[]"], "stage=grpo without a reward"),
        (["reward=number", "stage.num_generations=1"], "stage.num_generations=1: 2 or more: rewards are relative"),
        (["reward=number", "stage.temperature=0"], "stage.temperature=0.0: above 0"),
        (
            ["reward=number", "stage.minibatch_size=33", "trainer.per_device_train_batch_size=4"],
            "is more than the 32 answers of a step",
        ),
        (
            ["reward=number", "stage.minibatch_size=8", "stage.microbatch_size=9"],
            "stage.microbatch_size=9 is more than the 8 answers of an optimizer step",
        ),
        (["stage=sft", "reward=number"], "reward=[number] with stage=sft: rewards score the answers"),
    ],
)
def test_what_is_not_legal_is_said(words, message):
    with pytest.raises(ConfigError) as error:
        compose([*GRPO, *words])
    assert message in str(error.value)
