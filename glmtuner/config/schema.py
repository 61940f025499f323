"""The whole configuration of a run, and the base classes of the groups that depend on it."""

import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore

from glmtuner.config.benchmarks import Benchmark
from glmtuner.config.budget import Budget
from glmtuner.config.datasets import as_override
from glmtuner.config.groups import (
    SCHEMA_CLASSES,
    Data,
    Engine,
    Finetuning,
    Generation,
    Metric,
    Model,
    Quant,
    Trainer,
)
from glmtuner.config.objective import objective_problem
from glmtuner.config.ranges import infinite_values
from glmtuner.config.rewards import GROUP as REWARD
from glmtuner.config.rewards import Reward
from glmtuner.config.trainer_fields import default_of
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


@dataclass(kw_only=True)
class Stage:
    """What is learned: the configuration's part; records, batches, loss and predictions are in stages/stage.py."""

    name: str

    policy: typing.ClassVar[bool] = True  # does it train a model that generates answers? (a reward model scores them)
    models_loss: typing.ClassVar[bool] = False  # is the loss the model's own, of one sample at a time?
    reads_rows: typing.ClassVar[bool] = False  # is its loss computed by objectives/rows.py, which knows the fast paths?
    evaluates: typing.ClassVar[tuple[str, ...] | None] = (
        None  # what its evaluations measure; None if that is not declared
    )
    weighs: typing.ClassVar[bool] = True  # are its records learned, so that they can have weights?
    by_probability: typing.ClassVar[bool] = (
        False  # is the model's own loss of a token multiplied by the token's probability?
    )
    packs: typing.ClassVar[bool] = False  # can several of its samples be packed into one row?
    uses_reward_model: typing.ClassVar[bool] = False
    uses_rewards: typing.ClassVar[bool] = False  # does it score answers by the presets of `reward`?
    memory_notice: typing.ClassVar[str | None] = (
        None  # what a memory estimate leaves out; checkpointing is then not decided by it
    )

    def impossible(self, run: "Run") -> "Iterator[str]":
        """One sentence for each value of the run that is incompatible with this stage."""
        if run.trainer.predict_with_generate:
            yield (
                f"trainer.predict_with_generate=true with stage={self.name}: only stage=sft generates; "
                "type trainer.predict_with_generate=false"
            )
        if run.trainer.do_predict:
            yield (
                f"trainer.do_predict=true with stage={self.name}: answers are predicted in a separate run; "
                "type trainer=predict model.checkpoint_dir=<the folder of this run>"
            )

    def check(self, run: "Run") -> None:
        """Raise GlmtunerError where a file that the stage needs is missing or does not fit; called before anything is loaded."""

    def largest_batch(self, run: "Run") -> tuple[int, int]:
        """The rows of a training batch, and the largest length of a row in tokens."""
        return run.trainer.per_device_train_batch_size, run.data.max_source_length + run.data.max_target_length


@dataclass(kw_only=True)
class Tracker:
    """Where metrics are logged besides the run folder."""

    name: str

    def check_machine(self) -> None:
        """Raise ConfigError where this machine lacks a package that the tracker needs."""

    def start(self, run: "Run", folder: "Path") -> None:
        """Open the tracker before training; config.yaml is in the folder already."""

    def log(self, line: dict[str, float]) -> None:
        """Log one line of history.jsonl. A resumed run logs the lines that it keeps again, from the first, before it continues."""

    def abandon(self, preempted: bool = False) -> None:
        """Close the tracker of a run that ends early: failed or, if `preempted`, to be resumed."""

    def finish(self, folder: "Path", metrics: dict[str, float]) -> str | None:
        """Close the tracker with the content of metrics.json; returns a line to print on where to see the run, or None."""
        return None

    def publish(self, sweep: "Path") -> str | None:
        """Upload the report of a finished sweep from its folder; returns a line to print on where it is, or None."""
        return None


