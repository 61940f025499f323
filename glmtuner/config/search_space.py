"""What a search may draw: the sweep overrides of Hydra's grammar as parameters of Optuna, some on the condition of others.

`choice(a, b)` or `a,b` draws one of the values, `range(…)` one of its numbers, `interval(low, high)` a real number, and
`int(interval(low, high))` a whole one, high included; `tag(log, …)` draws evenly on a logarithmic scale. A tag of the form
`"finetuning=lora"` is a condition: the parameter exists only in trials that have this value.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, ListConfig, OmegaConf

from glmtuner.config.overrides import bracket_lists, parse
from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.run_folder.redaction import flatten

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

EXAMPLES = "choice(a, b), range(1, 9), interval(0, 1), int(interval(1, 8)) or tag(log, interval(1e-5, 1e-2))"
TAGS = ("log", "int")
MOST_VALUES = 10_000  # of a choice or a range


@dataclass(frozen=True)
class Condition:
    """The values of another key with which a parameter exists, as in overrides."""

    key: str
    values: tuple[str, ...]

    def holds(self, drawn: Mapping[str, str]) -> bool:
        """Whether it holds in a trial that has drawn these values; one of a parameter that the trial lacks does not."""
        return drawn.get(self.key) in self.values

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"


@dataclass(frozen=True)
class Parameter:
    """One searched key; `values` are those of a choice, otherwise there are numbers from `low` to `high`."""

    key: str
    conditions: tuple[Condition, ...] = ()
    values: tuple[str, ...] = ()  # as in overrides
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False
    typed: str = ""  # the key as it was typed, if that was with + or a package

    def suggest(self, trial: "BaseTrial") -> str:
        """The value that Optuna draws for the trial, as in an override."""
        if self.values:
            categories = self.categories()
            return self.values[categories.index(trial.suggest_categorical(self.key, categories))]
        if self.whole:
            return str(
                trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
            )
        return repr(trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log))

    def categories(self) -> list[Any]:
        """The values of a choice as numbers, booleans and null where all of them differ as such, otherwise as text."""
        plain = [_plain_value(text) for text in self.values]
        return plain if len({*plain}) == len(plain) else [*self.values]

    def extremes(self) -> list[str]:
        """Values that every trial's is one of, or between, as in overrides."""
        if self.values:
            return [*self.values]
        return [str(int(each)) if self.whole else repr(float(each)) for each in dict.fromkeys((self.high, self.low))]

    def discrete(self) -> tuple[str, ...] | None:
        """Its values where they can be listed; None for real numbers."""
        if self.values or not self.whole:
            return self.values or None
        return tuple(map(str, range(int(self.low), int(self.high) + 1, int(self.step or 1))))[:MOST_VALUES]

    def __str__(self) -> str:
        step = f", step {self.step:g}" if self.step and not (self.whole and self.step == 1) else ""
        kind = f"{'log ' if self.log else ''}{'whole number' if self.whole else 'number'}"
        what = f"one of {', '.join(self.values)}" if self.values else f"{kind} from {self.low:g} to {self.high:g}{step}"
        return what + "".join(f", with {condition}" for condition in self.conditions)


@dataclass(frozen=True)
class SearchSpace:
    """The searched parameters, each after those that it depends on, and the overrides that are the same in every trial."""

    parameters: tuple[Parameter, ...]
    fixed: tuple[str, ...]

    def draw(self, trial: "BaseTrial") -> list[str]:
        """The overrides of a trial, with the parameters whose conditions hold in it; the others are not drawn."""
        drawn: dict[str, str] = {}
        for parameter in self.parameters:
            if all(condition.holds(drawn) for condition in parameter.conditions):
                drawn[parameter.key] = parameter.suggest(trial)
        return self._overrides(drawn)

    def corners(self) -> Iterator[list[str]]:
        """The searched overrides of a trial with the first extreme of every parameter, then of one for each other extreme.

        So each value that a range check could refuse is in one of them, with what its conditions ask for.
        """
        seen = [self._with({})]
        yield seen[0]
        for parameter in self.parameters:
            asked = self._asked_by(parameter)
            for value in parameter.extremes():
                corner = self._with({**asked, parameter.key: value})
                if corner not in seen:
                    seen.append(corner)
                    yield corner

    def _asked_by(self, parameter: Parameter) -> dict[str, str]:
        by_key = {each.key: each for each in self.parameters}
        asked: dict[str, str] = {}
        for condition in parameter.conditions:
            asked |= {**self._asked_by(by_key[condition.key]), condition.key: condition.values[0]}
        return asked

    def _with(self, chosen: Mapping[str, str]) -> list[str]:
        drawn: dict[str, str] = {}
        for parameter in self.parameters:
            if all(condition.holds(drawn) for condition in parameter.conditions):
                drawn[parameter.key] = chosen.get(parameter.key, parameter.extremes()[0])
        return self._overrides(drawn)

    def _overrides(self, drawn: Mapping[str, str]) -> list[str]:
        return [f"{each.typed or each.key}={drawn[each.key]}" for each in self.parameters if each.key in drawn]

    def description(self) -> dict[str, str]:
        """What each key may be, in words; two spaces are the same if these are."""
        return {parameter.key: str(parameter) for parameter in self.parameters}


