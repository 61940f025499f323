"""Sweeps on a Ray cluster of two nodes on this machine (`make test-ray`): killed, stopped, started again, and equal to an undisturbed one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from glmtuner.run_folder.folder import job_folders

T = TypeVar("T")
ROOT = Path(__file__).parent.parent.parent
STORE = 80 * 2**20
WORDS = [
    "-m", "model=tiny_glm", "tracker=none", "data.max_samples=40", "data.max_target_length=48", "trainer.max_steps=40",
    "trainer.logging_steps=2", "trainer.save_steps=10", "trainer.seed=1,2", "trainer.learning_rate=1e-3",
    "trainer.disable_tqdm=true", "objective=train_loss",
]  # fmt: skip
FOUR, TWO = [*WORDS, "data.dataset=belle_sample,alpaca_zh_sample"], [*WORDS, "data.dataset=belle_sample"]
ONE = [*TWO, "trainer.seed=1"]
RACE = [
    "-m", "hydra/sweeper=race", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=60",
    "data.dev_ratio=0.4", "data.max_target_length=32", "trainer.do_eval=true", "trainer.max_steps=20", "trainer.logging_steps=5",
    "trainer.save_steps=5", "trainer.disable_tqdm=true", "hydra.sweeper.rungs=[4,10]", "trainer.learning_rate=1e-2,1e-6,1e-7",
]  # fmt: skip
ENV = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}, "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


class TwoNodes:
    """A head that runs no job, and two nodes of two cores."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        own = {"object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **own})
        self.with_single = self.add(resources={"single": 1})
        self.nodes = [self.with_single, self.add()]

    def add(self, **more: Any) -> Any:
        return self.cluster.add_node(num_cpus=2, object_store_memory=STORE, **more)

    @property
    def words(self) -> list[str]:
        return ["hydra/launcher=ray", f"hydra.launcher.address={self.cluster.address}", "hydra.launcher.num_cpus=2"]

    def kill(self, node_id: str) -> None:
        """SIGKILL of a node as its machine would die: its raylet and Ray's workers at once; another one comes in its place."""
        (node,) = [node for node in self.nodes if node.node_id == node_id]
        (raylet,) = [info.process for info in node.all_processes["raylet"]]
        doomed = [psutil.Process(raylet.pid), *psutil.Process(raylet.pid).children()]
        for process in doomed:
            process.suspend()
        for process in doomed:
            process.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def restore(self) -> None:
        """Add the nodes that were killed, with what they had; Ray lists a dead one as alive for a while."""
        if self.with_single not in self.nodes:
            self.with_single = self.add(resources={"single": 1})
            self.nodes.append(self.with_single)
        while len(self.nodes) < 2:
            self.nodes.append(self.add())


def nodes_alive(address: str) -> list[dict[str, Any]]:
    ray.init(address=address, log_to_driver=False)
    found = [each for each in ray.nodes() if each["Alive"]]
    ray.shutdown()
    return found


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    made = TwoNodes()
    yield made
    made.cluster.shutdown()


