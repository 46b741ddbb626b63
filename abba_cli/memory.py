"""Memory of this process and its device: the peak so far, and what is left."""

import ctypes
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


def device_memory() -> int | None:
    """Bytes of the smallest GPU; None without one."""
    return min((torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())), default=None)


def reuse_freed_memory() -> None:
    """Has the C library keep what is freed for the next allocation, where the training is on a CPU.

    glibc gives a large block back to the system when it is freed, and gets a new one, page by page, for the next tensor of the
    same size. What that costs grows with the tensors: nothing in the quickstart, 15% of a step with whole logits
    (benchmarks/LOG.md). Other C libraries have no such setting.
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # malloc.h: M_MMAP_MAX = 0, no block of its own for a large tensor; M_TRIM_THRESHOLD = -1, never shrink the heap;
        # M_TOP_PAD, grow it by 64 MB at a time.
        for parameter, value in ((-4, 0), (-1, -1), (-2, 64 << 20)):
            mallopt(parameter, value)
