"""`python -m glmtuner.cli.talker RUN …`: `serve` for a board, which ends with the board: when its standard input is closed."""

import os
import signal
import sys
import threading

from glmtuner.cli.main import main


def end_with_parent() -> None:
    """End this process once its standard input is at its end."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(main(["serve", *sys.argv[1:]]))
