"""The processes that share an evaluation's rows: those that accelerate or torchrun started, on GPUs or on a CPU."""

from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

_PATIENCE = timedelta(days=7)  # of a process that waits for slower ones; the default ends an evaluation after minutes


def join_processes() -> Any:
    """This process among the others; must be asked before anything else looks at accelerate's state."""
    # Without being told, accelerate takes a process group on a machine without accelerator for a single process.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
