"""Starts `sharded_runs.py` in several processes, for the tests of what they share out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("sharded_runs.py")
# In a folder of its own: where it is installed, accelerate imports it into every process, and it prints as it comes.
DEEPSPEED = Path(sys.prefix) / "deepspeed"


def launch(recipe: Path, out: Path, *runs: str, processes: int = 2) -> list[dict[str, Any]]:
    """Make runs of a recipe, one after the other.

    Args:
        recipe: The recipe.
        out: The run directory of each will be in it, named by its number.
        runs: `KEY=VALUE;KEY=VALUE` of each.
        processes: How many make them together; one is not started through torchrun.

    Returns:
        What rank 0 found in each.
    """
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    with_deepspeed = any("deepspeed" in run for run in runs)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(DEEPSPEED) if with_deepspeed else None]))
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *together, str(SCRIPT), str(recipe), str(out), *runs],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{number}.json").read_text()) for number in range(len(runs))]
