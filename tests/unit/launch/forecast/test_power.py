"""The power of the processor's packages, from counters in a folder like that of the kernel."""

import time

from glmtuner.launch.forecast.power import Power, package_energy


def package(root, name, microjoules):
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "energy_uj").write_text(f"{microjoules}\n")


def test_the_packages_are_added_and_their_parts_are_not(tmp_path):
    package(tmp_path, "intel-rapl:0", 5_000_000)
    package(tmp_path, "intel-rapl:1", 1_500_000)
    package(tmp_path, "intel-rapl:0:0", 9_000_000)  # the cores of package 0
    assert package_energy(tmp_path) == {"intel-rapl:0": 5.0, "intel-rapl:1": 1.5}


def test_watts_are_joules_a_second(tmp_path):
    package(tmp_path, "intel-rapl:0", 1_000_000)
    start = time.monotonic()
    with Power("cpu", rapl=tmp_path) as power:
        package(tmp_path, "intel-rapl:0", 11_000_000)
        time.sleep(0.05)
    assert 0 < power.watts <= 10 / 0.05 and power.watts >= 10 / (time.monotonic() - start)


def test_what_cannot_be_read_is_not_guessed(tmp_path):
    with Power("cpu", rapl=tmp_path) as power:
        pass
    assert power.watts is None
    package(tmp_path, "intel-rapl:0", 9_000_000)
    with Power("cpu", rapl=tmp_path) as power:
        package(tmp_path, "intel-rapl:0", 1_000)  # the counter began again
    assert power.watts is None
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("none")
    assert package_energy(tmp_path) is None
