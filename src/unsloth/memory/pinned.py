"""Host memory that a GPU reads and writes by its address: pinned in place, in the size that it has.

Torch's own allocator of pinned memory rounds every request up to a power of two, and never gives any back.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch

from unsloth.core.errors import UnslothError

_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegister's flags


def host_memory(size: int) -> torch.Tensor:
    """(size,) uint8 zeros on the host, in large pages where the system has them, and all there.

    Pinning walks over every page. Those that do not exist yet are made one by one then, in one thread; here all
    threads make them.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).zero_()


class PinnedMemory:
    """Pins the memory of a contiguous tensor on the host for as long as this object lives.

    Args:
        memory: Must outlive this object.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        runtime = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE_AND_MAPPED))
        if code:
            raise UnslothError(
                "host memory cannot be pinned",
                got=f"{memory.nbytes / 2**30:.1f} GiB, CUDA error {code}",
                do="Let less wait on the host (Budget(host=...), offload_embedding), or raise the limit (ulimit -l).",
            )
        self.address = memory.data_ptr()
        weakref.finalize(self, runtime.cudaHostUnregister, self.address)
