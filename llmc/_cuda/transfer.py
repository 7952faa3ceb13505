"""Values between the host and the GPU, through pinned memory, without stopping either.

To the GPU they go in two steps: in the copy stream from a pinned slot of the host into a slot of the device, while ops
run, and from there to their place in the compute stream, in the order of the calls.  From the GPU small arrays come in
the compute stream into pinned slots, which are looked at later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SLOT_NBYTES, SLOTS = 1 << 20, 8  # of what is sent; more than fits is sent in parts
STAGING_NBYTES = SLOT_NBYTES * SLOTS
FETCH_NBYTES, FETCHES = 1 << 18, 32  # of what is fetched: more slots than the contract's 16, so that none is early


class _Slot:
    """Host memory with a place in the device's, and two events: the device has a copy; the device is done with it."""

    def __init__(self, cuda: Any, host: np.ndarray[Any, Any], ptr: int) -> None:
        no_timing = cuda.event_flags.DISABLE_TIMING
        self.host, self.ptr = host, ptr
        self.arrived, self.used = cuda.Event(no_timing), cuda.Event(no_timing)


class Staging:
    """The way to the GPU: a ring of slots."""

    def __init__(self, cuda: Any, compute: Any, copy: Any) -> None:
        self._cuda, self._compute, self._copy = cuda, compute, copy
        host = cuda.pagelocked_empty(STAGING_NBYTES, np.uint8)
        self._device = cuda.mem_alloc(STAGING_NBYTES)
        starts = range(0, STAGING_NBYTES, SLOT_NBYTES)
        self._slots = [_Slot(cuda, host[at : at + SLOT_NBYTES], int(self._device) + at) for at in starts]
        self._next = 0

    def send(self, ptr: int, values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> None:
        """Write `values` (one axis), converted to `dtype`, to the device's address `ptr`."""
        step = SLOT_NBYTES // dtype.itemsize
        for start in range(0, values.size, step):
            self._send(ptr + start * dtype.itemsize, values[start : start + step], dtype)

    def _send(self, ptr: int, values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> None:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        nbytes = values.size * dtype.itemsize
        host = slot.host[:nbytes]
        slot.arrived.synchronize()  # of the last time around
        host.view(dtype)[...] = values
        self._copy.wait_for_event(slot.used)
        self._cuda.memcpy_htod_async(slot.ptr, host, self._copy)
        slot.arrived.record(self._copy)
        self._compute.wait_for_event(slot.arrived)
        self._cuda.memcpy_dtod_async(ptr, slot.ptr, nbytes, self._compute)
        slot.used.record(self._compute)


class Fetches:
    """The way back: a ring of pinned slots for small arrays; large ones are waited for at once."""

    def __init__(self, cuda: Any, compute: Any) -> None:
        self._cuda, self._compute = cuda, compute
        host = cuda.pagelocked_empty(FETCHES * FETCH_NBYTES, np.uint8)
        self._slots = host.reshape(FETCHES, FETCH_NBYTES)
        self._events = [cuda.Event(cuda.event_flags.DISABLE_TIMING) for _ in range(FETCHES)]
        self._count = 0

    def begin(self, ptr: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[], np.ndarray[Any, Any]]:
        """Start copying; the callable waits and gives the values, bfloat16 as float32."""
        values = np.empty(shape, dtype)
        flat = values.reshape(-1).view(np.uint8)
        if flat.size == 0:
            return lambda: _readable(values)
        if flat.size > FETCH_NBYTES:
            self._cuda.memcpy_dtoh_async(flat, ptr, self._compute)
            self._compute.synchronize()
            return lambda: _readable(values)
        turn = self._count
        self._count += 1
        slot, event = self._slots[turn % FETCHES][: flat.size], self._events[turn % FETCHES]
        self._cuda.memcpy_dtoh_async(slot, ptr, self._compute)
        event.record(self._compute)
        waiting = True

        def wait() -> np.ndarray[Any, Any]:
            nonlocal waiting
            if waiting:
                if self._count - turn > FETCHES:
                    raise RuntimeError(f"fetch: {FETCHES} more arrays have been fetched before this one was looked at")
                event.synchronize()
                flat[...] = slot
                waiting = False
            return _readable(values)

        return wait


def _readable(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values
