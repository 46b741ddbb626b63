"""FSDP2: base and factors sharded over two real processes, gradients those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_for_sharding import adapted_model, batch

SCRIPT = Path(__file__).with_name("sharded_step.py")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_gradients_are_those_of_one_process(dtype: str, tolerance: float, checkpointing: bool, tmp_path: Path) -> None:
    found = tmp_path / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*command, str(found), dtype, str(checkpointing)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    model = adapted_model(getattr(torch, dtype), checkpointing)
    model(input_ids=batch(), labels=batch()).loss.backward()
    expected = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    gradients = torch.load(found, weights_only=True)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        reference = expected[name]
        assert reference is not None
        assert reference.abs().max() > 0
        assert (gradient - reference).norm() <= tolerance * reference.norm(), name
