"""Memory of this process and its device: the peak so far, and what is left."""

import resource
import sys
from pathlib import Path

import psutil
import torch


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of the process."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_process_memory()


def peak_process_memory() -> int:
    """Peak resident memory of the process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: Linux has it begin with what the parent process held when it started this one.
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
