"""What a run in the sandbox may use, and what it finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one run; all but the wall clock hold for the program and for its tests separately."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    """Of each process."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    processes: int = 16
    """Processes and threads together; none beside the first where there is no process namespace."""
    file_bytes: int = 32 << 20
    """Largest file, and room in the home and in /tmp."""
    output_bytes: int = 16 << 20
    """Largest arguments or result of one call. What is printed is thrown away."""


@dataclass(frozen=True)
class Verdict:
    """Whether the tests passed, and why not, in one short line."""

    passed: bool
    reason: str