def search_space(overrides: Sequence[str], params: Any, presets: Mapping[str, Sequence[str]]) -> SearchSpace:
    """The space of the overrides and of `hydra.sweeper.params`, whose keys the overrides may set otherwise.

    `presets` are the legal names of each group, for `glob(…)`. Raises ConfigError for what cannot be searched.
    """
    typed = [override for override in parse(overrides) if not is_of_hydra(override.key_or_group)]
    named = {override.key_or_group for override in typed}
    merged = [
        *(
            override
            for override in parse(bracket_lists(params_as_overrides(params), True))
            if override.key_or_group not in named
        ),
        *typed,
    ]
    sweeps = [override for override in merged if override.is_sweep_override()]
    fixed = [override for override in merged if not override.is_sweep_override()]
    if not sweeps:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search: no key has a search space; type one, as in "
            "'trainer.learning_rate=tag(log, interval(1e-5, 1e-2))', or set hydra.sweeper.params in an experiment"
        )
    values = {override.key_or_group: _text_of_fixed(override) for override in fixed}
    parameters = {}
    for override in sweeps:
        parameter = _parameter(override, presets)
        if parameter.key in parameters or parameter.key in values:
            raise ConfigError(
                f"{parameter.key} is given twice, and one of them is a search space; leave one of the two out"
            )
        parameters[parameter.key] = replace(parameter, typed=override.get_key_element())
    return SearchSpace(tuple(_ordered(parameters, values)), tuple(override.input_line or "" for override in fixed))


def has_condition(override: Override) -> bool:
    """Whether the sweep override is of a parameter that exists only with a value of another."""
    return any("=" in tag for tag in getattr(override.value(), "tags", ()))


def is_of_hydra(key: str) -> bool:
    """Whether the key is Hydra's own, such as hydra.sweeper.n_trials or hydra/launcher."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def params_as_overrides(params: Any) -> list[str]:
    """`hydra.sweeper.params` as overrides; keys may have dots or be nested. Raises ConfigError if it is no mapping."""
    if isinstance(params, (DictConfig, ListConfig)):
        params = OmegaConf.to_container(params, resolve=True)
    if params is None or params == {}:
        return []
    if not isinstance(params, dict):
        raise ConfigError(
            f"hydra.sweeper.params={params}: expected keys and what they may be, as in trainer.learning_rate: interval(1e-5, 1e-3)"
        )
    return [f"{key}={value if isinstance(value, str) else text_of(value)}" for key, value in flatten(params).items()]


def text_of(value: Any) -> str:
    """A value as in an override: true, null, 0.001, [a,b]."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    return repr(value) if isinstance(value, float) else str(value)


