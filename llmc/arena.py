"""One allocation, many named views.

A table of `Row`s says what lies in an arena; `Arena(table, empty)` makes a single allocation for all of
it.  `arena.wte` (or `arena["wte"]`) is a view of one tensor, `arena.layer(l)` a namespace with layer l's
slice of every stacked tensor, and the single ones, which all layers share.  Views are made once, so the
training loop allocates nothing.

A tensor's place, counted in elements, does not depend on its type: arenas over one table in float32 and in
bfloat16 (weights and their masters, gradients, moments) are vectors of one length with one meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes "bfloat16" the name of a dtype
import numpy as np

Array = np.ndarray[Any, Any]

PADDED = ("wte", "head")  # tensors whose first axis is the vocabulary: Vp rows in memory, V in most files
ALIGNMENT = 64  # elements: 128 bytes of bfloat16, a GPU's cache line; 64 bytes of the narrowest, a CPU's


class Row(NamedTuple):
    """One tensor of a table.

    `layers` = 0 is a single tensor of shape `shape`; otherwise `layers` of them lie one after another and
    the tensor's full shape is `(layers, *shape)`.  The last three fields matter for parameters alone:
    whether weight decay applies, the name in a Hugging Face file (with `{layer}` where stacked), and
    whether that file holds the transpose.  Where such a file has several tensors for one of ours, `hf_name` is a tuple
    of (name, rows): they lie one after another along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layers: int = 0
    decay: bool = False
    hf_name: str | tuple[tuple[str, int], ...] = ""
    transpose: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (self.layers, *self.shape) if self.layers else self.shape

    @property
    def size(self) -> int:
        """Number of elements, all layers together."""
        return math.prod(self.full_shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


def table_nbytes(table: Iterable[Row]) -> int:
    """Bytes that an arena over `table` allocates, alignment included."""
    return sum(_aligned(row) * np.dtype(row.dtype).itemsize for row in table)


def _aligned(row: Row) -> int:
    """Elements that a row takes, padding included."""
    return -(-row.size // ALIGNMENT) * ALIGNMENT


def spans(table: Iterable[Row]) -> Iterator[tuple[Row, int, int]]:
    """Each row with the elements from start to stop that it has, padding included, in the `flat` of an arena over
    `table`."""
    start = 0
    for row in table:
        stop = start + _aligned(row)
        yield row, start, stop
        start = stop


class Arena:
    """Named views of one zero-filled allocation.

    `empty(shape, dtype)` is the backend's allocator (`ops.empty`).  Padding between tensors stays zero, so
    `flat` (all tensors end to end, when they share one dtype) can be handed to a norm as it is.
    """

    def __init__(self, table: Iterable[Row], empty: Callable[..., Array]) -> None:
        self.table = tuple(table)
        self.nbytes = table_nbytes(self.table)
        self.buffer = empty((self.nbytes,), "uint8")
        self._views: dict[str, Array] = {}
        offset = 0
        for row in self.table:
            raw = self.buffer[offset : offset + row.nbytes]
            self._views[row.name] = raw.view(row.dtype).reshape(row.full_shape)
            offset += _aligned(row) * np.dtype(row.dtype).itemsize
        depth = max((row.layers for row in self.table), default=0)
        single = {row.name: self[row.name] for row in self.table if not row.layers}
        self._layers = [
            SimpleNamespace(**single, **{row.name: self[row.name][i] for row in self.table if i < row.layers})
            for i in range(depth)
        ]

    @property
    def flat(self) -> Array:
        """The whole buffer as one vector (one dtype throughout, else ValueError)."""
        dtypes = {row.dtype for row in self.table}
        if len(dtypes) != 1:
            raise ValueError(f"an arena of {sorted(dtypes)} has no flat view")
        return self.buffer.view(dtypes.pop())

    def layer(self, index: int) -> SimpleNamespace:
        """Layer `index`'s view of every stacked tensor, and every single tensor whole, by name."""
        return self._layers[index]

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __getattr__(self, name: str) -> Array:
        try:
            return self.__dict__["_views"][name]
        except KeyError:
            raise AttributeError(f"no tensor {name!r} in this arena") from None

    def __iter__(self) -> Iterator[tuple[Row, Array]]:
        """Rows with their views, in table order."""
        return ((row, self._views[row.name]) for row in self.table)
