"""Host memory that a GPU reads and writes by its address: pinned in place, in the size that it has.

Torch's own allocator of pinned memory rounds every request up to a power of two, and never gives any back.
"""

from __future__ import annotations

import weakref

import torch

from unsloth.core.errors import UnslothError

_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegister's flags


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
