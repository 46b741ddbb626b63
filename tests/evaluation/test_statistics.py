"""Intervals and tests against published examples, enumeration of every case, and properties."""

import itertools
import math
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abba_cli.evaluation.reporting.statistics import mean_and_error, paired_test, wilson_interval

BITS = st.lists(st.booleans().map(float), min_size=1, max_size=60)
SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.1, 4))
def test_wilson_ends_are_one_z_from_the_share(case: tuple[int, int], z: float) -> None:
    """Both ends solve (share - p)^2 = z^2 p (1 - p) / n, which is how the interval is defined."""
    successes, n = case
    share = successes / n
    low, high = wilson_interval(successes, n, z)
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-9)
    assert low < high
    assert wilson_interval(n - successes, n, z) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_at_the_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    # All of 1: p = 1 / (1 + z^2), from the formula by hand.
    assert wilson_interval(1, 1) == (pytest.approx(1 / (1 + 1.959964**2)), 1.0)
    for successes, n in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"{successes} successes in {n} trials"):
            wilson_interval(successes, n)


def test_wilson_covers_as_often_as_it_says() -> None:
    """The exact coverage, averaged over p: a sum over all outcomes of the binomial distribution."""
    n, grid = 30, [(i + 0.5) / 200 for i in range(200)]
    covered = [
        sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k in range(n + 1)
            if wilson_interval(k, n)[0] <= p <= wilson_interval(k, n)[1]
        )
        for p in grid
    ]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)


def test_mean_and_error_by_hand() -> None:
    # 3 of 4: sample variance (3 * (1/4)^2 + (3/4)^2) / 3 = 1/4, so the error is sqrt(1/4 / 4) = 1/4.
    mean, error, interval = mean_and_error([1.0, 1.0, 0.0, 1.0])
    assert (mean, error) == (0.75, pytest.approx(0.25))
    assert interval == wilson_interval(3, 4)
    # 0, 1/2, 1: sample variance (1/4 + 0 + 1/4) / 2 = 1/4, error sqrt(1/12); 1/2 +/- 1.96 sqrt(1/12) leaves [0, 1].
    assert mean_and_error([0.0, 0.5, 1.0]) == (0.5, pytest.approx(math.sqrt(1 / 12)), (0.0, 1.0))
    # 1/4 and 3/4 five times each: variance 10 / 9 / 16, error sqrt(1 / 144) = 1/12.
    mean, error, interval = mean_and_error([0.25, 0.75] * 5)
    assert (mean, error) == (0.5, pytest.approx(1 / 12))
    assert interval == pytest.approx((0.5 - 1.959964 / 12, 0.5 + 1.959964 / 12))


def test_mean_and_error_at_the_edges() -> None:
    mean, error, interval = mean_and_error([1.0])
    assert mean == 1.0
    assert math.isnan(error)
    assert interval == wilson_interval(1, 1)
    mean, error, interval = mean_and_error([0.3])
    assert (mean, math.isnan(error), interval) == (0.3, True, (0.0, 1.0))
    assert mean_and_error([0.0] * 9)[:2] == (0.0, 0.0)
    assert mean_and_error([12.0, 14.0]) == (13.0, 1.0, (pytest.approx(13 - 1.959964), pytest.approx(13 + 1.959964)))
    with pytest.raises(ValueError, match="no scores"):
        mean_and_error([])


@given(SCORES | BITS)
def test_the_interval_holds_the_mean(scores: list[float]) -> None:
    mean, error, (low, high) = mean_and_error(scores)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    if len(scores) > 1:
        fractions = [Fraction(score) for score in scores]
        exact = sum(fractions) / len(fractions)
        variance = sum((score - exact) ** 2 for score in fractions) / (len(fractions) - 1)
        assert mean == pytest.approx(float(exact))
        assert error == pytest.approx(math.sqrt(variance / len(fractions)), abs=1e-12)


