"""What `doctor` finds about packages: their versions, whether they can be imported, and extras that are not installed."""

import importlib.util
import re
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import glmtuner
from glmtuner.launch.doctor.ask import one_line
from glmtuner.launch.doctor.findings import MISSING, OK, PROBLEM, Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CHECKOUT = Path(glmtuner.__file__).parent.parent
NEEDED = {  # by every run; the other dependencies are those of trackers, searches, pictures and the server
    "torch", "transformers", "accelerate", "huggingface-hub", "tokenizers", "peft", "datasets", "safetensors", "numpy", "pyarrow",
    "hydra-core", "omegaconf", "pyyaml", "packaging", "filelock", "psutil", "rich", "rapidfuzz",
}  # fmt: skip
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets")
EXTRAS = {"vllm": "generation.engine=vllm", "benchmark": "benchmark=…",
          "dashboard": "scripts/wandb_dashboard.py", "mlflow": "tracker=mlflow", "swanlab": "tracker=swanlab",
          "trackio": "tracker=trackio", "comet": "tracker=comet", "ray": "hydra/launcher=ray"}  # fmt: skip


def requirements() -> list["Requirement"]:
    """What glmtuner declares: by pyproject.toml of its checkout, else by the metadata of its installation; extras are marked."""
    from packaging.requirements import Requirement

    file = CHECKOUT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        lines = list(project["dependencies"])
        for extra, wanted in project["optional-dependencies"].items():
            lines += [f"{line} ; extra == '{extra}'" for line in wanted]
    else:
        lines = metadata.requires("glmtuner") or []
    return [Requirement(line) for line in lines]


def of_extra(requirement: "Requirement") -> str:
    """The extra that the requirement belongs to; empty for one of every installation."""
    found = re.search(r"extra == ['\"]([\w-]+)", str(requirement.marker or ""))
    return found[1] if found else ""


def version_problem(requirement: "Requirement") -> tuple[str, str]:
    """The installed version, and what is wrong with it; both empty where it is not installed."""
    from packaging.version import Version

    try:
        version = str(Version(metadata.version(requirement.name)))
        fits = requirement.specifier.contains(version, prereleases=True)
    except metadata.PackageNotFoundError:
        return "", ""
    except Exception as error:  # whatever a damaged file causes
        return "?", f"{requirement.name}'s metadata is damaged ({one_line(error)})"
    wanted = f"{requirement.name} {version} is not {requirement.specifier}"
    return version, "" if fits else wanted


def check_packages(probed: Mapping[str, Any]) -> Finding:
    """glmtuner itself, the versions of what it declares, and whether what every run imports can be imported."""
    wrong: list[str] = []
    install: list[str] = []
    versions: dict[str, str] = {}
    needed = False
    declared = [each for each in requirements() if not of_extra(each)]
    for requirement in declared:
        version, problem = version_problem(requirement)
        versions[requirement.name] = version
        if version and not problem:
            continue
        wrong.append(problem or f"{requirement.name} is not installed")
        install.append(f"{requirement.name}{requirement.specifier}")
        needed |= plain_name(requirement.name) in NEEDED
    broken = [f"{name} fails ({error})" for name, error in probed.items() if name.startswith("import ") and error]
    if "torch" not in probed:
        broken.insert(0, f"import torch fails ({probed.get('error in build') or probed['problem']})")
    elif "complete" not in probed and probed.get("problem"):
        broken.append(f"the libraries do not load together ({probed['problem']})")
    shown = ", ".join(f"{name} {probed.get(name) or versions.get(name) or 'missing'}" for name in SHOWN)
    about = f"glmtuner {glmtuner.__version__} in {CHECKOUT}, Python {sys.version.split()[0]}; {shown}"
    facts = {"versions": versions, "python": sys.version.split()[0], "glmtuner": glmtuner.__version__}
    if wrong or broken:
        again = [f"'{each}'" for each in dict.fromkeys(install)]
        fix = f"pip install --upgrade {' '.join(again)}" if again else reinstall(broken)
        return Finding(
            "glmtuner", PROBLEM, f"{about}; {'; '.join([*broken, *wrong])}", fix, needed or bool(broken), facts
        )
    return Finding("glmtuner", OK, f"{about}; all {len(declared)} packages are as declared", "", True, facts)


def reinstall(broken: list[str]) -> str:
    """The command that installs the packages again whose imports fail."""
    names = [line.split()[1].partition(".")[0] for line in broken if line.startswith("import ")]
    distributions = {"hydra": "hydra-core"}
    return f"pip install --force-reinstall {' '.join(distributions.get(name, name) for name in names)}" if names else ""


def plain_name(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_installed(module: str) -> bool:
    """Whether the module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def extra_command(*extras: str) -> str:
    """What to type to install extras of glmtuner: from its checkout, if it runs from one."""
    names = ",".join(extras)
    if (CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e '{CHECKOUT}[{names}]'"
    return f"pip install 'glmtuner[{names}]'"


def check_extras() -> Finding:
    """The packages that single presets need."""
    from glmtuner.config.optimizers import PACKAGES

    declared = [(of_extra(each), each) for each in requirements()]
    here, absent, wrong = [], [], []
    for extra, purpose in EXTRAS.items():
        for requirement in (each for name, each in declared if name == extra):
            version, problem = version_problem(requirement)
            wrong += [problem] if problem else []
            if version:
                here.append(f"{requirement.name} {version}")
            else:
                absent.append((extra, f"{requirement.name} ({purpose})"))
    optimizers = {
        how.removeprefix("pip install "): module for module, how in PACKAGES.values() if how.startswith("pip ")
    }
    optimizers = {
        package: module for package, module in optimizers.items() if package not in ("torch-xla", "torch-npu")
    }
    lacking = [package for package, module in optimizers.items() if not is_installed(module)]
    parts = [f"installed: {', '.join(here)}"] if here else []
    parts += [f"not installed: {', '.join(text for _, text in absent)}"] if absent else []
    parts += [f"packages of single optimizers not installed: {' '.join(lacking)}"] if lacking else []
    parts += [*wrong, "ModelScope needs none"]
    commands = [extra_command(*dict.fromkeys(extra for extra, _ in absent))] if absent else []
    commands += [f"pip install {lacking[0]} for {optimizer_of(lacking[0])}, and so on"] if lacking else []
    facts = {"installed": here, "missing": [extra for extra, _ in absent], "optimizers": lacking}
    state = PROBLEM if wrong else MISSING if absent or lacking else OK
    if wrong and not absent:
        commands.insert(0, extra_command(*EXTRAS))
    return Finding("extras", state, "; ".join(parts), ", or ".join(commands), facts=facts)


def optimizer_of(package: str) -> str:
    """The first value of trainer.optim that needs the package."""
    from glmtuner.config.optimizers import PACKAGES

    return "trainer.optim=" + next(name for name, (_, how) in PACKAGES.items() if how == f"pip install {package}")
