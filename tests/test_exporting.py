"""`abba export` as a command: what each format writes and prints, and what is refused before any work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import write_adapter, write_model
from safetensors.torch import load_file

from abba_cli.errors import ModelError, RunError
from abba_cli.exporting import export


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", tiny_llama)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "abba_cli", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_the_command_names_the_rank_that_vllm_needs(adapter: Path, tmp_path: Path) -> None:
    done = run("--adapter", "adapter", "--format", "lora", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exported lora, float32, rank 6: " in done.stdout
    assert "in adapter-lora\n" in done.stdout
    assert "exact: the same function as the ABBA adapter" in done.stdout
    assert "vLLM needs --max-lora-rank 8\n" in done.stdout
    assert json.loads((tmp_path / "adapter-lora" / "adapter_config.json").read_text())["r"] == 6
    assert "adapter-lora" in (tmp_path / "adapter-lora" / "README.md").read_text()


def test_an_approximation_says_what_it_loses(adapter: Path, tmp_path: Path) -> None:
    done = run("--adapter", "adapter", "--format", "lora", "--rank", 2, "--dtype", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Exported lora, bfloat16, rank 2" in done.stdout
    errors = json.loads((tmp_path / "adapter-lora" / "approximation_errors.json").read_text())
    assert f"relative error of the updates {errors['overall']:.3g} over all layers" in done.stdout
    assert len(errors["layers"]) == 14
    assert 0 < errors["overall"] <= max(errors["layers"].values()) < 1


def test_a_rank_past_vllms_largest(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "large", base, r1=24, r2=24, target_modules=["down_proj"])
    done = run("--adapter", "large", "--format", "lora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vLLM serves ranks up to 512, this one has 576: give --rank 512" in done.stdout


@pytest.mark.parametrize("format", ["loha", "abba", "gguf-lora"])
def test_the_other_adapters(format: str, adapter: Path, tmp_path: Path) -> None:
    exported = export(adapter, format)  # type: ignore[arg-type]
    assert exported.path.resolve() == tmp_path / f"adapter-{format}"
    assert all((exported.path / name).stat().st_size == size for name, size in exported.files.items())
    assert json.loads((exported.path / "abba.json").read_text())["format"] == format
    if format == "abba":
        before, after = (load_file(one / "adapter_model.safetensors") for one in (adapter, exported.path))
        assert before.keys() == after.keys()
        assert all((after[key] == value).all() for key, value in before.items())
    with pytest.raises(RunError, match="exists; choose another, or give --overwrite"):
        export(adapter, format)  # type: ignore[arg-type]
    export(adapter, format, overwrite=True)  # type: ignore[arg-type]


def test_options_that_do_not_go_together(adapter: Path) -> None:
    with pytest.raises(ModelError, match="--rank goes with lora and gguf-lora, not with loha"):
        export(adapter, "loha", rank=4)
    with pytest.raises(ModelError, match="--rank is 0; expected 1 or more"):
        export(adapter, "lora", rank=0)
    with pytest.raises(ModelError, match="--rank 7 is above 6, at which the LoRA is exact; leave --rank out"):
        export(adapter, "lora", rank=7)
    with pytest.raises(ModelError, match="--llama-cpp goes with gguf, not with lora"):
        export(adapter, "lora", llama_cpp=adapter)
    with pytest.raises(ModelError, match="q8_0 goes with gguf, not with lora"):
        export(adapter, "lora", dtype="q8_0")


def test_a_failed_export_leaves_nothing(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    gpt2 = write_adapter(tmp_path / "gpt2", write_model(tmp_path / "gpt2-base", tiny_llama, "gpt2"))
    with pytest.raises(ModelError, match="Conv1D"):
        export(gpt2, "loha")
    with pytest.raises(ModelError, match="gpt2"):
        export(gpt2, "gguf-lora")
    assert not list(tmp_path.glob("*-loha")) + list(tmp_path.glob(".*"))
    done = run("--adapter", gpt2, "--format", "loha", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("abba: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_converter_is_found_before_the_merge(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    (adapter / "adapter_model.safetensors").chmod(0o400)
    with pytest.raises(ModelError, match=r"converter is neither in .*converter nor on PATH.*\n  pip install"):
        export(adapter, "gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_a_gguf_model_end_to_end(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "converter").symlink_to(Path(sys.prefix) / "converter")
    monkeypatch.setenv("ABBA_CACHE", str(tmp_path / "cache"))
    exported = export(adapter, "gguf", dtype="q8_0")
    assert sorted(exported.files) == ["Modelfile", "README.md", "adapter-gguf.gguf"]
    assert (exported.path / "adapter-gguf.gguf").read_bytes()[:4] == b"GGUF"
    assert exported.modelfile is not None
    assert exported.modelfile.untemplated is None
    assert "FROM ./adapter-gguf.gguf\n" in (exported.path / "Modelfile").read_text()
    assert not list(exported.path.glob(".*"))
