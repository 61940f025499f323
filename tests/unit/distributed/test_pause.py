"""Where a training pauses."""

import pytest

from glmtuner.distributed.pause import VARIABLE, Pause, parse_pause, requested_pause
from glmtuner.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "max_steps", "step"),
    [("200", 1000, 200), ("0.25", 1000, 250), ("0.07", 100, 7), ("0.07", 101, 8), ("0.001", 10, 1), ("0.5", 7, 4)],
)
def test_a_share_is_complete_at_its_first_step(text: str, max_steps: int, step: int) -> None:
    pause = Pause(text)
    assert pause.step(max_steps) == step
    assert [pause.is_reached(at, max_steps) for at in (step - 1, step, step + 1)] == [False, True, True]


def test_a_training_that_is_at_its_end_does_not_pause() -> None:
    assert not Pause("0.99").is_reached(10, 10) and not Pause("200").is_reached(100, 100)


@pytest.mark.parametrize(("value", "text"), [(200, "200"), ("0200", "200"), (0.25, "0.25"), ("0.250", "0.25")])
def test_one_pause_has_one_name(value: object, text: str) -> None:
    assert parse_pause(value, "key").text == text


@pytest.mark.parametrize("value", [0, -5, 1.0, 1.5, "0.0", "nan", "inf", "-0.5", "soon", "", True, None, "1e3", "²"])
def test_what_is_no_pause_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="a number of steps, such as 200, or a share"):
        parse_pause(value, "key")


def test_the_environment_asks_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert requested_pause() is None
    monkeypatch.setenv(VARIABLE, "0.5")
    assert requested_pause() == Pause("0.5")
    monkeypatch.setenv(VARIABLE, "half")
    with pytest.raises(ConfigError, match=f"{VARIABLE}=half"):
        requested_pause()
