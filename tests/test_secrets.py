"""Tokens are written nowhere, and nothing is sent anywhere: whole commands, with every file and word that they leave behind."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from models import write_adapter

SECRETS = {
    "HF_TOKEN": "hf_distinctiveSecretOfTheTests",
    "WANDB_API_KEY": "0123456789distinctivekeyofwandb",
    "HTTPS_PROXY": "http://someone:distinctivepassword@127.0.0.1:9",
}
WORDS = ("distinctiveSecret", "distinctivekey", "distinctivepassword")
# Told to Python before anything else: every connection that is tried is written down, and those to other machines fail.
WATCH = """
import os, socket
def watched(before):
    def connect(self, address):
        if self.family != socket.AF_UNIX:
            with open(os.environ["CONNECTIONS"], "a") as stream:
                print(address, file=stream)
            if address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise OSError("the tests have no network")
        return before(self, address)
    return connect
socket.socket.connect, socket.socket.connect_ex = watched(socket.socket.connect), watched(socket.socket.connect_ex)
def lookup(host, *arguments, before=socket.getaddrinfo, **keywords):
    with open(os.environ["CONNECTIONS"], "a") as stream:
        print(f"lookup of {host}", file=stream)
    if host not in ("127.0.0.1", "localhost", "::1", None):
        raise socket.gaierror(socket.EAI_NONAME, "the tests have no network")
    return before(host, *arguments, **keywords)
socket.getaddrinfo = lookup
"""


class Hub(BaseHTTPRequestHandler):
    """Refuses everything, and repeats what it was told in its answer."""

    def answer(self) -> None:
        told = f"Bad credentials: {self.headers['authorization']} at http://someone:{SECRETS['HF_TOKEN']}@hub.test{self.path}"
        body = json.dumps({"error": told}).encode()
        self.send_response(401)
        self.send_header("X-Error-Message", told)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Commands:
    """Runs commands in processes of their own, and keeps all that they say."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.said = folder, ""
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(WATCH)
        self.connections = folder / "connections.txt"
        self.connections.touch()
        own = {"PYTHONPATH": str(folder / "site"), "CONNECTIONS": str(self.connections), "HOME": str(folder / "home")}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and name != "DO_NOT_TRACK"}
        self.environment = {**inherited, "OMP_NUM_THREADS": "1", **own, **SECRETS, **environment}

    def __call__(self, *arguments: object) -> int:
        command = [sys.executable, "-m", "abba_cli", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=300, check=False
        )
        self.said += f"$ {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        return done.returncode

    def leaks(self) -> list[str]:
        """Files with a secret in them, and whether one was said."""
        found = [
            str(file)
            for file in self.folder.rglob("*")
            if file.is_file() and any(one.encode() in file.read_bytes() for one in WORDS)
        ]
        return found + [line for line in self.said.splitlines() if any(one in line for one in WORDS)]


def write_recipe(folder: Path, model: object, rows: Path) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {model}, dtype: float32}}\nadapter: {{r1: 2, r2: 2}}\ndata: {{train: {rows}, template: chat}}\n"
        f"training: {{max_steps: 2, batch_size: 1}}\noutput: {folder}/run\n"
    )
    return recipe


@pytest.fixture
def tasks(tmp_path: Path, rows: Path) -> Path:
    file = tmp_path / "task.yaml"
    file.write_text(
        f"name: sums\ndata: {{path: {rows}, split: train}}\nprompt: '{{{{ question }}}}'\nanswer: '{{{{ answer }}}}'\n"
        "metric: number\nmax_tokens: 4\n"
    )
    return file


@pytest.mark.slow
def test_local_work_tries_no_connection_and_writes_no_secret(tmp_path: Path, tiny_llama: Path, rows: Path, tasks: Path) -> None:
    """With the hub not switched off: what is on the disk needs nobody."""
    abba = Commands(tmp_path, TMPDIR=str(tmp_path))
    recipe = write_recipe(tmp_path, tiny_llama, rows)
    assert abba("train", recipe) == 0, abba.said
    assert abba("eval", "run", "--tasks", tasks, "--limit", 2) == 0, abba.said
    assert abba("merge", "--adapter", "run", "--output", "merged") == 0, abba.said
    assert abba("export", "--adapter", "run", "--format", "lora", "--output", "lora") == 0, abba.said
    assert abba("doctor") == 0, abba.said
    assert abba.connections.read_text() == ""
    assert abba.leaks() == []
    assert len(abba.said) > 1000


def test_the_watch_sees_connections(tmp_path: Path, rows: Path) -> None:
    """The test above would pass on a watch that sees nothing."""
    abba = Commands(tmp_path)
    assert abba("train", write_recipe(tmp_path, "a/b", rows)) == 1
    assert abba.connections.read_text() != ""


@pytest.mark.slow
def test_a_hub_that_refuses_and_repeats_the_token(tmp_path: Path, tiny_llama: Path, rows: Path, tasks: Path, hub: str) -> None:
    abba = Commands(tmp_path, HF_ENDPOINT=hub, HTTPS_PROXY="")
    adapter = write_adapter(tmp_path / "adapter", tiny_llama)
    (adapter / "README.md").write_text("# card\n")
    recipe = write_recipe(tmp_path, tiny_llama, rows)
    for arguments in (
        ("train", recipe, "--set", "model.name=a/b"),
        ("train", recipe, "--set", "data.train.0.path=a/b"),
        ("merge", "--adapter", "a/b"),
        ("export", "--adapter", "a/b", "--format", "lora"),
        ("eval", "--model", "a/b", "--tasks", tasks),
        ("generate", "hello", "--model", "a/b"),
        ("push", adapter, "a/b"),
    ):
        assert abba(*arguments) == 1, abba.said
    assert abba.said.count("\nabba: ") == 7, abba.said
    assert "Traceback" not in abba.said
    assert f"{hub.rpartition('/')[2].partition(':')[0]}" in abba.connections.read_text()
    assert abba.leaks() == []
