"""A rank that runs several commands in one process group: `python -m gpu_parts.rank FILE`, which holds a JSON list of them.

The first that fails ends it: the ranks are out of step then.
"""

import json
import sys
from pathlib import Path

from glmtuner.cli.main import main
from glmtuner.distributed import ranks


def run_commands(listed: Path) -> int:
    """Run the commands of the file; returns the exit code of the first that fails, or 0."""
    leave, ranks.destroy_process_group = ranks.destroy_process_group, lambda: None
    for words in json.loads(listed.read_text(encoding="utf-8")):
        if code := main(words):
            return code
    leave()
    return 0


if __name__ == "__main__":
    with ranks.Leaving():
        sys.exit(run_commands(Path(sys.argv[1])))
