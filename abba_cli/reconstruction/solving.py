"""The best LoRA in closed form, and the best (B1 A1) * (B2 A2) by alternating least squares or by Adam.

Shape legend
    M (m, n)       the matrix to approximate
    W (m, n)       the product of the pair that is held fixed while the other one is solved for
    r1, r2, B1, A1, B2, A2     as in `adapter/factors.py`

Errors are squared and relative: ||M - (B1 A1) * (B2 A2)||^2 / ||M||^2. The scale s is 1 here: the factors take up any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from abba_cli.adapter.factors import Factors, delta_weight

TOLERANCE = 1e-6  # a sweep that lowers the error by a smaller share of it is the last
MOST_SWEEPS = 500
ADAM_RATE = 0.05  # of 0.01, 0.03, 0.05 and 0.1 none was better by more than 0.5% of the error (benchmarks/LOG.md)


@dataclass(frozen=True)
class Solution:
    """What a solver came to.

    Args:
        factors: The four factors.
        errors: Before the first sweep (or step) and after each.
    """

    factors: Factors
    errors: Sequence[float]

    @property
    def error(self) -> float:
        """The error of the factors."""
        return self.errors[-1]


def relative_error(M: torch.Tensor, factors: Factors) -> float:
    """Returns ||M - (B1 A1) * (B2 A2)||^2 / ||M||^2."""
    return ((M - delta_weight(factors, 1.0)).square().sum() / M.square().sum()).item()


def lora_errors(M: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """The error of the best matrix of each rank: the share of the squared singular values behind it (Eckart and Young)."""
    energy = torch.linalg.svdvals(M.double()).square()
    return [(energy[rank:].sum() / energy.sum()).item() for rank in ranks]


def alternating_least_squares(
    M: torch.Tensor, start: Factors, tolerance: float = TOLERANCE, most_sweeps: int = MOST_SWEEPS
) -> Solution:
    """Solve for one factor after the other, each exactly, until the error stands still.

    With three factors fixed the error is an ordinary least-squares problem in the fourth, and falls apart into one small problem
    for each row of a B or column of an A. Plain sweeps become slow near the end, so each starts from a point ahead of the last
    two; where that does not lower the error, it starts from the last point, from where it cannot rise.

    Args:
        M: Shape (m, n), float32 or float64, with entries of about 1.
        start: Four factors of its type. One may be zero, as at the start of a training.
        tolerance: A sweep that lowers the error by a smaller share of it is the last.
        most_sweeps: The last in any case.

    Returns:
        The factors, and errors that never rise.
    """
    current, previous, errors, momentum = start, start, [relative_error(M, start)], 0.5
    for _ in range(most_sweeps):
        ahead = Factors(*(one + momentum * (one - before) for one, before in zip(current, previous, strict=True)))
        found = _sweep(M, ahead)
        error = relative_error(M, found)
        if error < errors[-1]:
            momentum = min(1.0, 1.05 * momentum)
        else:
            momentum /= 1.5
            found = _sweep(M, current)
            error = relative_error(M, found)
            if not error < errors[-1]:
                break  # nothing is left but rounding
        previous, current = current, found
        errors.append(error)
        if errors[-2] - error < tolerance * error:
            break
    return Solution(current, errors)


def _sweep(M: torch.Tensor, factors: Factors) -> Factors:
    B1, A1, B2, A2 = factors
    B1, A1 = _solve_pair(M, B2 @ A2, B1, A1)
    B2, A2 = _solve_pair(M, B1 @ A1, B2, A2)
    return Factors(B1, A1, B2, A2)


def _solve_pair(M: torch.Tensor, W: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B = solve_rows(M, W, A, B)
    return B, solve_rows(M.T, W.T, B.T, A.T).T


def solve_rows(M: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The B that minimises ||M - W * (B A)||^2 for a fixed A: for row i, (A diag(W_i^2) A^T) b_i = A (W_i * M_i).

    Args:
        M: Shape (m, n).
        W: Shape (m, n).
        A: Shape (r, n).
        B: The last one, (m, r). What the equations leave open, such as all of a row in which W is zero, stays as it is there: a
            weight of rounding's size holds the result to B, which can slow the descent but never turn it.

    Returns:
        Shape (m, r).
    """
    rank = A.shape[0]
    rows, columns = torch.triu_indices(rank, rank, device=A.device)
    half = W.square() @ (A[rows] * A[columns]).T
    normal = half.new_empty(M.shape[0], rank, rank)
    normal[:, rows, columns] = half
    normal[:, columns, rows] = half
    diagonal = normal.diagonal(dim1=1, dim2=2)
    trace = diagonal.sum(1, keepdim=True)
    ridge = 10 * torch.finfo(M.dtype).eps * (trace + trace.mean()) + torch.finfo(M.dtype).tiny
    diagonal += ridge
    right = (W * M) @ A.T + ridge * B
    factor = torch.linalg.cholesky_ex(normal).L
    return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]


def adam(M: torch.Tensor, start: Factors, steps: int, learning_rate: float = ADAM_RATE) -> Solution:
    """Follow the gradient of the error in all four factors with Adam, under a cosine schedule; for comparison.

    Args:
        M: Shape (m, n), with entries of about 1.
        start: Four factors of its type.
        steps: So many.
        learning_rate: The first one.
    """
    free = Factors(*(one.clone().requires_grad_() for one in start))
    # The second beta forgets within 100 steps: gradients fall by orders of magnitude on the way.
    optimizer = torch.optim.Adam(free, lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    energy = M.square().sum()
    errors = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (M - delta_weight(free, 1.0)).square().sum() / energy
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        errors.append(loss.item())
    found = Factors(*(one.detach() for one in free))
    return Solution(found, [*errors, relative_error(M, found)])
