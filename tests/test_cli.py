"""The command as a user meets it: exit codes, messages, real processes and real signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abba_cli import __version__

RecipeFile = Callable[..., Path]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def process(*arguments: object, **keywords: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "abba_cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_version_and_module_entry() -> None:
    command = process("--version")
    assert command.communicate()[0].strip() == f"abba {__version__}"
    assert command.returncode == 0


def test_schema_is_json(abba: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = abba("schema")
    assert code == 0
    assert "adapter" in json.loads(out)["properties"]


def test_no_arguments_show_help_and_unknown_commands_are_usage_errors(abba: Callable[..., tuple[int, str, str]]) -> None:
    assert "Usage: abba" in "".join(abba()[1:])
    code, _, err = abba("trian")
    assert code == 2
    assert "No such command 'trian'" in err


def test_train_prints_what_it_does(abba: Callable[..., tuple[int, str, str]], recipe_file: RecipeFile, tmp_path: Path) -> None:
    code, out, err = abba("train", recipe_file(), "--set", "training.max_steps=2")
    assert code == 0, err
    for wanted in ("rows.jsonl", "question/answer", "It is 0.", "14 layers adapted", "step 2/2", "Finished after 2 steps"):
        assert wanted in out
    assert "\x1b" not in out
    code, out, _ = abba("train", recipe_file(), "--set", "training.max_steps=2")
    assert "has finished already, after 2 steps" in " ".join(out.split())


def test_dry_run_writes_nothing(abba: Callable[..., tuple[int, str, str]], recipe_file: RecipeFile, tmp_path: Path) -> None:
    code, out, err = abba("train", recipe_file(), "--dry-run")
    assert code == 0, err
    assert "Memory forecast" in out
    assert re.search(r"q_proj +2 +32 x 32 +4, 3 +896", out)
    assert not (tmp_path / "run").exists()


BAD: dict[str, tuple[list[str], str]] = {
    "unknown key": (["training.learning_rat=1"], "did you mean learning_rate"),
    "wrong type": (["training.seed=x"], 'training.seed is "x": expected a whole number'),
    "rank above the layer": (["adapter.r1=17"], r"adapter.r1 is 17, but .*k_proj is 16 x 32: expected at most 16"),
    "rank pattern above the layer": (["adapter.r2=40"], r"adapter.r2 is 40, but .* expected at most"),
    "no target": (
        ["adapter.targets=[query]"],
        "linear layers are: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    ),
    "one target of two": (["adapter.targets=[q_proj, q_porj]"], r"'q_porj' matches no layer"),
    "regex without a match": (["adapter.targets=.*attn_block.*"], r"'.\*attn_block.\*' matches no layer"),
    "regex that hits a norm": (["adapter.targets=.*attention.*"], "matches a LlamaRMSNorm, which is no linear layer; .* q_proj"),
    "missing data file": (["data.train.0.path=./rowz.jsonl"], "rowz.jsonl does not exist"),
    "unknown package": (["model.name=package:no_such_thing"], "no installed Python package has this import name"),
    "unknown directory": (["model.name=/no/such/model"], "there is no directory /no/such/model"),
    "hub id without a network": (["model.name=me/model"], "hub cannot be reached|not in the local cache"),
    "not a hub id": (["model.name=me/model/extra"], "neither a local directory nor a hub id"),
    "columns not found": (
        ["data.train.0.prompt={{ query }}", "data.train.0.completion={{ answer }}"],
        "`query`.*found `question`, `answer`",
    ),
    "too short": (["data.max_length_tokens=16"], "data.max_length_tokens"),
    "no template file": (["data.template=nowhere.jinja"], "nowhere.jinja"),
    "start_from nothing": (["adapter.start_from=/no/such/adapter"], "/no/such/adapter"),
    "start_from a missing folder": (["adapter.start_from=./nowhere"], "adapter.start_from: there is no directory .*nowhere"),
    "a tied head": (["adapter.targets=[q_proj, lm_head]"], "lm_head, which shares its weight with the embeddings"),
    "a pattern for nothing": (["adapter.rank_pattern={nosuch: 2}"], "adapter.rank_pattern: 'nosuch' matches none of the 14"),
    "a module for nothing": (["adapter.modules_to_save=[nosuch]"], "the model has no module 'nosuch'"),
    "a string that is no regex of full names": (["adapter.targets=q_proj"], r"write names as a list: \[q_proj\]"),
    "a logger that is not installed": (["logging.logger=trackio"], "trackio is not installed; pip install trackio"),
    "output is a file": (["output=recipe.yaml"], "is a file; expected a run directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_1(
    abba: Callable[..., tuple[int, str, str]],
    recipe_file: RecipeFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    overrides, wanted = BAD[case]
    monkeypatch.chdir(tmp_path)
    file = recipe_file()
    before = {path.name for path in tmp_path.iterdir()}
    code, _, err = abba("train", file, *(part for override in overrides for part in ("--set", override)))
    assert code == 1
    assert re.search(wanted, err), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_missing_recipe(abba: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = abba("train", tmp_path / "nothing.yaml")
    assert (code, "cannot read the recipe" in err) == (1, True)


def test_empty_data(abba: Callable[..., tuple[int, str, str]], recipe_file: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = abba("train", recipe_file(), "--set", f"data.train={tmp_path / 'empty.jsonl'}")
    assert (code, "empty.jsonl is empty" in err) == (1, True)


def test_read_only_output(abba: Callable[..., tuple[int, str, str]], recipe_file: RecipeFile) -> None:
    code, _, err = abba("train", recipe_file(), "--set", "output=/proc/run")
    assert code == 1
    assert "cannot write to /proc" in err


def test_pickled_weights_are_not_read(
    abba: Callable[..., tuple[int, str, str]], recipe_file: RecipeFile, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tiny_llama / "model.safetensors"), folder / "pytorch_model.bin")
    code, _, err = abba("train", recipe_file(), "--set", f"model.name={folder}")
    assert code == 1
    assert "no safetensors weights; pickled weights (.bin) can run code" in err


def test_nf4_without_bitsandbytes(
    abba: Callable[..., tuple[int, str, str]], recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest))
    code, _, err = abba("train", recipe_file(), "--set", "model.quantization=nf4")
    assert code == 1
    assert "nf4 needs bitsandbytes; pip install bitsandbytes" in err


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_the_run_ends_as_if_undisturbed(
    recipe_file: RecipeFile, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    steps = ("--set", "training.max_steps=40", "--set", "checkpoints.every_steps=1000")
    whole = process("train", recipe_file(), *steps, "--set", f"output={tmp_path / 'whole'}")
    broken = process("train", recipe_file(), *steps)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() and broken.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    broken.send_signal(number)
    _, err = broken.communicate()
    assert broken.returncode == expected, err
    stopped = re.search(r"stopped after step (\d+) of 40; .* Run the same command again to go on", err)
    assert stopped, err
    again = process("train", recipe_file(), *steps)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert f"after step {stopped[1]} of 40" in " ".join(out.split())
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_secret_is_printed(
    abba: Callable[..., tuple[int, str, str]], recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    monkeypatch.setenv("WANDB_API_KEY", "verysecretvalue2")
    code, out, err = abba("train", recipe_file(), "--set", "training.max_steps=1")
    assert code == 0, err
    written = "".join(file.read_text(errors="ignore") for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert "verysecretvalue" not in out + err + written
