"""The side-by-side benchmark: a whole small run, what it counts, and what it makes of figures that are known."""

import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for `python benchmarks/run.py`

from side_by_side import grids, running  # noqa: E402
from side_by_side.measure import layers_that_fit  # noqa: E402
from side_by_side.memory import kept_bytes, peak_bytes  # noqa: E402
from side_by_side.methods import NotHere, adapted, base_model  # noqa: E402
from side_by_side.plots import plot  # noqa: E402
from side_by_side.report import report, ways_within  # noqa: E402

CPU = torch.device("cpu")
TINY = replace(grids.rows_of("smoke", "cpu", False)[0], layers=1)
METHODS = [*grids.PEERS, grids.OURS, grids.FACTORED, grids.EFFECTIVE]


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--device", "cpu", "--grid", "smoke", "--out", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    finished = run(folder, "--rounds", "3")
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_the_smallest_run_prints_its_table_and_draws(done: tuple[Path, str]) -> None:
    folder, printed = done
    assert (folder / "table.md").read_text().strip() == printed.strip()
    assert (folder / "whole-models.png").read_bytes().startswith(b"\x89PNG")


def test_the_ratios_are_those_of_the_run(done: tuple[Path, str]) -> None:
    folder, printed = done
    (record,) = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert set(record["methods"]) | set(record["left_out"]) == set(METHODS)
    assert record["environment"]["versions"]["torch"] == torch.__version__
    for name in ("ABBA", "LoHa", "full"):
        ours, lora = record["methods"][name]["seconds"], record["methods"]["LoRA"]["seconds"]
        assert len(ours) == 3
        expected = statistics.median([a / b for a, b in zip(ours, lora, strict=True)])
        cells = next(line for line in printed.splitlines() if line.startswith(f"| {name} |")).split(" | ")
        assert float(cells[2]) == pytest.approx(statistics.median(ours), abs=6e-4)
        assert float(cells[3]) == pytest.approx(expected, abs=6e-3)


