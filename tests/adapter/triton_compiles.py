"""The GPU kernels go through Triton's compiler to machine code for cards that need not be there, and use their tensor cores.

Not collected by itself: test_triton_kernels.py runs it in a process of its own, whose Triton then knows no other card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from abba_cli.adapter import triton_kernels as kernels
from abba_cli.adapter import triton_tiles as tiles
from abba_cli.adapter.factors import Factors

M, N = 256, 320


class AbsentCard:
    """What the compiler asks a driver for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are remembered by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> None:
        return None


class Compiled:
    """Stands in for a kernel: compiles the first of its tile sizes instead of launching one."""

    def __init__(self, kernel: Any, codes: list[str]) -> None:
        self.kernel, self.codes = kernel, codes

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def compile_one(*arguments: object, **options: object) -> None:
            tile = self.kernel.configs[0].all_kwargs()
            code = self.kernel.fn.run(*arguments, grid=(1, 1), warmup=True, **options, **tile).asm
            assert code["cubin"]
            self.codes.append(code["ptx"])

        return compile_one


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), (90, torch.float32)], ids=["A100", "H100"])
def test_compiles(monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype) -> None:
    codes: list[str] = []
    triton.runtime.driver.set_active(AbsentCard(capability))
    for name in ("add_delta", "dequantize_4bit", "contract"):
        monkeypatch.setattr(tiles, name, Compiled(getattr(tiles, name), codes))
    factors = Factors(*(torch.zeros(shape, dtype=dtype) for shape in ((M, 16), (16, N), (M, 3), (3, N))))
    matrix = torch.zeros(M, N, dtype=torch.bfloat16)
    kernels.add_delta(matrix, [(factors, 0.7)], False, torch.bfloat16)
    kernels.contract(matrix, factors, 0.7)
    packed, absmax, code = torch.zeros(M * N // 2, 1, dtype=torch.uint8), torch.zeros(M * N // 64), torch.zeros(16)
    kernels.dequantize_4bit(packed, absmax, code, 64, (M, N), [(factors, 0.7)], torch.bfloat16)
    assert len(codes) == 4  # contract is launched twice
    assert all("mma.sync" in code or "wgmma" in code for code in codes)
