"""What the hub answers, from a real local server that speaks its protocol, becomes one line that says what to do."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# What the hub sends: https://huggingface.co/docs/hub/models-gated and huggingface_hub's `hf_raise_for_status`.
ANSWERS = {
    "me/gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model me/gated is restricted."}),
    "me/waiting": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Your request is awaiting review."}),
    "me/nothing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "me/branchless": (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: v9"}),
    "me/broken": (500, {}),
}
WANTED = {
    "me/gated": "it is gated; ask for access on https://huggingface.co/me/gated, then run `hf auth login`",
    "me/waiting": "it is gated; ask for access on https://huggingface.co/me/waiting, then run `hf auth login`",
    "me/nothing": "there is no such repository, or it is private: check the name on https://huggingface.co/me/nothing",
    "me/branchless": "the repository has no such file or revision",
    "me/broken": "the hub answered with status 500",
}
SCRIPT = """
import json, sys
from abba_cli.bases import find_base
from abba_cli.errors import ModelError
from abba_cli.loading import load_config
from abba_cli.recipe import ModelSection
for name in sys.argv[1:]:
    section = ModelSection(name=name)
    try:
        load_config(find_base(section), section)
    except ModelError as error:
        print(json.dumps([name, str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        status, headers = ANSWERS[name]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache: Path = tmp_path_factory.mktemp("hub")
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_verysecret",
        "PATH": "/usr/bin:/bin",
        "HOME": str(cache),
    }
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *ANSWERS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    server.shutdown()
    server.server_close()
    assert "hf_verysecret" not in done.stdout + done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", ANSWERS)
def test_message(messages: dict[str, str], name: str) -> None:
    assert messages[name].startswith(f"cannot load model {name}: {WANTED[name]}")
    assert "\n" not in messages[name]
