"""A run of a sweep: the `abba` command, which is told to stop when the sweep is gone, however it ended."""

import os
import signal
import threading

from abba_cli.cli import main


def _stop_when_alone() -> None:
    """Wait for the end of the pipe that the sweep holds; a killed sweep cannot say so itself."""
    # Not through sys.stdin, whose lock would be held by this thread when the interpreter ends, which it takes for a fatal error.
    if os.read(0, 1) == b"":
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    main()
