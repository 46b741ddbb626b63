"""Memory that is freed is used again, instead of being asked of the system page by page."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from abba_cli.memory import reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    kept = [torch.ones(1_000_000 + 1000 * i) for i in range(20)]
    return sum(float(one[0]) for one in kept)
step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
def test_freed_memory_is_reused() -> None:
    def run(how: str) -> int:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # 400 MB in 4 KB pages are 100,000 faults, of which glibc spares some by itself.
    assert run("reuse") < 10_000 < 20_000 < run("plain")
