"""What `doctor` finds about SLURM, trackers and the hub."""

import os
import re
import sys
from typing import Any

from glmtuner.launch.doctor import findings
from glmtuner.launch.doctor.ask import Answer, ask, first_line, one_line, within
from glmtuner.launch.doctor.findings import MISSING, OK, PROBLEM, Finding
from glmtuner.launch.doctor.packages import is_installed
from glmtuner.run_folder.redaction import redact_text

NO_ADDRESS = "it is no address such as https://huggingface.co"
CLIENTS = {"mlflow": "MLflow", "swanlab": "SwanLab", "trackio": "trackio", "comet_ml": "Comet"}  # by modules
WANDB_PROBE = """\
import json, wandb
settings = wandb.setup(wandb.Settings(silent=True)).settings
logged_in = settings.mode not in ("offline", "dryrun", "disabled") and wandb.login(prompt=False, verify=False)
print(json.dumps({"mode": settings.mode, "host": settings.base_url, "logged_in": bool(logged_in)}))
"""


def ask_slurm() -> tuple[Answer, Answer] | None:
    """What `sbatch --version` and squeue answer; None without an sbatch."""
    version = ask(["sbatch", "--version"], findings.PROGRAM_SECONDS)
    if version.problem == "not found":
        return None
    return version, ask(["squeue", "--noheader", "--format=%i", "--states=RUNNING,PENDING"], findings.PROGRAM_SECONDS)


def check_slurm(answers: tuple[Answer, Answer] | None) -> Finding:
    """Whether sweeps can be submitted: hydra/launcher=slurm."""
    if answers is None:
        text = "no sbatch on PATH: sweeps run on this machine alone"
        return Finding(
            "SLURM", MISSING, text, "hydra/launcher=joblib for several jobs at once, or log in to a node with sbatch"
        )
    version, queue = answers
    if problem := version.problem or queue.problem:
        program = "sbatch --version" if version.problem else "squeue"
        return Finding("SLURM", PROBLEM, f"{program}: {problem}", "scontrol ping, or ask who runs the cluster")
    jobs = len(queue.out.split())
    text = f"{first_line(version.out)} answers, {jobs} jobs in the queue"
    return Finding("SLURM", OK, text, facts={"version": first_line(version.out), "jobs": jobs})


def ask_wandb() -> Answer:
    """W&B's mode, its host, and whether a key is stored for it, as one JSON object; W&B's own settings and files decide."""
    return ask([sys.executable, "-c", WANDB_PROBE], findings.PROBE_SECONDS)


def check_trackers(answer: Answer) -> Finding:
    """Whether W&B is installed and a key for it is stored, and which of the other trackers are installed.

    The optional ones that are not are in the line of the extras.
    """
    board = "tensorboard is installed" if is_installed("tensorboard") else "tensorboard is not installed"
    clients = [name for module, name in CLIENTS.items() if is_installed(module)]
    board += f", with the clients of {', '.join(clients)}" if clients else ""
    lacking = [] if is_installed("tensorboard") else ["tensorboard"]
    facts: dict[str, Any] = {"tensorboard": not lacking, "clients": clients}
    if not is_installed("wandb"):
        return Finding(
            "trackers", MISSING, f"wandb is not installed, {board}", f"pip install {' '.join(['wandb', *lacking])}"
        )
    found = answer.last_object()
    if not found:
        fix = "pip install --force-reinstall wandb, or tracker=tensorboard"
        return Finding("trackers", PROBLEM, f"wandb does not load ({answer.reason}), {board}", fix)
    facts |= {"wandb": found}
    mode = found.get("mode")
    if mode in ("offline", "dryrun", "disabled"):
        return Finding("trackers", MISSING if lacking else OK, f"W&B is {mode} (WANDB_MODE), {board}", "", facts=facts)
    if not found.get("logged_in"):
        fix = "wandb login; without an account tracker=none or tracker=tensorboard"
        return Finding(
            "trackers",
            MISSING,
            f"W&B has no key for {found.get('host')}: runs are written offline, {board}",
            fix,
            facts=facts,
        )
    fix = "pip install tensorboard" if lacking else ""
    text = f"W&B has a key for {found.get('host')}, which was not asked about it; {board}"
    return Finding("trackers", MISSING if lacking else OK, text, fix, facts=facts)


def check_hub() -> Finding:
    """Whether the hub answers, whether there is a token for it, or what stands in its place offline."""
    from glmtuner.config.offline import MANIFEST, VARIABLE, offline_folder

    folder = offline_folder()
    token = token_problem = ""
    try:
        token = "a token is stored" if within(findings.PROGRAM_SECONDS, stored_token) else "no token"
    except Exception as error:
        token_problem = f"the token cannot be read ({one_line(error)})"
    facts: dict[str, Any] = {"token": token == "a token is stored"}
    about = token_problem or token
    if folder is not None:
        if not (folder / MANIFEST).is_file():
            fix = f"python -m glmtuner prefetch --folder {folder} and the arguments of a run where there is a network, or unset {VARIABLE}"
            return Finding(
                "hub", PROBLEM, f"{VARIABLE}={folder} has no {MANIFEST}: every run is refused", fix, True, facts
            )
        return Finding("hub", OK, f"offline: {VARIABLE}={folder} is read, and no network is asked", facts=facts)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            "hub", OK, f"offline: HF_HUB_OFFLINE is set, only what is in the cache is found; {about}", facts=facts
        )
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    problem = unreachable(endpoint)
    facts |= {"endpoint": redact_text(endpoint), "reachable": not problem}
    if problem:
        fix = "HF_ENDPOINT=… for a mirror, or python -m glmtuner prefetch --folder FOLDER and the arguments of a run where there is a network"
        state = PROBLEM if problem == NO_ADDRESS else MISSING
        return Finding("hub", state, f"{endpoint} does not answer ({problem}); {about}", fix, facts=facts)
    return Finding(
        "hub",
        PROBLEM if token_problem else OK,
        f"{endpoint} answers; {about}",
        "hf auth login" if token_problem else "",
        facts=facts,
    )


def stored_token() -> bool:
    """Whether huggingface_hub finds a token, in the environment or in its file."""
    from huggingface_hub import get_token

    return bool(get_token())


def unreachable(endpoint: str) -> str:
    """Why an address does not answer within NETWORK_SECONDS; empty if it does, whatever it says."""
    import urllib.error
    import urllib.request
    from base64 import b64encode
    from urllib.parse import unquote

    parts = re.fullmatch(r"(https?://)(?:([^/@]*)@)?([^/\s@]+.*)", endpoint)
    if not parts:
        return NO_ADDRESS
    headers = {"User-Agent": "glmtuner"}
    if parts[2]:
        headers["Authorization"] = f"Basic {b64encode(unquote(parts[2]).encode()).decode()}"

    def head() -> str:
        try:
            request = urllib.request.Request(parts[1] + parts[3], method="HEAD", headers=headers)
            with urllib.request.urlopen(request, timeout=findings.NETWORK_SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            return f"status {error.code}" if error.code == 407 or error.code >= 500 else ""

    try:
        return within(findings.NETWORK_SECONDS + 0.5, head)
    except TimeoutError:
        return f"no answer within {findings.NETWORK_SECONDS:g} s"
    except urllib.error.URLError as error:
        return " ".join(str(error.reason).split())[:200]
    except Exception as error:
        return one_line(error)
