"""The numbers of a sweep's report: means, deviations and paired tests, from records made by hand."""

import csv
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from abba_cli.sweeping.charts import _losses, _side_by_side, draw_all
from abba_cli.sweeping.planning import Sweep
from abba_cli.sweeping.records import Record, Step
from abba_cli.sweeping.reporting import answer, markdown, results_csv
from abba_cli.sweeping.running import choose
from abba_cli.sweeping.schema import SweepFile
from abba_cli.sweeping.summary import paired_t, summarise


def sweep(tmp_path: Path, **keys: Any) -> Sweep:
    tree = {"base": "recipe.yaml", "output": "out", "variants": {"lora": {}, "abba": {}}, "seeds": [1, 2, 3]} | keys
    return Sweep(tmp_path / "small.yaml", SweepFile.model_validate(tree), tmp_path / "out", None)


def record(variant: str, seed: int, loss: float | None, right: str = "", **keys: Any) -> Record:
    rows = {"obqa": {str(place): float(one) for place, one in enumerate(right)}} if right else {}
    given = {
        "name": f"runs/{variant}/seed-{seed}",
        "kind": "run",
        "label": variant,
        "variant": variant,
        "values": {},
        "tuned": {},
        "seed": seed,
        "digest": "d",
        "status": "done",
        "parameters": 1000 if variant == "lora" else 1100,
        "steps": 10,
        "seconds": 20.0 if variant == "lora" else 30.0,
        "peak_memory_bytes": 2_000_000_000,
        "eval_loss": loss,
        "scores": {task: sum(found.values()) / len(found) for task, found in rows.items()},
        "rows": rows,
        "curve": [Step(step=step, loss=1 / step, gradient_norm=0.5) for step in range(1, 11)],
    } | keys
    return Record.model_validate(given)


@pytest.mark.parametrize(
    ("freedom", "t"),  # two-sided 5% points of Student's t, as in any table
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (6, 2.44691), (9, 2.26216), (30, 2.04227)],
)
def test_student(freedom: int, t: float) -> None:
    n = freedom + 1
    spread = [(-1.0) ** place for place in range(n)] if n % 2 == 0 else [0.0, *((-1.0) ** place for place in range(n - 1))]
    deviation = math.sqrt(sum(one**2 for one in spread) / (n - 1))
    mean = t * deviation / math.sqrt(n)
    assert paired_t([mean + one for one in spread]) == pytest.approx(0.05, abs=2e-6)
    assert paired_t([-mean + one for one in spread]) == pytest.approx(0.05, abs=2e-6)


def test_student_at_the_edges() -> None:
    assert paired_t([1.0]) is None
    assert paired_t([]) is None
    assert paired_t([0.0, 0.0]) == 1.0
    assert paired_t([0.5, 0.5]) == 0.0
    assert paired_t([1.0, -1.0]) == pytest.approx(1.0)


def test_lines_and_answer(tmp_path: Path) -> None:
    records = [
        *(record("lora", seed, loss, "10101010") for seed, loss in ((1, 1.0), (2, 1.1), (3, 1.2))),
        *(record("abba", seed, loss, "11111110") for seed, loss in ((1, 0.9), (2, 1.01), (3, 1.08))),
    ]
    lora, abba = summarise(sweep(tmp_path), records)
    assert lora.beside is None
    assert lora.loss is not None
    assert (lora.loss.mean, lora.loss.deviation) == pytest.approx((1.1, 0.1))
    assert abba.beside is not None
    assert abba.beside.loss == pytest.approx(-0.31 / 3)
    # Differences -0.1, -0.09, -0.12 with deviation 0.015275: t = 11.717 at 2 degrees of freedom, for which p = 1 - t/sqrt(t^2+2).
    assert abba.beside.loss_p == pytest.approx(1 - 11.7172 / math.sqrt(11.7172**2 + 2), abs=1e-5)
    assert abba.beside.score == pytest.approx(3 / 8)
    assert abba.beside.score_p == pytest.approx(2 / 2**3)  # three rows differ, all one way
    text = " ".join(answer(sweep(tmp_path), [lora, abba]))
    assert "Lowest evaluation loss: abba, 0.9967 ± 0.0907 (-0.1033 beside the reference, p = 0.0072)." in text
    assert "All others are worse beyond chance." in text
    assert (
        "Best mean score: abba, 87.5 ± 0.0 (+37.5 beside the reference, p = 0.25). Not told apart from it at p < 0.05: lora."
        in text
    )
    assert "abba takes 1.50 times the time of lora and 1.00 times its memory, with 1.10 times its trained parameters." in text
    assert f"abba train {tmp_path / 'out' / 'runs/abba/seed-1'}.yaml" in text


def test_times_are_the_processor_s_where_all_have_it(tmp_path: Path) -> None:
    lora = [record("lora", seed, 1.0, seconds=400.0, processor_seconds=20.0) for seed in (1, 2)]  # beside other work
    abba = [record("abba", seed, 0.9, seconds=30.0, processor_seconds=22.0) for seed in (1, 2)]
    lines = summarise(sweep(tmp_path), [*lora, *abba])
    assert "abba takes 1.10 times the processor time of lora" in " ".join(answer(sweep(tmp_path), lines))
    text = markdown(sweep(tmp_path), lines, [*lora, *abba], [], [])
    assert "| CPU s/step |" in text
    assert "| 2.00 |" in text
    assert "CPU s/step: the processor's time for a step" in text
    lines = summarise(sweep(tmp_path), [*lora, record("abba", 1, 0.9, seconds=30.0)])  # of a version that did not look
    assert "abba takes 0.07 times the time of lora" in " ".join(answer(sweep(tmp_path), lines))
    assert "CPU s/step" not in markdown(sweep(tmp_path), lines, [], [], [])


