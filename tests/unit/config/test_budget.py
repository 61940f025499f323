"""Budgets: limits, prices, and what is refused."""

import pytest

from glmtuner.config.budget import Budget
from glmtuner.config.compose import compose
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()


def test_money_by_hand():
    budget = Budget(price_per_gpu_hour=2.5, price_per_cpu_hour=0.04)
    assert budget.cost(4, 0) == 10 and budget.cost(0, 50) == 2 and budget.cost(4, 50) == 12
    assert Budget(price_per_gpu_hour=2.5).cost(0, 50) is None  # the hours of the processor have no price
    assert Budget(price_per_gpu_hour=2.5).cost(0, 0) == 0 and Budget().cost(1, 0) is None


def test_each_limit_that_is_reached_is_named():
    budget = Budget(gpu_hours=8, money=10, price_per_gpu_hour=2)
    assert budget.passed(4, 0) == []
    assert budget.passed(5, 0) == ["budget.money=10 is reached by 10"]
    assert budget.passed(8.5, 0) == ["budget.gpu_hours=8 is reached by 8.5", "budget.money=10 is reached by 17"]
    assert Budget().passed(1e9, 1e9) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["budget.gpu_hours=0"], "budget.gpu_hours=0.0: above 0, or null"),
        (["budget.cpu_hours=-1"], "budget.cpu_hours=-1.0: above 0"),
        (["budget.cpu_hours=nan"], "budget.cpu_hours=nan"),
        (["budget.money=5"], "budget.money=5 without a price; type budget.price_per_gpu_hour="),
        (["budget.currency=''"], "budget.currency is empty"),
        (["budget.gpu_hours=many"], "budget.gpu_hours"),
        (["budget.gpu_hour=3"], "did you mean 'gpu_hours'"),
        (["budget.wats=300"], "did you mean 'watts'"),
    ],
)
def test_a_wrong_budget_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        compose([*words, "model=tiny_glm"])


def test_a_budget_is_part_of_a_run():
    run = compose(["budget.cpu_hours=2", "budget.price_per_cpu_hour=0.1", "model=tiny_glm"]).run
    assert run.budget.limits() == {"cpu_hours": 2.0} and run.budget.forecast
    assert compose(["model=tiny_glm"]).run.budget == Budget()
