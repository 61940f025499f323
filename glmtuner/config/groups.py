"""The config groups: the names, types and legal values of all keys.

A field without a default must be set by a preset in `conf/`. Strategy groups (finetuning, quant, stage, metric,
tracker) have a base class, in this module or in schema.py; each choice is a subclass in its own file, registered with `@preset`.
"""

import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from hydra.core.config_store import ConfigStore

from glmtuner.config.datasets import dataset_errors
from glmtuner.config.dictionaries import schema_of
from glmtuner.config.method_hooks import MethodHooks
from glmtuner.config.new_tokens import new_token_errors
from glmtuner.config.optimizers import SHORT_NAMES
from glmtuner.config.ranges import range_errors, trainer_range_errors
from glmtuner.config.rope import rope_scaling_errors
from glmtuner.config.trainer_arguments import UNIONS, WORDS, OptimizerNames, TrainerArguments
from glmtuner.config.trainer_fields import REDIRECTED, REFUSED
from glmtuner.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel


T = typing.TypeVar("T")
SCHEMA_CLASSES: dict[str, dict[str, type]] = {}


def preset(group: str, name: str) -> Callable[[type[T]], type[T]]:
    """Register a class as the schema of `conf/<group>/<name>.yaml`; raises ConfigError for a name that another module has."""

    def register(cls: type[T]) -> type[T]:
        registered = SCHEMA_CLASSES.get(group, {}).get(name)
        if registered is not None and registered.__module__ != cls.__module__:
            raise ConfigError(
                f"{cls.__module__} registers {group}={name}, which {registered.__module__} has registered already; give it "
                "another name"
            )
        ConfigStore.instance().store(group=f"schema/{group}", name=name, node=schema_of(cls))
        SCHEMA_CLASSES.setdefault(group, {})[name] = cls
        return cls

    return register


def preset_key(group: str) -> str:
    """The key of a strategy group that holds the choice, such as finetuning_type."""
    return {"finetuning": "finetuning_type", "quant": "quantization_bit"}.get(group, "name")


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


class Thinking(Enum):  # no str, which has a method strip
    """How the thoughts of answers are learned: auto (those that a record has), empty (else an empty one), strip (none)."""

    auto = "auto"
    empty = "empty"
    strip = "strip"


class AskedThinking(str, Enum):
    """The mode of the prompts that are answered; auto is that in which they were learned."""

    auto = "auto"
    on = "on"
    off = "off"


class PreferenceLoss(str, Enum):
    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"
    sigmoid_norm = "sigmoid_norm"
    robust = "robust"
    exo_pair = "exo_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"


class SftLoss(str, Enum):
    cross_entropy = "cross_entropy"
    dft = "dft"


class CpoLoss(str, Enum):
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
    use_modelscope: bool = False
    checkpoint_dir: list[str] = field(default_factory=list)
    reward_model: str | None = None
    resume_lora_training: bool = True
    plot_loss: bool = False
    template: str | None = None
    dtype: Dtype = Dtype.auto
    rope_scaling: Any = None

    def __post_init__(self) -> None:
        if wrong := list(rope_scaling_errors(self.rope_scaling)):
            raise ConfigError("; ".join(wrong))


