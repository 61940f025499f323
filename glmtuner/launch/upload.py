"""trainer.push_to_hub: what a run has trained, uploaded to a Hugging Face repository when the run is finished."""

from typing import TYPE_CHECKING

from glmtuner.config.groups import Trainer
from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def create_repository(trainer: Trainer, folder: RunFolder) -> None:
    """Create the repository if it does not exist, private by default; raises ConfigError where the token may not do that."""
    name = repository_of(trainer, folder)
    try:
        api = _api(trainer)
        api.whoami()  # of an existing repository, create_repo accepts any token
        repository = api.create_repo(name, exist_ok=True, private=trainer.hub_private_repo is not False).repo_id
        if trainer.hub_revision is not None:
            api.create_branch(repository, branch=trainer.hub_revision, exist_ok=True)
    except Exception as error:  # no network, no token, no write access, a wrong name
        raise ConfigError(
            f"trainer.push_to_hub=true: the repository {name} cannot be written ({_reason(error)}); type `hf auth login` with a "
            "token that has write access, another trainer.hub_model_id=<organization>/<name>, or leave it out"
        ) from None


def upload(trainer: Trainer, folder: RunFolder, saved_as: str) -> None:
    """Upload the folder of the trained weights; raises ConfigError where that fails. The run itself is complete."""
    name = repository_of(trainer, folder)
    trained = folder / saved_as
    try:
        api = _api(trainer)
        repository = api.create_repo(name, exist_ok=True, private=trainer.hub_private_repo is not False).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=trained,
            revision=trainer.hub_revision,
            ignore_patterns=["README.md"],  # PEFT's empty card, which the hub refuses if the base is a folder
            commit_message=f"glmtuner run {folder.path.name}",
        )
    except Exception as error:
        raise ConfigError(
            f"trainer.push_to_hub=true: the upload failed ({_reason(error)}); the run in {folder.path} is complete. Type "
            f"`hf upload {name} {trained}`"
        ) from None
    say(f"uploaded {trained} to {repository}")


def repository_of(trainer: Trainer, folder: RunFolder) -> str:
    """The name of the repository: trainer.hub_model_id, or that of the run folder."""
    return trainer.hub_model_id or folder.path.resolve().name


def _api(trainer: Trainer) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=trainer.hub_token)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