def test_a_second_run_measures_nothing_again(done: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, printed = done
    before = (folder / "rows.jsonl").read_text()
    with (folder / "rows.jsonl").open("a") as stream:
        stream.write('{"row": {"shape": "ti')  # as a killed run may leave it
    assert running.main(["--device", "cpu", "--grid", "smoke", "--rounds", "3", "--out", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "1 of 1 rows are there already" in shown.err
    assert shown.out.strip() == printed.strip()
    assert (folder / "rows.jsonl").read_text().startswith(before)


def test_a_row_that_would_end_too_late_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert running.main(["--device", "cpu", "--grid", "smoke", "--minutes", "0.3", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "Skipped, for it would not have ended within 0.3 minutes: tiny" in shown.out
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_end_of_a_process_ends_its_row_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kill() -> None:
        for process in multiprocessing.active_children():
            process.kill()

    timer = threading.Timer(0.5, kill)
    timer.start()
    assert running.main(["--device", "cpu", "--grid", "smoke", "--out", str(tmp_path)]) == 1
    timer.join()
    shown = capsys.readouterr().out
    assert re.search(
        r"Failed: tiny.*: its process ended with code -9 \(ended by the system, most likely for want of memory", shown
    )


def test_a_folder_without_the_authors_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert running.main(["--device", "cpu", "--reference", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"--reference {tmp_path}: no abba.py in it; expected a checkout of")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_share_the_weights_and_nothing_else(name: str, precision: str) -> None:
    row, shape = replace(TINY, precision=precision), grids.SHAPES["tiny"]
    torch.manual_seed(0)
    base = base_model(row, shape, 1, CPU)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    try:
        model = adapted(name, base, row, shape, None)  # which counts the trained parameters
    except NotHere:
        pytest.skip("not in the installed packages")
    ids = torch.randint(0, shape.vocabulary, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in base.parameters()} <= addresses
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


FAKE_CHECKOUT = '''
import torch


class ABBAConfig(torch.nn.Module):
    """The layer; the dataclass of the same name is lost."""

    def init_weights_svd_mixed(self, adapter_name):
        raise AssertionError("no SVD in a benchmark")


def apply_abba(model, config, adapter_name="default"):
    assert (config.r1, config.r2, config.dropout) == (3, 3, 0.0)
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if any(target in name for target in config.target_modules):
                layer, (m, n) = ABBAConfig(), linear.weight.shape
                layer.base_layer, layer.forward = linear, linear.forward
                shapes = {"A1": (3, n), "B1": (m, 3), "A2": (3, n), "B2": (m, 3)}
                for factor, shape in shapes.items():
                    setattr(layer, "lora_" + factor, torch.nn.ParameterDict({adapter_name: torch.zeros(shape)}))
                layer.init_weights_svd_mixed(adapter_name)
                setattr(parent, name, layer)
    return model
'''


def test_the_authors_layer_is_taken_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "abba.py").write_text(FAKE_CHECKOUT)
    shape = grids.SHAPES["tiny"]
    model = adapted("authors", base_model(TINY, shape, 1, CPU), TINY, shape, tmp_path)
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(factors) == 4 * 7
    assert all(factor.dtype == torch.bfloat16 and factor.abs().sum() > 0 for factor in factors)


def test_kept_are_the_tensors_alive_between_forward_and_backward() -> None:
    linear, x = nn.Linear(8, 6, bias=False), torch.randn(5, 8)

    def forward() -> torch.Tensor:
        (x @ linear.weight.T).exp().sum()  # a graph that is let go
        y = linear(x).tanh()
        return (y * y[:, :1]).sum()  # keeps y, and a view of it

    # x for the gradient of the weight, which is the model's own, and y once.
    assert kept_bytes(linear, forward) == x.nbytes + 5 * 6 * 4


def test_the_peak_is_what_lives_at_once() -> None:
    size = 1_000_000
    model = nn.ParameterList([nn.Parameter(torch.zeros(size))])

    def forward(together: bool) -> torch.Tensor:
        first = torch.ones(size)
        if not together:
            del first
        second = torch.ones(size)
        del second
        return model[0].sum()

    # The gradient, another 4 MB, is there from the start.
    assert peak_bytes(model, lambda: forward(False), CPU) == pytest.approx(4 * size, rel=1e-3)
    assert peak_bytes(model, lambda: forward(True), CPU) == pytest.approx(8 * size, rel=1e-3)
    assert model[0].grad is None


def test_the_grids_span_what_they_promise() -> None:
    cpu, cuda = (grids.rows_of("all", device, True) for device in ("cpu", "cuda"))
    for rows, tokens in ((cpu, 2048), (cuda, 16384)):
        assert len(rows) == len(set(rows))
        assert {row.rank for row in rows} == {2, 4, 8, 16, 32}
        assert {row.shape for row in rows if not row.whole} == {"135M", "1B", "3B", "8B"}
        assert {row.precision for row in rows} == {"bf16", "fp32", "nf4"}
        assert (min(row.tokens for row in rows), max(row.tokens for row in rows)) == (256, tokens)
    choices = {(row.shape, row.tokens, row.rank, row.precision) for row in cpu if grids.FACTORED in row.methods}
    assert len(choices) >= 30
    assert any(grids.REFERENCE in row.methods for row in cpu)
    assert not any(grids.REFERENCE in row.methods for row in grids.rows_of("all", "cpu", False))
    assert not any(grids.NOT_ON_NF4 & set(row.methods) for row in cpu if row.precision == "nf4")


def test_layers_are_cut_to_the_memory() -> None:
    row = grids.rows_of("headline", "cuda", False)[2]
    shape, card = grids.SHAPES["3B"], 80 * 2**30
    assert row.tokens == 16384
    assert 1 < layers_that_fit(row, shape, card) < shape.layers
    assert layers_that_fit(replace(row, batch=1), shape, card) == shape.layers
    assert layers_that_fit(row, shape, 2**30) == 1


def record(row: grids.Row, seconds: dict[str, list[float]], peak: float = 100.0) -> dict[str, Any]:
    sizes = {"trained": 9, "gradient_bytes": 36, "kept_bytes": 50, "peak_bytes": peak}
    return {
        "row": asdict(row),
        "settings": {"device": "cpu", "rounds": 3, "optimizer": False},
        "layers": row.layers,
        "methods": {name: {"seconds": times, **sizes} for name, times in seconds.items()},
        "left_out": {"HiRA": "out of memory"},
        "environment": {"device": "A machine", "cores": 2, "threads": 2, "versions": {"torch": "2"}},
    }


def test_each_column_is_judged_by_its_own_target() -> None:
    bf16, _, nf4, rank4, rank32, fp32, _ = grids.rows_of("headline", "cpu", False)
    # The medians of ABBA and LoRA are equal; of the ratios within a round, 0.5, 1 and 2, so is the median: 1.
    seconds = {"floor": [1.0, 1.0, 1.0], "LoRA": [2.0, 2.0, 2.0], "ABBA": [1.0, 2.0, 4.0], "LoHa": [1.0, 4.0, 2.0]}
    ours = {"ABBA": [1.0, 1.0, 1.0]}
    records = [record(row, seconds) for row in (bf16, nf4, fp32)] + [record(rank4, ours, 100.0), record(rank32, ours, 104.0)]
    text = report(records, ["Skipped: a row."], "a command")
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")}
    lora = lines["step time, ABBA / LoRA as PEFT makes it"]
    assert lora == ["**1.000**, target <= 0.9: not met", "", "**1.000**, target <= 1.05: met |"]
    assert lines["step time, ABBA / QLoRA"][1] == "**1.000**, target <= 1: met"
    assert lines["step time, ABBA / authors' layer"][0] == "not measured"
    assert lines["peak memory, ABBA at R = 1024 / R = 16"][0] == "**1.040**, target <= 1.05: met"
    assert "| HiRA | out of memory |" in text
    assert "- Skipped: a row." in text


def test_a_wrong_choice_of_the_way_is_named() -> None:
    row = grids.rows_of("ranks", "cpu", False)[0]
    ways = {grids.FACTORED: [1.0, 1.0, 1.0], grids.EFFECTIVE: [2.0, 2.0, 2.0]}
    good, bad = ({"ABBA": [time] * 3, **ways} for time in (1.05, 1.5))
    missed, compared = ways_within([record(row, good), record(replace(row, rank=4), bad), record(row, {"ABBA": [1.0] * 3})])
    assert compared == 2
    assert missed == ["135M (layers), 1x512, bf16, r1 = r2 = 4: 1.50"]


def test_lines_are_drawn_where_there_are_two_points(tmp_path: Path) -> None:
    rows = grids.rows_of("tokens", "cpu", False)[:2] + grids.rows_of("ranks", "cpu", False)[:5]
    files = plot([record(row, {"ABBA": [1.0] * 3, "LoRA": [1.0] * 3}) for row in rows], tmp_path)
    assert [file.name for file in files] == ["tokens-135M.png", "ranks-135M.png"]
    assert plot([record(rows[0], {"ABBA": [1.0] * 3})], tmp_path) == []
