"""Shutting the current process in, step by step; each step that this machine refuses is named, and the others still taken."""

import errno
import os
import resource
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from . import call_filter, kernel, private_root

_NAMESPACES = {
    "mount": kernel.CLONE_NEWNS,
    "process": kernel.CLONE_NEWPID,
    "network": kernel.CLONE_NEWNET,
    "IPC": kernel.CLONE_NEWIPC,
    "host name": kernel.CLONE_NEWUTS,
}
_MOST_PROCESS_NUMBER = 1 << 22
_MOST_DESCRIPTORS = 1 << 16
_FIRST_SPARE_USER = 1_600_000_000  # far from what distributions and directory services give out


@dataclass(frozen=True)
class Bounds:
    """What one jailed process may use."""

    cpu_seconds: int
    memory_bytes: int
    processes: int
    file_bytes: int


def enter(visible: Sequence[str], bounds: Bounds, keep: Sequence[int]) -> list[str]:
    """Shut the process in. It may return in a child, for which the caller's process then only waits, and ends with it.

    Args:
        visible: Folders that stay to be seen, read-only.
        bounds: Of the process.
        keep: Descriptors that stay open, beside the standard ones.

    Returns:
        The protections that this machine refused, each with the reason. Empty: all are in force.
    """
    steps = _Steps([])
    linux = sys.platform == "linux"
    user = os.getuid()
    alone = False
    if linux:
        steps.take("end with the parent", kernel.die_with_parent)
        _be_first_out_of_memory()
        if user:
            steps.take("user namespace", lambda: _own_user_namespace(user, os.getgid()))
        for name, flag in _NAMESPACES.items():
            steps.take(f"{name} namespace", lambda flag=flag: kernel.unshare(flag))  # type: ignore[misc]
        alone = not steps.refused("process namespace")
        spare = user or _spare_user()
        if alone:
            _go_on_in_a_child()
        if not steps.refused("mount namespace"):
            steps.take("private file system", lambda: private_root.enter(visible, bounds.file_bytes, spare))
        if not user:
            steps.take("user of its own", lambda: _become(spare))
            steps.take("end with the parent", kernel.die_with_parent)  # a change of user has taken it back
        steps.take("dropped capabilities", kernel.drop_capabilities)
    else:
        steps.refuse("namespaces, private file system, filter of system calls", f"only on Linux, and this is {sys.platform}")
    _close_all_but(keep)
    # Without a namespace of its own nothing finds what a process leaves behind, so it starts none.
    for name, what, most in _limits(bounds, bounds.processes if alone else 0):
        steps.take(f"limit of {name}", lambda what=what, most=most: resource.setrlimit(what, (most, most)))  # type: ignore[misc]
    if linux:
        steps.take("no new rights", kernel.forbid_new_rights)
        steps.take("filter of system calls", call_filter.install)
    return list(dict.fromkeys(steps.failures))


@dataclass(frozen=True)
class _Steps:
    failures: list[str]

    def take(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except (OSError, ValueError) as error:
            self.refuse(name, (isinstance(error, OSError) and error.strerror) or str(error))

    def refuse(self, name: str, reason: str) -> None:
        self.failures.append(f"{name} ({reason})")

    def refused(self, name: str) -> bool:
        return any(failure.startswith(f"{name} (") for failure in self.failures)


def _be_first_out_of_memory() -> None:
    """When memory runs out, the kernel shall end this process and not the one that evaluates."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _own_user_namespace(user: int, group: int) -> None:
    kernel.unshare(kernel.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _go_on_in_a_child() -> None:
    """Fork into the new process namespace, whose first process the child is: when it ends, everything in there does."""
    ours, its = os.pipe()
    child = os.fork()
    if child:
        _close_all_but([its])  # the other side of the link must see when the child has ended
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    os.close(its)
    os.setsid()  # a signal to its process group must not reach the parent's
    kernel.die_with_parent()
    if select.select([ours], [], [], 0)[0]:  # the parent died before this could be asked for
        os._exit(1)
    os.close(ours)


def _spare_user() -> int:
    """A user id that nobody has and no other jail: the limit of processes counts by user, and never binds root."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    first, _, count = max(ranges, key=lambda numbers: numbers[2])
    if count > _FIRST_SPARE_USER + _MOST_PROCESS_NUMBER:
        return _FIRST_SPARE_USER + os.getpid()
    return first + count - 1 - os.getpid() % max(1, count // 4)


def _become(user: int) -> None:
    os.seteuid(user)
    try:
        os.stat(os.__file__)
    except PermissionError:
        raise OSError(errno.EACCES, "Python lies in a folder that only root may enter") from None
    finally:
        os.seteuid(0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _close_all_but(keep: Sequence[int]) -> None:
    edges = [2, *sorted(keep), _MOST_DESCRIPTORS]
    for low, high in pairwise(edges):
        os.closerange(low + 1, high)


def _limits(bounds: Bounds, processes: int) -> list[tuple[str, int, int]]:
    return [
        ("CPU time", resource.RLIMIT_CPU, bounds.cpu_seconds),
        ("memory", resource.RLIMIT_AS, bounds.memory_bytes),
        ("file size", resource.RLIMIT_FSIZE, bounds.file_bytes),
        ("open files", resource.RLIMIT_NOFILE, 64),
        ("core dumps", resource.RLIMIT_CORE, 0),
        ("processes", resource.RLIMIT_NPROC, processes),
    ]
