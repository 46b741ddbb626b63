"""Where the factors of a fit begin: from the matrix itself, as a training begins, as PEFT's LoHa does, or at random."""

import math
from typing import Literal

import torch

from abba_cli.adapter.factors import Factors, init_A2, init_pair, svd_init

Start = Literal["svd", "root", "training", "random", "loha"]


def abba_start(restart: int) -> Start:
    """The start of ABBA's fits, the most promising first: from the fourth on they are random."""
    order: tuple[Start, ...] = ("svd", "root", "training")
    return order[restart] if restart < len(order) else "random"


def draw(start: Start, M: torch.Tensor, r1: int, r2: int, seed: int) -> Factors:
    """Make four factors to begin with.

    svd         the first pair is the best of rank r1 for M, the second is all ones and a little noise
    root        each pair is the best of its rank for |M|^(1/2), the second with the signs of M, and a little noise
    training    as a training begins: the first pair from the SVD, B2 zero, A2 uniform
    random      Gaussian, so that the products are as large as M
    loha        as PEFT 0.21's LoHa begins: uniform within sqrt(1 / fan-in), but for the last factor, which is zero

    Args:
        start: Which one.
        M: Shape (m, n), floating, with entries of about 1.
        r1: Rank of the first pair, at most min(m, n).
        r2: Rank of the second.
        seed: The same one gives the same factors.

    Returns:
        Factors of M's type, on its device.
    """
    m, n = M.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match start:
            case "svd":
                B2, A2 = _noise(m, r2), _noise(r2, n)
                B2[:, 0] = A2[0] = 1.0
                pairs = [*svd_init(M, r1, seed), B2, A2]
            case "root":
                root = M.abs().sqrt()
                B2, A2 = svd_init(root * M.sign(), r2, seed)
                # Without noise two equal pairs of a matrix without signs would stay equal under Adam.
                pairs = [*svd_init(root, r1, seed), B2 + _noise(m, r2).to(B2), A2 + _noise(r2, n).to(A2)]
            case "training":
                pairs = [*svd_init(M, r1, seed), torch.zeros(m, r2), init_A2(r2, n)]
            case "random":
                spread = [(m, r1), (r1, n), (m, r2), (r2, n)]
                pairs = [torch.randn(*shape) * (r1 * r2) ** -0.125 for shape in spread]
            case "loha":
                B2, _ = init_pair((m, r2), (r2, n))
                pairs = [*init_pair((m, r1), (r1, n)), B2, torch.zeros(r2, n)]
    return Factors(*(one.to(M) for one in pairs))


def _noise(rows: int, columns: int) -> torch.Tensor:
    return 0.1 / math.sqrt(min(rows, columns)) * torch.randn(rows, columns)
