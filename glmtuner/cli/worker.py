"""A process that runs jobs of a sweep one after another: `python -m glmtuner.cli.worker`, started by sweep/workers.py and sweep/on_ray.

Each line of standard input is a job, {"arguments": […], "log": "output.log"}; when it has ended, a line with its exit code is
written. Imports, and the base model that the next job shares, stay in memory meanwhile.
"""

import json
import os
import sys
import traceback

from glmtuner.cli import streams
from glmtuner.cli.main import main
from glmtuner.distributed import ranks
from glmtuner.launch.between_jobs import keep_base_models

PARENT = "GLMTUNER_WORKER_PARENT"  # the id of a process that this one must not outlive


def serve() -> None:
    """Run the jobs of standard input until it is closed."""
    if parent := os.environ.pop(PARENT, ""):
        ranks.die_with(int(parent))
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    streams.discard(0)
    streams.discard(1)
    streams.prepare()
    keep_base_models()
    for line in requests:
        job = json.loads(line)
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        try:
            code = main(job["arguments"])
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(f"{code}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
