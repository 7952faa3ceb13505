"""Packs: the 16 bytes that a thread reads or writes at once, where addresses allow it."""

from __future__ import annotations

from llmc._cuda import device
from llmc._cuda.device import DeviceArray

NBYTES = 16


def elements() -> int:
    """Elements of the storage type in a pack: PACK of `common.cuh`."""
    return NBYTES // device.storage.itemsize


def aligned(*arrays: DeviceArray | None) -> bool:
    """Whether all that are given begin at multiples of 16 bytes."""
    return all(a is None or a.ptr % NBYTES == 0 for a in arrays)


def rows_aligned(width: int, *arrays: DeviceArray | None) -> bool:
    """Whether every row of `width` elements of the storage type does, too."""
    return width % elements() == 0 and aligned(*arrays)


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` hold n."""
    return -(-n // size)
