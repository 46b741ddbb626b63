"""The experiment: each method fits each matrix at each budget, from several starts; what is in the table is not done again."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from abba_cli.disk import disk_errors
from abba_cli.errors import DataError
from abba_cli.events import Event, Stage
from abba_cli.reconstruction.matrices import Target
from abba_cli.reconstruction.records import Fit, read_fits, write_fits
from abba_cli.reconstruction.solving import MOST_SWEEPS, adam, alternating_least_squares, lora_errors
from abba_cli.reconstruction.starts import Start, abba_start, draw

Method = Literal["lora", "abba", "loha"]
Solver = Literal["als", "adam"]
ADAM_STEPS_PER_SWEEP = 4  # which takes about as long where r1 and r2 are 16, and ends as low


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Args:
        ranks: LoRA's ranks; the other methods get as many parameters.
        methods: Which ones.
        solver: Of ABBA and LoHa.
        restarts: Fits of ABBA and LoHa for each matrix and rank.
        seed: Of the starts.
        sweeps: The most that a fit may take; Adam makes `ADAM_STEPS_PER_SWEEP` steps for each.
    """

    ranks: Sequence[int]
    methods: Sequence[Method] = ("lora", "abba", "loha")
    solver: Solver = "als"
    restarts: int = 4
    seed: int = 0
    sweeps: int = MOST_SWEEPS


def split(rank: int) -> tuple[int, int]:
    """r1 and r2 of as many parameters as a LoRA has: r1 + r2 = rank, so rank * (m + n) for both."""
    return rank // 2, rank - rank // 2


def reconstruct(targets: Sequence[Target], plan: Plan, output: Path, listen: Callable[[Event], None]) -> list[Fit]:
    """Make the fits that are not in the table of the output folder yet.

    Args:
        targets: The matrices.
        plan: What is asked for.
        output: The folder; its table is written after each fit.
        listen: Gets a `Stage` for each fit.

    Returns:
        The fits that were asked for, those of earlier calls among them.

    Raises:
        DataError: A matrix has no numbers, or a rank does not fit it.
        RunError: The table cannot be read or written.
    """
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    fits = {fit.key: fit for fit in read_fits(output)}
    for target in targets:  # all of them before the first fit, which may take minutes
        check_matrix(target.name, target.load(), plan.ranks)
    asked = []
    each = sum(len(plan.ranks) * (1 if method == "lora" else plan.restarts) for method in plan.methods)
    for place, target in enumerate(targets):
        M = target.load()
        M = M / M.double().square().mean().sqrt()  # errors are relative, and the solvers want entries of about 1
        digest = hashlib.sha256(M.numpy().tobytes()).hexdigest()[:12]
        for done, (fit, make) in enumerate(_fits(target, M, digest, plan)):
            listen(Stage(f"{target.name}, {fit.method}, rank {fit.rank}", place * each + done, len(targets) * each))
            if fit.key not in fits:
                fits[fit.key] = make()
                write_fits(output, list(fits.values()))
            asked.append(fits[fit.key])
    return asked


def check_matrix(name: str, M: torch.Tensor, ranks: Sequence[int]) -> None:
    """Make sure that a matrix can be fitted.

    Raises:
        DataError: It is zero or not finite, or a rank is larger than its smaller side.
    """
    if not M.isfinite().all():
        raise DataError(f"{name} holds values that are no numbers (inf or nan)")
    if not M.any():
        raise DataError(f"{name} is zero everywhere; there is nothing to approximate")
    if max(ranks) > min(M.shape):
        raise DataError(
            f"--ranks: {max(ranks)} is too large for {name} of {M.shape[0]} x {M.shape[1]}; expected {min(M.shape)} or less"
        )


def _fits(target: Target, M: torch.Tensor, digest: str, plan: Plan) -> Iterator[tuple[Fit, Callable[[], Fit]]]:
    """Each fit that is asked for, with no error yet, and what makes it."""
    m, n = M.shape
    on_device = M.cuda() if torch.cuda.is_available() else M
    lora = functools.cache(lambda: dict(zip(plan.ranks, lora_errors(on_device, plan.ranks), strict=True)))
    for rank in plan.ranks:
        r1, r2 = split(rank)
        for method in plan.methods:
            pending = Fit(target.name, target.group, digest, m, n, method, rank=rank, parameters=rank * (m + n))
            if method == "lora":
                yield pending, functools.partial(_decompose, pending, lora)
                continue
            for restart in range(plan.restarts):
                start = "loha" if method == "loha" else abba_start(restart)
                pending = replace(
                    pending, solver=plan.solver, r1=r1, r2=r2, restart=restart, start=start, seed=plan.seed, limit=plan.sweeps
                )
                yield pending, functools.partial(_solve, pending, on_device, start)


def _decompose(pending: Fit, errors: Callable[[], dict[int, float]]) -> Fit:
    began = time.perf_counter()
    return replace(pending, error=errors()[pending.rank], seconds=round(time.perf_counter() - began, 3))


def _solve(pending: Fit, M: torch.Tensor, start: Start) -> Fit:
    began = time.perf_counter()
    # A seed of its own for each restart, and another one than those of the next seed's.
    factors = draw(start, M, pending.r1, pending.r2, seed=1000 * pending.seed + pending.restart)
    if pending.solver == "als":
        solution = alternating_least_squares(M, factors, most_sweeps=pending.limit)
    else:
        solution = adam(M, factors, steps=ADAM_STEPS_PER_SWEEP * pending.limit)
    seconds = round(time.perf_counter() - began, 3)
    return replace(pending, error=solution.error, steps=len(solution.errors) - 1, seconds=seconds)