@dataclass(kw_only=True)
class Parallel:
    """How many processes train one run, and what each of them stores."""

    name: str
    processes: int | None = None
    lost_after: float | None = 40.0

    several: typing.ClassVar[bool] = True  # one process per GPU, if there are several
    sharded: typing.ClassVar[bool] = False  # does each process hold only a shard of every weight?
    shares: typing.ClassVar[tuple[str, ...]] = ()  # the parts of an `Estimate` that are divided by the processes

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError(
                f"parallel.processes={self.processes}: 1 or more, or null for one per GPU of this machine"
            )
        if self.lost_after is not None and not 10 <= self.lost_after <= 3600:
            raise ConfigError(
                f"parallel.lost_after={self.lost_after:g}: 10 to 3600 seconds in which another machine has not answered, or null to wait "
                "for it as long as trainer.ddp_timeout says"
            )

    @property
    def ranks_per_row(self) -> int:
        """The number of processes that share a row, of which each has a part of the tokens."""
        return 1

    def impossible(self, run: "Run") -> Iterator[str]:
        """One sentence for each value of the run that is incompatible with this strategy."""
        yield from ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' TrainingArguments."""
        return {}

    def shard_model(self, model: "nn.Module", blocks: "list[nn.Module]") -> None:
        """Shard the model in place before training; called once on every process, with the model's layers as `blocks`."""


@dataclass(kw_only=True)
class SharedRows(Parallel):
    """A strategy in which processes may share a row: the long context of a sample, or of a pack."""

    sequence: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence < 1:
            raise ConfigError(
                f"parallel.sequence={self.sequence}: 1 or more processes share a row; leave it out for rows of one process"
            )
        if self.processes is not None and self.processes % self.sequence:
            raise ConfigError(
                f"parallel.sequence={self.sequence} with parallel.processes={self.processes}: the processes are groups of "
                f"{self.sequence}, which share a row; type parallel.processes={-(-self.processes // self.sequence) * self.sequence}"
            )

    @property
    def ranks_per_row(self) -> int:
        return self.sequence

    def impossible(self, run: "Run") -> Iterator[str]:
        if self.sequence == 1:
            return
        knob, data, trainer = f"parallel.sequence={self.sequence}", run.data, run.trainer
        if not run.stage.models_loss:
            yield f"{knob} with stage={run.stage.name}: only the losses of stage=sft and stage=pt are computed in parts; leave it out"
        for key in ("padding_free", "ignore_pad_token_for_loss"):
            if not getattr(data, key):
                yield f"{knob} with data.{key}=false: rows are shared without their padding; type data.{key}=true"
        if trainer.neftune_noise_alpha:
            yield f"{knob} with trainer.neftune_noise_alpha={trainer.neftune_noise_alpha}: its noise is drawn for whole rows; leave one out"
        if not trainer.average_tokens_across_devices:
            yield (
                f"{knob} with trainer.average_tokens_across_devices=false: the tokens of a row are on several processes; leave it out"
            )
        if trainer.accelerator_config is not None:
            yield f"{knob} with trainer.accelerator_config: how rows are divided among processes follows from {knob}; leave it out"


