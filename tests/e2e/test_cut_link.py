"""One run on two hosts, network namespaces with torchrun on each: a rank is killed, the link is cut, and the run goes on to its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from two_hosts import HOSTS, TwoHosts

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=32", "data.max_target_length=32",
    "finetuning.lora_dropout=0", "trainer.learning_rate=1e-3", "trainer.max_steps=60", "trainer.logging_steps=1",
    "trainer.save_steps=5", "trainer.disable_tqdm=true",
]  # fmt: skip
TWO = [
    *WORDS,
    "trainer.per_device_train_batch_size=4",
    "trainer.output_dir=two",
    "parallel=fsdp2",
    "parallel.lost_after=10",
]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    try:
        made = TwoHosts(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}")
    yield made
    made.close()


class Launched:
    """`torchrun --nnodes 2` on both hosts."""

    def __init__(self, here: Path, hosts: TwoHosts) -> None:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
        ]
        torchrun += [f"--rdzv-endpoint={HOSTS['host1']}:29400", "--rdzv-id=cut", "-m", "glmtuner", *TWO]
        self.agents = {
            host: subprocess.Popen(
                hosts.command(host, *torchrun), cwd=here, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for host in HOSTS
        }  # fmt: skip

    def rank(self, host: str) -> int:
        """The process of the host's only rank."""
        agent = self.agents[host].pid
        (child,) = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        return int(child)

    def ended(self) -> tuple[dict[str, int], str]:
        """The exit codes, and what was said on both hosts."""
        said = {host: agent.communicate(timeout=600)[0] for host, agent in self.agents.items()}
        return {host: agent.returncode for host, agent in self.agents.items()}, "".join(said.values())

    def close(self) -> None:
        for host, agent in self.agents.items():
            if agent.poll() is None:
                for process in (self.rank(host), agent.pid):
                    os.kill(process, signal.SIGKILL)
                agent.communicate()


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def history(folder: Path) -> list[dict[str, float]]:
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.heavy
def test_a_killed_rank_and_a_cut_link_end_the_run_which_goes_on_to_the_losses_of_one_process(
    tmp_path: Path, hosts: TwoHosts
) -> None:
    one = [sys.executable, "-m", "glmtuner", *WORDS, "trainer.per_device_train_batch_size=8", "trainer.output_dir=one"]
    alone = subprocess.Popen(one, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "two"
    reason = folder / "failed.json"
    launched = Launched(tmp_path, hosts)
    try:
        wait(lambda: (folder / "checkpoints/checkpoint-5/complete.json").exists())
        first, second = launched.rank("host1"), launched.rank("host2")
        os.kill(second, signal.SIGKILL)
        began = time.monotonic()
        codes, said = launched.ended()
        assert time.monotonic() - began < 60 and codes == {"host1": 1, "host2": 1}, said
        killed = f"rank 1 on host2 (process {second}) has ended without a word: it was killed"
        assert said.count(f"glmtuner: {killed}") == 1 and killed in json.loads(reason.read_text())["reason"], said
        assert "the same command" in said and not re.search("RuntimeError|terminate called", said), said

        launched = Launched(tmp_path, hosts)
        steps = len(history(folder))
        wait(lambda: len(history(folder)) > steps + 2)
        first, second = launched.rank("host1"), launched.rank("host2")
        hosts.set_link("down")
        began = time.monotonic()
        codes, said = launched.ended()
        assert time.monotonic() - began < 60 and codes == {"host1": 1, "host2": -signal.SIGKILL}, said
        cut = "which has had no answer for 10 s"
        assert f"glmtuner: rank 1 on host2 (process {second}) cannot be reached from host1, {cut}" in said, said
        assert f"glmtuner: rank 0 on host1 (process {first}) cannot be reached from host2, {cut}" in said, said
        assert "the network between them is cut" in json.loads(reason.read_text())["reason"]
        assert "Traceback" not in said.partition("torch/distributed/elastic")[0]

        hosts.set_link("up")
        launched = Launched(tmp_path, hosts)
        codes, said = launched.ended()
        assert codes == {"host1": 0, "host2": 0} and said.count("resumed from checkpoint-") == 1, said
    finally:
        launched.close()
        out, _ = alone.communicate(timeout=600)
    assert alone.returncode == 0, out
    mine, theirs = history(folder), history(tmp_path / "one")
    assert len(mine) == len(theirs) == 60
    for line, wanted in zip(mine, theirs, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4, abs=1e-5)
