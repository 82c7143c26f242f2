"""GPU memory that can be given back and taken again at the same address.

An address range is reserved once; memory is mapped into it and taken out again by the driver (CUDA's virtual memory
management, cuMem*). What holds the address, such as a captured CUDA graph, stays valid. The memory comes from the
driver itself and goes back to it whole, so torch's allocator is not fragmented by it.
"""

from __future__ import annotations

import ctypes
import weakref

import torch

_SUCCESS, _OUT_OF_MEMORY = 0, 2
_NOTHING = ctypes.c_ulonglong(0)
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3  # of the driver's enumerations


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class MappedMemory:
    """One range of addresses on a GPU, with memory behind it or without.

    Args:
        size: Bytes that are wanted.
        device: A CUDA device.

    Raises:
        RuntimeError: The driver cannot do this.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        torch.cuda.init()
        self._driver = _load_driver()
        index = torch.cuda.current_device() if device.index is None else device.index
        self._properties = _Properties(type=_PINNED, location=_Location(_ON_DEVICE, index))
        self._access = _Access(_Location(_ON_DEVICE, index), _READ_WRITE)
        step = ctypes.c_size_t()
        with torch.cuda.device(index):
            torch.empty(1, device=device)  # the driver wants a context
            self._call("cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(self._properties), 0)
            self.size = -(-size // step.value) * step.value
            address = ctypes.c_uint64()
            self._call(
                "cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(self.size), ctypes.c_size_t(0),
                ctypes.c_uint64(0), _NOTHING,
            )  # fmt: skip
        self.address = address.value
        self._handle: ctypes.c_uint64 | None = None
        self._freed = weakref.finalize(self, _free_range, self._driver, self.address, self.size)

    @property
    def held(self) -> bool:
        """Whether there is memory behind the addresses."""
        return self._handle is not None

    def take(self) -> None:
        """Put memory behind the addresses, if there is none; its contents are undefined.

        Raises:
            torch.OutOfMemoryError: There is not enough.
        """
        if self._handle is not None:
            return
        handle = ctypes.c_uint64()
        arguments = (ctypes.byref(handle), ctypes.c_size_t(self.size), ctypes.byref(self._properties), _NOTHING)
        with torch.cuda.device(self._device):
            error = self._driver.cuMemCreate(*arguments)
            if error == _OUT_OF_MEMORY:  # torch keeps what was freed
                torch.cuda.empty_cache()
                error = self._driver.cuMemCreate(*arguments)
            if error == _OUT_OF_MEMORY:
                raise torch.OutOfMemoryError(f"{self.size >> 20} MiB for the cache of keys and values are not free")
            _check("cuMemCreate", error)
            address, size = ctypes.c_uint64(self.address), ctypes.c_size_t(self.size)
            self._call("cuMemMap", address, size, ctypes.c_size_t(0), handle, _NOTHING)
            self._call("cuMemSetAccess", address, size, ctypes.byref(self._access), ctypes.c_size_t(1))
        self._handle = handle

    def release(self) -> None:
        """Give the memory back to the driver, once the device has done all that it was given."""
        if self._handle is None:
            return
        torch.cuda.synchronize(self._device)
        self._call("cuMemUnmap", ctypes.c_uint64(self.address), ctypes.c_size_t(self.size))
        self._call("cuMemRelease", self._handle)
        self._handle = None

    def tensor(self) -> torch.Tensor:
        """The range as bytes; to be used only while it has memory, and to be made while it has."""
        return torch.as_tensor(_Bytes(self), device=self._device)

    def _call(self, name: str, *arguments: object) -> None:
        _check(name, getattr(self._driver, name)(*arguments))


class _Bytes:
    """A range of memory in the form that torch reads without copying."""

    def __init__(self, memory: MappedMemory) -> None:
        self._memory = memory  # kept as long as the tensor
        self.__cuda_array_interface__ = {
            "shape": (memory.size,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 3,
        }


def _load_driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError("the CUDA driver's library libcuda.so.1 is not there") from error


def _check(name: str, error: int) -> None:
    if error != _SUCCESS:
        raise RuntimeError(f"{name} of the CUDA driver failed with error {error}")


def _free_range(driver: ctypes.CDLL, address: int, size: int) -> None:
    driver.cuMemAddressFree(ctypes.c_uint64(address), ctypes.c_size_t(size))
