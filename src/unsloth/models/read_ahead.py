"""The tensors of a model folder, read by several threads before they are asked for, and put onto a GPU.

transformers reads a tensor that is to be quantized when its turn comes, in one thread, through a memory map, and copies
it from there while nothing else is done. Here threads read pieces of the next files' tensors into pinned buffers, and
copies to the device run beside them and beside the quantization of what has arrived. transformers is given entries
that it indexes like its own.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unsloth.core.device import free_memory
from unsloth.core.errors import CheckpointError, UnslothError
from unsloth.core.log import get_logger
from unsloth.memory.pinned import PinnedMemory, host_memory
from unsloth.models.weight_files import TensorHeader

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

logger = get_logger(__name__)


@dataclass(frozen=True)
class Sizes:
    """How much is read at a time.

    Attributes:
        threads: That read.
        piece: Bytes that one of them reads at once; there are twice as many buffers of this size as threads.
        ahead: Bytes of tensors on the device that nobody has asked for yet.
    """

    threads: int = 8
    piece: int = 16 * 2**20
    ahead: int = 768 * 2**20


@dataclass
class _Buffer:
    """Host memory to read into, the stream that copies out of it, and when its last copy ends."""

    memory: torch.Tensor
    pinned: PinnedMemory | None
    stream: Any
    copied: Any = None


@dataclass
class _Coming:
    """A tensor on its way: (bytes,) uint8 on the device, and its pieces, which hand out when they are there."""

    flat: torch.Tensor
    pieces: list[Future] = field(default_factory=list)


class ReadAhead:
    """Reads tensors in the order of their names, with numbers in them in numerical order, as transformers does.

    Any other order is right as well, only slower. A tensor may be asked for again, and is read again then.

    Args:
        tensors: What there is to read, by name.
        device: Where it goes.
        sizes: How much at a time.
    """

    def __init__(self, tensors: Mapping[str, TensorHeader], device: torch.device, sizes: Sizes = Sizes()) -> None:
        self.tensors, self.device, self.sizes = tensors, device, sizes
        self._order = iter(sorted(tensors, key=_natural))
        self._seen: set[str] = set()
        self._coming: dict[str, _Coming] = {}
        self._waiting = 0
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(sizes.threads, thread_name_prefix="read-ahead")

    def __enter__(self) -> ReadAhead:
        with ExitStack() as undo:
            undo.callback(self.__exit__)
            for path in {header.file for header in self.tensors.values()}:
                self._files[path] = os.open(path, os.O_RDONLY)
            for _ in range(2 * self.sizes.threads):
                self._buffers.put(_buffer(self.sizes.piece, self.device))
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # before buffers are no longer pinned

    def fetch(self, name: str) -> torch.Tensor:
        """The tensor on the device, in the dtype of its file; starts reading those that come next.

        Raises:
            CheckpointError: The file ends too early.
            OSError: It cannot be read.
        """
        header = self.tensors[name]
        with self._lock:
            coming = self._coming.pop(name, None)
            if coming is None:
                self._seen.add(name)
                coming = self._begin(header)
            else:
                self._waiting -= header.size
            self._read_on()
        for piece in coming.pieces:
            arrived = piece.result()
            if arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(arrived)
        return coming.flat.view(DTYPES[header.dtype]).view(header.shape)

    def _read_on(self) -> None:
        """Begin what comes next, as far as its memory allows."""
        while self._waiting < self.sizes.ahead:
            name = next((name for name in self._order if name not in self._seen), None)
            if name is None:
                return
            self._seen.add(name)
            self._coming[name] = self._begin(self.tensors[name])
            self._waiting += self.tensors[name].size

    def _begin(self, header: TensorHeader) -> _Coming:
        flat = torch.empty(header.size, dtype=torch.uint8, device=self.device)
        # what was there before may still be in use by what the device was told so far
        free = None if self.device.type != "cuda" else torch.cuda.current_stream(self.device).record_event()
        starts = range(0, header.size, self.sizes.piece)
        return _Coming(flat, [self._pool.submit(self._read, header, start, flat, free) for start in starts])

    def _read(self, header: TensorHeader, start: int, flat: torch.Tensor, free: Any) -> Any:
        """Read one piece and start its copy; the event of its end, or None where it has ended."""
        buffer = self._buffers.get()
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            part = flat[start : start + self.sizes.piece]
            memory = buffer.memory[: part.numel()]
            _read_fully(self._files[header.file], memory, header.start + start, header.file)
            if buffer.stream is None:
                part.copy_(memory)
                return None
            with torch.cuda.stream(buffer.stream):
                buffer.stream.wait_event(free)
                part.copy_(memory, non_blocking=True)
                buffer.copied = buffer.stream.record_event()
            return buffer.copied
        finally:
            self._buffers.put(buffer)


class Entry:
    """A tensor of a folder, read when it is indexed, or before; transformers takes it for a safetensors slice.

    Args:
        reader: Reads it.
        name: Of the tensor.
    """

    def __init__(self, reader: ReadAhead, name: str) -> None:
        self._reader, self._name = reader, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._reader.fetch(self._name)[index]

    def get_shape(self) -> list[int]:
        """As of a safetensors slice."""
        return list(self._reader.tensors[self._name].shape)

    def get_dtype(self) -> str:
        """As of a safetensors slice."""
        return self._reader.tensors[self._name].dtype


def can_read(tensors: Iterable[TensorHeader]) -> bool:
    """Whether this system reads files by position, and all dtypes are known."""
    return hasattr(os, "preadv") and all(header.dtype in DTYPES for header in tensors)


@contextmanager
def entries(tensors: Mapping[str, TensorHeader], device: torch.device) -> Iterator[dict[str, Any]]:
    """The tensors as a state dict for transformers, whose entries are on ``device`` when they are indexed."""
    free = free_memory(device)
    ahead = Sizes.ahead if free is None else min(Sizes.ahead, free // 16)
    with ReadAhead(tensors, device, Sizes(ahead=ahead)) as reader:
        yield {name: Entry(reader, name) for name in tensors}


def _buffer(size: int, device: torch.device) -> _Buffer:
    if device.type != "cuda":
        return _Buffer(torch.empty(size, dtype=torch.uint8), None, None)
    memory, pinned = host_memory(size), None
    try:
        pinned = PinnedMemory(memory)
    except UnslothError as error:  # copies then take longer, and are right as well
        logger.info("weights are read into memory that is not pinned: %s", error, extra={"once": True})
    return _Buffer(memory, pinned, torch.cuda.Stream(device))


def _read_fully(descriptor: int, memory: torch.Tensor, position: int, path: Path) -> None:
    view, done = memoryview(memory.numpy()), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if not count:
            raise CheckpointError(f"{path} ended while it was read", do="Copy or download it again.")
        done += count


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
