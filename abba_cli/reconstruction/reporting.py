"""What the fits say: mean errors by matrix or type of layer, a one-line answer, and both as Markdown."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from abba_cli.evaluation.reporting.tables import escape_markdown, markdown_row
from abba_cli.reconstruction.records import Fit

LABELS = {"lora": "LoRA", "abba": "ABBA", "loha": "LoHa's start"}
_RIVALS = {"lora": "LoRA's", "loha": "that from LoHa's start"}
_NAMED_LOSSES = 3
_LEVEL = 0.01  # errors that differ by a smaller share of the larger one are called level: another start moves them as much


@dataclass(frozen=True)
class Duel:
    """Two methods over all pairs of matrix and rank, the best of the restarts of each.

    Args:
        rival: Whom ABBA is compared with.
        lower: In how many pairs ABBA's error is lower.
        level: In how many they are within 1% of each other.
        higher: The pairs in which ABBA's error is higher, as names.
        ratio: The median of ABBA's error over the rival's.
    """

    rival: str
    lower: int
    level: int
    higher: Sequence[str]
    ratio: float


@dataclass(frozen=True)
class Summary:
    """Errors by group, method and rank.

    Args:
        groups: Matrices, or types of layers.
        methods: In the order of the tables.
        ranks: Ascending.
        sizes: Matrices of each group.
        errors: The best of the restarts, as a mean over the matrices of a group.
        spread: The lowest and highest error of all fits of a group.
        duels: ABBA beside each other method.
        starts: How often each start was ABBA's best.
    """

    groups: Sequence[str]
    methods: Sequence[str]
    ranks: Sequence[int]
    sizes: Mapping[str, int]
    errors: Mapping[tuple[str, str, int], float]
    spread: Mapping[tuple[str, str, int], tuple[float, float]]
    duels: Sequence[Duel]
    starts: Mapping[str, int]


def summarise(fits: Sequence[Fit]) -> Summary:
    """Put the fits of one call together."""
    groups = list(dict.fromkeys(fit.group for fit in fits))
    methods = [method for method in LABELS if any(fit.method == method for fit in fits)]
    best: dict[tuple[str, str, str, int], Fit] = {}
    for fit in fits:
        key = (fit.group, fit.matrix, fit.method, fit.rank)
        if key not in best or fit.error < best[key].error:
            best[key] = fit
    errors: dict[tuple[str, str, int], list[float]] = {}
    everything: dict[tuple[str, str, int], list[float]] = {}
    for (group, _, method, rank), fit in best.items():
        errors.setdefault((group, method, rank), []).append(fit.error)
    for fit in fits:
        everything.setdefault((fit.group, fit.method, fit.rank), []).append(fit.error)
    return Summary(
        groups=groups,
        methods=methods,
        ranks=sorted({fit.rank for fit in fits}),
        sizes={group: len({fit.matrix for fit in fits if fit.group == group}) for group in groups},
        errors={key: statistics.fmean(values) for key, values in errors.items()},
        spread={key: (min(values), max(values)) for key, values in everything.items()},
        duels=[_duel(best, rival) for rival in methods if rival != "abba" and "abba" in methods],
        starts=Counter(fit.start for (_, _, method, _), fit in best.items() if method == "abba"),
    )


def _duel(best: Mapping[tuple[str, str, str, int], Fit], rival: str) -> Duel:
    pairs = [
        (f"{matrix} at rank {rank}", fit.error, best[group, matrix, rival, rank].error)
        for (group, matrix, method, rank), fit in best.items()
        if method == "abba"
    ]
    apart = [(name, mine, theirs) for name, mine, theirs in pairs if abs(mine - theirs) > _LEVEL * max(mine, theirs)]
    return Duel(
        rival=rival,
        lower=sum(mine < theirs for _, mine, theirs in apart),
        level=len(pairs) - len(apart),
        higher=[name for name, mine, theirs in apart if mine > theirs],
        ratio=statistics.median(mine / theirs if theirs else 1.0 for _, mine, theirs in pairs),
    )


def answer(summary: Summary) -> str:
    """One line for a person who asks which method holds these matrices best."""
    said = []
    for duel in summary.duels:
        named = ", ".join(duel.higher[:_NAMED_LOSSES])
        more = f" and {len(duel.higher) - _NAMED_LOSSES} more" if len(duel.higher) > _NAMED_LOSSES else ""
        cases = duel.lower + duel.level + len(duel.higher)
        said.append(
            f"below {_RIVALS[duel.rival]} in {duel.lower} of {cases} cases, within 1% of it in {duel.level}, above it in "
            f"{len(duel.higher)}{f' ({named}{more})' if named else ''}, median ratio {duel.ratio:.2f}"
        )
    return (
        f"At equal numbers of parameters ABBA's error is {'; '.join(said)}." if said else "ABBA and no rival: nothing to compare."
    )


def grid(summary: Summary) -> tuple[list[str], list[tuple[list[str], list[bool]]]]:
    """Headings, and for each line its cells and which of them are the lowest error of their group and rank."""
    lines = []
    for group in summary.groups:
        size = summary.sizes[group]
        name = f"{group} ({size} layers)" if size > 1 else group
        lowest = {rank: min(summary.errors[group, method, rank] for method in summary.methods) for rank in summary.ranks}
        for place, method in enumerate(summary.methods):
            errors = [summary.errors[group, method, rank] for rank in summary.ranks]
            marks = [error == lowest[rank] for error, rank in zip(errors, summary.ranks, strict=True)]
            lines.append(([name if place == 0 else "", LABELS[method], *map(show_error, errors)], [False, False, *marks]))
    return ["matrix", "method", *(f"rank {rank}" for rank in summary.ranks)], lines


def show_error(error: float) -> str:
    """Three digits, however small."""
    return f"{error:.3f}" if error >= 0.0995 else f"{error:.4f}" if error >= 0.00095 else f"{error:.1e}"


def markdown(summary: Summary, solver: str, restarts: int) -> str:
    """The answer, the table, and how its numbers came about."""
    headings, lines = grid(summary)
    rows = [
        markdown_row([f"**{cell}**" if mark else escape_markdown(cell) for cell, mark in zip(cells, marks, strict=True)])
        for cells, marks in lines
    ]
    text = [
        answer(summary),
        "",
        markdown_row(headings),
        "|" + "|".join([" --- ", " --- ", *[" ---: "] * len(summary.ranks)]) + "|",
        *rows,
        "",
        *(f"- {note}" for note in notes(summary, solver, restarts)),
    ]
    return "\n".join(text) + "\n"


def notes(summary: Summary, solver: str, restarts: int) -> list[str]:
    """What a reader of the table has to know."""
    told = [
        "Squared relative error, the lowest in bold or with a star; each method has as many parameters as a LoRA of that rank."
    ]
    if any(method != "lora" for method in summary.methods):
        way = "alternating least squares" if solver == "als" else "Adam"
        told.append(
            f"LoRA by SVD, which is exact; the others by {way}, the best of {restarts} starts, which may not be the best of all."
        )
    if summary.starts:
        told.append("ABBA's best start: " + ", ".join(f"{name} {count}" for name, count in summary.starts.items()) + ".")
    if any(size > 1 for size in summary.sizes.values()):
        told.append("Means over the layers of a type, each counting alike.")
    return told
