"""Out of memory: recognizing it, undoing a half-done step, and saying which arguments take less."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from unsloth.core import device

_SNAPSHOT_LIMIT = 2**30  # bytes; adapters fit, the weights of a whole model do not
_MESSAGES = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED|Cannot allocate memory", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_MESSAGES.search(str(error)))


def snapshot_bytes(parameters: Sequence[torch.Tensor]) -> int:
    """Bytes of the copy that :class:`Snapshot` keeps of ``parameters`` while a step runs; 0 if it keeps none."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return size if size <= _SNAPSHOT_LIMIT else 0


class Snapshot:
    """The trainable weights as they were before an optimizer step, to go back to if the step fails half way.

    A copy is kept only while the step runs, when the activations are gone, and only if it is small and fits. Without
    one, the weights' version counters still tell whether the step had begun to change them.

    Args:
        parameters: The weights that the optimizer changes.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._versions = [parameter._version for parameter in parameters]
        self._copies: list[torch.Tensor] | None = None
        size = snapshot_bytes(parameters)
        free = device.free_memory(parameters[0].device) if parameters else None
        if size and (free is None or size < free):
            self._copies = [torch.empty_like(parameter, requires_grad=False) for parameter in parameters]
            with torch.no_grad():  # in a few launches, where clones would be one each
                torch._foreach_copy_(self._copies, list(parameters))

    @torch.no_grad()
    def restore(self) -> bool:
        """Give the weights their values back; return whether they are those from before the step."""
        if self._copies is not None:
            for parameter, copy in zip(self._parameters, self._copies, strict=True):
                parameter.copy_(copy)
            return True
        return all(p._version == version for p, version in zip(self._parameters, self._versions, strict=True))
