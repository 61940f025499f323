"""The typed configuration: what every key is called, what type it has, what values are legal.

A field without a default is one that a preset in `conf/` must choose. Strategy groups (finetuning, quant, stage, metric,
tracker) have a base class here; each choice is a subclass in a file of its own, registered with `@preset`.
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore

from glmtuner.config.trainer_arguments import UNIONS, WORDS, TrainerArguments
from glmtuner.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

T = typing.TypeVar("T")
SCHEMA_CLASSES: dict[str, dict[str, type]] = {}


def preset(group: str, name: str) -> Callable[[type[T]], type[T]]:
    """Register a class as the schema of `conf/<group>/<name>.yaml`."""

    def register(cls: type[T]) -> type[T]:
        ConfigStore.instance().store(group=f"schema/{group}", name=name, node=cls)
        SCHEMA_CLASSES.setdefault(group, {})[name] = cls
        return cls

    return register


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class QuantizationType(str, Enum):
    nf4 = "nf4"
    fp4 = "fp4"


class LossOn(str, Enum):
    every_answer = "every_answer"
    last_answer = "last_answer"


class PreferenceLoss(str, Enum):
    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


class Engine(str, Enum):
    transformers = "transformers"
    vllm = "vllm"


class LayerPart(str, Enum):
    mlp = "mlp"
    qkv = "qkv"


@dataclass(kw_only=True)
class Model:
    """Which pretrained model, and what to start from."""

    model_name_or_path: str
    family: str
    config_name: str | None = None
    tokenizer_name: str | None = None
    cache_dir: str | None = None
    use_fast_tokenizer: bool = True
    model_revision: str = "main"
    use_auth_token: bool = False
    checkpoint_dir: list[str] = field(default_factory=list)
    reward_model: str | None = None
    resume_lora_training: bool = True
    plot_loss: bool = False
    template: str | None = None
    dtype: Dtype = Dtype.auto


@dataclass(kw_only=True)
class Quant:
    """How the frozen base weights are stored; `none` stores them as they are."""

    quantization_bit: int | None = None
    quantization_type: QuantizationType = QuantizationType.nf4
    double_quantization: bool = True

    bits: typing.ClassVar[int | None] = None  # what the preset stores

    def __post_init__(self) -> None:
        if self.quantization_bit != self.bits:
            raise ConfigError(
                f"quant.quantization_bit={self.quantization_bit}: the preset chooses the bits; "
                "type quant=int4, quant=int8 or quant=none"
            )

    def loading(self, device: Any, compute_dtype: Any) -> dict[str, Any]:
        """What `from_pretrained` needs to be told, given the device and the torch dtype of the matrix products."""
        return {}

    def prepare(self, model: "nn.Module") -> None:
        """Called once on the loaded model."""


@dataclass(kw_only=True)
class Data:
    """Which records, and how they become tokens."""

    dataset: list[str]
    dataset_dir: str
    max_source_length: int
    max_target_length: int
    split: str = "train"
    overwrite_cache: bool = False
    preprocessing_num_workers: int | None = None
    max_samples: int | None = None
    eval_num_beams: int | None = None
    ignore_pad_token_for_loss: bool = True
    source_prefix: str | None = None
    dev_ratio: float = 0.0
    eval_dataset: list[str] = field(default_factory=list)
    mix_probabilities: list[float] = field(default_factory=list)
    loss_on: LossOn = LossOn.every_answer
    packing: bool = False
    padding_free: bool = True
    max_bad_records: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"data.{name}={value}: {legal}"
            for name, value, fits, legal in (
                ("dev_ratio", self.dev_ratio, 0 <= self.dev_ratio < 1, "a share of the data in [0, 1)"),
                ("max_source_length", self.max_source_length, self.max_source_length >= 8, "at least 8 tokens"),
                ("max_target_length", self.max_target_length, self.max_target_length >= 2, "at least 2 tokens"),
                (
                    "max_samples",
                    self.max_samples,
                    self.max_samples is None or self.max_samples > 0,
                    "1 or more, or null",
                ),
                ("max_bad_records", self.max_bad_records, self.max_bad_records >= 0, "0 or more"),
                (
                    "eval_num_beams",
                    self.eval_num_beams,
                    (self.eval_num_beams or 1) > 0,
                    "1 or more, or null for greedy",
                ),
                (
                    "preprocessing_num_workers",
                    self.preprocessing_num_workers,
                    self.preprocessing_num_workers is None or self.preprocessing_num_workers > 0,
                    "1 or more, or null",
                ),
            )
            if not fits
        ]
        if not self.dataset:
            wrong.append("data.dataset=[]: name at least one dataset, such as data.dataset=alpaca_zh_sample")
        if self.mix_probabilities:
            shares = self.mix_probabilities
            if len(shares) != len(self.dataset):
                wrong.append(
                    f"data.mix_probabilities={_plain(shares)}: {len(shares)} shares for the {len(self.dataset)} datasets "
                    f"{_plain(self.dataset)}; give one share a dataset"
                )
            elif min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
                wrong.append(
                    f"data.mix_probabilities={_plain(shares)}: shares are above 0 and sum to 1; these sum to {sum(shares):g}"
                )
        if wrong:
            raise ConfigError("; ".join(wrong))

    def lengths(self) -> dict[str, Any]:
        """What an encoder needs to know of lengths and prefix."""
        names = ("max_source_length", "max_target_length", "source_prefix")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class Finetuning:
    """Which weights are trained. `attach` prepares a loaded model; `save` and `restore` keep what was trained."""

    finetuning_type: str

    trains: typing.ClassVar[bool] = True
    on_quantized: typing.ClassVar[bool] = True  # can it train on frozen integer weights?
    saved_as: typing.ClassVar[str] = "adapter"  # the run folder's subfolder: adapter/ or model/

    def settle(self, family: Any, layers: int) -> None:
        """Fill in what depends on the model's family and number of layers; raises ConfigError where it does not fit."""

    def attach(self, model: "nn.Module", family: Any) -> "nn.Module":
        """The model with everything frozen but what this method trains; trained parameters are float32."""
        raise NotImplementedError

    def save(self, model: "nn.Module", folder: "Path") -> None:
        """Write what was trained for others to use, in PEFT's or transformers' format."""
        raise NotImplementedError

    def save_trained(self, model: "nn.Module", folder: "Path") -> None:
        """Write what a checkpoint needs of the model: the trained parameters, bit by bit."""
        raise NotImplementedError

    def restore(self, model: "nn.Module", folder: "Path") -> None:
        """Put what `save_trained` or `save` wrote back into an attached model, bit by bit."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Stage:
    """What is learned: the records it takes, how they become batches, the loss, what a prediction is."""

    name: str

    policy: typing.ClassVar[bool] = True  # does what it trains answer? (a reward model scores)
    models_loss: typing.ClassVar[bool] = False  # is the loss the model's own, of one sample at a time?
    packs: typing.ClassVar[bool] = False  # may several of its samples stand in one row?
    spreads: typing.ClassVar[bool] = True  # can ranks that hold a share of the weights or gradients train it?

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
class Metric:
    """Scores of generated answers against their labels."""

    name: str

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """The scores of one answer, by name; empty when nothing is measured."""
        raise NotImplementedError

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """The mean over all answers of each score; empty without answers, or when nothing is measured."""
        return self.mean([self.score(*pair) for pair in zip(predictions, references, strict=True)])

    @staticmethod
    def mean(found: list[dict[str, float]]) -> dict[str, float]:
        """The mean of each score; empty without any."""
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]} if found else {}


@dataclass(kw_only=True)
class Generation:
    """How chat and serving decode: CET's values. Evaluation and prediction decode greedily, or with beams.

    `engine` is what generates in trainer=predict; all else generates by the model that is loaded. `max_batch_size` is how many
    answers evaluation and prediction generate at once: null is as many as memory has room for, 32 at most (128 on a GPU), or
    trainer.per_device_eval_batch_size where that was given another value than its default.
    """

    do_sample: bool
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    num_beams: int = 1
    max_length: int = 2048
    max_new_tokens: int | None = None
    repetition_penalty: float = 1.0
    max_batch_size: int | None = None
    engine: Engine = Engine.transformers

    def __post_init__(self) -> None:
        wrong = [
            f"generation.{name}={value}: {legal}"
            for name, value, fits, legal in (
                ("temperature", self.temperature, self.temperature > 0, "above 0 (generation=greedy does not sample)"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
                ("top_k", self.top_k, self.top_k >= 0, "0 or more; 0 keeps every token"),
                ("num_beams", self.num_beams, self.num_beams >= 1, "1 or more"),
                ("max_length", self.max_length, self.max_length >= 2, "2 tokens or more"),
                ("max_new_tokens", self.max_new_tokens, (self.max_new_tokens or 1) >= 1, "1 or more, or null"),
                (
                    "max_batch_size",
                    self.max_batch_size,
                    (1 if self.max_batch_size is None else self.max_batch_size) >= 1,
                    "1 or more, or null",
                ),
                (
                    "repetition_penalty",
                    self.repetition_penalty,
                    self.repetition_penalty > 0,
                    "above 0; 1 changes nothing",
                ),
            )
            if not fits
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))


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

    def spread(self, model: "nn.Module", blocks: "list[nn.Module]") -> None:
        """Called once on every process with the model whose training begins; `blocks` are its layers."""


@dataclass(kw_only=True)
class Trainer(TrainerArguments):
    """transformers' Seq2SeqTrainingArguments, and the words that transformers 5 dropped."""

    overwrite_output_dir: bool = False
    no_cuda: bool = False
    warmup_ratio: float | None = None
    group_by_length: bool = False
    save_safetensors: bool = True
    logging_dir: str | None = None

    def __post_init__(self) -> None:
        wrong = [*self._wrong_words(), *self._wrong_shapes(), *self._wrong_values()]
        if wrong:
            raise ConfigError("; ".join(wrong))
        if self.no_cuda:
            self.use_cpu = True
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.warmup_ratio:
            self.warmup_steps = self.warmup_ratio  # transformers 5 reads a warmup_steps below 1 as a share

    def _wrong_words(self) -> Iterator[str]:
        for name, legal in WORDS.items():
            value = getattr(self, name)
            if value is False and "no" in legal:  # YAML's `no`
                value = "no"
                setattr(self, name, value)
            if value not in legal:
                yield f"trainer.{name}={value}{did_you_mean(str(value), legal, 'legal: ' + ', '.join(legal))}"

    def _wrong_shapes(self) -> Iterator[str]:
        for name, shapes in UNIONS.items():
            value = getattr(self, name)
            shape = "null" if value is None else type(value).__name__
            if shape not in shapes:
                yield f"trainer.{name}={value}: expected {' or '.join(shapes) or 'null'}, not {shape}"

    def _wrong_values(self) -> Iterator[str]:
        for name, fits, legal in (
            ("learning_rate", self.learning_rate >= 0, "0 or more"),
            ("num_train_epochs", self.num_train_epochs > 0, "above 0; a fraction trains part of the last epoch"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "1 or more"),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size >= 1, "1 or more"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "1 or more"),
            ("warmup_ratio", self.warmup_ratio is None or 0 <= self.warmup_ratio < 1, "a share of the steps in [0, 1)"),
            ("save_safetensors", self.save_safetensors, "always true: glmtuner writes nothing but safetensors"),
            ("logging_dir", self.logging_dir is None, "the run folder holds the logs (tensorboard/); leave it out"),
            ("seed", 0 <= self.seed < 2**32, "0 to 4294967295"),
        ):
            if not fits:
                yield f"trainer.{name}={getattr(self, name)}: {legal}"
        if self.fp16 and self.bf16:
            yield "trainer.fp16=true with trainer.bf16=true: choose one"
        if self.warmup_ratio and self.warmup_steps:
            yield f"trainer.warmup_ratio={self.warmup_ratio} with trainer.warmup_steps={self.warmup_steps:g}: choose one"
        if self.auto_find_batch_size:
            yield (
                "trainer.auto_find_batch_size=true: a run that changes its batch size cannot be resumed or compared; "
                "set trainer.per_device_train_batch_size and trainer.gradient_accumulation_steps"
            )


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
        if not self.stage.spreads and self.parallel.name not in ("none", "ddp"):
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


def _plain(values: list) -> str:
    """A list as it is typed: [a,b]."""
    return f"[{','.join(str(value) for value in values)}]"


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