@pytest.fixture
def nodes(two_nodes: TwoNodes) -> TwoNodes:
    two_nodes.restore()
    return two_nodes


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def undisturbed(here: Path) -> Path:
    """The same sweep, one job after another in one process."""
    done = glmtuner(here, *FOUR, "name=undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    return here / "outputs/sweeps/undisturbed"


def glmtuner(here: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "glmtuner", *words]
    return subprocess.run(command, cwd=here, env={**ENV, **env}, capture_output=True, text=True, timeout=300)


class Driver:
    """A sweep's command, while it runs its jobs."""

    def __init__(self, here: Path, *words: str) -> None:
        self.log = here / f"driver_{time.monotonic_ns()}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "glmtuner", *words], cwd=here, env=ENV, stdout=file, stderr=file
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def end(self) -> int:
        return self.process.wait(300)


def wait(condition: Callable[[], T], seconds: float = 200) -> T:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def folders(sweep: Path) -> list[Path]:
    return [folder.path for folder in job_folders(sweep)]


def lines(folder: Path) -> int:
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def begun(sweep: Path, logged: int) -> list[Path]:
    """The jobs that have logged so many lines and are not done."""
    found = folders(sweep) if sweep.is_dir() else []
    return [folder for folder in found if lines(folder) >= logged and not (folder / "metrics.json").exists()]


def place(folder: Path) -> dict[str, Any]:
    return json.loads((folder.parent / ".ray/places" / f"{folder.name}.json").read_text())


def job_processes(here: Path) -> list[psutil.Process]:
    """The processes of jobs that were started in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "glmtuner.cli.worker" in process.cmdline() and process.cwd() == str(here):
                found.append(process)
        except psutil.Error:
            continue
    return found


def same(sweep: Path, undisturbed: Path) -> None:
    """Each job has the history, the weights and the metrics of its twin."""
    twins = {key_of(folder): folder for folder in folders(undisturbed)}
    assert folders(sweep)
    for mine in folders(sweep):
        theirs = twins[key_of(mine)]
        for name in ("history.jsonl", "adapter/adapter_model.safetensors"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), (mine, name)
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (mine, theirs)]
        timeless = [
            {key: value for key, value in found.items() if not re.search("runtime|second|memory", key)}
            for found in metrics
        ]
        assert timeless[0] == timeless[1] and "train_loss" in timeless[0]


def key_of(folder: Path) -> tuple[str, str]:
    """The dataset and the seed of a job."""
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    return re.findall(r"belle_sample|alpaca_zh_sample", config)[0], re.findall(r"^  seed: (\d)", config, re.MULTILINE)[
        0
    ]


def resumed(folder: Path) -> int:
    return len(json.loads((folder / "provenance.json").read_text()).get("resumed") or [])


def test_a_machine_of_no_cluster_has_none_to_find(here: Path) -> None:
    """Before one is started here."""
    done = glmtuner(here, *TWO, "name=auto", "hydra/launcher=ray", "hydra.launcher.address=auto")
    assert (
        done.returncode == 2 and "hydra.launcher.address=auto: no Ray can be used here (ConnectionError" in done.stderr
    )
    assert "leave the address out to start a Ray on this machine" in done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr


# -- what goes well -----------------------------------------------------------------------------------------------------------


def test_four_jobs_on_two_nodes_end_as_in_one_process(here: Path, undisturbed: Path, nodes: TwoNodes) -> None:
    done = glmtuner(here, *FOUR, "name=four", *nodes.words)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = here / "outputs/sweeps/four"
    assert "(4 finished, 0 did not fit into memory, 0 failed)" in done.stdout
    same(sweep, undisturbed)
    assert {place(folder)["node"] for folder in folders(sweep)} == {node.node_id for node in nodes.nodes}
    assert len({place(folder)["pid"] for folder in folders(sweep)}) == 4  # a process each
    assert (sweep / "leaderboard.csv").read_text(encoding="utf-8").count("\n") == 5
    assert not job_processes(here)
    again = glmtuner(here, *FOUR, "name=four", *nodes.words)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 4, again.stdout


def test_a_ray_that_is_started_here_is_quiet_and_leaves_nothing(tmp_path: Path) -> None:
    """Without a cluster: no statistics, no dashboard, no task of others; a typed secret reaches the job, and no file."""
    token = "hf_abcdefghijklmnopqrstuvwxyz"
    driver = Driver(
        tmp_path, *ONE, "hydra/launcher=ray", "name=local", f"trainer.hub_token={token}", "trainer.max_steps=2"
    )
    root = psutil.Process(driver.process.pid)
    (raylet,) = wait(lambda: [each for each in root.children(recursive=True) if each.name() == "raylet"])
    line, environment = " ".join(raylet.cmdline()), raylet.environ()
    (session,) = {Path(found) for found in re.findall(r"--session_dir=(\S+)", line)}
    wait(lambda: list((tmp_path / "outputs/sweeps/local").glob("*/config.yaml")))
    others = root.children(recursive=True)
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0" and environment["RAY_AUTH_MODE"] == "token"
    boards = [command_of(each) for each in others if "dashboard/dashboard.py" in " ".join(command_of(each))]
    assert all("--disable-frontend" in board for board in boards)  # only what would send the statistics
    assert driver.end() == 0, driver.said()
    wait(lambda: not [each for each in others if each.is_running() and each.status() != psutil.STATUS_ZOMBIE], 30)
    assert "(1 finished" in driver.said() and "raylet" not in driver.said()
    written = [path for folder in (tmp_path / "outputs", session) for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in written if path.is_relative_to(session)]) > 3
    assert [path for path in written if token.encode() in path.read_bytes()] == []


OPEN = """
import os, subprocess, sys
from pathlib import Path
from glmtuner.sweep.on_ray import cluster
cluster.connect(None, Path("messages.log"))
import ray
script = f"import ray; ray.init(address='{ray.get_runtime_context().gcs_address}')"
for env in (None, {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}):
    code = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True).returncode
    print("refused" if code else "let in")