@dataclass(kw_only=True)
class Run:
    """One composed run."""

    model: Model
    quant: Quant
    data: Data
    finetuning: Finetuning
    stage: Stage
    trainer: Trainer
    metric: Metric
    generation: Generation
    tracker: Tracker
    parallel: Parallel
    budget: Budget = field(default_factory=Budget)  # runs of earlier versions have none
    reward: dict[str, Reward] = field(default_factory=dict)  # of stage=grpo: preset -> its values
    benchmark: Benchmark = field(default_factory=Benchmark)
    name: str | None = None
    objective: Any = None  # the metric that sweeps rank by, or a list of two
    plugins: list[str] = field(default_factory=list)  # the user's own modules, see plugins.py

    def __post_init__(self) -> None:
        wrong = list(self.impossible())
        if wrong:
            raise ConfigError("; also: ".join(wrong))

    def impossible(self) -> Iterator[str]:
        """One sentence for each pair of incompatible values; all of them are reported at once."""
        for declared in fields(self):
            if is_dataclass(owner := getattr(self, declared.name)) and declared.name != "trainer":  # has its own ranges
                yield from infinite_values(declared.name, owner)
        if self.name is not None and self.name.strip() in ("", ".", ".."):
            yield f"name={self.name!r}: it names the run's folder; type a name, or leave it out"
        if problem := objective_problem(self.objective):
            yield problem
        for name, reward in self.reward.items():
            yield from infinite_values(f"{REWARD}.{name}", reward)
        if self.reward and not self.stage.uses_rewards:
            yield (
                f"{REWARD}={as_override([*self.reward])} with stage={self.stage.name}: rewards score the answers that stage=grpo "
                "samples; leave it out, or type stage=grpo"
            )
        trainer, method, bits = self.trainer, self.finetuning, self.quant.quantization_bit
        if bits is not None and trainer.do_train and not method.on_quantized:
            yield (
                f"quant=int{bits} stores frozen integer weights and finetuning={method.finetuning_type} must update them; "
                "type finetuning=lora, or quant=none"
            )
        if bits is not None and trainer.fp16 and not method.fp16_on_quantized and trainer.do_train:
            yield (
                f"trainer.fp16=true with quant=int{bits} and finetuning={method.finetuning_type}: its gradients overflow in half "
                "precision; type trainer.fp16=false"
            )
        if trainer.do_train:
            yield from method.impossible(bits, self.parallel.sharded)
        if trainer.do_train and not method.trains:
            yield (
                f"finetuning={method.finetuning_type} trains nothing and trainer.do_train=true asks for training; "
                "type trainer=evaluate or trainer=predict, or finetuning=lora"
            )
        if not (trainer.do_train or trainer.do_eval or trainer.do_predict or self.benchmark.tasks):
            yield (
                "nothing to do: trainer.do_train, trainer.do_eval and trainer.do_predict are all false; "
                "type trainer=train, trainer=evaluate or trainer=predict, or benchmark=ceval for a benchmark"
            )
        yield from self._impossible_benchmarks()
        yield from self.stage.impossible(self)
        if self.model.reward_model is not None and not self.stage.uses_reward_model:
            yield f"model.reward_model={self.model.reward_model} with stage={self.stage.name}: it is for stage=ppo and grpo; leave it out"
        evaluates = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start
        if trainer.do_train and evaluates and not self.data.dev_ratio and not self.data.eval_dataset:
            yield (
                "evaluation after training needs records that were not trained on: type data.dev_ratio=0.1, or "
                "data.eval_dataset=<name>, or evaluate in a separate run with trainer=evaluate"
            )
        if self.data.dev_ratio and self.data.eval_dataset:
            yield (
                f"data.dev_ratio={self.data.dev_ratio:g} with data.eval_dataset={as_override(self.data.eval_dataset)}: "
                "choose one source of evaluation records"
            )
        yield from self.parallel.impossible(self)
        if self.data.weights and not self.stage.weighs:
            yield (
                f"data.weights={as_override(self.data.weights)} with stage={self.stage.name}: it learns from answers of its own, "
                "and records have no weights; leave it out, or type data.mix_probabilities=<a share of each dataset>"
            )
        if self.data.packing and not self.stage.packs:
            yield (
                f"data.packing=true with stage={self.stage.name}: only the samples of stage=sft are packed; type data.packing=false"
            )
        if self.data.packing and not (self.data.padding_free and self.data.ignore_pad_token_for_loss):
            knob = "ignore_pad_token_for_loss" if self.data.padding_free else "padding_free"
            yield f"data.packing=true with data.{knob}=false: packed rows have no padding; leave one of the two out"
        if self.generation.engine is Engine.vllm:
            yield from self._impossible_by_vllm()

    def _impossible_benchmarks(self) -> Iterator[str]:
        if not self.benchmark.tasks:
            return
        knob = f"benchmark={as_override(self.benchmark.tasks)}"
        if not self.stage.policy:
            yield f"{knob} with stage={self.stage.name}: it trains no model that generates answers; leave it out"
        if self.generation.engine is Engine.vllm:
            yield f"{knob} with generation.engine=vllm: benchmarks are asked of the loaded model; leave one of the two out"
        if self.parallel.sharded:
            yield (
                f"{knob} with parallel={self.parallel.name}: sharded models are not scored; leave it out, and score the run in another "
                "one: trainer=benchmark model.checkpoint_dir=<the folder of this run>"
            )

    def _impossible_by_vllm(self) -> Iterator[str]:
        bits, beams = self.quant.quantization_bit, self.data.eval_num_beams
        for incompatible, knob, reason in (
            (self.trainer.do_train, "trainer.do_train=true", "vLLM only predicts; type trainer=predict"),
            (
                bits is not None,
                f"quant=int{bits}",
                "adapters are merged into the weights for vLLM, which integer weights do not allow; type quant=none",
            ),
            (
                not self.finetuning.mergeable,
                f"finetuning={self.finetuning.finetuning_type}",
                "what it trains cannot be merged into the weights that vLLM loads; type finetuning=lora",
            ),
            ((beams or 1) > 1, f"data.eval_num_beams={beams}", "vLLM decodes greedily; type data.eval_num_beams=1"),
            (
                self.parallel.several,
                f"parallel={self.parallel.name}",
                "vLLM is called by one process; type parallel=none",
            ),
        ):
            if incompatible:
                yield f"generation.engine=vllm with {knob}: {reason}, or generation.engine=transformers"


