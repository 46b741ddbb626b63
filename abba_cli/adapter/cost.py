"""Which way of computing a layer is the fastest: a roofline over the operations that each way makes.

Shape legend
    m, n, r1, r2, R = r1 * r2, T     out and in features, ranks, rank bound, tokens

Forward goes through the effective weight W0 + dW, or adds s (x A_kr^T) B_kr^T to the base's output ("factored").
The factors' gradients are contracted from the dense G = dy^T x (m, n), or from those of the Khatri-Rao factors. Each operation is
taken to last as long as its arithmetic, or as its memory traffic, whichever is longer, plus a fixed time for the call.
`benchmarks/cost_model.py` compares the choices with the measured best.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Kernel = Literal["auto", "factored", "effective"]
"""What a user may ask for; the factors' gradients are the cheaper ones of the two in any case."""


class Way(NamedTuple):
    """One way of computing a layer.

    Attributes:
        effective: Forward and dx through W0 + dW; otherwise through A_kr and B_kr.
        dense: The factors' gradients through G; otherwise through those of A_kr and B_kr.
    """

    effective: bool
    dense: bool


class Device(NamedTuple):
    """What a device does in a second. Only ratios matter to the choice.

    Attributes:
        low: FLOP/s of large matrix products in 16 bits.
        full: FLOP/s of large matrix products in 32 bits.
        thin: Share of these that a product with one side of at most 64 reaches.
        bandwidth: Bytes/s of elementwise operations.
        call: Seconds that an operation takes at least.
    """

    low: float
    full: float
    thin: float
    bandwidth: float
    call: float


# Two cores of an AMD EPYC with AVX512-BF16 (single operations timed, benchmarks/LOG.md). More cores move all but the last alike.
CPU = Device(low=370e9, full=165e9, thin=0.65, bandwidth=45e9, call=12e-6)
CPU_WITHOUT_BF16 = CPU._replace(low=60e9)  # oneDNN then converts to float32 and back
# H100 and A100 from their data sheets, at the half that large products of real models reach; not measured.
GPU = Device(low=400e12, full=60e12, thin=0.2, bandwidth=2e12, call=6e-6)


class Shape(NamedTuple):
    """A call: T tokens through a layer (m, n) with adapters of these ranks, in 16 or 32 bits a number.

    Attributes:
        ranks: (r1, r2) of each active adapter.
        shared: Whether dW shares the base layer's product instead of needing one of its own.
        training: Whether gradients will be asked for.
    """

    T: int
    m: int
    n: int
    ranks: tuple[tuple[int, int], ...]
    bytes_per_number: int
    shared: bool
    training: bool


def choose(shape: Shape, kernel: Kernel, device: torch.device) -> Way:
    """Returns the cheapest way of computing a call that `kernel` allows."""
    return _cheapest(shape, kernel, device.type)


@lru_cache(maxsize=4096)
def _cheapest(shape: Shape, kernel: str, device_type: str) -> Way:
    device = profile(device_type)
    allowed = [name == "effective" for name in ("effective", "factored") if kernel in ("auto", name)]
    return min(
        (Way(effective, dense) for effective in allowed for dense in (True, False)), key=lambda way: seconds(shape, way, device)
    )


def profile(device_type: str) -> Device:
    """Returns the figures of a kind of device."""
    if device_type != "cpu":
        return GPU
    return CPU if _has_bf16() else CPU_WITHOUT_BF16


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def seconds(shape: Shape, way: Way, device: Device) -> float:
    """Estimates one forward and, in training, one backward of a call, without what every way has to do."""
    cost = _Cost(shape.bytes_per_number, device)
    T, m, n, size = shape.T, shape.m, shape.n, shape.bytes_per_number
    passes = 2 if shape.training else 1
    total = 0.0
    if way.effective and not shape.shared:
        total += passes * cost.product(T, n, m)
    if shape.training and way.dense:
        total += cost.product(m, T, n)
    for r1, r2 in shape.ranks:
        R = r1 * r2
        if way.effective:
            total += passes * (cost.product(m, r1, n) + cost.product(m, r2, n) + cost.elementwise(4 * m * n * size))
        else:
            factors = cost.elementwise(2 * R * (m + n) * size)
            total += passes * (factors + cost.product(T, n, R) + cost.product(T, R, m) + cost.elementwise(3 * T * m * size))
        if shape.training and way.dense:
            total += 2 * (cost.product(m, n, r1) + cost.product(m, n, r2)) + 2 * cost.elementwise(3 * m * n * size)
        elif shape.training:
            total += cost.product(T, n, R) + cost.product(m, T, R) + cost.product(R, T, n) + 6 * cost.elementwise(R * (m + n) * 4)
            if way.effective:  # otherwise dS is at hand
                total += cost.product(T, m, R)
    return total


class _Cost(NamedTuple):
    size: int
    device: Device

    def product(self, a: int, b: int, c: int) -> float:
        """Seconds of (a, b) @ (b, c)."""
        rate = self.device.low if self.size == 2 else self.device.full
        if min(a, b, c) <= 64:
            rate *= self.device.thin
        return max(2 * a * b * c / rate, (a * b + b * c + a * c) * self.size / self.device.bandwidth) + self.device.call

    def elementwise(self, moved: int) -> float:
        """Seconds of passing `moved` bytes through the processor."""
        return moved / self.device.bandwidth + self.device.call