@dataclass(kw_only=True)
class Quant:
    """How the frozen base weights are stored; `none` stores them as they are."""

    quantization_bit: int | None = None
    quantization_type: QuantizationType = QuantizationType.nf4
    double_quantization: bool = True

    bits: typing.ClassVar[int | None] = None  # the preset's quantization_bit

    def __post_init__(self) -> None:
        if self.quantization_bit != self.bits:
            raise ConfigError(
                f"quant.quantization_bit={self.quantization_bit}: the preset chooses the bits; "
                "type quant=int4, quant=int8 or quant=none"
            )

    def loading(self, device: Any, compute_dtype: Any) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, given the device and the torch dtype of the matrix products."""
        return {}

    def prepare(self, model: "nn.Module") -> None:
        """Change the loaded model in place; called once."""


@dataclass(kw_only=True)
class Data:
    """Which records, and how they become tokens."""

    dataset: list[str]
    dataset_dir: str
    max_source_length: int
    max_target_length: int
    split: str = "train"
    use_modelscope: bool = False
    overwrite_cache: bool = False
    preprocessing_num_workers: int | None = None
    max_samples: int | None = None
    eval_num_beams: int | None = None
    ignore_pad_token_for_loss: bool = True
    source_prefix: str | None = None
    input_separator: str = "\n"
    ignore_columns: list[str] = field(default_factory=list)
    dev_ratio: float = 0.0
    eval_dataset: list[str] = field(default_factory=list)
    mix_probabilities: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    loss_on: LossOn = LossOn.every_answer
    packing: bool = False
    padding_free: bool = True
    max_bad_records: int = 0
    tiktoken_engine: bool = True
    thinking: Thinking = Thinking.auto
    new_tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        wrong = [
            *range_errors(
                "data",
                self,
                (
                    ("dev_ratio", 0 <= self.dev_ratio < 1, "a share of the data in [0, 1)"),
                    ("max_source_length", self.max_source_length >= 8, "at least 8 tokens"),
                    ("max_target_length", self.max_target_length >= 2, "at least 2 tokens"),
                    ("max_samples", self.max_samples is None or self.max_samples > 0, "1 or more, or null"),
                    ("max_bad_records", self.max_bad_records >= 0, "0 or more"),
                    (
                        "eval_num_beams",
                        self.eval_num_beams is None or self.eval_num_beams > 0,
                        "1 or more, or null for greedy",
                    ),
                    (
                        "preprocessing_num_workers",
                        self.preprocessing_num_workers is None or self.preprocessing_num_workers > 0,
                        "1 or more, or null",
                    ),
                ),
            )
        ]
        wrong += new_token_errors(self.new_tokens)
        wrong += dataset_errors(self.dataset, self.mix_probabilities, self.weights)
        if wrong:
            raise ConfigError("; ".join(wrong))

    def lengths(self) -> dict[str, Any]:
        """An encoder's keyword arguments: the lengths in tokens, the prefix of the prompts, and whether thoughts are left out."""
        names = ("max_source_length", "max_target_length", "source_prefix")
        return {**{name: getattr(self, name) for name in names}, "strips_reasoning": self.thinking is Thinking.strip}


class ModelFamily(Protocol):
    """The part of families/family.py's Family that fine-tuning methods use."""

    @property
    def name(self) -> str: ...
    @property
    def attention_block(self) -> str: ...
    @property
    def mlp(self) -> str: ...
    @property
    def attention(self) -> tuple[str, ...]: ...
    @property
    def linears(self) -> tuple[str, ...]: ...
    @property
    def lora_targets(self) -> tuple[str, ...]: ...
    @property
    def left_out(self) -> Mapping[str, str]: ...
    @property
    def towers(self) -> tuple[str, ...]: ...
    @property
    def experts(self) -> tuple[str, ...]: ...
    @property
    def wide_prefix(self) -> bool: ...
    def blocks(self, model: "nn.Module") -> "list[nn.Module]": ...
    def is_in_blocks(self, path: str) -> bool: ...
    def projections_in(self, block: "nn.Module") -> "list[nn.Module]": ...
    def frozen_linears(self, model: "nn.Module") -> dict[str, str]: ...
    def mlps_in(self, block: "nn.Module") -> "list[nn.Module]": ...


