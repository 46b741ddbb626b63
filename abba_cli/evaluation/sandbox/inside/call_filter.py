"""The system calls that a jailed process is refused: networks, other processes, namespaces, memory that no limit counts."""

import errno
import os
import struct

from . import kernel

# Number on x86_64, number on aarch64.
_REFUSED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_PRCTL = (157, 167)
_PR_SET_PDEATHSIG = 1
_NAMESPACES = 0x7E020000  # every CLONE_NEW flag that clone takes
_X32_CALLS = 0x40000000

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16


def install() -> None:
    """Refuse the calls to this process and all that it starts.

    Raises:
        OSError: The kernel has no filters, or the machine is of a kind whose call numbers are not known here.
    """
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"not known for {machine}")
    kernel.filter_calls(_program(*_ARCHITECTURES[machine]))


def _program(column: int, architecture: int) -> bytes:
    refuse = 0x00050000 | errno.EPERM
    steps = [(_LOAD, 0, 0, _ARCHITECTURE_AT), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    if architecture == _ARCHITECTURES["x86_64"][1]:
        steps += [(_AT_LEAST, 0, 1, _X32_CALLS), (_RETURN, 0, 0, refuse)]
    for numbers in _REFUSED.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, refuse)]
    # clone3 hides its flags from a filter; where it does not exist, the C library takes clone.
    steps += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, 0x00050000 | errno.ENOSYS)]
    for numbers, test, value in ((_CLONE, _ANY_BIT, _NAMESPACES), (_PRCTL, _EQUAL, _PR_SET_PDEATHSIG)):
        steps += [(_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (test, 0, 1, value)]
        steps += [(_RETURN, 0, 0, refuse), (_LOAD, 0, 0, _NUMBER_AT)]
    steps += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
