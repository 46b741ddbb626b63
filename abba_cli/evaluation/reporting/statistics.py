"""Uncertainty of scores: Wilson's interval, standard errors, and paired tests that assume no distribution."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

_NORMAL_95 = 1.959964  # half-width of a normal distribution's middle 95%, in standard deviations
_MOST_EXACT_SUMS = 2**16  # enumerated in well under a second; more are drawn
_DRAWS = 10_000


def wilson_interval(successes: float, n: int, z: float = _NORMAL_95) -> tuple[float, float]:
    """Interval for a proportion that holds its level at any n, also where nothing or everything succeeded.

    Args:
        successes: Between 0 and n.
        n: Trials; 0 tells nothing, so the interval is all of [0, 1].
        z: Half-width in standard deviations.

    Returns:
        Both ends. They are the p at which (successes/n - p)^2 = z^2 p (1 - p) / n (Wilson 1927).

    Raises:
        ValueError: `successes` is not between 0 and n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    # In exact arithmetic the ends are 0 and 1 here, and the interval always holds the share; rounding may miss by one bit.
    return (0.0 if successes == 0 else min(max(low, 0.0), share)), (1.0 if successes == n else max(min(high, 1.0), share))


def mean_and_error(scores: Sequence[float]) -> tuple[float, float, tuple[float, float]]:
    """Mean of scores, and how sure it is.

    Args:
        scores: One number a row.

    Returns:
        The mean; its standard error (sample standard deviation / sqrt n; NaN for a single row, which tells nothing of the
        spread); the 95% interval: Wilson's for scores that are all 0 or 1, else mean +/- 1.96 errors, not beyond [0, 1] where
        no score is.

    Raises:
        ValueError: There are no scores.
    """
    n = len(scores)
    if n == 0:
        raise ValueError("no scores")
    total = math.fsum(scores)
    mean = total / n
    error = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (n - 1) / n) if n > 1 else math.nan
    if _binary(scores):
        return mean, error, wilson_interval(total, n)
    floor, ceiling = (0.0, 1.0) if all(0 <= score <= 1 for score in scores) else (-math.inf, math.inf)
    if n == 1:
        return mean, error, (floor, ceiling)
    return mean, error, (max(floor, mean - _NORMAL_95 * error), min(ceiling, mean + _NORMAL_95 * error))


def paired_test(scores: Sequence[float], baseline: Sequence[float]) -> tuple[float, str]:
    """Two-sided test of no difference between two models on the same rows.

    Were the models alike, each row's difference would as likely have had the other sign. The p-value is the share of all ways
    to choose the signs whose sum is at least as far from 0 as the sum found. For scores of 0 and 1 that is McNemar's exact test.

    Args:
        scores: One number a row.
        baseline: The other model's, in the same order.

    Returns:
        The p-value, 1.0 where no row differs; the test's name, `McNemar exact` or `sign flips`. Beyond 65,536 different sums
        the latter takes 10,000 random ones, the same in every call, and counts the one that was found among them.

    Raises:
        ValueError: The lengths differ.
    """
    if len(scores) != len(baseline):
        raise ValueError(f"{len(scores)} scores beside {len(baseline)} of the baseline")
    binary = _binary(scores) and _binary(baseline)
    name = "McNemar exact" if binary else "sign flips"
    # Differences that are equal but for rounding are one size.
    differences = [round(score - other, 12) for score, other in zip(scores, baseline, strict=True)]
    sizes = sorted(Counter(abs(difference) for difference in differences if difference).items())
    if not sizes:
        return 1.0, name
    largest = math.fsum(size * count for size, count in sizes)
    found = abs(math.fsum(differences)) - 1e-9 * largest  # sums in another order differ in their last bits
    if binary or math.prod(count + 1 for _, count in sizes) <= _MOST_EXACT_SUMS:
        ways = sum(ways for total, ways in _signed_sums(sizes) if abs(total) >= found)
        return ways / 2 ** sum(count for _, count in sizes), name
    draw = random.Random(0).getrandbits
    sums = (sum(size * (2 * draw(count).bit_count() - count) for size, count in sizes) for _ in range(_DRAWS))
    return (1 + sum(abs(total) >= found for total in sums)) / (1 + _DRAWS), name


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _signed_sums(sizes: Sequence[tuple[float, int]]) -> Iterator[tuple[float, int]]:
    """Every sum that signs can give to `count` numbers of each size, with the number of ways to choose the signs."""
    if not sizes:
        yield 0.0, 1
        return
    (size, count), *rest = sizes
    for others, ways in _signed_sums(rest):
        chosen = 1  # ways to choose which of the equal numbers are positive: the next binomial coefficient from the last
        for positive in range(count + 1):
            yield others + size * (2 * positive - count), ways * chosen
            chosen = chosen * (count - positive) // (positive + 1)
