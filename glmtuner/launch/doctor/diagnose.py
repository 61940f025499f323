"""What this machine can do, a finding for each subject, and what to install for what is missing.

Nothing here may stop `doctor`: programs and libraries are asked in processes of their own, with a limit of time, and what goes wrong
is a finding.
"""

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace

from glmtuner.launch.doctor import accelerator, packages, resources, services
from glmtuner.launch.doctor.ask import in_background, one_line
from glmtuner.launch.doctor.findings import PROBLEM, Finding
from glmtuner.run_folder.redaction import redact_text

NEEDED = ("glmtuner", "memory")  # subjects without which no run works


def diagnose() -> list[Finding]:
    """The findings about this machine, in the order in which they are shown."""
    torch = in_background(accelerator.ask_torch)
    driver = in_background(accelerator.ask_driver)
    queue = in_background(services.ask_slurm)
    wandb = in_background(services.ask_wandb)
    hub = in_background(services.check_hub)
    probed = accelerator.probed(torch())
    subjects: list[tuple[str, Callable[[], Finding]]] = [
        ("glmtuner", lambda: packages.check_packages(probed)),
        ("GPU", lambda: accelerator.check_gpus(probed, driver())),
        ("precision", lambda: accelerator.check_precision(probed)),
        ("kernels", lambda: accelerator.check_kernels(probed)),
        ("memory", resources.check_memory),
        ("CPU", lambda: resources.check_cpu(probed)),
        ("SLURM", lambda: services.check_slurm(queue())),
        ("trackers", lambda: services.check_trackers(wandb())),
        ("hub", hub),
        ("extras", packages.check_extras),
    ]
    return [redacted(guarded(subject, check)) for subject, check in subjects]


def guarded(subject: str, check: Callable[[], Finding]) -> Finding:
    """What the check finds; an error of its own is a problem."""
    try:
        return check()
    except Exception as error:
        return Finding(subject, PROBLEM, f"could not be looked at ({one_line(error)})", needed=subject in NEEDED)


def redacted(finding: Finding) -> Finding:
    """The finding without a secret."""
    return replace(finding, text=redact_text(finding.text), fix=redact_text(finding.fix))


def lines(findings: list[Finding]) -> Iterator[str]:
    """A line for each finding: its subject, its state, what was found, and what to type."""
    for each in findings:
        yield f"{each.subject:<10}{each.state:<8} {each.text}{f'; type {each.fix}' if each.fix else ''}"


def wrapped(line: str) -> str:
    """The line, in a terminal broken at its width with the rest below what was found."""
    if not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, 40)
    return textwrap.fill(line, width, subsequent_indent=" " * 19, break_long_words=False, break_on_hyphens=False)
