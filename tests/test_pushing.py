"""Uploads, against a stand-in for the hub's client that keeps what it is given."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from models import write_adapter, write_model

from abba_cli.errors import ModelError
from abba_cli.exporting import export
from abba_cli.merging import merge
from abba_cli.pushing import push

SECRET = "hf_thisisasecretandmustnotbeseen"


class LocalHub:
    """What HfApi does, on a folder: repositories are directories."""

    root: Path
    calls: list[dict[str, Any]]

    def __init__(self, token: str) -> None:
        assert token == SECRET

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool, repo_type: str) -> str:
        assert repo_type == "model"
        folder = self.root / repo_id
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "visibility").write_text("private" if private else "public")
        assert exist_ok
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str) -> None:
        from huggingface_hub.utils import filter_repo_objects

        names = [str(file.relative_to(folder_path)) for file in sorted(folder_path.rglob("*")) if file.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            target = self.root / repo_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder_path / name, target)
        self.calls.append({"message": commit_message})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[LocalHub]:
    LocalHub.root, LocalHub.calls = tmp_path / "hub", []
    monkeypatch.setattr("abba_cli.pushing.HfApi", LocalHub)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return LocalHub


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "adapter", write_model(tmp_path / "base", tiny_llama))
    (folder / "README.md").write_text("# card\n")
    return folder


def test_a_run_goes_up_without_its_checkpoints(adapter: Path, hub: type[LocalHub], tmp_path: Path) -> None:
    (adapter / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (adapter / "checkpoints" / "checkpoint-2" / "optimizer.pt").write_text("large")
    (adapter / "eval" / "harness").mkdir(parents=True)
    for name in ("results.md", "samples.jsonl", "samples.rank1.jsonl", ".lock", "harness/harness-x.0.jsonl"):
        (adapter / "eval" / name).touch()
    (adapter / ".lock").touch()
    assert push(adapter, "someone/thing") == "https://hub.test/someone/thing"
    uploaded = {str(file.relative_to(hub.root / "someone/thing")) for file in hub.root.rglob("*") if file.is_file()}
    assert uploaded == {"visibility", "README.md", "adapter_config.json", "adapter_model.safetensors", "eval/results.md"}
    assert (hub.root / "someone/thing/visibility").read_text() == "private"
    push(adapter, "someone/open", public=True)
    assert (hub.root / "someone/open/visibility").read_text() == "public"


def test_merged_models_and_exports_go_up_with_their_cards(adapter: Path, hub: type[LocalHub]) -> None:
    push(merge([adapter]).path, "someone/merged")
    push(export(adapter, "lora").path, "someone/lora")
    assert json.loads((hub.root / "someone/lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    for name in ("merged", "lora"):
        assert (hub.root / "someone" / name / "README.md").read_text().startswith("---\n")
    assert (hub.root / "someone/merged/model.safetensors").is_file()


def test_what_cannot_be_pushed(adapter: Path, hub: type[LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("noowner", "a/b/c", "a b/c", "/c", "../c"):
        with pytest.raises(ModelError, match="is no name of a repository; expected OWNER/NAME"):
            push(adapter, name)
    with pytest.raises(ModelError, match="there is no directory"):
        push(tmp_path / "nowhere", "a/b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no adapter, model or GGUF to upload; found nothing"):
        push(tmp_path / "empty", "a/b")
    (adapter / "README.md").unlink()
    with pytest.raises(ModelError, match=r"has no README\.md"):
        push(adapter, "a/b")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match="environment variable HF_TOKEN"):
        push(adapter, "a/b")
    assert not hub.calls


def test_a_refusal_is_explained_and_the_token_never_shown(adapter: Path, tmp_path: Path) -> None:
    """The real client, and a server that refuses."""
    seen = []

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": SECRET, "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "abba_cli", "push", str(adapter), "a/b"],
            env={**os.environ, **environment, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert done.returncode == 1
    assert done.stderr.startswith("abba: cannot upload to a/b: the hub refused access (403)")
    assert seen == [f"Bearer {SECRET}"]
    assert SECRET not in done.stdout + done.stderr


def test_the_name_and_the_token_are_checked_before_the_work(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    monkeypatch.delenv("HF_TOKEN", raising=False)
    for command in (["merge"], ["export", "--format", "lora"]):
        done = subprocess.run(
            [sys.executable, "-m", "abba_cli", *command, "--adapter", str(adapter), "--push", "a/b"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("abba: pushing needs a token with write access")
    assert not list(tmp_path.glob("adapter-*"))
