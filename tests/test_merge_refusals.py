"""What `abba merge` refuses, in one clear line, and what it leaves behind when it is stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import OUTCOME, write_adapter, write_model
from safetensors.torch import load_file, save_file

from abba_cli.errors import ModelError, RunError
from abba_cli.exporting import export
from abba_cli.merge.plan import plan_merge
from abba_cli.merge.verifying import verify_merge
from abba_cli.merging import default_output, merge
from abba_cli.saved_adapter import find_adapter


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", tiny_llama)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def change(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_no_adapter_there(tmp_path: Path, base: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"there is no adapter in .*empty: expected adapter_config.json.*found nothing"):
        merge([tmp_path / "empty"])
    with pytest.raises(ModelError, match=r"there is no directory ./nowhere; expected a run, an adapter"):
        merge(["./nowhere"])
    with pytest.raises(ModelError, match="is a file; expected the directory"):
        merge([base / "config.json"])
    with pytest.raises(ModelError, match="cannot load adapter someone/adapter: the hub cannot be reached"):
        merge(["someone/adapter"])


def test_half_an_adapter(adapter: Path) -> None:
    (adapter / "adapter_config.json").rename(adapter / "kept")
    with pytest.raises(ModelError, match=r"half an adapter: adapter_model.safetensors is there, adapter_config.json is missing"):
        merge([adapter])
    (adapter / "kept").rename(adapter / "adapter_config.json")
    name = "base_model.model.model.layers.0.mlp.up_proj.abba_A2"
    change(adapter, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(ModelError, match=r"half an adapter: model.layers.0.mlp.up_proj.abba_A2 is missing"):
        merge([adapter])


def test_whole_layers_are_missed_too(adapter: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
            del tensors[name]

    change(adapter, drop)
    with pytest.raises(ModelError, match=r"half an adapter: model.layers.1.self_attn.q_proj.abba_A1, .* missing for"):
        merge([adapter])


def test_a_file_cut_short(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot read .*adapter_model.safetensors.*cut short"):
        merge([adapter])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_no_numbers(value: float, adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.abba_B1"
    change(adapter, lambda tensors: tensors[name].__setitem__((0, 0), value))
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.abba_B1 holds NaN or infinity"):
        merge([adapter])
    assert not (tmp_path / "adapter-merged").exists()


def test_ranks_that_the_configuration_does_not_have(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r1": 4}))
    with pytest.raises(ModelError, match=r"abba_B1 is 32 x 3, expected 32 x 4 from the ranks 4 and 2"):
        merge([adapter])


def test_another_method(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "VERA"}))
    with pytest.raises(ModelError, match="holds a VERA adapter; expected an ABBA one"):
        merge([adapter])


def test_a_pickled_adapter_is_pointed_to_import(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickled adapter.*abba import"):
        merge([adapter])


def test_a_base_of_another_architecture(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "gpt2", tiny_llama, "gpt2")
    with pytest.raises(ModelError, match=r"was trained on .*base, not on .*gpt2; leave --base out, or give --force"):
        merge([adapter], base=str(other))
    with pytest.raises(ModelError, match=r"does not fit .*gpt2 \(GPT2\)"):
        merge([adapter], base=str(other), force=True)


def test_a_base_of_other_shapes(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "wide", tiny_llama, intermediate_size=80)
    with pytest.raises(ModelError, match=r"mlp.gate_proj is 80 x 32 there, the adapter is for 72 x 32"):
        merge([adapter], base=str(other), force=True)
    deep = write_model(tmp_path / "deep", tiny_llama, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"the base has no model.layers.1"):
        merge([adapter], base=str(deep), force=True)


def test_a_copy_of_the_base_needs_force(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(ModelError, match="give --force if the weights are the same"):
        merge([adapter], base=str(copy))
    assert merge([adapter], base=str(copy), force=True).verification
    (tmp_path / "link").symlink_to(base)
    merge([adapter], base=str(tmp_path / "link"), overwrite=True)  # the same folder by another name


def test_a_recorded_base_that_is_gone(adapter: Path, base: Path) -> None:
    base.rename(base.with_name("moved"))
    with pytest.raises(ModelError, match=r"the recorded base .*base is not there any more; name it with --base and --force"):
        merge([adapter])


def test_another_revision(adapter: Path) -> None:
    with pytest.raises(ModelError, match="not on revision v2"):
        merge([adapter], revision="v2")


def test_adapters_of_different_bases(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", write_model(tmp_path / "other-base", tiny_llama))
    with pytest.raises(ModelError, match="the adapters have different bases"):
        merge([adapter, other])
    with pytest.raises(ModelError, match="2 adapters and 1 weights were given"):
        merge([adapter, adapter], weights=[1.0])


def test_a_quantised_checkpoint(adapter: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is stored quantised"):
        merge([adapter])


def test_pickled_or_missing_weights(adapter: Path, base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model.safetensors; expected a model with safetensors weights, found"):
        merge([adapter])


def test_a_broken_shard(adapter: Path, base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is cut short"):
        merge([adapter])


def test_the_dequantised_base_of_a_run_that_had_none(adapter: Path) -> None:
    with pytest.raises(ModelError, match="was not trained on a quantised base"):
        merge([adapter], base_precision="dequantized")


def test_a_sum_too_large_for_its_type(adapter: Path) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.abba_B1"
    change(adapter, lambda tensors: tensors.update({name: tensors[name] * 1e7}))
    with pytest.raises(ModelError, match=r"up_proj.weight is not finite in float16 after the merge.*--dtype"):
        merge([adapter], dtype="float16")


def test_an_existing_output_is_kept(adapter: Path, base: Path, tmp_path: Path) -> None:
    merge([adapter])
    before = (tmp_path / "adapter-merged" / "model.safetensors").stat().st_ino
    with pytest.raises(RunError, match="adapter-merged exists; choose another, or give --overwrite"):
        merge([adapter])
    with pytest.raises(RunError, match="was not written by `abba merge` or `abba export`, so it is not replaced"):
        merge([adapter], output=base, overwrite=True)
    assert (tmp_path / "adapter-merged" / "model.safetensors").stat().st_ino == before
    merge([adapter], overwrite=True)
    assert (tmp_path / "adapter-merged" / "model.safetensors").stat().st_ino != before
    assert sorted(path.name for path in tmp_path.iterdir() if "merged" in path.name) == ["adapter-merged"]


def test_what_is_read_is_never_replaced(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = export(adapter, "abba").path
    earlier = merge([adapter], output=tmp_path / "parent" / "earlier", verify=False).path
    for output in (copy, copy / ".." / copy.name):
        with pytest.raises(RunError, match=r"is or holds .*, which is being read; choose another output"):
            merge([copy], output=output, overwrite=True)
    with pytest.raises(RunError, match=r"is or holds .*earlier, which is being read"):
        merge([adapter], base=str(earlier), output=earlier, overwrite=True, force=True)
    with pytest.raises(RunError, match="was written by `abba export`, so `abba merge` does not replace it"):
        merge([adapter], output=copy, overwrite=True)
    assert (copy / "adapter_model.safetensors").is_file()


def test_home_and_links_in_an_output(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert merge([adapter], output=Path("~/there"), verify=False).path == tmp_path / "there"
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    for overwrite in (False, True):
        merge([adapter], output=tmp_path / "link", overwrite=overwrite, verify=False)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "target" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob(".*.old"))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(weight: float, adapter: Path) -> None:
    with pytest.raises(ModelError, match=r"--weight is .*; expected numbers"):
        merge([adapter], weights=[weight])


def test_a_weight_that_breaks_the_model(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gives logits that are no numbers, so nothing was written: the update is too large"):
        merge([adapter], weights=[1e30])
    assert not list(tmp_path.glob("*merged*"))


def test_no_room_on_the_disk_is_found_first(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=40_000_000))
    with pytest.raises(RunError, match=r"needs \d+ MB, the disk has 40 MB free; make room"):
        merge([adapter])
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_with_one_layer_missing_is_refused(dtype: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    """Also where rounding the weights alone moves the logits by more than that layer does."""
    plan = plan_merge([adapter], dtype=dtype)
    merged = merge([adapter], dtype=dtype, output=tmp_path / "merged").path  # type: ignore[arg-type]

    def check() -> None:
        verify_merge(plan.adapters, plan.base, merged, plan.dtypes, plan.parameters, None, True, lambda event: None)

    check()
    tensors = load_file(merged / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = load_file(base / "model.safetensors")[name].to(tensors[name].dtype)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not answer like base \+ adapter: logits differ by"):
        check()


def test_a_model_that_does_not_fit_is_not_verified(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abba_cli.merge.verifying.available_memory", lambda device: 1_000_000)
    merged = merge([adapter])
    assert merged.verification is None
    assert "does not fit into memory (0.0 GB free" in merged.unverified
    assert merge([adapter], verify=True, overwrite=True).verification


def test_the_newest_finished_run_of_a_folder(adapter: Path, base: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for number, name in enumerate(("b", "a", "c")):
        run = shutil.copytree(adapter, runs / name)
        outcome = None if name == "c" else OUTCOME
        (run / "provenance.json").write_text(json.dumps({"abba": "0", "outcome": outcome, "base": {"name": str(base)}}))
        os.utime(run / "provenance.json", (1000 + number, 1000 + number))
    assert find_adapter(str(runs)) == runs / "a"
    for file in (runs / "c").glob("adapter_*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has not finished; run `abba train` again to finish it"):
        find_adapter(str(runs / "c"))
    assert default_output([runs], [runs / "a"]).name == "a-merged"
    assert default_output(["someone/thing"], [tmp_path]) == Path("thing-merged")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "abba_cli", "merge", *map(str, arguments)]


def test_an_interrupted_merge_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "tie_word_embeddings": True}
    folder = write_model(tmp_path / "base", tiny_llama, **sizes)
    adapter = write_adapter(tmp_path / "adapter", folder, r1=32, r2=32)
    output = tmp_path / "merged"
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command("--adapter", adapter, "--output", output, "--no-verify"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that started the tests in the background has it ignored, which is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 120
        while not list((tmp_path / ".merged.partial").glob("*.safetensors")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert not output.exists()
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert errors == "abba: interrupted; nothing was written\n"
            assert not list(tmp_path.glob(".merged*"))
    done = subprocess.run(command("--adapter", adapter, "--output", output, "--no-verify"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # what the killed one left is in nobody's way
    assert not list(tmp_path.glob(".merged*"))
    assert json.loads((output / "abba.json").read_text())["command"] == "merge"


def test_the_command_says_what_it_did(adapter: Path, base: Path, tmp_path: Path) -> None:
    done = subprocess.run(command("--adapter", adapter), capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Merged 14 layers; 21 tensors (7 of them copied as they are)" in done.stdout
    assert f"  {adapter} on {base}, in its original precision\n" in done.stdout
    assert "peak memory" in done.stdout
    assert "100% of the next tokens agree" in done.stdout
    assert "checkpoint in adapter-merged" in done.stdout
    assert "adapter-merged" in (tmp_path / "adapter-merged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing option '--adapter'"),
        (("--adapter", "nowhere/at/all"), 1, "abba: there is no directory nowhere/at/all"),
        (("--adapter", "x", "--shard-size", "5 bananas"), 2, "'5 bananas' is no size"),
        (("--adapter", "x", "--shard-size", "5"), 2, "'5' is less than 1 MB"),
        (("--adapter", "x", "--dtype", "int4"), 2, "'int4' is not one of"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
