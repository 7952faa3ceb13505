"""Every op in a recording: the bits that it gives alone, at the first run, as it is captured, and at every replay.

What an op must not do there shows: ask the device for a number, allocate, or leave scratch that the next run needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes  # noqa: F401  makes "bfloat16" the name of a dtype
import numpy as np
import on_device
import pytest
from guard import OUTPUTS, Sizes, example, names
from numpy.random import Generator
from on_device import Adapter

WORKSPACE = {"channels": 512, "vocab_size": 1024, "parameters": 1 << 16, "tokens": 4096, "heads": 8, "head_size": 64}


@pytest.fixture(params=["fp32", "bf16"])
def ops(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    yield from on_device.configured(request.param, WORKSPACE)


SIZES = {"small": Sizes(), "larger": Sizes(B=3, T=19, C=32, H=2, N=48, V=300, Vp=320, maxT=40)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OUTPUTS)
def test_replays_give_the_same_bits(ops: Adapter, rng: Generator, op: str, size: str) -> None:
    given = example(op, rng, SIZES[size])
    function = getattr(ops._backend, op)  # the op itself, without the adapter, which waits
    arrays: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            dtype = "bfloat16" if ops.bf16 and on_device.stored(op, name, given) else value.dtype.name
            arrays[name] = ops.empty(value.shape, dtype)
    passed = {**given, **arrays}

    def run() -> None:
        function(*(passed[name] for name in names(op)))

    def after(call: Any) -> dict[str, bytes]:
        for name, array in arrays.items():
            array[...] = given[name]
        call()
        return {name: np.asarray(array).tobytes() for name, array in arrays.items()}

    expected = after(run)
    assert any(expected[name] != after(lambda: None)[name] for name in OUTPUTS[op] if name in arrays), "it does nothing"
    step = ops.record(run)
    for _ in range(4):
        found = after(step)
        for name in arrays:
            assert found[name] == expected[name], name