cluster.close()
"""


def test_a_ray_that_is_started_here_refuses_others(tmp_path: Path) -> None:
    """It listens on all interfaces, and a task is code: only who has the command's token is let in."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split("\n") == ["let in", "refused", ""], done.stdout + done.stderr


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_race_decides_as_in_one_process(here: Path, nodes: TwoNodes) -> None:
    alone = glmtuner(here, *RACE, "name=race_alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    done = glmtuner(here, *RACE, "name=race_on_ray", *nodes.words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [
        [json.loads(path.read_text()) for path in sorted((here / "outputs/sweeps" / name / "race").glob("rung-*.json"))]
        for name in ("race_alone", "race_on_ray")
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    (winner,) = [folder.path.name for folder in job_folders(here / "outputs/sweeps/race_alone") if folder.is_finished]
    for name in ("history.jsonl", "losses.jsonl", "adapter/adapter_model.safetensors"):
        mine, theirs = (here / "outputs/sweeps" / sweep / winner / name for sweep in ("race_on_ray", "race_alone"))
        assert mine.read_bytes() == theirs.read_bytes(), name


# -- what is killed or stopped ------------------------------------------------------------------------------------------------


def test_a_job_whose_node_is_killed_goes_on_elsewhere(here: Path, undisturbed: Path, nodes: TwoNodes) -> None:
    driver = Driver(here, *TWO, "name=node_killed", *nodes.words)
    sweep = here / "outputs/sweeps/node_killed"
    (victim, *_) = wait(
        lambda: [each for each in begun(sweep, 6) if list(each.glob("checkpoints/checkpoint-10/complete.json"))]
    )
    lost = place(victim)
    nodes.kill(lost["node"])
    assert driver.end() == 0, driver.said()
    same(sweep, undisturbed)
    assert place(victim)["node"] != lost["node"] and resumed(victim) == 1
    assert re.search(rf"{victim.name}: lost with its node .* it starts again from step [1-4]0", driver.said()), (
        driver.said()
    )
    assert "attempt 2" in driver.said()
    assert f"{victim.name} was started again once, after its node on Ray was lost" in (sweep / "report.md").read_text()
    assert "state-dump" not in driver.said()


def test_a_job_whose_node_is_lost_too_often_is_a_failed_one(here: Path, nodes: TwoNodes) -> None:
    words = [*ONE, "name=too_often", "hydra.launcher.max_retries=0", *nodes.words]
    driver = Driver(here, *words)
    sweep = here / "outputs/sweeps/too_often"
    (victim, *_) = wait(lambda: begun(sweep, 6))
    nodes.kill(place(victim)["node"])
    assert driver.end() == 1, driver.said()
    reason = json.loads((victim / "failed.json").read_text())["reason"]
    assert "lost with its node 1 times" in reason and "the same command resumes it from step" in reason
    assert "0 finished" in driver.said() and "1 failed" in driver.said()


def test_a_killed_command_leaves_no_process_and_goes_on(here: Path, undisturbed: Path, nodes: TwoNodes) -> None:
    driver = Driver(here, *TWO, "name=command_killed", *nodes.words)
    sweep = here / "outputs/sweeps/command_killed"
    wait(lambda: len(begun(sweep, 6)) == 2)
    assert len(job_processes(here)) == 2
    driver.process.kill()
    driver.end()
    wait(lambda: not job_processes(here), 60)
    assert not any((folder / "metrics.json").exists() for folder in folders(sweep))
    again = glmtuner(here, *TWO, "name=command_killed", *nodes.words)
    assert again.returncode == 0, again.stdout + again.stderr
    same(sweep, undisturbed)
    assert [resumed(folder) for folder in folders(sweep)] == [1, 1]


def test_ctrl_c_leaves_checkpoints_and_the_same_command_goes_on(here: Path, undisturbed: Path, nodes: TwoNodes) -> None:
    """One job runs, and the other waits in Ray's queue for what a single node has."""
    words = [*TWO, "name=stopped", "+hydra.launcher.resources.single=1", *nodes.words]
    driver = Driver(here, *words)
    sweep = here / "outputs/sweeps/stopped"
    (running,) = wait(lambda: begun(sweep, 1))
    driver.process.send_signal(signal.SIGINT)
    assert driver.end() == 130, driver.said()
    assert "stopped: 1 running jobs save a checkpoint, 1 are not started" in driver.said()
    assert not job_processes(here) and len(folders(sweep)) == 1
    steps = [int(path.parent.name.rpartition("-")[2]) for path in running.glob("checkpoints/*/complete.json")]
    assert f"{running.name}: stopped; the same command resumes it from step {max(steps)}" in driver.said()
    assert not (running / "failed.json").exists() and not (running / "metrics.json").exists()
    again = glmtuner(here, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    same(sweep, undisturbed)
    assert sorted(resumed(folder) for folder in folders(sweep)) == [0, 1]


def test_sigterm_stops_as_ctrl_c_does(here: Path, nodes: TwoNodes) -> None:
    driver = Driver(here, *TWO, "name=terminated", "hydra.launcher.max_parallel=1", *nodes.words)
    sweep = here / "outputs/sweeps/terminated"
    (running,) = wait(lambda: begun(sweep, 1))
    driver.process.terminate()
    assert driver.end() == 143, driver.said()
    assert "stopped by SIGTERM: 1 running jobs save a checkpoint, 1 are not started" in driver.said()
    assert list(running.glob("checkpoints/*/complete.json")) and not job_processes(here)


def test_a_time_limit_is_no_success(here: Path, nodes: TwoNodes) -> None:
    limited = glmtuner(here, *ONE, "name=limited", "hydra.launcher.timeout_min=0.05", *nodes.words)
    assert limited.returncode == 1, limited.stdout
    assert "hydra.launcher.timeout_min=0.05 is reached; the same command resumes it from step 0" in limited.stdout
    assert "glmtuner: 1 of 1 jobs have not begun" in limited.stderr


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_more_than_any_node_has_is_refused_at_once(here: Path, nodes: TwoNodes) -> None:
    for word, said in {
        "hydra.launcher.num_gpus=8": r"hydra.launcher.num_gpus=8: a job asks for more than any node has \(.*: 2 CPU, .*\); type "
        "hydra.launcher.num_gpus=0, or add a node",
        "+hydra.launcher.resources.a100=1": r"hydra.launcher.resources.a100=1: .*leave hydra.launcher.resources.a100 out",
        "hydra.launcher.memory_gb=9000": r"hydra.launcher.memory_gb=9000.0: .*type hydra.launcher.memory_gb=\d",
    }.items():
        start = time.monotonic()
        done = glmtuner(here, *TWO, "name=refused", *nodes.words, word)
        assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
        assert time.monotonic() - start < 60 and "Traceback" not in done.stderr
        assert done.stderr.strip().count("\n") == 0, done.stderr


def test_an_address_where_no_ray_is_fails_within_a_minute_in_one_sentence(here: Path) -> None:
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))  # nobody listens
        addresses = {
            f"127.0.0.1:{closed.getsockname()[1]}": "no connection (connection refused)",
            f"127.0.0.1:{silent.getsockname()[1]}": "nothing answers there within 5 s",
            "no-such-host.invalid:6379": "no connection (",
            "ray://127.0.0.1:10001": "type the command on a node of the cluster",
            "10.0.0.1": "or <host>:<port> of its head",
        }
        for address, said in addresses.items():
            start = time.monotonic()
            done = glmtuner(here, *TWO, "name=typo", "hydra/launcher=ray", f'hydra.launcher.address="{address}"')
            assert done.returncode == 2 and said in done.stderr, done.stderr
            assert f"hydra.launcher.address={address}: " in done.stderr and time.monotonic() - start < 60
            assert done.stderr.strip().count("\n") == 0, done.stderr