@pytest.mark.parametrize(("chosen", "told"), [(1.0, True), (2.0, False), (4.0, True)])
def test_a_choice_at_an_edge_is_told_of(chosen: float, told: bool, tmp_path: Path) -> None:
    read = sweep(tmp_path, tune={"values": {"training.learning_rate": [2.0, 1.0, 4.0]}})
    tuned = {"training.learning_rate": chosen}
    records = [record("lora", 1, 1.0, tuned={"training.learning_rate": 2.0}), record("abba", 1, 0.9, tuned=tuned)]
    text = markdown(read, summarise(read, records), records, [], [])
    line = "chosen at an edge of the values tried, so that a wider range may change the order: learning_rate of abba\n"
    assert (line in text) == told
    assert ("at an edge" in text) == told


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    lines = summarise(sweep(tmp_path, seeds=[1]), [record("lora", 1, 1.0), record("abba", 1, 0.5)])
    assert "Not told apart from it for want of a second seed: lora." in answer(sweep(tmp_path), lines)[0]
    assert answer(sweep(tmp_path), []) == ["No run has ended yet."]


def test_what_failed_or_was_not_run_stands_in_the_report(tmp_path: Path) -> None:
    failed = record("abba", 2, None, status="failed", error="the loss is nan | at step 3", steps=None, seconds=None)
    records = [record("lora", 1, 1.0), record("abba", 1, 2.0), failed]
    lines = summarise(sweep(tmp_path), records)
    assert [len(line.records) for line in lines] == [1, 1]
    text = markdown(sweep(tmp_path), lines, records, ["runs/lora/seed-2"], ["loss.png"])
    assert r"- runs/abba/seed-2 failed: the loss is nan \| at step 3" in text
    assert "- not run, for want of time or of a tuning run that ended well: runs/lora/seed-2" in text
    assert text.index("Lowest evaluation loss: lora") < text.index("## Missing") < text.index("## Runs")
    table = list(csv.DictReader(io.StringIO(results_csv(records))))
    assert [(row["name"], row["status"], row["eval_loss"]) for row in table] == [
        *(("runs/lora/seed-1", "done", "1.0"), ("runs/abba/seed-1", "done", "2.0"), ("runs/abba/seed-2", "failed", "")),
    ]
    assert table[0]["seconds_per_step"] == "2.0"


def test_tuning_chooses_the_lowest_loss_of_those_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = sweep(tmp_path, tune={"values": {"training.learning_rate": [1.0, 2.0]}})

    def tried(variant: str, rate: float, loss: float | None) -> Record:
        status = "failed" if loss is None else "done"
        keys = {"kind": "tuning", "tuned": {"training.learning_rate": rate}, "status": status, "name": f"tuning/{variant}/{rate}"}
        return record(variant, 1, loss, **keys)

    class Planned:
        def __init__(self, label: str) -> None:
            self.point = next(point for point in read.points if point.label == label)

    monkeypatch.setattr(Sweep, "tuning_runs", lambda self: [Planned(label) for label in ("lora", "lora", "abba", "abba")])
    both = [tried("lora", 1.0, 0.5), tried("lora", 2.0, 0.4), tried("abba", 1.0, 0.3), tried("abba", 2.0, None)]
    assert choose(read, both) == {"lora": {"training.learning_rate": 2.0}, "abba": {"training.learning_rate": 1.0}}
    assert choose(read, both[:3]) == {"lora": {"training.learning_rate": 2.0}}, "abba's tuning has not ended"


@pytest.mark.parametrize("grid", [{}, {"adapter.rank": [4, 64]}])
def test_figures(grid: dict[str, list[int]], tmp_path: Path) -> None:
    read = sweep(tmp_path, grid=grid)
    values = [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]
    records = [
        record(variant, seed, 1.0 + seed, "1010", label=" ".join([variant, *(f"rank={v}" for v in one.values())]), values=one)
        for variant in ("lora", "abba")
        for seed in (1, 2)
        for one in values
    ]
    (tmp_path / "pictures").mkdir()
    names = draw_all(summarise(read, records), tmp_path / "pictures")
    assert names == ["score.png", "loss.png", "gradient-norm.png", "cost.png"]
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.size[0] > 800
            colours = picture.convert("RGB").getcolors(2**24)
            assert colours is not None
            found = {colour for count, colour in colours if count > 30}
            assert {(0, 114, 178)} <= found, "nothing of the first variant's colour"


def test_lines_of_one_size_are_drawn_side_by_side(tmp_path: Path) -> None:
    read = sweep(tmp_path, variants={name: {} for name in ("lora", "abba", "dora", "full")})
    sizes = {"lora": 10_000_000, "abba": 10_000_000, "dora": 10_100_000, "full": 100_000_000}
    places = _side_by_side(summarise(read, [record(name, 1, 1.0, parameters=size) for name, size in sizes.items()]))
    assert list(places) == sorted(places, key=lambda name: places[name])
    assert places["full"] == 100.0
    near = [places[name] for name in ("lora", "abba", "dora")]
    assert all(later - earlier > 0.4 for earlier, later in itertools.pairwise(near))
    assert sum(near) / 3 == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize(("losses", "scale"), [((1.0, 0.8, 0.7), "linear"), ((5.0, 1.0, 0.2), "log")])
def test_curves_are_logarithmic_where_they_fall_far(losses: tuple[float, ...], scale: str, tmp_path: Path) -> None:
    curve = [Step(step=place, loss=loss, gradient_norm=None) for place, loss in enumerate(losses, start=1)]
    lines = summarise(sweep(tmp_path), [record("lora", 1, 1.0, curve=curve)])
    assert _losses(lines).axes[0].get_yscale() == scale
