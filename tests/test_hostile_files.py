"""Files made to do harm: pickles with code in them are never run, and names and links that lead out of a folder are refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_adapter, write_model

from abba_cli.bases import Base
from abba_cli.checkpoint import read_checkpoint
from abba_cli.errors import ModelError
from abba_cli.loading import load_config
from abba_cli.pushing import push
from abba_cli.recipe import ModelSection
from abba_cli.sealing import is_complete, seal_checkpoint

Abba = Callable[..., tuple[int, str, str]]
STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a pickle that is run would make; checked to work."""
    mark = tmp_path / "run by a pickle"
    pickle.loads(pickle.dumps(Harm(mark)))
    mark.rmdir()
    return mark


def write_harm(file: Path, mark: Path, zipped: bool) -> None:
    if zipped:
        torch.save({"state": Harm(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Harm(mark)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")  # torch's own word of doubt
def test_states_of_a_checkpoint(abba: Abba, recipe_file: Callable[..., Path], mark: Path, zipped: bool) -> None:
    """The manifest is written anew, as whoever can write into a run can do."""
    recipe = recipe_file(checkpoints="{every_steps: 1, keep: 1}")
    assert abba("train", recipe, "--set", "training.max_steps=1")[0] == 0
    run = mark.parent / "run"
    shutil.copytree(run, mark.parent / "good")
    for name in STATES:
        shutil.rmtree(run)
        shutil.copytree(mark.parent / "good", run)
        [checkpoint] = (run / "checkpoints").iterdir()
        assert (checkpoint / name).is_file()
        write_harm(checkpoint / name, mark, zipped)
        seal_checkpoint(checkpoint)
        assert is_complete(checkpoint)
        code, _, message = abba("train", recipe, "--set", "training.max_steps=2")
        assert not mark.exists(), name
        assert code == (0 if name == "training_args.bin" else 1), (name, message)  # the last is never read
        assert code == 0 or "holds a state that is more than numbers" in message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_pickled_adapters_and_data(abba: Abba, tiny_llama: Path, mark: Path, zipped: bool) -> None:
    folder = mark.parent / "foreign"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"alpha1": 1, "alpha2": 1}))
    write_harm(folder / "adapter_model.bin", mark, zipped)
    code, _, message = abba("import", folder, "--base", tiny_llama, "--output", mark.parent / "out")
    assert (code, mark.exists()) == (1, False)
    assert "could run code, so it is not read" in message
    code, _, message = abba("merge", "--adapter", folder)
    assert (code, mark.exists()) == (1, False)
    for name in ("rows.pt", "rows.pkl", "rows.bin"):
        write_harm(mark.parent / name, mark, zipped)
        recipe = mark.parent / "recipe.yaml"
        recipe.write_text(f"model: {{name: {tiny_llama}}}\ndata: {{train: ./{name}, template: chat}}\noutput: {mark.parent}/o\n")
        assert abba("train", recipe, "--dry-run")[0] == 1
        assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_base(abba: Abba, tiny_llama: Path, mark: Path, zipped: bool) -> None:
    base = write_model(mark.parent / "base", tiny_llama)
    adapter = write_adapter(mark.parent / "adapter", base)
    (base / "model.safetensors").unlink()
    write_harm(base / "pytorch_model.bin", mark, zipped)
    for command in (["merge"], ["generate", "hello"]):
        code, _, message = abba(*command, "--adapter", adapter)
        assert (code, mark.exists()) == (1, False)
        assert "safetensors" in message


def test_a_base_with_code_is_not_run_unasked(abba: Abba, tiny_llama: Path, mark: Path) -> None:
    base = write_model(mark.parent / "base", tiny_llama)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    recipe = mark.parent / "recipe.yaml"
    recipe.write_text(f"model: {{name: {base}}}\ndata: {{train: rows.jsonl, template: chat}}\noutput: {mark.parent}/o\n")
    code, _, message = abba("train", recipe, "--dry-run")
    assert (code, mark.exists()) == (1, False)
    assert "code that its repository brings along, which is not run unasked" in message


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", tiny_llama, max_shard_size="2MB")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "", 7])
def test_a_shard_index_that_leads_out(base: Path, abba: Abba, tmp_path: Path, name: object) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    shutil.copyfile(next(base.glob("*.safetensors")), tmp_path / "outside.safetensors")
    index = base / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"][next(iter(tree["weight_map"]))] = name
    index.write_text(json.dumps(tree))
    code, _, message = abba("merge", "--adapter", adapter, "--output", tmp_path / "sub" / "out")
    assert code == 1
    assert f"{index} names the file {str(name)!r}; expected the bare names of .safetensors files beside it" in message
    assert not (tmp_path / "sub").exists()


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"hidden_size": 10**12}),
        ("qwen3", {"text_config": {"num_experts": 10**6}}),  # has a list with an entry for each layer
        ("gpt2", {"n_layer": 5000}),
        ("gpt2", {"n_embd": 10**8}),
    ],
)
def test_a_model_larger_than_any(architecture: str, keys: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    """Its modules would be built one by one, for hours."""
    folder = write_model(tmp_path / "base", tiny_llama, architecture)
    config = json.loads((folder / "config.json").read_text())
    load_config(Base(str(folder)), ModelSection(name="base"))
    (folder / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ModelError, match=r"config.json has \w+: 1?5?[,0]+, and no model has more than 4,0"):
        load_config(Base(str(folder)), ModelSection(name="base"))


def test_a_tensor_larger_than_its_bytes(base: Path) -> None:
    """Or reading it would ask for all memory first."""
    file = next(base.glob("*.safetensors"))
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header[name]["shape"] = [10**9, 10**6]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ModelError, match=r"is broken: .* of shape \[1000000000, 1000000\] has"):
        read_checkpoint(base)


def test_links_that_lead_out_are_not_copied(base: Path, abba: Abba, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    (tmp_path / "secret").write_text("hf_secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    code, _, message = abba("merge", "--adapter", adapter, "--output", tmp_path / "out", "--no-verify")
    assert code == 1
    assert f"{base}/notes.txt is a link to {tmp_path}/secret, outside of the model's folder" in message
    assert not (tmp_path / "out").exists()
    (base / "notes.txt").unlink()
    (base / "notes.txt").symlink_to("config.json")  # one that stays inside is a file like any other
    assert abba("merge", "--adapter", adapter, "--output", tmp_path / "out", "--no-verify")[0] == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == (base / "config.json").read_text()


def test_links_that_lead_out_are_not_uploaded(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    adapter = write_adapter(tmp_path / "adapter", tiny_llama)
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("hf_secret")
    with pytest.raises(ModelError, match=r"README\.md is a link to .*secret, which is not uploaded with it"):
        push(adapter, "a/b")


@pytest.mark.parametrize("name", ["/dev/zero", "../../../outside", "link"])
def test_a_manifest_that_leads_out(tmp_path: Path, name: str) -> None:
    """Reading /dev/zero for its checksum would never end."""
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state").write_text("x")
    seal_checkpoint(checkpoint)
    assert is_complete(checkpoint)
    (checkpoint / "link").symlink_to("/dev/zero")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {name: "0" * 64}))
    assert not is_complete(checkpoint)