def test_the_error_of_a_job_is_that_of_its_run(here: Path, nodes: TwoNodes) -> None:
    (here / "broken.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": 1')
    words = [word for word in ONE if not word.startswith("data.dataset")]
    done = glmtuner(here, *words, "data.dataset=broken.json", "name=fails", *nodes.words)
    assert done.returncode == 1 and "broken.json" in done.stderr and "Traceback" not in done.stderr, done.stderr
    (folder,) = folders(here / "outputs/sweeps/fails")
    assert "broken.json" in json.loads((folder / "failed.json").read_text())["reason"]


def test_a_node_that_does_not_see_the_sweep_is_avoided(here: Path, nodes: TwoNodes) -> None:
    """A node whose mount namespace hides the sweep's folder; its raylet is started as its users would start it."""
    hidden = here / "outputs"
    hidden.mkdir(exist_ok=True)
    can = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(hidden)], capture_output=True, check=False
    )
    if can.returncode:
        pytest.skip(f"no mount namespaces here: {can.stderr.decode()}")
    script = (
        'mount -t tmpfs none "$1" && exec "$2" start --address "$3" --num-cpus 2 --resources \'{"blind": 1}\' --block'
    )
    blind = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", str(hidden), str(Path(sys.executable).parent / "ray"), nodes.cluster.address],
        env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait(lambda: any("blind" in each["Resources"] for each in nodes_alive(nodes.cluster.address)))
        done = glmtuner(here, *ONE, "trainer.max_steps=2", "name=half_blind", *nodes.words)
        assert done.returncode == 0, done.stdout + done.stderr
        said = r"the node \S+ \(\w{8}\) is not used: it does not see the sweep's folder \S+half_blind, which all nodes must share"
        assert len(re.findall(said, done.stdout)) == 1, done.stdout
        none = glmtuner(here, *ONE, "name=all_blind", *nodes.words, "+hydra.launcher.resources.blind=1")
        assert none.returncode == 2 and "no node of the cluster can run the jobs: it does not see" in none.stderr
    finally:
        blind.terminate()
        blind.wait(30)
