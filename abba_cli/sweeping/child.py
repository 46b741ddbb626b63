"""A run of a sweep: the `abba` command, which is told to stop when the sweep is gone, however it ended."""

import os
import signal
import sys
import threading

from abba_cli.cli import main


def _stop_when_alone() -> None:
    """Wait for the end of the pipe that the sweep holds; a killed sweep cannot say so itself."""
    if sys.stdin.buffer.read() == b"":
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    main()
