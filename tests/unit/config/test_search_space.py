"""Search spaces: what each word of Hydra's grammar draws, conditions, and mistakes."""

import math
from itertools import pairwise

import optuna
import pytest

from glmtuner.config.search_space import has_condition, params_as_overrides, search_space
from glmtuner.errors import ConfigError

PRESETS = {"finetuning": ["lora", "freeze", "full"]}


def drawn(*overrides: str, params=None, count: int = 200, seed: int = 0) -> list[dict[str, str]]:
    """The values of many random trials, as in overrides."""
    space = search_space(overrides, params or {}, PRESETS)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [dict(text.split("=", 1) for text in space.draw(study.ask())) for _ in range(count)]


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a=1,2,4", {"1", "2", "4"}),
        ("a=choice(1e-3, 1e-4)", {"0.001", "0.0001"}),
        ("a=true,null,no-pe", {"true", "null", "no-pe"}),
        ("a=[x],[y,z]", {"[x]", "[y,z]"}),
        ("a=choice('x y', b)", {"x\\ y", "b"}),
        ("finetuning=glob(f*)", {"freeze", "full"}),
        ("a=range(1, 9)", {*map(str, range(1, 9))}),
        ("a=range(10, 0, -3)", {"10", "7", "4", "1"}),
        ("a=range(0, 1, 0.25)", {"0.0", "0.25", "0.5", "0.75"}),
        ("a=int(interval(1, 4))", {"1", "2", "3", "4"}),
        ("a=tag(int, interval(1, 4))", {"1", "2", "3", "4"}),
        ("a=tag(log, int(interval(1, 4)))", {"1", "2", "3", "4"}),
        ("a=tag(log, range(1, 5))", {"1", "2", "3", "4"}),
        ("a=choice(16)", {"16"}),
    ],
)  # fmt: skip
def test_what_a_word_draws(override, values):
    key = override.partition("=")[0]
    assert {trial[key] for trial in drawn(override)} == values


def test_an_interval_is_drawn_evenly_and_with_log_evenly_over_its_decades():
    for text, edges in (
        ("interval(0, 4)", (0, 1, 2, 3, 4)),
        ("tag(log, interval(1e-4, 1))", (1e-4, 1e-3, 1e-2, 1e-1, 1)),
    ):
        values = [float(trial["a"]) for trial in drawn(f"a={text}", count=2000)]
        shares = [sum(low <= value <= high for value in values) / 2000 for low, high in pairwise(edges)]
        assert all(math.isclose(share, 0.25, abs_tol=0.04) for share in shares), shares


def test_conditions_hold_in_every_trial_and_may_depend_on_each_other():
    trials = drawn(
        "b=tag('a=x,y', 'c=2', choice(5, 6))", "d=tag('b=6', interval(0, 1))", "a=x,y,z", "c=range(1, 3)", "seed=7"
    )  # fmt: skip
    for trial in trials:
        assert ("b" in trial) == (trial["a"] in ("x", "y") and trial["c"] == "2")
        assert ("d" in trial) == (trial.get("b") == "6")
    assert {len(trial) for trial in trials} == {2, 3, 4}


def test_a_condition_on_what_is_typed_is_settled():
    for method, exists in (("lora", True), ("freeze", False)):
        trials = drawn(
            f"finetuning={method}", "finetuning.lora_rank=tag('finetuning=lora', choice(4, 8))", "a=1,2", count=5
        )
        assert all(("finetuning.lora_rank" in trial) is exists for trial in trials)


def test_corners_have_every_extreme_value_once_with_what_it_needs():
    space = search_space(
        ["a=x,y", "b=tag('a=y', int(interval(2, 8)))", "c=tag(log, interval(0.1, 1))", "+d=1,2"], {}, PRESETS
    )
    assert [*space.corners()] == [
        ["a=x", "c=1.0", "+d=1"],
        ["a=y", "b=8", "c=1.0", "+d=1"],
        ["a=y", "b=2", "c=1.0", "+d=1"],
        ["a=x", "c=0.1", "+d=1"],
        ["a=x", "c=1.0", "+d=2"],
    ]