ConfigStore.instance().store(group="schema", name="run", node=Run, package="_global_")


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The resolved type hints of a class; resolving them takes milliseconds, and every override asks."""
    return typing.get_type_hints(cls)


def classes_of(group: str) -> dict[str, type]:
    """The classes that a root key can have, by preset; single-type groups have one, named like the group."""
    hint = hints_of(Run)[group]
    if group in SCHEMA_CLASSES:
        return SCHEMA_CLASSES[group]
    return {group: hint} if isinstance(hint, type) and is_dataclass(hint) else {}


def groups() -> list[str]:
    """The root keys that are config groups, in the order of `Run`."""
    return [declared.name for declared in fields(Run) if classes_of(declared.name)]


@cache
def needed_groups() -> set[str]:
    """The groups without which there is no run."""
    return {each.name for each in fields(Run) if each.default is MISSING and each.default_factory is MISSING}


def legal_keys() -> dict[str, Any]:
    """Every dotted key of every class with its type hint; leaves only, no group names."""
    keys: dict[str, Any] = {}
    for declared in fields(Run):
        owners = classes_of(declared.name)
        if not owners:
            keys[declared.name] = hints_of(Run)[declared.name]
        for preset_name, cls in owners.items():
            hints = hints_of(cls)
            keys |= {f"{_prefix(declared.name, preset_name)}.{inner.name}": hints[inner.name] for inner in fields(cls)}
    return keys


def _prefix(group: str, preset_name: str) -> str:
    """What stands before the keys of a preset: a run has several rewards, each below its own name."""
    return f"{group}.{preset_name}" if group == REWARD else group


def key_defaults() -> dict[str, Any]:
    """The defaults of the dotted keys that have one, enums as text; where several classes have the key, the first one's."""
    defaults: dict[str, Any] = {}
    for declared in fields(Run):
        for preset_name, cls in classes_of(declared.name).items():
            for inner in fields(cls):
                if (made := default_of(inner)) is not MISSING:
                    key = f"{_prefix(declared.name, preset_name)}.{inner.name}"
                    defaults.setdefault(key, getattr(made, "value", made))
    return defaults


def list_keys() -> set[str]:
    """The dotted keys whose value is a list, to which the comma rule applies, and the group that takes several presets."""
    return {REWARD} | {
        key
        for key, hint in legal_keys().items()
        if any(typing.get_origin(part) is list for part in (hint, *typing.get_args(hint)))
    }
