"""The whole configuration of a run, and the groups whose methods take one."""

import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore

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
    _plain,
)
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


@dataclass(kw_only=True)
class Stage:
    """What is learned: the records it takes, how they become batches, the loss, what a prediction is."""

    name: str

    policy: typing.ClassVar[bool] = True  # does what it trains answer? (a reward model scores)
    models_loss: typing.ClassVar[bool] = False  # is the loss the model's own, of one sample at a time?
    packs: typing.ClassVar[bool] = False  # may several of its samples stand in one row?
    supports_sharding: typing.ClassVar[bool] = True  # can ranks that hold a share of the weights or gradients train it?

    def impossible(self, run: "Run") -> "Iterator[str]":
        """One sentence for each value of the run that cannot meet this stage."""
        if run.trainer.predict_with_generate:
            yield (
                f"trainer.predict_with_generate=true with stage={self.name}: only stage=sft generates; "
                "type trainer.predict_with_generate=false"
            )
        if run.trainer.do_predict:
            yield (
                f"trainer.do_predict=true with stage={self.name}: answers are predicted in a run of their own; "
                "type trainer=predict model.checkpoint_dir=<the folder of this run>"
            )

    def check(self, run: "Run") -> None:
        """Raise when a file that the stage needs is not there or does not fit; called before anything is loaded."""

    def datasets(self, run: "Run", specs: dict[str, Any], template: Any, tokenizer: Any) -> Any:
        """The encoded records (`Datasets` of glmtuner/data/splits.py)."""
        raise NotImplementedError

    def largest_batch(self, run: "Run") -> tuple[int, int]:
        """Rows of a training batch, and the most tokens that one can have."""
        return run.trainer.per_device_train_batch_size, run.data.max_source_length + run.data.max_target_length

    def collator(self, **padding: Any) -> Any:
        """Rows -> a batch; `padding` is what the collators of glmtuner/data take."""
        raise NotImplementedError

    def objective(self, run: "Run", model: "nn.Module", template: Any, tokenizer: Any) -> Any:
        """The loss and what belongs to it besides the model (glmtuner/objectives); None is the model's own loss.

        Called on the model as training will start, before a checkpoint is restored; heads are added to it here.
        """
        return None

    def predict(
        self, run: "Run", folder: Any, trainer: Any, tokenizer: Any, template: Any, data: Any
    ) -> dict[str, float]:
        """Write predictions.jsonl, one line an evaluation record; returns their scores, whose names begin with predict_."""
        raise NotImplementedError

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """More metrics that follow from the means of what was measured, in training or in an evaluation."""
        return {}


@dataclass(kw_only=True)
class Tracker:
    """Where the numbers go besides the run folder."""

    name: str

    def start(self, run: "Run", folder: "Path") -> None:
        """Open the tracker before training; the folder's config.yaml is written."""

    def log(self, line: dict[str, float]) -> None:
        """One line of history.jsonl. A resumed run logs the lines it keeps again, from the first, before it goes on."""

    def abandon(self, preempted: bool = False) -> None:
        """The run ends early: by an error, or, when preempted, to be continued."""

    def finish(self, folder: "Path", metrics: dict[str, float]) -> str | None:
        """Close the tracker with the content of metrics.json; returns a line on where its numbers are, if there is one."""
        return None

    def publish(self, sweep: "Path") -> str | None:
        """Take in the report of a finished sweep, from its folder; returns a line on where it is, if there is one."""
        return None


