"""A seccomp filter that leaves a process memory, clocks, and the descriptors it already has.

Everything that names a file, another process, a socket or a new thread is refused with EPERM. The filter is classic
BPF over ``struct seccomp_data`` (number at 0, architecture at 4, arguments from 16, 8 bytes each); see
``Documentation/userspace-api/seccomp_filter.rst`` of the Linux kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_PR_SET_SECCOMP = 22
_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM
_KILL = 0x80000000
_X32_BIT = 0x40000000
_PROT_EXEC = 4

# What a Python loop without files and threads calls, by machine: (audit architecture, numbers, mapping numbers).
# read write close mremap madvise munmap brk sched_yield nanosleep clock_nanosleep getpid gettid exit exit_group
# futex clock_gettime clock_getres gettimeofday time getrandom restart_syscall getrusage times
_X86_64 = (0, 1, 3, 25, 28, 11, 12, 24, 35, 230, 39, 186, 60, 231, 202, 228, 229, 96, 201, 318, 219, 98, 100)
_AARCH64 = (63, 64, 57, 216, 233, 215, 214, 124, 101, 115, 172, 178, 93, 94, 98, 113, 114, 169, 278, 128, 165, 153)
# mmap and mprotect are allowed without PROT_EXEC
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, (9, 10)),
    "aarch64": (0xC00000B7, _AARCH64, (222, 226)),
}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def apply(libc: ctypes.CDLL) -> str:
    """Install the filter for this process, for good; an empty text, or why it could not be done."""
    machine = os.uname().machine
    if machine not in _MACHINES or ctypes.sizeof(ctypes.c_void_p) != 8:
        return f"no list of system calls for {machine}"
    code = ctypes.create_string_buffer(_filter(*_MACHINES[machine]))
    program = _Program(len(code) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), zero, zero) != 0:
        return f"the kernel refused the filter ({os.strerror(ctypes.get_errno())})"
    return ""


def _filter(architecture: int, allowed: tuple[int, ...], mappings: tuple[int, ...]) -> bytes:
    load, equal, above, masked, end = 0x20, 0x15, 0x35, 0x45, 0x06
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (end, 0, 0, _KILL),
        (load, 0, 0, 0),
        (above, 0, 1, _X32_BIT),
        (end, 0, 0, _KILL),
    ]
    for number in allowed:
        lines += [(equal, 0, 1, number), (end, 0, 0, _ALLOW)]
    for number in mappings:
        lines += [
            (equal, 0, 4, number),
            (load, 0, 0, 16 + 8 * 2),
            (masked, 0, 1, _PROT_EXEC),
            (end, 0, 0, _REFUSE),
            (end, 0, 0, _ALLOW),
        ]
    lines.append((end, 0, 0, _REFUSE))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
