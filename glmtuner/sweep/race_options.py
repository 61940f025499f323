"""The options of hydra/sweeper=race, and what a race cannot compare: refused before a job is started."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from glmtuner.config.compose import Composed
from glmtuner.config.schema import Run
from glmtuner.console import plain
from glmtuner.distributed.pause import Pause, is_generated, measured_name
from glmtuner.errors import ConfigError
from glmtuner.report.jobs import format_value
from glmtuner.report.record_scores import evaluation_set
from glmtuner.run_folder.files import is_number
from glmtuner.run_folder.redaction import flatten
from glmtuner.sweep.rungs import cannot_pause, illegal_rungs, rungs_of

RACE_TARGET = "hydra_plugins.glmtuner.RaceSweeper"  # `_target_` of conf/hydra/sweeper/race.yaml
KEY = "hydra.sweeper"
RULES = ("paired", "halving")
# Keys that change how an evaluation record becomes tokens, or what a token's loss weighs.
ENCODING_KEYS = (
    "data.max_source_length", "data.max_target_length", "data.source_prefix", "data.input_separator", "data.ignore_columns",
    "data.loss_on", "data.thinking", "data.new_tokens", "data.weights", "data.ignore_pad_token_for_loss", "model.template",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "ice_text.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class RaceOptions:
    """What stands in hydra.sweeper, legal."""

    rungs: tuple[Pause, ...]
    rule: str
    alpha: float
    keep: int
    reduction_factor: int
    recall: tuple[str, ...]

    @classmethod
    def of(cls, sweeper: DictConfig) -> "RaceOptions":
        """The options of a Hydra configuration; raises one ConfigError for all illegal values."""
        wrong = [*_illegal(sweeper)]
        if wrong:
            raise ConfigError("; also: ".join(wrong))
        return cls(
            rungs=rungs_of(sweeper.rungs),
            rule=sweeper.rule,
            alpha=float(sweeper.alpha),
            keep=sweeper.keep,
            reduction_factor=sweeper.reduction_factor,
            recall=tuple(map(str, sweeper.recall or ())),
        )


def _illegal(sweeper: DictConfig) -> Iterator[str]:
    rule, alpha = sweeper.rule, sweeper.alpha
    if rule not in RULES:
        yield f"{KEY}.rule={plain(str(rule))}: legal: {', '.join(RULES)}"
    if not is_number(alpha) or not 0 < alpha < 1:
        yield f"{KEY}.alpha={plain(str(alpha))}: an error rate between 0 and 1, such as 0.05"
    for name, least in (("keep", 1), ("reduction_factor", 2)):
        value = sweeper[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield f"{KEY}.{name}={plain(str(value))}: a whole number, {least} or more"
    recall = sweeper.recall
    if recall is not None and not isinstance(recall, ListConfig):
        yield f"{KEY}.recall={plain(str(recall))}: a list of jobs; type {KEY}.recall=[{plain(str(recall))}]"
    yield from _illegal_rungs(sweeper.rungs, least=2 if rule == "paired" else 1)


def _illegal_rungs(rungs: Any, least: int) -> Iterator[str]:
    yield from (wrong := [*illegal_rungs(rungs)])
    if not wrong and len(rungs) < least:
        reason = "rule=paired drops a job by two rungs, so it takes two or more" if least > 1 else "one or more"
        yield f"{KEY}.rungs=[{','.join(pause.text for pause in rungs_of(rungs))}]: {reason}, such as [0.1,0.2,0.4]"


def check_race(jobs: Sequence[Composed]) -> None:
    """Raise ConfigError unless the sweep's options are legal and its jobs can be compared at every rung."""
    options = RaceOptions.of(jobs[0].hydra.sweeper)
    runs = [job.run for job in jobs]
    wrong = [
        *dict.fromkeys(
            sentence for run in runs for sentence in cannot_pause(run, options.rungs, "hydra/sweeper=race", True)
        )
    ]
    values = [flatten(OmegaConf.to_container(job.config, enum_to_str=True)) for job in jobs]
    wrong += _incomparable(runs[0], values)
    if wrong:
        raise ConfigError("; also: ".join(wrong))


def _incomparable(first: Run, values: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One sentence for each difference between the jobs that gives them other records, or losses of another kind."""
    race, name = "hydra/sweeper=race", measured_name(first)

    def differing(keys: Sequence[str]) -> list[str]:
        return [key for key in keys if len({repr(each.get(key)) for each in values}) > 1]

    def listed(keys: Sequence[str]) -> str:
        shown = {key: dict.fromkeys(format_value(each.get(key)) for each in values) for key in keys}
        return "; ".join(f"{key}={','.join(found)}" for key, found in shown.items())

    if differing(["objective"]):
        yield f"{race}: {listed(['objective'])}: all jobs of a race have one objective"
    if len({evaluation_set(each) for each in values}) > 1:
        swept = differing(
            ["data.eval_dataset", "data.dataset", "data.dev_ratio", "data.max_samples", "data.split", "data.dataset_dir",
             "trainer.seed", "trainer.data_seed"]
        )  # fmt: skip
        yield (
            f"{race}: {listed(swept)}: the jobs hold out other records, so they cannot be compared; type data.eval_dataset=… to "
            "evaluate all of them on the same ones"
            + (", or trainer.data_seed=42 to hold out the same ones" if "trainer.seed" in swept else "")
        )
    if is_generated(first):
        return
    if differing(["stage.name"]):
        yield f"{race}: {listed(['stage.name'])}: the losses of two stages are of two kinds; run a race for each"
    elif not first.stage.models_loss and name != "accuracy":
        settings = [key for key in values[0] if key.startswith(("stage.", "reward."))]
        if different := differing([*settings, "reward"]):
            better = "; type objective=accuracy" if "accuracy" in (first.stage.evaluates or ()) else ""
            yield f"{race}: {listed(different)}: eval_{name} is of another kind with each of these{better}"
    if encoding := differing(ENCODING_KEYS):
        yield (
            f"{race}: {listed(encoding)}: the same records become other tokens, whose losses cannot be compared; run a race for each, "
            "or compare answers: objective=rouge-l"
        )
    if len({tokenizer_of(str(each.get("model.model_name_or_path"))) for each in values} - {None}) > 1:
        yield (
            f"{race}: {listed(['model.model_name_or_path'])}: their tokenizers differ, so the losses of their tokens cannot be compared; "
            "run a race for each, or compare answers: objective=rouge-l"
        )


def tokenizer_of(model: str) -> str | None:
    """A digest of the tokenizer's files in a model's folder; None for a model that is not in one, whose records tell at the first rung."""
    folder = Path(model).expanduser()
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else None
