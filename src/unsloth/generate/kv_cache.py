"""Keys and values of all layers, in pages.

Shapes: L layers, N pages of P tokens, G key heads, D head dimension. ``keys[l]`` and ``values[l]`` are what
:func:`unsloth.kernels.paged_attention.paged_attention` takes. Eight-bit caches hold E4M3 numbers as they are: keys and
values are of order one, well inside its range of 448, with 3 bits of mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.generate.attention import on_device
from unsloth.generate.options import EngineOptions
from unsloth.kernels.rope_to_pages import write_pages
from unsloth.memory.mapped import MappedMemory

logger = get_logger(__name__)

_CPU_BYTES = 1 << 30


@dataclass(frozen=True)
class CacheShape:
    """What the model needs of a cache.

    Attributes:
        layers: L.
        key_heads: G.
        head_dim: D.
        dtype: Of keys and values.
        device: Where.
        page_size: P.
    """

    layers: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    page_size: int

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values of all layers."""
        return 2 * self.layers * self.page_size * self.key_heads * self.head_dim * self.dtype.itemsize


def choose_pages(shape: CacheShape, options: EngineOptions, max_len: int, reserve: int) -> int:
    """How many pages there are to be, page 0 included.

    Args:
        shape: Of the cache.
        options: Of the engine.
        max_len: Longest sequence.
        reserve: Bytes to leave for a step's temporaries.

    Raises:
        ConfigError: The memory that is left holds hardly anything.
    """
    if options.num_pages is not None:
        return options.num_pages + 1
    most = options.max_num_seqs * -(-max_len // shape.page_size)
    least = -(-max_len // shape.page_size)
    if shape.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(shape.device)
        cached = torch.cuda.memory_reserved(shape.device) - torch.cuda.memory_allocated(shape.device)
        room = (free + cached) // 2
        if options.gpu_memory_utilization is not None:
            room = int(options.gpu_memory_utilization * total) - (total - free - cached) - reserve
    else:
        room = max(_CPU_BYTES, least * shape.page_bytes)
    pages = min(most, room // shape.page_bytes)
    if pages < min(least, 8):
        needed = (least * shape.page_bytes) >> 20
        raise ConfigError(
            f"there is no room for a cache of keys and values: {max(room, 0) >> 20} MiB",
            got=f"gpu_memory_utilization={options.gpu_memory_utilization}",
            do=f"Raise it, or free memory: one sequence of {max_len} tokens takes {needed} MiB.",
        )
    return pages + 1


class KVCache:
    """The memory of keys and values, which can be given back and taken again.

    On a GPU it comes back at the same address, so that captured graphs stay valid; where the driver cannot do that,
    wherever torch finds room.

    Args:
        shape: Of the cache.
        pages: N.
    """

    def __init__(self, shape: CacheShape, pages: int) -> None:
        self.shape, self.pages = shape, pages
        self._mapped = _map(pages * shape.page_bytes, shape.device) if shape.device.type == "cuda" else None
        self._memory: torch.Tensor | None = None  # (2, L, N, P, G, D)
        self._held = False

    @property
    def held(self) -> bool:
        """Whether it has its memory."""
        return self._held

    @property
    def bytes(self) -> int:
        """Memory that it has."""
        return self.pages * self.shape.page_bytes if self._held else 0

    def take(self) -> None:
        """Take the memory, if it is not there; what it holds is undefined."""
        if self._held:
            return
        s = self.shape
        size = (2, s.layers, self.pages, s.page_size, s.key_heads, s.head_dim)
        if self._mapped is None:
            self._memory = torch.empty(size, dtype=s.dtype, device=s.device)
        else:
            self._mapped.take()
            if self._memory is None:
                whole = self._mapped.tensor()[: self.pages * s.page_bytes]
                self._memory = whole.view(s.dtype).view(size)
        self._held = True

    def release(self) -> None:
        """Give the memory back."""
        if self._mapped is None:
            self._memory = None
        else:
            self._mapped.release()
        self._held = False

    def key(self) -> int:
        """Changes when the memory moves."""
        return 0 if self._memory is None else self._memory.data_ptr()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (N, P, G, D) of a layer."""
        assert self._held and self._memory is not None
        return self._memory[0, index], self._memory[1, index]

    def write(self, index: int, slots_T: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put keys and values (T, G, D) of tokens at their places (page times P, and the place in the page)."""
        for cache, new in zip(self.layer(index), (k, v), strict=True):
            write_pages(cache, slots_T, new)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copy pages of all layers."""
        if not sources:
            return
        assert self._held and self._memory is not None
        source, target = on_device(torch.tensor([sources, targets]), self.shape.device)
        raw = self._memory.view(torch.uint8) if self.shape.dtype.itemsize == 1 else self._memory
        raw.index_copy_(2, target, raw.index_select(2, source))


def _map(size: int, device: torch.device) -> MappedMemory | None:
    try:
        return MappedMemory(size, device)
    except RuntimeError as error:
        logger.info("the cache cannot keep its address, so graphs are captured anew after it was given back: %s", error)
        return None
