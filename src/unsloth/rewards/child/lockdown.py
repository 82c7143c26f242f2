"""Give up, for good, everything that a pure function does not need. Linux; through ctypes, without a dependency.

Layers, each independent of the others:

- ``limits``: memory, processor time, no file may grow, no core dump (setrlimit).
- ``namespaces``: own users, processes, network (without any interface), mounts, host name (unshare).
- ``empty_root``: the root is an empty read-only folder (pivot_root); needs ``namespaces``.
- ``capabilities``: none, and none to be gained (capset, no_new_privs).
- ``landlock``: no path may be opened, no port bound or connected (Landlock).
- ``seccomp``: only memory, clocks, and reading and writing the descriptors already open (:mod:`seccomp`).
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import seccomp  # type: ignore[import-not-found]

LAYERS = ("limits", "namespaces", "empty_root", "capabilities", "landlock", "seccomp")

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_NOBODY = 65534


def namespaces(libc: ctypes.CDLL) -> str:
    """Move into own namespaces; processes forked from here on are in the new process namespace."""
    if not sys.platform.startswith("linux"):
        return f"not Linux but {sys.platform}"
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    if libc.unshare(flags | _CLONE_NEWUSER) != 0:
        reason = os.strerror(ctypes.get_errno())
        return "" if user == 0 and libc.unshare(flags) == 0 else f"unshare: {reason}"
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("gid_map", f"{_NOBODY} {group} 1"),
            ("uid_map", f"{_NOBODY} {user} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        return f"mapping the user: {error.strerror}"
    return ""


def empty_root(libc: ctypes.CDLL) -> str:
    """Make an empty read-only folder the root of this mount namespace."""
    pivot = _PIVOT_ROOT.get(os.uname().machine)
    if pivot is None:
        return f"no pivot_root number for {os.uname().machine}"
    place = next((p for p in (b"/tmp", b"/dev", b"/usr") if os.path.isdir(p)), b"/")
    steps = (
        lambda: libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None),
        lambda: libc.mount(b"tmpfs", place, b"tmpfs", ctypes.c_ulong(0), b"size=4k,nr_inodes=2,mode=555"),
        lambda: libc.chdir(place),
        lambda: libc.syscall(pivot, b".", b"."),
        lambda: libc.umount2(b".", _MNT_DETACH),
        lambda: libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REMOUNT | _MS_BIND | _MS_RDONLY), None),
        lambda: libc.chdir(b"/"),
    )
    for step in steps:
        if step() != 0:
            return f"mounting an empty root: {os.strerror(ctypes.get_errno())}"
    return ""


def limits(values: dict[str, int]) -> str:
    """Set resource limits: ``memory_bytes`` of address space, ``cpu_seconds``, nothing else to be had."""
    wanted = {
        "RLIMIT_AS": (values["memory_bytes"], values["memory_bytes"]),
        "RLIMIT_CPU": (values["cpu_seconds"], values["cpu_seconds"] + 5),
        "RLIMIT_FSIZE": (0, 0),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_NPROC": (0, 0),
        "RLIMIT_NOFILE": (16, 16),
        "RLIMIT_MEMLOCK": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_STACK": (8 << 20, 8 << 20),
    }
    for name, pair in wanted.items():
        if hasattr(resource, name):
            hard = resource.getrlimit(getattr(resource, name))[1]
            bound = [value if hard == resource.RLIM_INFINITY else min(value, hard) for value in pair]
            try:
                resource.setrlimit(getattr(resource, name), (bound[0], bound[1]))
            except (OSError, ValueError) as error:
                return f"{name}: {error}"
    return ""


def capabilities(libc: ctypes.CDLL) -> str:
    """Drop every capability, and the ways to gain one."""
    for number in range(64):
        _prctl(libc, _PR_CAPBSET_DROP, number)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset(ctypes.byref(header), ctypes.byref(nothing)) != 0:
        return f"capset: {os.strerror(ctypes.get_errno())}"
    return ""


def landlock(libc: ctypes.CDLL) -> str:
    """Refuse every right over files and ports that this kernel's Landlock knows."""
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return f"Landlock: {os.strerror(ctypes.get_errno())}"
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = (ctypes.c_uint64 * 3)(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(_LANDLOCK_CREATE, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    if rules < 0:
        return f"Landlock: {os.strerror(ctypes.get_errno())}"
    done = libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0
    reason = os.strerror(ctypes.get_errno())
    os.close(rules)
    return "" if done else f"Landlock: {reason}"


def outer(libc: ctypes.CDLL, unused: frozenset[str]) -> dict[str, str]:
    """What must happen before the fork: namespaces. Returns layer → reason why it is missing, empty if it holds."""
    if "namespaces" in unused:
        return {"namespaces": "switched off by the configuration"}
    return {"namespaces": namespaces(libc)}


def inner(libc: ctypes.CDLL, unused: frozenset[str], values: dict[str, int], before: dict[str, str]) -> dict[str, str]:
    """The layers of the process that will run the code, the one that forbids setting up others last."""
    _prctl(libc, _PR_SET_PDEATHSIG, 9)
    _prctl(libc, _PR_SET_DUMPABLE, 0)
    no_privileges = _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    steps = {
        "empty_root": lambda: "needs namespaces" if before["namespaces"] else empty_root(libc),
        "landlock": lambda: landlock(libc),
        "limits": lambda: limits(values),
        "capabilities": lambda: "no_new_privs was refused" if no_privileges else capabilities(libc),
        "seccomp": lambda: seccomp.apply(libc),
    }
    found = dict(before)
    for name, step in steps.items():
        found[name] = "switched off by the configuration" if name in unused else step()
    return found


def be_killed_first() -> None:
    """When the machine runs out of memory, the kernel shall take this process, not the host."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # no /proc, or not Linux: the kernel's own choice stays
        return


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> int:
    zero = ctypes.c_ulong(0)
    return int(libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero))


def open_libc() -> ctypes.CDLL:
    """The C library, with ``errno`` kept."""
    return ctypes.CDLL(None, use_errno=True)