def test_the_command_line_comes_before_params():
    params = {
        "trainer": {"learning_rate": "interval(0, 1)", "seed": "1,2"},
        "data.dataset": "a,b",
        "trainer.max_steps": 4,
    }
    space = search_space(["trainer.learning_rate=0.5", "trainer.seed=range(3, 5)"], params, PRESETS)
    assert {parameter.key: parameter.extremes() for parameter in space.parameters} == {
        "data.dataset": ["[a]", "[b]"], "trainer.seed": ["4", "3"]
    }  # fmt: skip
    assert space.fixed == ("trainer.max_steps=4", "trainer.learning_rate=0.5")
    assert params_as_overrides({"a": {"b": [1, None]}, "c": True, "d": 1e-5}) == ["a.b=[1,null]", "c=true", "d=1e-05"]


def test_categories_are_numbers_for_optuna_where_they_can_be():
    space = search_space(["a=1,2.5", "b=1,true", "c=1e-3,1e-4", "d=1,1.0"], {}, PRESETS)
    assert [parameter.categories() for parameter in space.parameters] == [
        [1, 2.5], ["1", "true"], [0.001, 0.0001], ["1", "1.0"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["a=1"], "has nothing to search"),
        (["a=1,2", "a=2,3"], "a is given twice"),
        (["a=1,2", "a=2"], "a is given twice"),
        (["objective=x,y"], r"type objective=\[a,b\] for two"),
        (["a=tag(lgo, interval(0, 1))"], "unknown tag 'lgo'; did you mean 'log'"),
        (["a=tag(log, choice(1, 2))"], "a choice have no scale; leave the tag log out"),
        (["a=tag(log, interval(0, 1))"], "logarithmic scale begins above 0"),
        (["a=interval(2, 1)"], "the smaller one first"),
        (["a=interval(0, inf)"], "two finite numbers"),
        (["a=tag(int, interval(0.5, 2))"], "are whole numbers"),
        (["a=range(3, 3)"], "the range is empty"),
        (["a=range(0, 1, 0.25)", "b=tag(int, range(0, 1, 0.5))"], "not whole; leave the tag int out"),
        (["a=range(0, 100000)"], "more than 10,000 numbers"),
        (["a=tag(log, range(1, 9, 2))"], "without a step"),
        (["a=1,1"], "1 is one of the choices twice"),
        (["a=shuffle(1, 2)"], "leave shuffle out"),
        (["finetuning=glob(z*)"], "no finetuning preset matches; legal: lora, freeze, full"),
        (["a=tag('finetunin=lora', choice(1))", "finetuning=lora,full"], "neither searched nor typed; did you mean 'finetuning'"),
        (["a=tag('finetuning=lroa', choice(1))", "finetuning=lora,full"], "never so: .* did you mean 'lora'"),
        (["a=tag('b=1', choice(1))", "b=interval(0, 2)"], "conditions are on choices and whole numbers"),
        (["a=tag('b=1', choice(1))", "b=tag('a=1', choice(1))"], "the conditions of a, b wait for each other"),
        (["a=tag('b', choice(1))"], "unknown tag 'b'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_end_in_one_paragraph(overrides, message):
    with pytest.raises(ConfigError, match=message) as raised:
        search_space(overrides, {}, PRESETS)
    assert "\n" not in str(raised.value)


def test_params_that_are_no_mapping_are_refused():
    with pytest.raises(ConfigError, match="expected keys and what they may be"):
        search_space([], "interval(0, 1)", PRESETS)


def test_a_condition_is_seen_in_a_tag_alone():
    from glmtuner.config.overrides import parse

    found = [
        has_condition(override)
        for override in parse(["a=tag('b=1', choice(1, 2))", "a=tag(log, interval(1, 2))", "a='b=1'"])
    ]
    assert found == [True, False, False]
