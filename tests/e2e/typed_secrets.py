"""Thirty secrets as a user may type them, and a search for them in every byte of a folder."""

import os
from pathlib import Path

HUB_TOKEN = "hf_TypedHubToken0123456789abcdefGH"
LINES = {  # in shell lines
    "typed-pw-03": "export HF_TOKEN=typed-pw-03",
    "typed-pw-04": "export AWS_SECRET_ACCESS_KEY=typed-pw-04",
    "typed-pw-05": "export WANDB_API_KEY=typed-pw-05",
    "typed-pw-06": "export OPENAI_API_KEY=typed-pw-06",
    "typed-pw-07": "export hf_token=typed-pw-07",
    "typed-pw-08": "export HUGGING_FACE_HUB_TOKEN=typed-pw-08",
    "typed-pw-09": "export GITHUB_TOKEN=typed-pw-09",
    "typed-pw-10": "export MYSQL_PWD=typed-pw-10",
    "typed-pw-11": "export PGPASSWORD=typed-pw-11",
    "typed-pw-12": "wandb login typed-pw-12",
    "typed-pw-13": "huggingface-cli login --token typed-pw-13",
    "typed-pw-14": "sshpass -p typed-pw-14 true",
    "typed-pw-15": "git clone https://me:typed-pw-15@host/x.git",
    "ghp_TypedGithub0123456789abcdefghijkl": "git clone https://ghp_TypedGithub0123456789abcdefghijkl@host/x.git",
    "typed-bearer-16": "curl -H 'Authorization: Bearer typed-bearer-16' host",
    "typed-pw-17": "curl -u me:typed-pw-17 host",
}
SHAPED = [
    "sk-TypedOpenai0123456789abcdefgh", "github_pat_11TYPED0123456789abcdefghij", "glpat-Typed0123456789abcdef", "AKIATYPED0123456789A",
    "xoxb-1234567890-typedabcdef", "AIzaTyped0123456789abcdefghijklmnopqrst", "npm_Typed0123456789abcdefghijklmnopqrst",
    "eyJhbGciOiJIUzI1NiJ9.eyJ0eXBlZCI6MX0.dHlwZWRzaWduYXR1cmU", "gsk_Typed0123456789abcdefgh", "ya29.Typed0123456789abcdef",
    "0123456789abcdef0123456789abcdef.Typed01234567890", "hf_TypedOther0123456789abcdefghijkl",
]  # fmt: skip


def typed_overrides() -> tuple[list[str], list[str]]:
    """Overrides of a sweep with tracker=wandb that hold secrets, and the secrets."""
    overrides = [
        f"trainer.hub_token={HUB_TOKEN}",
        f"tracker.tags=[{','.join(SHAPED)}]",
        "+hydra.job.env_set.MY_SERVICE_TOKEN=typed-env-18",
        "+hydra.job.env_set.OTHER=plain",
        *(f"+hydra.job.env_set.LINE_{number}='{_escaped(line)}'" for number, line in enumerate(LINES.values())),
    ]
    return overrides, [HUB_TOKEN, "typed-env-18", *LINES, *SHAPED]


def _escaped(text: str) -> str:
    return text.replace("'", "\\'")


def leaks(folder: Path, secrets: list[str]) -> dict[str, list[str]]:
    """The secrets that stand in the files of the folder, or in their names; also in UTF-16, and behind JSON's escapes."""
    found: dict[str, list[str]] = {}
    for parent, folders, files in os.walk(folder):  # unlike rglob, it may meet folders that are removed meanwhile
        for name in (*folders, *files):
            path = Path(parent) / name
            try:
                content = path.read_bytes() if name in files and not path.is_symlink() else b""
            except OSError:
                content = b""
            names = [secret for secret in secrets if secret in name]
            names += [
                secret for secret in secrets if secret.encode() in content or secret.encode("utf-16-le") in content
            ]
            if names:
                found[str(path.relative_to(folder))] = names
    return found