def _plain_value(text: str) -> Any:
    """The number, boolean or null that an override's text is; other text, and what is not finite, as it is."""
    named = {"true": True, "false": False, "null": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def _text_of_fixed(override: Override) -> str:
    value = override.value()
    return text_of(value) if value is None or isinstance(value, (bool, float)) else str(getattr(value, "text", value))


def _parameter(override: Override, presets: Mapping[str, Sequence[str]]) -> Parameter:
    """The parameter of one sweep override; raises ConfigError for one that means nothing to a search."""
    key, text, value = override.key_or_group, override.input_line, override.value()
    if key in ("objective", "name", "plugins", "trainer.output_dir"):
        advice = "type objective=[a,b] for two" if key == "objective" else f"type one {key}"
        raise ConfigError(f"{text}: {key} is the same in every trial of a search; {advice}")
    if isinstance(value, Glob):
        names = tuple(value.filter([*presets.get(key, [])]))
        if not names:
            raise ConfigError(f"{text}: no {key} preset matches; legal: {', '.join(presets.get(key, [])) or 'none'}")
        return Parameter(key, values=names)
    assert isinstance(value, (ChoiceSweep, RangeSweep, IntervalSweep))
    conditions, tags = _conditions_and_tags(override, value.tags)
    if getattr(value, "shuffle", False):
        raise ConfigError(f"{text}: a search draws in an order of its own; leave shuffle out")
    if isinstance(value, IntervalSweep):
        return _interval(override, value, conditions, tags)
    if isinstance(value, RangeSweep):
        return _range(override, value, conditions, tags)
    if tags:
        raise ConfigError(
            f"{text}: the values of a choice have no scale; leave the tag {sorted(tags)[0]} out, or type {EXAMPLES}"
        )
    values = _texts(override)
    if repeated := [each for each in values if values.count(each) > 1]:
        raise ConfigError(f"{text}: {repeated[0]} is one of the choices twice; leave one of them out")
    if len(values) > MOST_VALUES:
        raise ConfigError(f"{text}: {len(values):,} choices; a search takes {MOST_VALUES:,} at most")
    return Parameter(key, conditions, values)


def _texts(override: Override) -> tuple[str, ...]:
    """The values of a choice as in overrides; Hydra's own texts have Python's words for booleans."""
    return tuple({"True": "true", "False": "false"}.get(text, text) for text in override.sweep_string_iterator())


def _conditions_and_tags(override: Override, tags: Iterable[str]) -> tuple[tuple[Condition, ...], set[str]]:
    conditions, others = [], set()
    for tag in sorted(tags):
        if "=" not in tag:
            others.add(tag)
            continue
        (condition,) = parse([tag])
        values = _texts(condition) if condition.is_choice_sweep() else (_text_of_fixed(condition),)
        conditions.append(Condition(condition.key_or_group, values))
    if wrong := sorted(others - {*TAGS}):
        raise ConfigError(
            f"{override.input_line}: unknown tag {wrong[0]!r}"
            + did_you_mean(wrong[0], TAGS, 'legal: log, int, and a condition such as "finetuning=lora"')
        )
    return tuple(conditions), others


def _interval(override: Override, value: IntervalSweep, conditions: tuple[Condition, ...], tags: set[str]) -> Parameter:
    text, low, high = override.input_line, value.start, value.end
    if not (math.isfinite(low or 0) and math.isfinite(high or 0) and (low or 0) < (high or 0)):
        raise ConfigError(f"{text}: the ends of an interval are two finite numbers, the smaller one first")
    assert low is not None and high is not None
    whole = "int" in tags or isinstance(low, int)
    if whole and (low != int(low) or high != int(high)):
        raise ConfigError(
            f"{text}: the ends of an interval of whole numbers are whole numbers, as in int(interval(1, 8))"
        )
    if "log" in tags and low <= 0:
        raise ConfigError(
            f"{text}: a logarithmic scale begins above 0; type a larger lower end, or leave the tag log out"
        )
    return Parameter(override.key_or_group, conditions, low=low, high=high, log="log" in tags, whole=whole)


def _range(override: Override, value: RangeSweep, conditions: tuple[Condition, ...], tags: set[str]) -> Parameter:
    text = override.input_line
    numbers = []
    for number in value.range():
        numbers.append(number)
        if len(numbers) > MOST_VALUES:
            raise ConfigError(f"{text}: more than {MOST_VALUES:,} numbers; type interval(…) instead")
    if not numbers:
        raise ConfigError(
            f"{text}: the range is empty; its second number is not part of it, as in range(1, 9) for 1 to 8"
        )
    whole = all(float(number).is_integer() for number in numbers)
    if "int" in tags and not whole:
        raise ConfigError(f"{text}: the numbers of the range are not whole; leave the tag int out")
    low, high, step = min(numbers), max(numbers), abs(float(value.step))
    if "log" in tags and not (whole and step == 1 and low > 0):
        raise ConfigError(
            f"{text}: a logarithmic range is one of whole numbers from 1 on without a step; type tag(log, interval(…)) instead"
        )
    whole = whole and (isinstance(value.start, int) or "int" in tags)
    return Parameter(override.key_or_group, conditions, low=low, high=high, step=step, log="log" in tags, whole=whole)


def _ordered(parameters: Mapping[str, Parameter], fixed: Mapping[str, str]) -> Iterator[Parameter]:
    """The parameters, each after those of its conditions; a condition on a fixed key is settled here.

    Raises ConfigError for conditions that name no such key or value, and for those that wait for each other.
    """
    waiting = {}
    for parameter in parameters.values():
        searched = [condition for condition in parameter.conditions if condition.key in parameters]
        settled = [condition for condition in parameter.conditions if condition.key not in parameters]
        for condition in searched:
            _check_condition(parameter, condition, parameters[condition.key])
        for condition in settled:
            if condition.key not in fixed:
                raise ConfigError(
                    f"{parameter.key} depends on {condition}, and {condition.key} is neither searched nor typed"
                    + did_you_mean(
                        condition.key, [*parameters, *fixed], f"type {condition.key}=…, or leave the condition out"
                    )
                )
        if all(condition.holds(fixed) for condition in settled):
            waiting[parameter.key] = replace(parameter, conditions=tuple(searched))
    known: set[str] = {key for key in parameters if key not in waiting}  # those are in no trial
    while waiting:
        ready = [each for each in waiting.values() if all(condition.key in known for condition in each.conditions)]
        if not ready:
            raise ConfigError(
                f"hydra/sweeper=optuna: the conditions of {', '.join(sorted(waiting))} wait for each other; leave one of them out"
            )
        parameter = ready[0]
        known.add(parameter.key)
        yield waiting.pop(parameter.key)


def _check_condition(parameter: Parameter, condition: Condition, parent: Parameter) -> None:
    legal = parent.discrete()
    if legal is None:
        raise ConfigError(
            f"{parameter.key} depends on {condition}, and {condition.key} is {parent}, which is hardly ever equal to a number; "
            "conditions are on choices and whole numbers"
        )
    wrong = [value for value in condition.values if value not in legal]
    if wrong:
        raise ConfigError(
            f"{parameter.key} depends on {condition}, which is never so: {condition.key} is {parent}"
            + did_you_mean(wrong[0], legal, f"legal: {', '.join(legal[:20])}")
        )
