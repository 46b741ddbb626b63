"""The Linux calls that Python 3.11 does not offer: namespaces, mounts, capabilities, rights that cannot come back."""

import ctypes
import errno
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITIES_VERSION_3 = 0x20080522
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SIGKILL = 9

_MOUNT_SETATTR = 442  # the same on every architecture
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def unshare(flags: int) -> None:
    """Leave the namespaces shared with the parent; a process namespace begins with the next child."""
    _call("unshare", flags)


def die_with_parent() -> None:
    """Ask to be killed when the parent dies; a change of user id takes it back."""
    _call("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(_SIGKILL), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def forbid_new_rights() -> None:
    """No program started from here gains rights, whatever its file says."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def filter_calls(instructions: bytes) -> None:
    """Judge every later system call by a BPF program, given as 8-byte instructions."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = _FilterProgram(len(instructions) // 8, ctypes.cast(code, ctypes.c_void_p))
    _call("prctl", _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program))


def drop_capabilities() -> None:
    """Give up every capability for good."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION_3, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2); None where the kernel wants no value."""
    _call("mount", _path(source), _path(target), _path(kind), ctypes.c_ulong(flags), _path(options or None))


def make_read_only(target: str) -> None:
    """Make a bound folder and what is mounted under it read-only; only the folder itself before Linux 5.12."""
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    try:
        _call("syscall", *_longs(_MOUNT_SETATTR, _AT_FDCWD), _path(target), *_longs(_AT_RECURSIVE), attributes, *_longs(32))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        # A user namespace may not take back what the source had, such as noexec; statvfs reports in the same bits as mount.
        inherited = os.statvfs(target).f_flag & 0x0F
        mount(None, target, None, MS_REMOUNT | MS_BIND | flags | inherited)


def change_root(folder: str) -> None:
    """Make a mounted folder the root, and let go of the old one."""
    os.chdir(folder)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"not known for {os.uname().machine}")
    _call("syscall", *_longs(number), b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def _call(name: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _path(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _longs(*numbers: int) -> tuple[ctypes.c_long, ...]:
    return tuple(ctypes.c_long(number) for number in numbers)
