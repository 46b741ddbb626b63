"""A root of its own for a jail: read-only Python and system libraries, an empty home and /tmp, and nothing else."""

import os
from collections.abc import Iterator, Sequence

from . import kernel

HOME = "/sandbox"

# Where the new root is put together. Every Linux has the folder, and nothing that Python needs lies under it.
_SITE = "/proc"
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_ROOT_BYTES = 1 << 20
_FILES = 4096


def enter(visible: Sequence[str], home_bytes: int, uid: int) -> None:
    """Replace the root of this mount namespace, and change to the new home.

    Args:
        visible: Absolute paths of folders that stay to be seen, read-only, beside the system's libraries.
        home_bytes: Room in the home, and again in /tmp.
        uid: Owner of both.

    Raises:
        OSError: A mount was refused.
    """
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    # The sources are held open, because the folder that is mounted next may lie over one of them.
    sources = {path: os.open(path, os.O_PATH) for path in _outermost((*visible, *_SYSTEM, *_DEVICES))}
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    folder_of_descriptors = os.open("/proc/self/fd", os.O_PATH)
    kernel.mount("tmpfs", _SITE, "tmpfs", kernel.MS_NOSUID, f"mode=755,size={_ROOT_BYTES}")
    for folder in ("/tmp", HOME):
        os.makedirs(_SITE + folder)
        options = f"mode=700,uid={uid},size={home_bytes},nr_inodes={_FILES}"
        kernel.mount("tmpfs", _SITE + folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    os.chdir(folder_of_descriptors)
    for path, descriptor in sources.items():
        _show(str(descriptor), _SITE + path, os.path.isdir(path))
        os.close(descriptor)
    os.close(folder_of_descriptors)
    for path, target in links.items():
        os.symlink(target, _SITE + path)
    kernel.change_root(_SITE)
    kernel.mount(None, "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID)
    os.chdir(HOME)


def _show(source: str, target: str, is_folder: bool) -> None:
    if is_folder:
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    if not target.startswith(_SITE + "/dev/"):  # a device's file has to stay one
        kernel.make_read_only(target)


def _outermost(paths: Sequence[str]) -> Iterator[str]:
    """The paths that exist, without links of the system's own and without what lies in another of them."""
    kept: list[str] = []
    for path in sorted(path for path in paths if os.path.exists(path) and not (path in _SYSTEM and os.path.islink(path))):
        if not any(path == other or path.startswith(other + "/") for other in kept):
            kept.append(path)
    return iter(kept)