@dataclass(kw_only=True)
class Parallel:
    """How many processes train one run, and what each of them holds."""

    name: str
    processes: int | None = None

    several: typing.ClassVar[bool] = True  # one process a GPU, where there are several
    sharded: typing.ClassVar[bool] = False  # does a process hold only its share of every weight?
    whole_modules: typing.ClassVar[bool] = True  # are a layer's weights whole outside of its own forward pass?
    shares: typing.ClassVar[tuple[str, ...]] = ()  # the parts of an `Estimate` that a process holds its share of

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"parallel.processes={self.processes}: 1 or more, or null for one a GPU of this machine")

    def impossible(self, run: "Run") -> Iterator[str]:
        """One sentence for each value of the run that cannot meet this."""
        yield from ()

    def check_machine(self) -> None:
        """Raises ConfigError where this machine lacks what it takes."""

    def arguments(self) -> dict[str, Any]:
        """What transformers' TrainingArguments are to be told."""
        return {}

    def shard_model(self, model: "nn.Module", blocks: "list[nn.Module]") -> None:
        """Called once on every process with the model whose training begins; `blocks` are its layers."""


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
    name: str | None = None
    objective: str | None = None

    def __post_init__(self) -> None:
        wrong = list(self.impossible())
        if wrong:
            raise ConfigError("; also: ".join(wrong))

    def impossible(self) -> Iterator[str]:
        """One sentence for each pair of values that cannot meet; all that is wrong is told at once."""
        trainer, method, bits = self.trainer, self.finetuning, self.quant.quantization_bit
        if bits is not None and trainer.do_train and not method.on_quantized:
            yield (
                f"quant=int{bits} stores frozen integer weights and finetuning={method.finetuning_type} must update them; "
                "type finetuning=lora, or quant=none"
            )
        if bits is not None and trainer.fp16 and method.finetuning_type == "p_tuning" and trainer.do_train:
            yield (
                f"trainer.fp16=true with quant=int{bits} and finetuning=p_tuning: the prefix's gradients overflow in half "
                "precision; type trainer.fp16=false"
            )
        if trainer.do_train and not method.trains:
            yield (
                f"finetuning={method.finetuning_type} trains nothing and trainer.do_train=true asks for training; "
                "type trainer=evaluate or trainer=predict, or finetuning=lora"
            )
        if not (trainer.do_train or trainer.do_eval or trainer.do_predict):
            yield (
                "nothing to do: trainer.do_train, trainer.do_eval and trainer.do_predict are all false; "
                "type trainer=train, trainer=evaluate or trainer=predict"
            )
        yield from self.stage.impossible(self)
        if not self.stage.supports_sharding and self.parallel.name not in ("none", "ddp"):
            yield (
                f"parallel={self.parallel.name} with stage={self.stage.name}: its loss needs every rank to hold the whole model; "
                "type parallel=ddp"
            )
        if self.model.reward_model is not None and self.stage.name != "ppo":
            yield f"model.reward_model={self.model.reward_model} with stage={self.stage.name}: it is for stage=ppo; leave it out"
        evaluates = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start
        if trainer.do_train and evaluates and not self.data.dev_ratio and not self.data.eval_dataset:
            yield (
                "evaluation after training needs records that were not trained on: type data.dev_ratio=0.1, or "
                "data.eval_dataset=<name>, or evaluate in a run of its own with trainer=evaluate"
            )
        if self.data.dev_ratio and self.data.eval_dataset:
            yield (
                f"data.dev_ratio={self.data.dev_ratio:g} with data.eval_dataset={_plain(self.data.eval_dataset)}: "
                "choose one place to take the evaluation records from"
            )
        if trainer.load_best_model_at_end and (
            trainer.eval_strategy == "no" or trainer.eval_strategy != trainer.save_strategy
        ):
            yield (
                f"trainer.load_best_model_at_end=true with trainer.eval_strategy={trainer.eval_strategy} and "
                f"trainer.save_strategy={trainer.save_strategy}: both must be the same, steps or epoch"
            )
        yield from self.parallel.impossible(self)
        if self.data.packing and not self.stage.packs:
            yield (
                f"data.packing=true with stage={self.stage.name}: only the samples of stage=sft are packed; type data.packing=false"
            )
        if self.data.packing and not (self.data.padding_free and self.data.ignore_pad_token_for_loss):
            knob = "ignore_pad_token_for_loss" if self.data.padding_free else "padding_free"
            yield f"data.packing=true with data.{knob}=false: packed rows have no padding; leave one of the two out"
        if self.generation.engine is Engine.vllm:
            yield from self._impossible_by_vllm()

    def _impossible_by_vllm(self) -> Iterator[str]:
        bits, beams = self.quant.quantization_bit, self.data.eval_num_beams
        for wrong, knob, why in (
            (self.trainer.do_train, "trainer.do_train=true", "it answers in a run of its own; type trainer=predict"),
            (
                bits is not None,
                f"quant=int{bits}",
                "it is given weights with the adapters merged in, and integer weights take none in; type quant=none",
            ),
            (
                self.finetuning.finetuning_type == "p_tuning",
                "finetuning=p_tuning",
                "vLLM does not know the prefix of P-Tuning v2; type finetuning=lora",
            ),
            ((beams or 1) > 1, f"data.eval_num_beams={beams}", "it answers greedily; type data.eval_num_beams=1"),
            (self.parallel.name != "none", f"parallel={self.parallel.name}", "one process asks it; type parallel=none"),
        ):
            if wrong:
                yield f"generation.engine=vllm with {knob}: {why}, or generation.engine=transformers"


ConfigStore.instance().store(group="schema", name="run", node=Run, package="_global_")


def classes_of(group: str) -> dict[str, type]:
    """The classes that can stand under a root key, by preset; single-type groups have one, named like the group."""
    hint = typing.get_type_hints(Run)[group]
    if group in SCHEMA_CLASSES:
        return SCHEMA_CLASSES[group]
    return {group: hint} if is_dataclass(hint) else {}


def groups() -> list[str]:
    """The root keys that are config groups, in the order of `Run`."""
    return [declared.name for declared in fields(Run) if classes_of(declared.name)]


def legal_keys() -> dict[str, Any]:
    """Every dotted key of every class with its type hint; a leaf only, no group names."""
    keys: dict[str, Any] = {}
    for declared in fields(Run):
        owners = classes_of(declared.name)
        if not owners:
            keys[declared.name] = typing.get_type_hints(Run)[declared.name]
        for cls in owners.values():
            hints = typing.get_type_hints(cls)
            keys |= {f"{declared.name}.{inner.name}": hints[inner.name] for inner in fields(cls)}
    return keys


def list_keys() -> set[str]:
    """The dotted keys whose value is a list: the comma rule is for them."""
    return {
        key
        for key, hint in legal_keys().items()
        if any(typing.get_origin(part) is list for part in (hint, *typing.get_args(hint)))
    }
