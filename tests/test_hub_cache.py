"""Bases and adapters by their hub ids, from a cache in the hub's own layout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import write_adapter, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(cache: Path, name: str, folder: Path) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def cache(tiny_llama: Path, tmp_path: Path) -> Path:
    base = write_model(tmp_path / "base", tiny_llama, max_shard_size="1MB")
    # As in some repositories: the same weights once more, which nobody needs to download.
    (base / "consolidated.safetensors").write_bytes(b"not read")
    adapter = write_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/tiny"}))
    put_into_cache(tmp_path / "cache", "me/tiny", base)
    put_into_cache(tmp_path / "cache", "me/adapter", adapter)
    shutil.rmtree(base)
    return tmp_path / "cache"


def merge(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "abba_cli", "merge", "--adapter", "me/adapter", *arguments]
    return subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True)


def test_adapter_and_base_by_their_hub_ids(cache: Path, tmp_path: Path) -> None:
    done = merge(cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoint in adapter-merged\n" in done.stdout
    assert "100% of the next tokens agree" in done.stdout
    merged = tmp_path / "adapter-merged"
    assert not (merged / "consolidated.safetensors").exists()
    assert "base_model: me/tiny\n" in (merged / "README.md").read_text()


def test_another_revision_needs_force_and_has_to_be_there(cache: Path) -> None:
    done = merge(cache, "--revision", "v2")
    assert done.returncode == 1
    assert done.stderr.startswith("abba: the adapter was trained on me/tiny, not on revision v2")
    done = merge(cache, "--revision", "v2", "--force")
    assert done.returncode == 1
    assert done.stderr.startswith("abba: cannot load model me/tiny: the hub cannot be reached and it is not in the local cache")