@dataclass(kw_only=True)
class Finetuning(MethodHooks):
    """Which weights are trained. `attach` prepares a loaded model; `save` and `restore` store the trained parameters."""

    finetuning_type: str

    trains: typing.ClassVar[bool] = True
    on_quantized: typing.ClassVar[bool] = True  # can it train on frozen integer weights?
    fp16_on_quantized: typing.ClassVar[bool] = True  # can it do so in float16 without overflowing gradients?
    mergeable: typing.ClassVar[bool] = True  # can what it trains be merged into the base's weights?
    saved_as: typing.ClassVar[str] = "adapter"  # the run folder's subfolder: adapter/ or model/

    def resolved(self, family: ModelFamily, layers: int) -> "typing.Self":
        """The method with all settings that depend on the model's family and number of layers filled in.

        Raises ConfigError where a setting does not fit the model.
        """
        return self

    def check_model(self, model: Model, family: ModelFamily | None) -> None:
        """Raise ConfigError where config.json alone tells that the method cannot train this model."""

    def impossible(self, bits: int | None, sharded: bool) -> Iterator[str]:
        """One sentence for each value that excludes a training on a base of so many bits, or with sharded weights."""
        yield from ()

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        """The model with all parameters frozen except those that this method trains, which are float32."""
        raise NotImplementedError

    def learning_rates(self, model: "nn.Module", rate: float) -> "dict[nn.Parameter, float]":
        """The learning rates of the trained parameters that do not have `rate`, the run's."""
        return {}

    def save(self, model: "PreTrainedModel", folder: "Path") -> None:
        """Export the trained parameters in PEFT's or transformers' format."""
        raise NotImplementedError

    def save_trained(self, model: "PreTrainedModel", folder: "Path") -> None:
        """Write the trained parameters into a checkpoint, bit-exact."""
        raise NotImplementedError

    def restore(self, model: "PreTrainedModel", folder: "Path") -> None:
        """Load what `save_trained` or `save` wrote into an attached model, bit-exact."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Metric:
    """Scores of generated answers against their labels; with `without_reasoning` of both without their thoughts."""

    name: str
    without_reasoning: bool = False

    def prepare(self) -> None:
        """Load what the scores need, so that they do not wait for it; may run in a thread of its own."""

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """The scores of one answer, by name; empty for metric=none."""
        raise NotImplementedError

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """The mean over all answers of each score; empty without answers, and for metric=none."""
        return self.mean([self.score(*pair) for pair in zip(predictions, references, strict=True)])

    @staticmethod
    def mean(scores: list[dict[str, float]]) -> dict[str, float]:
        """The mean of each score; empty without any."""
        return {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]} if scores else {}


@dataclass(kw_only=True)
class Generation:
    """How chat and serving decode, with the values of ChatGLM-Efficient-Tuning. Evaluation and prediction are greedy or use beams.

    `engine` generates the answers of trainer=predict; everything else generates with the loaded model. `max_batch_size` is the
    number of answers that evaluation and prediction generate at once: null is as many as fit into memory, 64 at most (128 on a
    GPU), or trainer.per_device_eval_batch_size if that is not at its default.
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
    thinking: AskedThinking = AskedThinking.auto

    @property
    def asks_thinking(self) -> bool | None:
        """Whether thinking is asked for; None for auto: each prompt as it was learned."""
        return None if self.thinking is AskedThinking.auto else self.thinking is AskedThinking.on

    def __post_init__(self) -> None:
        wrong = [
            *range_errors(
                "generation",
                self,
                (
                    ("temperature", self.temperature >= 1e-6, "0.000001 or more (generation=greedy does not sample)"),
                    ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
                    ("top_k", self.top_k >= 0, "0 or more; 0 keeps every token"),
                    ("num_beams", self.num_beams >= 1, "1 or more"),
                    ("max_length", self.max_length >= 2, "2 tokens or more"),
                    ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more, or null"),
                    ("max_batch_size", self.max_batch_size is None or self.max_batch_size >= 1, "1 or more, or null"),
                    ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 changes nothing"),
                ),
            )
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))


@dataclass(kw_only=True)
class Trainer(TrainerArguments):
    """transformers' Seq2SeqTrainingArguments, and the arguments that transformers 5 dropped."""

    overwrite_output_dir: bool = False
    no_cuda: bool = False
    warmup_ratio: float | None = None
    group_by_length: bool = False
    save_safetensors: bool = True
    logging_dir: str | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    async_save: bool = False
    layerwise_lr_decay: float | None = None

    def __post_init__(self) -> None:
        wrong = [*self._wrong_choices(), *self._wrong_types()]
        if wrong := wrong or list(self._wrong_values()):
            raise ConfigError("; ".join(wrong))
        if self.no_cuda:
            self.use_cpu = True
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.warmup_ratio:
            self.warmup_steps = self.warmup_ratio  # transformers 5 reads a warmup_steps below 1 as a share
        if self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            self.torch_compile = True  # as in transformers
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        if self.optim in SHORT_NAMES:
            self.optim = OptimizerNames(SHORT_NAMES[self.optim])

    def _wrong_choices(self) -> Iterator[str]:
        for name, legal in WORDS.items():
            value = getattr(self, name)
            if value is False and "no" in legal:  # YAML's `no`
                value = "no"
                setattr(self, name, value)
            if value not in legal:
                yield f"trainer.{name}={value}{did_you_mean(str(value), legal, 'legal: ' + ', '.join(legal))}"

    def _wrong_types(self) -> Iterator[str]:
        for name, legal_types in UNIONS.items():
            value = getattr(self, name)
            type_name = "null" if value is None else type(value).__name__
            if type_name not in legal_types:
                instead = (REDIRECTED | REFUSED).get(name)
                advice = f"; {instead.replace('{value}', '…')}" if instead else ""
                yield f"trainer.{name}={value}: expected {' or '.join(legal_types) or 'null'}, not {type_name}{advice}"

    def _wrong_values(self) -> Iterator[str]:
        yield from trainer_range_errors(self)
        yield from range_errors(
            "trainer",
            self,
            (
                ("save_safetensors", self.save_safetensors, "always true: glmtuner writes nothing but safetensors"),
                ("logging_dir", self.logging_dir is None, "the run folder holds the logs (tensorboard/); leave it out"),
            ),
        )
        if self.warmup_ratio and self.warmup_steps:
            yield f"trainer.warmup_ratio={self.warmup_ratio} with trainer.warmup_steps={self.warmup_steps:g}: choose one"
