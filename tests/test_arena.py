"""One allocation, many named views."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from llmc.arena import ALIGNMENT, Arena, Row, table_nbytes

Array = np.ndarray[Any, Any]

TABLE = [
    Row("wte", (5, 3), decay=True, hf_name="wte.weight"),
    Row("w", (2, 3), layers=4, decay=True, hf_name="h.{layer}.w", transpose=True),
    Row("b", (17,), layers=4),
    Row("one", (1,)),
    Row("none", (0, 7)),
    Row("shallow", (2,), layers=2),
]


class Allocator:
    """Counts calls, and hands out memory at an address that is a multiple of 64, as backends do."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], str]] = []

    def __call__(self, shape: tuple[int, ...], dtype: str) -> Array:
        self.calls.append((shape, dtype))
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + nbytes].view(dtype).reshape(shape)


@pytest.fixture
def arena() -> Arena:
    return Arena(TABLE, Allocator())


def test_one_allocation() -> None:
    empty = Allocator()
    arena = Arena(TABLE, empty)
    assert empty.calls == [((arena.nbytes,), "uint8")]
    assert arena.nbytes == table_nbytes(TABLE) == arena.buffer.nbytes


def test_a_table_may_be_an_iterator() -> None:
    empty = Allocator()
    assert Arena(iter(TABLE), empty).table == tuple(TABLE)
    assert len(empty.calls) == 1


def test_sizes() -> None:
    row = TABLE[1]
    assert (row.full_shape, row.size, row.nbytes) == ((4, 2, 3), 24, 96)
    assert (TABLE[0].full_shape, TABLE[0].size) == ((5, 3), 15)
    assert Row("x", (3,), "uint16", 2).nbytes == 12
    # 2^33 elements: sizes do not wrap at 32 bits
    assert Row("big", (1 << 16, 1 << 17)).nbytes == 1 << 35
    assert table_nbytes([Row("a", (1,)), Row("b", (64,)), Row("c", (65,))]) == 4 * (64 + 64 + 128)
    assert table_nbytes([Row("a", (1,), "float64"), Row("b", (65,), "uint8")]) == 8 * 64 + 128
    assert table_nbytes([]) == 0


def test_views(arena: Arena) -> None:
    """Every tensor has its shape and dtype, is contiguous and aligned, and begins as zeros."""
    for row in TABLE:
        view = arena[row.name]
        assert view is getattr(arena, row.name), "views are made once"
        assert (view.shape, view.dtype) == (row.full_shape, np.float32)
        assert view.flags.c_contiguous and view.flags.writeable and not view.any()
        assert view.ctypes.data % ALIGNMENT == 0


def test_views_lie_in_the_buffer_without_overlap(arena: Arena) -> None:
    """Each tensor, written with its own number, keeps it; all bytes between stay zero."""
    for number, row in enumerate(TABLE, 1):
        arena[row.name][...] = number
    for number, row in enumerate(TABLE, 1):
        assert (arena[row.name] == number).all()
        assert row.size == 0 or np.shares_memory(arena[row.name], arena.buffer)
    written = sum(row.size for row in TABLE)
    assert np.count_nonzero(arena.buffer.view(np.float32)) == written
    assert written * 4 < arena.nbytes, "the table has padding, or this test says nothing"


def test_order_is_the_table_s(arena: Arena) -> None:
    addresses = [arena[row.name].ctypes.data for row in TABLE if row.size]
    assert addresses == sorted(addresses)
    assert [(row, view.shape) for row, view in arena] == [(row, row.full_shape) for row in TABLE]
    assert all(view is arena[row.name] for row, view in arena)


def test_flat(arena: Arena) -> None:
    """All tensors end to end, the padding being zero: a norm over it is the norm over them."""
    rng = np.random.default_rng(1)
    for _, view in arena:
        view[...] = rng.standard_normal(view.shape)
    assert arena.flat.dtype == np.float32 and arena.flat.ndim == 1
    assert np.shares_memory(arena.flat, arena.wte)
    expected = sum(float((view.astype(np.float64) ** 2).sum()) for _, view in arena)
    assert float((arena.flat.astype(np.float64) ** 2).sum()) == pytest.approx(expected, rel=1e-14)
    arena.flat[...] = 0
    assert not any(view.any() for _, view in arena)


def test_flat_of_two_dtypes() -> None:
    arena = Arena([Row("a", (3,)), Row("b", (3,), "float64")], Allocator())
    assert arena.b.dtype == np.float64
    with pytest.raises(ValueError, match=r"float32.*float64"):
        _ = arena.flat


@pytest.mark.parametrize("dtype", ["float64", "uint16", "int32", "uint8"])
def test_other_dtypes(dtype: str) -> None:
    arena = Arena([row._replace(dtype=dtype) for row in TABLE], Allocator())
    arena.w[...] = 7
    assert arena.w.dtype == dtype and arena.w.shape == (4, 2, 3)
    assert arena.flat.dtype == dtype


def test_layers(arena: Arena) -> None:
    """Layer l's slices of the stacked tensors, of those that have as many layers, and the single ones: views."""
    for index in range(4):
        layer = arena.layer(index)
        assert set(vars(layer)) == {"wte", "one", "none", "w", "b"} | ({"shallow"} if index < 2 else set())
        assert layer.wte is arena.wte
        assert layer.w.shape == (2, 3) and layer.b.shape == (17,)
        assert layer.w.flags.c_contiguous
        layer.w[...] = index + 1
        assert arena.layer(index).w is layer.w, "views are made once"
    assert [float(value) for value in arena.w[:, 0, 0]] == [1, 2, 3, 4]
    with pytest.raises(IndexError):
        arena.layer(4)


def test_no_layers() -> None:
    with pytest.raises(IndexError):
        Arena([Row("a", (3,))], Allocator()).layer(0)


def test_unknown_names(arena: Arena) -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = arena.nothing
    with pytest.raises(KeyError):
        arena["nothing"]
    assert not hasattr(arena, "__deepcopy__"), "protocols that ask for dunder names get an AttributeError"


def test_views_keep_the_memory(arena: Arena) -> None:
    view = arena.wte
    view[...] = 5
    del arena
    gc.collect()
    assert (view == 5).all()


def test_the_backend_s_memory(ops: Any) -> None:
    """With a real allocator: aligned, zero, and as large as asked."""
    arena = Arena([Row("a", (1000, 1000)), Row("b", (3,), layers=2)], ops.empty)
    for _, view in arena:
        address = view.ctypes.data if isinstance(view, np.ndarray) else view.ptr
        assert address % ALIGNMENT == 0 and not np.asarray(view).any()
    arena.b[...] = 2
    norm = ops.empty((1,), "float64")
    ops.global_norm(norm, arena.flat)
    assert np.asarray(norm)[0] == pytest.approx(24**0.5)
