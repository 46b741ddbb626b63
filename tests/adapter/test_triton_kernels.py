"""The GPU kernels, in processes of their own: Triton reads once, when it is imported, whether its interpreter is on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run(arguments: list[str], **variables: str) -> None:
    """Runs Python; a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | variables, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def run_cases(name: str, **variables: str) -> None:
    # Without the conftest files, which load half of transformers.
    run(["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(HERE / name)], **variables)


def test_with_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_cases("triton_cases.py", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_the_card() -> None:
    run_cases("triton_cases.py", TRITON_INTERPRET="0")


@pytest.mark.slow
def test_compiles_for_cards_that_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_cases("triton_compiles.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_the_adapter_needs_no_triton() -> None:
    run(["-c", "import sys; sys.modules['triton'] = None; import abba_cli.adapter"])
