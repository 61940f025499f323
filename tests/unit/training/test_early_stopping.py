"""The decision to stop is transformers' own, counts no evaluation outside of the training, and its words are checked."""

import random
from types import SimpleNamespace

import pytest
from transformers import EarlyStoppingCallback, TrainerControl

from glmtuner.config.compose import compose
from glmtuner.config.run_rules import unused_values
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets
from glmtuner.launch.resume import may_change
from glmtuner.training.early_stopping import EarlyStopping

register_presets()

BASE = ["model=tiny_glm", "tracker=none", "data.dev_ratio=0.1"]
STOPS = [*BASE, "trainer.early_stopping_patience=2"]
STEPS = [*STOPS, "trainer.eval_strategy=steps"]


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.15])
def test_the_decisions_are_those_of_transformers(greater: bool, patience: int, threshold: float) -> None:
    rng = random.Random(patience)
    arguments = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater)
    for _ in range(50):
        ours, theirs = EarlyStopping(patience, threshold), EarlyStoppingCallback(patience, threshold)
        state, mine, control = SimpleNamespace(best_metric=None, global_step=0), TrainerControl(), TrainerControl()
        ours.on_train_begin(arguments, state, mine)
        for step in range(1, 20):
            state.global_step = step
            value = round(rng.random(), 1)
            ours.on_evaluate(arguments, state, mine, {"eval_loss": value})
            theirs.on_evaluate(arguments, state, control, {"eval_loss": value})
            assert mine.should_training_stop == control.should_training_stop == ours.stops
            assert ours.evaluations == theirs.early_stopping_patience_counter
            best = state.best_metric
            state.best_metric = value if best is None else (max if greater else min)(best, value)
            if ours.stops:
                break


def test_evaluations_outside_of_the_training_do_not_count() -> None:
    stopping, arguments = (
        EarlyStopping(1, 0.0),
        SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False),
    )
    state, control, worse = SimpleNamespace(best_metric=1.0, global_step=0), TrainerControl(), {"eval_loss": 2.0}
    stopping.on_train_begin(arguments, state, control)
    stopping.on_evaluate(arguments, state, control, worse)  # trainer.eval_on_start
    state.global_step = 4
    stopping.on_train_end(arguments, state, control)
    stopping.on_evaluate(arguments, state, control, worse)  # trainer.do_eval
    assert stopping.evaluations == 0 and not control.should_training_stop


def test_the_best_checkpoint_is_loaded_at_the_end_and_the_keys_may_change_when_a_checkpoint_is_continued() -> None:
    assert compose(STEPS).run.trainer.load_best_model_at_end
    assert may_change("trainer.early_stopping_patience") and may_change("trainer.early_stopping_threshold")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (STOPS, "type trainer.eval_strategy=steps trainer.save_strategy=steps"),
        ([*STEPS, "trainer.save_strategy=epoch"], "it loads the best checkpoint at the end, so both must be the same"),
        ([*STEPS, "trainer.save_strategy=no"], "type trainer.eval_strategy=steps trainer.save_strategy=steps"),
        ([*STEPS, "trainer.eval_steps=4", "trainer.save_steps=6"], "type trainer.save_steps=4"),
        ([*STEPS, "trainer=evaluate"], "early_stopping_patience=2 without training: it ends a training; leave it out"),
        ([*STEPS, "trainer.metric_for_best_model=accurracy"], "the evaluations of stage=sft measure loss"),
        ([*BASE, "trainer.early_stopping_patience=0"], "trainer.early_stopping_patience=0: 1 or more evaluations, or null"),
        ([*STEPS, "trainer.early_stopping_threshold=-1"], "trainer.early_stopping_threshold=-1.0: 0 or more"),
        ([*BASE, "trainer.early_stoping_patience=2"], "did you mean 'early_stopping_patience'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_paragraph(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*BASE, "trainer.early_stopping_threshold=0.1"], "no effect without trainer.early_stopping_patience"),
        ([*STEPS, "trainer.max_steps=20", "trainer.eval_steps=10", "trainer.save_steps=10"], "it has 2 evaluations"),
        ([*STOPS, "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch", "trainer.num_train_epochs=2"], "2 evaluations"),
        ([*STEPS, "trainer.eval_steps=0.5", "trainer.save_steps=0.5"], "it has 2 evaluations"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(words: list[str], told: str) -> None:
    (sentence,) = unused_values(compose(words).run)
    assert told in sentence
    assert [
        *unused_values(compose([*STEPS, "trainer.max_steps=30", "trainer.eval_steps=10", "trainer.save_steps=10"]).run)
    ] == []