def pairs(better: int, worse: int, same: int = 3) -> tuple[list[float], list[float]]:
    return [1.0] * better + [0.0] * worse + [1.0] * same, [0.0] * better + [1.0] * worse + [1.0] * same


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        # 2 (1 + 20 + 190 + 1140 + 4845 + 15504) / 2^20
        (15, 5, 2 * 21700 / 2**20),
        (5, 15, 2 * 21700 / 2**20),
        (6, 0, 2 / 64),
        (1, 0, 1.0),
        (4, 4, 1.0),
        (5, 4, 1.0),
        # 2 (1 + 10 + 45) / 1024
        (8, 2, 112 / 1024),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(better: int, worse: int, p: float) -> None:
    assert paired_test(*pairs(better, worse)) == (pytest.approx(p, abs=1e-15), "McNemar exact")


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_twice_the_binomial_tail(better: int, worse: int) -> None:
    n = better + worse
    tail = Fraction(sum(math.comb(n, k) for k in range(min(better, worse) + 1)), 2**n)
    assert paired_test(*pairs(better, worse))[0] == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def enumerated(scores: list[float], baseline: list[float]) -> float:
    """Every choice of signs, in exact fractions."""
    differences = [
        Fraction(a).limit_denominator(10**6) - Fraction(b).limit_denominator(10**6) for a, b in zip(scores, baseline, strict=True)
    ]
    found = abs(sum(differences))
    choices = list(itertools.product((1, -1), repeat=len(differences)))
    far = sum(abs(sum(sign * one for sign, one in zip(signs, differences, strict=True))) >= found for signs in choices)
    return far / len(choices)


TENTHS = st.integers(0, 10).map(lambda tenths: tenths / 10)
PAIRS_OF_TENTHS = st.lists(st.tuples(TENTHS, TENTHS), min_size=1, max_size=9)


@settings(deadline=None)
@given(PAIRS_OF_TENTHS | st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=9))
def test_small_cases_against_every_choice_of_signs(rows: list[tuple[float, float]]) -> None:
    """Tenths have sums that are equal on paper and unequal in binary: ties must count."""
    scores, baseline = [a for a, _ in rows], [b for _, b in rows]
    assert paired_test(scores, baseline)[0] == pytest.approx(enumerated(scores, baseline), abs=1e-12)


def test_sign_flips_as_published() -> None:
    """Darwin's maize: Fisher, The Design of Experiments (1935), section 21, found 2 * 863 of 2^15 ways."""
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert paired_test(differences, [0] * 15) == (1726 / 2**15, "sign flips")


def test_many_different_sizes_are_drawn() -> None:
    """17 sizes have 2^17 sums: the draws must come near to all of them, enumerated here."""
    generator = random.Random(5)
    differences = [generator.uniform(0.1, 1) * generator.choice((1, 1, 1, -1)) for _ in range(17)]
    sums = [0.0]
    for size in differences:
        sums = [total + size for total in sums] + [total - size for total in sums]
    exact = sum(abs(total) >= abs(sum(differences)) - 1e-9 for total in sums) / len(sums)
    assert 0.02 < exact < 0.9
    p, name = paired_test(differences, [0.0] * 17)
    assert name == "sign flips"
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))
    assert p == paired_test(differences, [0.0] * 17)[0]
    assert p != exact


def test_draws_never_give_zero() -> None:
    assert paired_test([0.5 + i / 1000 for i in range(200)], [0.0] * 200)[0] == 1 / 10_001


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=14), st.randoms(use_true_random=False))
def test_neither_the_models_nor_the_rows_have_an_order(rows: list[tuple[float, float]], generator: random.Random) -> None:
    p, name = paired_test([a for a, _ in rows], [b for _, b in rows])
    assert 0 < p <= 1
    assert (p, name) == paired_test([b for _, b in rows], [a for a, _ in rows])
    generator.shuffle(rows)
    assert paired_test([a for a, _ in rows], [b for _, b in rows])[0] == pytest.approx(p, abs=1e-9)


def test_p_values_are_as_frequent_as_they_say() -> None:
    """Between like models, p <= 0.05 comes up in at most about one comparison in twenty."""
    generator = random.Random(1)
    low = 0
    for _ in range(2000):
        scores, baseline = ([float(generator.random() < 0.5) for _ in range(60)] for _ in range(2))
        low += paired_test(scores, baseline)[0] <= 0.05
    assert 0.01 < low / 2000 < 0.065


def test_a_whole_benchmark_is_quick() -> None:
    generator = random.Random(2)
    scores, baseline = ([float(generator.random() < 0.5) for _ in range(100_000)] for _ in range(2))
    start = time.process_time()
    p, name = paired_test(scores, baseline)
    assert time.process_time() - start < 5
    # The normal approximation, with its correction for whole numbers, is good at this size.
    better, worse = (sum(a > b for a, b in zip(one, two, strict=True)) for one, two in ((scores, baseline), (baseline, scores)))
    z = (abs(better - worse) - 1) / math.sqrt(better + worse)
    assert (p, name) == (pytest.approx(math.erfc(z / math.sqrt(2)), abs=1e-3), "McNemar exact")


def test_rows_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="2 scores beside 3 of the baseline"):
        paired_test([1.0, 0.0], [1.0, 0.0, 1.0])
    assert paired_test([], []) == (1.0, "McNemar exact")
    assert paired_test([0.5, 0.25], [0.5, 0.25]) == (1.0, "sign flips")
