"""A hub that goes away while a run trains, from a local server that speaks its protocol: only a fresh start needs it."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Faults
from running import last_step, steps_lost

from abba_cli import RunDir

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECONDS = 240


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[ThreadingHTTPServer]:
    """Has the tiny model as `me/tiny`."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = tiny_llama / self.path.rpartition("/")[2]
            content = file.read_bytes() if file.is_file() and self.path.startswith("/me/tiny/resolve/") else None
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
                content = b""
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.server_close()


@pytest.mark.slow
def test_the_hub_goes_away(recipe: Path, undisturbed: RunDir, hub: ThreadingHTTPServer, faults: Faults, tmp_path: Path) -> None:
    """The plain command, as the server of forks is told to be offline. The next start finds the base in the cache."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "abba_cli", "train", str(recipe), "--set", "model.name=me/tiny"]
    run = RunDir(tmp_path / "run")
    with faults.of("the hub goes away") as tally, (tmp_path / "printed.txt").open("w") as printed:
        first = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
        try:
            wait_for_step(run, 3, first)
            first.send_signal(signal.SIGSTOP)
            hub.shutdown()
            hub.server_close()
            first.send_signal(signal.SIGCONT)
            wait_for_step(run, 14, first)
        finally:
            first.kill()
            first.wait(SECONDS)
        tally.add(steps_lost(run))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        assert "Going on from" in done.stdout
        tally.compare(run, undisturbed)


def wait_for_step(run: RunDir, step: int, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + SECONDS
    while last_step(run) < step:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
