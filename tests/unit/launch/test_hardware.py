"""What provenance.json says of the machine and of glmtuner's own code."""

import json
import subprocess
from importlib import metadata

import pytest
import torch

from glmtuner.launch.hardware import cpu_name, hardware, with_earlier
from glmtuner.run_folder import provenance as written
from glmtuner.run_folder.provenance import installed_commit, wrong_values


def test_a_cpu_is_named_with_its_cores_and_threads():
    found = hardware(torch.device("cpu"), 2)
    assert (
        found["device"] == "cpu"
        and found["processes"] == 2
        and found["memory_gib"] is None
        and found["name"] == found["cpu"]
    )
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    json.dumps(found)


def test_a_gpu_is_named_with_its_memory(monkeypatch):
    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = hardware(torch.device("cuda", 0), 8)
    assert (found["device"], found["name"], found["memory_gib"], found["processes"]) == ("cuda", "NVIDIA H100", 80.0, 8)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel\t\t: 25\nmodel name\t: AMD EPYC 9B14 \nflags : x\n", "AMD EPYC 9B14"),
        ("processor\t: 0\nBogoMIPS\t: 48\n\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 5\n", "BCM2835"),
    ],
)
def test_the_processor_of_linux(text, name, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_name(tmp_path / "cpuinfo") == name


def test_a_processor_that_the_system_does_not_name(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.processor", lambda: "")
    assert cpu_name(tmp_path / "none") is None
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert cpu_name(tmp_path / "none") == "arm"


def test_a_resumed_run_has_the_machines_of_all_its_attempts():
    one, other = {"name": "A100"}, {"name": "H100"}
    assert with_earlier(one, {}) == [one] and with_earlier(one, {"hardware": [one]}) == [one]
    assert with_earlier(other, {"hardware": [one, other]}) == [one, other]
    assert with_earlier(one, {"hardware": [one, other]}) == [other, one], "the last one computed last"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """glmtuner as if it were imported from a folder outside of any repository."""
    folder = tmp_path / "site/glmtuner"
    (folder / "run_folder").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(written, "__file__", str(folder / "run_folder/provenance.py"))
    return folder


def git(folder, *words):
    done = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x", *words],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_the_commit_of_the_checkout_that_is_imported(package):
    git(package, "init", "-q")
    git(package, "add", ".")
    git(package, "commit", "-qm", "x")
    commit = git(package, "rev-parse", "HEAD")
    assert installed_commit() == commit
    (package / "__init__.py").write_text("a = 1\n")
    assert installed_commit() == f"{commit}-dirty"


@pytest.mark.parametrize(
    ("origin", "commit"),
    [
        ('{"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}', "abc123"),
        ('{"url": "file:///x", "dir_info": {"editable": true}}', None),
        ("{", None), ("[]", None), (None, None), ('{"vcs_info": {"commit_id": 7}}', None),
    ],
)  # fmt: skip
def test_the_commit_that_pip_installed(package, monkeypatch, origin, commit):
    class Installed:
        def read_text(self, name):
            return origin if name == "direct_url.json" else None

    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    git(package.parent, "init", "-q")  # the user's repository around an environment that it ignores
    assert installed_commit() == commit


@pytest.mark.parametrize("wrong", [{"hardware": {}}, {"hardware": [1]}, {"glmtuner_commit": 7}])
def test_damaged_entries_are_found(wrong):
    assert wrong_values(wrong)
    assert not wrong_values({"hardware": [{"name": "x"}], "glmtuner_commit": None})
