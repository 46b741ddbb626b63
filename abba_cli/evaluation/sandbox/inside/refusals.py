"""What Python itself refuses to a program where the kernel cannot: it stops plain attempts, not determined ones."""

import os
import sys
from collections.abc import Sequence
from typing import Any

_NEVER = (
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"),
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "pty.spawn"),
    *("os.kill", "os.killpg", "signal.pthread_kill", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function"),
)
_READS = ("os.listdir", "os.scandir", "os.chdir", "glob.glob", "os.getxattr", "os.listxattr")
_WRITES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime"),
    *("os.chmod", "os.chown", "os.chflags", "os.lchflags", "os.setxattr", "os.removexattr"),
)
_AF_UNIX = 1


def install(home: str, visible: Sequence[str]) -> None:
    """Refuse networks, processes, signals, and files outside the home (and, to read, the folders of Python)."""
    writable = (os.path.realpath(home),)
    readable = (*writable, *map(os.path.realpath, visible), "/dev/null", "/dev/urandom")

    def judge(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _NEVER or (event == "socket.__new__" and arguments[1] != _AF_UNIX):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and mode.strip("rbtU") != "") or bool(flags & _WRITING)
            _stay_within(writable if writes else readable, (path,), event)
        elif event in _READS:
            _stay_within(readable, arguments[:1], event)
        elif event in _WRITES:
            _stay_within(writable, arguments[:2], event)

    sys.addaudithook(judge)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _stay_within(folders: Sequence[str], paths: Sequence[Any], event: str) -> None:
    for path in paths:
        if isinstance(path, (str, bytes)):
            real = os.path.realpath(os.fsdecode(path))
            if not any(real == folder or real.startswith(folder + "/") for folder in folders):
                raise PermissionError(f"the sandbox refuses {event} outside the home: {real}")
