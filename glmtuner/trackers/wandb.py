"""Weights & Biases."""

import netrc
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from glmtuner.config.schema import Run, Tracker, preset


@preset("tracker", "wandb")
@dataclass(kw_only=True)
class Wandb(Tracker):
    """Online when logged in, offline otherwise; it never asks. One run stays one W&B run when it is resumed."""

    project: str
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None

    def start(self, run: Run, folder: Path) -> list[str]:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        logs = folder / "wandb"
        logs.mkdir(parents=True, exist_ok=True)
        remembered = logs / "run_id.txt"
        run_id = remembered.read_text(encoding="utf-8").strip() if remembered.is_file() else secrets.token_hex(4)
        remembered.write_text(run_id, encoding="utf-8")
        wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            name=run.name or folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")),
            settings=wandb.Settings(silent=True, console="off"),
        )
        return ["wandb"]

    def abandon(self) -> None:
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=1)

    def finish(self, folder: Path) -> str | None:
        import wandb

        if wandb.run is None:
            return None
        files = Path(wandb.run.dir).parent
        closing = f"W&B: offline; send it with `wandb sync {files}`" if wandb.run.offline else f"W&B: {wandb.run.url}"
        wandb.finish()
        return closing


def logged_in() -> bool:
    """Whether a W&B key is at hand, in the environment or in ~/.netrc, without asking W&B."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
