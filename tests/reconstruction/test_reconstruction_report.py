"""What is said of fits, on fits that are made up."""

from abba_cli.reconstruction.records import Fit
from abba_cli.reconstruction.reporting import answer, grid, markdown, show_error, summarise


def fit(matrix: str, method: str, error: float, rank: int = 8, group: str = "", start: str = "svd") -> Fit:
    return Fit(matrix, group or matrix, "0", 9, 7, method, rank, 16 * rank, start=start, error=error, seconds=1.0)


FITS = [
    *(fit("a", "lora", error, rank) for rank, error in ((8, 0.5), (4, 0.8))),
    *(fit("b", "lora", error, rank) for rank, error in ((8, 0.2), (4, 0.4))),
    fit("a", "abba", 0.9),
    fit("a", "abba", 0.25, start="root"),
    fit("a", "abba", 0.799, 4),
    fit("b", "abba", 0.3),
    fit("b", "abba", 0.1, 4),
]


def test_the_answer_counts_what_is_lower_level_and_higher() -> None:
    summary = summarise(FITS)
    said = answer(summary)
    # 0.25 / 0.5, 0.799 / 0.8, 0.3 / 0.2, 0.1 / 0.4: the median of 0.25, 0.5, 0.999 and 1.5.
    assert said == (
        "At equal numbers of parameters ABBA's error is below LoRA's in 2 of 4 cases, within 1% of it in 1, above it in 1 "
        "(b at rank 8), median ratio 0.75."
    )
    assert summary.starts == {"svd": 3, "root": 1}
    assert markdown(summary, "als", 2).startswith(said)


def test_the_best_of_the_restarts_counts_and_the_lowest_is_marked() -> None:
    headings, lines = grid(summarise(FITS))
    assert headings == ["matrix", "method", "rank 4", "rank 8"]
    assert lines == [
        (["a", "LoRA", "0.800", "0.500"], [False] * 4),
        (["", "ABBA", "0.799", "0.250"], [False, False, True, True]),
        (["b", "LoRA", "0.400", "0.200"], [False, False, False, True]),
        (["", "ABBA", "0.100", "0.300"], [False, False, True, False]),
    ]
    assert "| a | LoRA | 0.800 | 0.500 |" in markdown(summarise(FITS), "als", 2)
    assert "|  | ABBA | **0.799** | **0.250** |" in markdown(summarise(FITS), "als", 2)


def test_layers_of_a_type_count_alike() -> None:
    fits = [fit(layer, "lora", error, group="q_proj") for layer, error in (("x", 0.2), ("y", 0.4))]
    summary = summarise([*fits, fit("y", "lora", 0.6, group="q_proj")])
    assert grid(summary)[1] == [(["q_proj (2 layers)", "LoRA", "0.300"], [False, False, True])]
    assert summary.spread["q_proj", "lora", 8] == (0.2, 0.6)
    assert answer(summary) == "ABBA and no rival: nothing to compare."


def test_errors_keep_three_digits() -> None:
    assert [show_error(error) for error in (0.98765, 0.09876, 0.0009876, 1e-9)] == ["0.988", "0.0988", "0.0010", "1.0e-09"]
