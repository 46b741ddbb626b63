"""Answers that a function writes in place of the model: what is made of them, end to end."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from evaluated import asked_anew, result_of, scored, with_stub

from abba_cli.speakers import Source


def test_a_random_model_scores_zero_with_every_extraction_failed(base: Path, data: Path, tmp_path: Path) -> None:
    results, _ = scored(Source(model=str(base), template="none"), tmp_path, data, "arc_c")
    [one] = results.results
    assert (one.value, one.n, one.extraction_failures) == (0.0, 60, 60)
    assert one.interval == (pytest.approx(0.0), pytest.approx(0.0602, abs=1e-4))  # Wilson: z^2 / (n + z^2)
    assert len(one.examples) == 3
    assert one.examples[0].prompt.startswith("Please choose the correct answer to the question: Which one is number 0?")


def test_uniform_draws_of_valid_answers_are_at_chance(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"{n}?", "output": "", "answer": f"answer{n % 4 + 1}"} for n in range(2000)]
    (tmp_path / "openbookqa").mkdir()
    (tmp_path / "openbookqa" / "test.json").write_text(json.dumps(rows))
    draw = random.Random(3)
    with_stub(monkeypatch, base, lambda request: f"the correct answer is answer{draw.randint(1, 4)}")
    results, _ = scored(Source(model=str(base), template="none"), tmp_path / "out", tmp_path, "obqa")
    [one] = results.results
    assert abs(one.value - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert one.extraction_failures == 0


def test_rows_that_ask_the_same_are_judged_by_their_own_answers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answers_in_order in (("first", ("Rome", "Bern")), ("second", ("Bern", "Rome"))):
        rows = [{"q": "Capital?", "a": answer} for answer in answers_in_order]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\ndata: {{path: {name}.jsonl}}\nprompt: '{{{{ q }}}}'\nanswer: '{{{{ a }}}}'\nmetric: exact\n"
            "pattern: '\\w+'\n"
        )
    with_stub(monkeypatch, base, lambda request: "Rome")
    tasks = [str(tmp_path / f"{name}.yaml") for name in ("first", "second")]
    results, heard = scored(Source(model=str(base), template="none"), tmp_path / "out", tmp_path, *tasks)
    assert asked_anew(heard) == 4
    assert [[one.score for one in task.examples] for task in results.results] == [[1.0, 0.0], [0.0, 1.0]]
    assert [one.value for one in results.results] == [0.5, 0.5]


def test_the_released_grader_and_what_it_judges_differently(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right everywhere, but half of the answers stand behind no mark, where the released code finds nothing."""
    texts = [f"The answer is: {2 * n}" if n % 2 else f"So it makes {2 * n} apples" for n in range(12)]
    with_stub(monkeypatch, base, lambda request: texts[request.number])
    source = Source(model=str(base), template="none")
    ours = result_of(scored(source, tmp_path, data)[0])
    assert (ours.value, ours.unmarked, ours.disagreements, ours.grader) == (1.0, 6, 6, "abba")
    theirs = result_of(scored(source, tmp_path, data, grader="released")[0])
    assert (theirs.value, theirs.disagreements, theirs.grader) == (0.5, 6, "released")


def test_programs_are_run_and_counted_per_sample(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["    return x + x\n" if sample < 3 else "    return 5\n" for sample in range(10)]
    with_stub(monkeypatch, base, lambda request: texts[request.number])
    source = Source(model=str(base), template="none")
    run: dict[str, Any] = {"temperature": 0.8, "samples": 10, "allow_code_execution": True}
    results, _ = scored(source, tmp_path, data, "humaneval", **run)
    assert [(one.metric, one.value, one.primary) for one in results.results] == [("pass@1", 0.3, True), ("pass@10", 1.0, False)]
