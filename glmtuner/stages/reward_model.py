"""The reward model of a run that scores answers on the policy's own layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import run_folder_of
from glmtuner.config.schema import Run
from glmtuner.errors import CheckpointError
from glmtuner.objectives.reward_model import head_file
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Weights


def check_reward_model(run: Run) -> None:
    """Raise CheckpointError where the reward model is not found, or has another base or method than this run."""
    path = str(run.model.reward_model)
    head_file(path, "model.reward_model")
    source = run_folder_of(path)
    if source is None:
        return
    saved = RunFolder(source).config(complete=True)
    for key, reward_value, value in (
        ("model.model_name_or_path", saved.model.model_name_or_path, _resolved(run.model.model_name_or_path)),
        ("finetuning", saved.finetuning.finetuning_type, run.finetuning.finetuning_type),
    ):
        if reward_value != value:
            raise CheckpointError(
                f"model.reward_model={path} does not fit this run, whose layers it shares: {key} is {reward_value} in the "
                f"reward model's run, {value} in this one; train it with stage=rm and this run's model, finetuning and "
                "model.checkpoint_dir"
            )


def _resolved(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def reward_weights(context: "RunContext", path: str) -> "Weights":
    """The reward model as parameter values for this run's model; raises CheckpointError where the weights below them differ."""
    from glmtuner.finetuning.adapter import further_settings, lora_settings, read_lora_config
    from glmtuner.finetuning.start import LORA, adapter_to_resume, checkpoints_of, lineage
    from glmtuner.finetuning.trained import holds_trained
    from glmtuner.objectives.objective import Weights

    source = run_folder_of(path)
    misfit = f"model.reward_model={path} does not fit this run, whose layers it shares"
    reward_template = RunFolder(source).config(complete=True).model.template if source else context.template_name
    if reward_template != context.template_name:
        raise CheckpointError(
            f"{misfit}: model.template is {reward_template} in the reward model's run, {context.template_name} in this one; type "
            f"model.template={reward_template}"
        )
    *below, reward = lineage(path)
    if holds_trained(reward.folder):
        raise CheckpointError(
            f"{misfit}: {reward.folder} holds only the parameters that its run trained; name the folder of the finished run, whose "
            "model/ is complete"
        )
    own = checkpoints_of(context.run.model)
    resumed = adapter_to_resume(own, context.finetuning, context.run.model.resume_lora_training, trains=True)
    merged = [checkpoint.folder.resolve() for checkpoint in own if checkpoint is not resumed]
    if context.finetuning.saved_as == "adapter" and [checkpoint.folder.resolve() for checkpoint in below] != merged:
        raise CheckpointError(
            f"{misfit}: the checkpoints merged into the base are {_folder_names(below)} for its adapter, {_folder_names(merged)} in "
            "this run; train both from the same model.checkpoint_dir with the same model.resume_lora_training"
        )
    if reward.kind == LORA:
        saved_settings = lora_settings(reward.folder)
        different = [
            f"finetuning.{name} is {saved_settings[name]} in the reward model's run, {current} in this one"
            for name in ("lora_rank", "lora_alpha", "lora_target")
            if (current := _sorted(getattr(context.finetuning, name))) != _sorted(saved_settings[name])
        ]
        further = further_settings(read_lora_config(reward.folder))
        own_further = further_settings(getattr(context.finetuning, "saved", {}))
        different += [
            f"{name} is {further.get(name)} in the reward model's adapter_config.json, {own_further.get(name)} in this run's"
            for name in sorted(further.keys() | own_further.keys())
            if further.get(name) != own_further.get(name)
        ]
        if different:
            raise CheckpointError(f"{misfit}: {'; '.join(different)}; train it with this run's finetuning values")
    return Weights.from_checkpoint(reward.folder, context.model, context.finetuning)


def _folder_names(checkpoints: list) -> str:
    return ", ".join(str(getattr(checkpoint, "folder", checkpoint)) for checkpoint in checkpoints) or "none"


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
