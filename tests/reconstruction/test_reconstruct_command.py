"""`abba reconstruct` as a user meets it: table, files, going on after a kill, and messages."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from abba_cli.reconstruction.matrices import synthetic
from abba_cli.reconstruction.solving import lora_errors

Abba = Callable[..., tuple[int, str, str]]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "reconstruction.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_table_files_and_equal_budgets(abba: Abba, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    code, out, err = abba(
        "reconstruct", "orthogonal", "sparse", "--size", 24, "--ranks", "5,4", "--restarts", 2, "--output", folder
    )
    assert (code, err) == (0, "")
    for wanted in (
        "orthogonal",
        "rank 4",
        "rank 5",
        "LoHa's start",
        "At equal numbers of parameters ABBA's error is below LoRA's in",
    ):
        assert wanted in out
    assert "\x1b" not in out
    rows = rows_of(folder)
    assert len(rows) == 2 * 2 * (1 + 2 + 2)
    for row in rows:
        assert int(row["parameters"]) == int(row["rank"]) * 48
        assert row["method"] == "lora" or int(row["r1"]) + int(row["r2"]) == int(row["rank"])
        if row["method"] == "lora":
            made = synthetic(row["matrix"], 24, seed=0)
            assert float(row["error"]) == pytest.approx(lora_errors(made, [int(row["rank"])])[0], abs=1e-6)
    assert {row["start"] for row in rows} == {"", "svd", "root", "loha"}
    with Image.open(folder / "reconstruction.png") as picture:
        assert picture.size[0] > 500
    report = (folder / "reconstruction.md").read_text()
    assert report.startswith("At equal numbers of parameters")
    best = min(float(row["error"]) for row in rows if (row["matrix"], row["rank"], row["method"]) == ("sparse", "5", "abba"))
    lines = report.splitlines()
    of_sparse = lines[next(place for place, line in enumerate(lines) if line.startswith("| sparse")) :]
    line = next(line for line in of_sparse if "ABBA |" in line)
    assert f"{best:.3f}" in line.split("|")[4]  # ranks ascend
    assert sorted(path.name for path in folder.iterdir()) == ["reconstruction.csv", "reconstruction.md", "reconstruction.png"]


def test_what_is_done_is_not_done_again(abba: Abba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("reconstruct", "random", "--size", 16, "--ranks", "4", "--restarts", 1, "--output", tmp_path)
    assert abba(*command)[0] == 0
    first = rows_of(tmp_path)
    monkeypatch.setattr("abba_cli.reconstruction.experiment._solve", lambda *_: pytest.fail("was fitted again"))
    assert abba(*command)[0] == 0
    assert rows_of(tmp_path) == first
    monkeypatch.undo()
    # Another seed makes another matrix of the same name: its fits are added, and the report is of them alone.
    code, out, err = abba(*command, "--seed", 1)
    assert code == 0, err
    assert rows_of(tmp_path)[:3] == first
    assert len(rows_of(tmp_path)) == 6
    assert "of 1 cases" in out


def test_a_killed_run_goes_on(abba: Abba, tmp_path: Path) -> None:
    arguments = [
        "random",
        "sparse",
        "--size",
        "64",
        "--ranks",
        "4,6,8,10,12",
        "--restarts",
        "3",
        "--output",
        str(tmp_path / "killed"),
    ]
    command = [sys.executable, "-m", "abba_cli", "reconstruct", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    end = time.monotonic() + 120
    while not (tmp_path / "killed" / "reconstruction.csv").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    kept = rows_of(tmp_path / "killed")
    assert 1 <= len(kept) < 70
    assert abba("reconstruct", *arguments)[0] == 0
    rows = rows_of(tmp_path / "killed")
    assert rows[: len(kept)] == kept
    assert len(rows) == 2 * 5 * 7
    keys = [(row["matrix"], row["method"], row["rank"], row["restart"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_layers_by_type(abba: Abba, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{place}.{kind}.weight" for place in range(3) for kind in ("q_proj", "up_proj")]
    weights = {name: torch.randn(20 if "up" in name else 12, 12, generator=generator) for name in names}
    for folder, factor in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / folder).mkdir()
        moved = {name: one + factor * torch.randn(one.shape, generator=generator) for name, one in weights.items()}
        save_file(moved, tmp_path / folder / "model.safetensors")
    options = (
        "--base",
        tmp_path / "base",
        "--tuned",
        tmp_path / "tuned",
        "--ranks",
        "4",
        "--restarts",
        1,
        "--output",
        tmp_path / "out",
    )
    code, out, err = abba("reconstruct", *options)
    assert code == 0, err
    assert "q_proj (3 layers)" in out
    rows = [row for row in rows_of(tmp_path / "out") if (row["group"], row["method"]) == ("up_proj", "lora")]
    assert len(rows) == 3
    mean = sum(float(row["error"]) for row in rows) / 3
    lines = (tmp_path / "out" / "reconstruction.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| up_proj (3 layers) | LoRA |"))
    assert f"{mean:.3f}" in line


def test_adam_and_one_method(abba: Abba, tmp_path: Path) -> None:
    command = (
        "reconstruct",
        "random",
        "--size",
        12,
        "--ranks",
        "4",
        "--restarts",
        1,
        "--solver",
        "adam",
        "--sweeps",
        50,
        "--output",
        tmp_path,
    )
    code, out, err = abba(*command, "--methods", "abba")
    assert code == 0, err
    assert "nothing to compare" in out
    assert [(row["method"], row["solver"], row["steps"]) for row in rows_of(tmp_path)] == [("abba", "adam", "200")]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["random", "--ranks", "8,x"], 2, "'8,x' is no list of ranks; expected numbers from 2 on, such as 8,16"),
        (["random", "--ranks", "1"], 2, "'1' is no list of ranks"),
        (["random", "--methods", "lora,dora"], 2, "expected some of lora,abba,loha"),
        ([], 2, "name a matrix such as random"),
        (["--base", "x"], 2, "--base and --tuned belong together"),
        (["--base", "x", "--tuned", "y", "--adapter", "z"], 2, "--adapter has the updates, and takes no --base and --tuned"),
        (["--adapter", "no-such-run"], 1, "there is no directory no-such-run; expected a run, an adapter"),
        (
            ["random", "--size", "16", "--ranks", "4,17"],
            1,
            "--ranks: 17 is too large for random of 16 x 16; expected 16 or less",
        ),
        (["rnadom"], 1, "did you mean random?"),
        (["no-such/model:weight"], 1, "cannot load model no-such/model"),
    ],
    ids=["no-number", "one", "method", "nothing", "half", "both", "no-run", "large", "misspelt", "hub"],
)
def test_mistakes_are_one_clear_message(arguments: list[str], code: int, message: str, abba: Abba, tmp_path: Path) -> None:
    found, _, err = abba("reconstruct", *arguments, "--output", tmp_path / "out")
    assert found == code, err
    assert message in " ".join(err.replace("│", " ").split())
    assert code == 2 or err.startswith("abba: ")
    assert "Traceback" not in err


def test_all_matrices_are_looked_at_before_the_first_fit(abba: Abba, tmp_path: Path) -> None:
    save_file({"small": torch.ones(30, 3)}, tmp_path / "model.safetensors")
    code, _, err = abba("reconstruct", "random", f"{tmp_path}:small", "--size", 16, "--ranks", "4", "--output", tmp_path / "out")
    assert code == 1
    assert "4 is too large for" in err
    assert not (tmp_path / "out" / "reconstruction.csv").exists()


def test_tiny_numbers_are_no_zeros(abba: Abba, tmp_path: Path) -> None:
    save_file({"tiny": 1e-30 * torch.rand(12, 9)}, tmp_path / "model.safetensors")
    assert abba("reconstruct", f"{tmp_path}:tiny", "--ranks", "4", "--restarts", 1, "--output", tmp_path / "out")[0] == 0
    assert all(0 < float(row["error"]) < 0.5 for row in rows_of(tmp_path / "out"))


def test_flat_matrices_and_broken_tables(abba: Abba, tmp_path: Path) -> None:
    save_file({"zero": torch.zeros(8, 8), "nan": torch.full((8, 8), torch.nan)}, tmp_path / "model.safetensors")
    for name, message in (("zero", "is zero everywhere"), ("nan", "values that are no numbers")):
        code, _, err = abba("reconstruct", f"{tmp_path}:{name}", "--ranks", "4", "--output", tmp_path / "out")
        assert code == 1
        assert message in err
    for text in ("a,b\n1,2\n", "matrix\n"):
        (tmp_path / "out" / "reconstruction.csv").write_text(text)
        code, _, err = abba("reconstruct", "random", "--output", tmp_path / "out")
        assert code == 1
        assert "its columns are not those of `abba reconstruct`; choose another --output" in err
    assert abba("reconstruct", "random", "--size", 8, "--ranks", 2, "--restarts", 1, "--output", tmp_path / "fine")[0] == 0
    whole = (tmp_path / "fine" / "reconstruction.csv").read_text()
    (tmp_path / "fine" / "reconstruction.csv").write_text(whole.replace("random", "rnd", 1)[:-20])
    code, _, err = abba("reconstruct", "random", "--size", 8, "--ranks", 2, "--output", tmp_path / "fine")
    assert code == 1
    assert "cannot go on with" in err
    (tmp_path / "file").write_text("")
    code, _, err = abba("reconstruct", "random", "--output", tmp_path / "file")
    assert code == 1
    assert "cannot write to" in err
