"""Proximal policy optimization."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.compose import run_folder_of
from glmtuner.config.groups import preset
from glmtuner.config.schema import Run, Stage
from glmtuner.data import DatasetSpec
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.objectives.reward_model import head_file
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from glmtuner.data.splits import Datasets
    from glmtuner.objectives.objective import Weights


@preset("stage", "ppo")
@dataclass(kw_only=True)
class Ppo(Stage):
    """The model answers a batch of prompts, `model.reward_model` scores the answers, and the model is moved towards better ones.

    A step is `trainer.per_device_train_batch_size` prompts: answers, scores, then `ppo_epochs` passes of updates over them
    (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593, and Ouyang et al.
    2022, arXiv:2203.02155). The reference is the model as this run starts.

    ppo_epochs: passes over each batch of answers (arXiv:1707.06347, algorithm 1).
    minibatch_size: answers of one optimizer step; null takes the whole batch. Memory is that of so many rows.
    clip_range: how far the probability ratio may move before it no longer counts (arXiv:1707.06347, eq. 7).
    value_clip_range: how far a value may move from its old one (arXiv:1909.08593's code).
    value_coefficient: weight of the value loss (arXiv:1707.06347, eq. 9); the value head shares the policy's layers.
    gamma, gae_lambda: discount, and the trade of variance for bias, of advantages (Schulman et al. 2015, arXiv:1506.02438).
    kl_coefficient: weight of the penalty on log(policy / reference) of every token (arXiv:1909.08593, eq. 2).
    kl_target, kl_horizon: with a target the coefficient adapts, over so many answers, until the mean KL of an answer is the
        target (arXiv:1909.08593, section 2.2); null keeps it fixed.
    score_clip: scores beyond plus or minus this are cut; null cuts none (Huang et al. 2024, arXiv:2403.17031).
    whiten_rewards, whiten_advantages: variance 1, and of advantages mean 0, in each batch (arXiv:1909.08593's code;
        arXiv:2403.17031).
    temperature: of sampling, and of the probabilities that are learned; every token may be drawn (no top-k, no top-p), since
        the ratio is that of whole distributions.
    max_new_tokens: of an answer; null takes data.max_target_length.
    """

    ppo_epochs: int
    clip_range: float
    value_clip_range: float
    value_coefficient: float
    gamma: float
    gae_lambda: float
    kl_coefficient: float
    minibatch_size: int | None = None
    kl_target: float | None = None
    kl_horizon: int = 10000
    score_clip: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    temperature: float = 1.0
    max_new_tokens: int | None = None

    supports_sharding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        wrong = [
            f"stage.{name}={getattr(self, name)}: {legal}"
            for name, fits, legal in (
                ("ppo_epochs", self.ppo_epochs >= 1, "1 or more"),
                ("minibatch_size", (self.minibatch_size or 1) >= 1, "1 or more, or null for the whole batch"),
                ("clip_range", 0 < self.clip_range < 1, "in (0, 1)"),
                ("value_clip_range", self.value_clip_range > 0, "above 0"),
                ("value_coefficient", self.value_coefficient >= 0, "0 or more"),
                ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
                ("gae_lambda", 0 <= self.gae_lambda <= 1, "in [0, 1]"),
                ("kl_coefficient", self.kl_coefficient >= 0, "0 or more"),
                ("kl_target", self.kl_target is None or self.kl_target > 0, "above 0, or null for a fixed coefficient"),
                ("kl_horizon", self.kl_horizon >= 1, "1 answer or more"),
                ("score_clip", self.score_clip is None or self.score_clip > 0, "above 0, or null"),
                ("temperature", self.temperature > 0, "above 0"),
                ("max_new_tokens", (self.max_new_tokens or 1) >= 1, "1 or more, or null"),
            )
            if not fits
        ]
        if self.kl_target is not None and self.kl_coefficient == 0:
            wrong.append(
                "stage.kl_target with stage.kl_coefficient=0: the coefficient is multiplied, so it stays 0; give it a start"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))

    def impossible(self, run: Run) -> Iterator[str]:
        yield from super().impossible(run)
        trainer = run.trainer
        if run.model.reward_model is None:
            yield (
                "stage=ppo without model.reward_model: answers need a score; train a reward model with stage=rm and type "
                "model.reward_model=<its run folder>"
            )
        if not trainer.do_train:
            yield (
                "stage=ppo without training: there is nothing to evaluate that stage=sft does not; type trainer=train, or "
                "trainer=predict with stage=sft"
            )
        if trainer.gradient_accumulation_steps != 1:
            yield (
                f"trainer.gradient_accumulation_steps={trainer.gradient_accumulation_steps} with stage=ppo: a step answers "
                "trainer.per_device_train_batch_size prompts at once and learns them stage.minibatch_size at a time; type "
                "trainer.gradient_accumulation_steps=1"
            )
        if (self.minibatch_size or 1) > trainer.per_device_train_batch_size:
            yield (
                f"stage.minibatch_size={self.minibatch_size} is more than the trainer.per_device_train_batch_size="
                f"{trainer.per_device_train_batch_size} answers of a step"
            )

    def check(self, run: Run) -> None:
        """The reward model is there, and is one of the same base and method."""
        path = str(run.model.reward_model)
        head_file(path, "model.reward_model")
        source = run_folder_of(path)
        if source is None:
            return
        saved = RunFolder(source).config()
        told = f"model.reward_model={path} does not fit this run, whose layers it would share"
        again = "train it on the same base, with the same method (stage=rm with this run's model, finetuning and model.checkpoint_dir)"
        for what, theirs, ours in (
            ("model", saved.model.model_name_or_path, _resolved(run.model.model_name_or_path)),
            ("finetuning", saved.finetuning.finetuning_type, run.finetuning.finetuning_type),
        ):
            if theirs != ours:
                raise CheckpointError(f"{told}: {what} {theirs} there, {ours} here; {again}")

    def datasets(self, run: Run, specs: dict[str, DatasetSpec], template: Any, tokenizer: Any) -> "Datasets":

        from glmtuner.data.prompts import PromptEncoder
        from glmtuner.data.splits import datasets_of

        encoder = PromptEncoder(template=template, tokenizer=tokenizer, every_answer=False, **run.data.lengths())
        return datasets_of(run, specs, encoder)

    def collator(self, **padding: Any) -> Any:
        from glmtuner.data.prompts import PromptCollator

        return PromptCollator(**padding)

    def objective(self, run: Run, model: "nn.Module", template: Any, tokenizer: Any) -> Any:
        from glmtuner.families.stop_tokens import stop_ids
        from glmtuner.objectives.ppo import PpoObjective

        path = str(run.model.reward_model)
        return PpoObjective(
            model,
            self,
            reward=reward_weights(run, model, template, path),
            reward_head=head_file(path, "model.reward_model"),
            max_new_tokens=self.max_new_tokens or run.data.max_target_length,
            stop_ids=stop_ids(template, tokenizer, run.model.family),
            pad_id=tokenizer.pad_token_id,
        )


def _resolved(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def reward_weights(run: Run, model: "nn.Module", template: Any, path: str) -> "Weights":
    """The reward model as values for this run's model; raises CheckpointError where it stands on other weights."""
    from glmtuner.finetuning.start import LORA, adapter_to_resume, checkpoints_of, lineage, lora_settings
    from glmtuner.finetuning.trained import TRAINED
    from glmtuner.objectives.objective import Weights

    source, told = run_folder_of(path), f"model.reward_model={path} does not fit this run, whose layers it would share"
    trained_on = RunFolder(source).config().model.template if source else run.model.template
    if trained_on != run.model.template:
        raise CheckpointError(
            f"{told}: template {trained_on} there, {run.model.template} here; type model.template={trained_on}"
        )
    *below, reward = lineage(path)
    if (reward.folder / TRAINED).is_file():
        raise CheckpointError(
            f"{told}: {reward.folder} holds only what its run changed; name the folder of the finished run, whose model/ is whole"
        )
    own = checkpoints_of(run.model)
    goes_on = adapter_to_resume(own, run.finetuning, run.model.resume_lora_training, trains=True)
    merged = [checkpoint.folder.resolve() for checkpoint in own if checkpoint is not goes_on]
    if run.finetuning.saved_as == "adapter" and [checkpoint.folder.resolve() for checkpoint in below] != merged:
        raise CheckpointError(
            f"{told}: below its adapter it has {_named(below)} merged into the base, and this run has {_named(merged)}; train both "
            "from the same model.checkpoint_dir with the same model.resume_lora_training"
        )
    if reward.kind == LORA:
        theirs = lora_settings(reward.folder)
        different = [
            f"{name} {theirs[name]} there, {ours} here"
            for name in ("lora_rank", "lora_alpha", "lora_target")
            if (ours := _sorted(getattr(run.finetuning, name))) != _sorted(theirs[name])
        ]
        if different:
            raise CheckpointError(f"{told}: {'; '.join(different)}; train it with this run's finetuning values")
    return Weights.saved_in(reward.folder, model, run.finetuning)


def _named(checkpoints: list) -> str:
    return ", ".join(str(getattr(checkpoint, "folder", checkpoint)) for checkpoint in checkpoints) or "nothing"


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
