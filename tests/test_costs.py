"""What a call costs, against counts made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from guard import OUTPUTS, Arguments, Sizes, example

from llmc import costs
from llmc.costs import Cost, cost

SIZES = Sizes()  # B=2 T=3 C=8 H=2 N=12 V=11 Vp=16 maxT=7
TOKENS, ROWS = 2 * 3, 2 * 3 * 8  # a number per token; a channel row per token


def given(op: str, accumulate: bool = True, **changes: Any) -> Arguments:
    return {**example(op, np.random.default_rng(0), SIZES, accumulate), **changes}


def test_every_op_and_every_array_has_a_role() -> None:
    """A new op, or a new array argument of one, costs nothing until it stands here: this must fail first."""
    assert set(costs.ROLES) == set(OUTPUTS)
    for op, roles in costs.ROLES.items():
        arguments = given(op)
        assert list(costs.PARAMETERS[op]) == list(arguments)
        assert set(roles) == {name for name, value in arguments.items() if isinstance(value, np.ndarray)}
        written = {name for name, role in roles.items() if role != "r"}
        appended = {"keys", "values"} if op == "attention_decode" else set()  # read here, a few rows written
        spans = {"copy"} if op == "adamw_step" else set()  # written, but not all of it
        assert written == set(OUTPUTS[op]) - appended
        for name, role in roles.items():
            kind = {"w": "write", "s": "sum", "u": "update", "r": ""}[role]
            assert OUTPUTS[op].get(name, "") == kind or name in appended | spans, (op, name)


# op, FLOPs, floats (or ids) read, floats written, and its large arrays; a scalar on the device is two floats
COUNTS = [
    ("zero", 0, 0, ROWS, (0, 1, 0)),
    ("copy", 0, ROWS, ROWS, (1, 1, 0)),
    ("normal", 0, 0, ROWS, (0, 1, 0)),
    ("embedding_forward", 0, ROWS + 3 * 8 + TOKENS, ROWS, (2, 1, 0)),
    ("embedding_backward", 0, 2 * ROWS + TOKENS, ROWS + 7 * 8, (1, 1, 1)),
    ("layernorm_forward", 0, ROWS + 2 * 8, ROWS + 2 * TOKENS, (1, 1, 0)),
    ("layernorm_backward", 0, 3 * ROWS + 2 * TOKENS + 8, ROWS + 2 * 8, (2, 0, 1)),
    ("residual_layernorm_forward", 0, 2 * ROWS + 2 * 8, 2 * ROWS + 2 * TOKENS, (2, 2, 0)),
    ("linear_forward", 2 * 6 * 12 * 8, ROWS + 96 + 12, 72, (2, 1, 0)),
    ("linear_backward", 4 * 6 * 12 * 8, 72 + ROWS + 96, ROWS + 96 + 12, (3, 2, 0)),
    ("linear_gelu_forward", 2 * 6 * 12 * 8, ROWS + 96 + 12, 2 * 72, (2, 2, 0)),
    ("gelu_linear_backward", 4 * 6 * 12 * 8, 72 + 2 * ROWS + 96, ROWS + 96 + 12, (4, 2, 0)),
    ("gelu_forward", 0, ROWS, ROWS, (1, 1, 0)),
    ("gelu_backward", 0, 2 * ROWS, ROWS, (2, 1, 0)),
    ("residual_forward", 0, 2 * ROWS, ROWS, (2, 1, 0)),
    # 6 of 9 scores in each of 2 x 2 heads of 4 channels: 2 * 24 * 4 FLOPs a product
    ("attention_forward", 2 * 2 * 24 * 4, 3 * ROWS, ROWS + 12, (1, 1, 0)),
    ("attention_backward", 5 * 2 * 24 * 4, 5 * ROWS + 12, 3 * ROWS, (3, 1, 0)),
    # three tokens after four: they see 5, 6 and 7 keys, in two products of 2 * 8 each, twice
    ("attention_decode", 2 * 2 * 18 * 2 * 8, 2 * 2 * 4 * 8 + 3 * ROWS, ROWS + 2 * ROWS, (3, 2, 0)),
    ("head_loss", 3 * 2 * 6 * 11 * 8, ROWS + 11 * 8 + TOKENS, TOKENS + ROWS + 16 * 8, (2, 2, 0)),
    ("head_logits", 2 * 6 * 11 * 8, ROWS + 11 * 8, 66, (2, 1, 0)),
    ("sum_losses", 0, TOKENS, 2, (1, 1, 0)),
    ("global_norm", 0, ROWS, 2, (1, 0, 0)),
    ("clip_scale", 0, 2 * 2, 2, (2, 1, 0)),
    # 32 and 48 of 96 elements are in spans
    ("adamw_step", 0, 4 * 80 + 2 * 2 + 2, 4 * 80, (1, 1, 3)),
]


@pytest.mark.parametrize("op, flops, read, written, arrays", COUNTS, ids=[count[0] for count in COUNTS])
def test_counts(op: str, flops: int, read: int, written: int, arrays: tuple[int, int, int]) -> None:
    """Of overwritten gradients; every number here has four bytes."""
    found = cost(op, given(op, accumulate=False))
    assert (found.flops, found.read, found.written, found.arrays) == (flops, 4 * read, 4 * written, arrays)
    assert found.nbytes == 4 * (read + written)


def test_all_ops_are_counted() -> None:
    assert {count[0] for count in COUNTS} == set(OUTPUTS)


def test_accumulating_reads_what_it_adds_to() -> None:
    plain, adding = (cost("linear_backward", given("linear_backward", accumulate=a)) for a in (False, True))
    assert adding.read - plain.read == 4 * (96 + 12)
    assert (adding.flops, adding.written) == (plain.flops, plain.written)
    plain, adding = (cost("embedding_backward", given("embedding_backward", accumulate=a)) for a in (False, True))
    assert plain.written - adding.written == 4 * (7 - 3) * 8  # positions beyond T are not zeroed


def test_what_is_absent_costs_nothing() -> None:
    bare = cost("linear_forward", given("linear_forward", b=None))
    assert bare.read == 4 * (ROWS + 96)
    masters = cost("adamw_step", given("adamw_step", copy=None))
    assert masters.written == 4 * 3 * 80 and masters.arrays == (1, 0, 3)
    alone = cost("head_loss", given("head_loss", dx=None, dw=None))
    assert (alone.flops, alone.written) == (2 * 6 * 11 * 8, 4 * TOKENS)


def test_in_place() -> None:
    """One array read and written is one array, and its bytes count both ways."""
    x = np.zeros((2, 3, 8), np.float32)
    apart = cost("residual_forward", {"out": x.copy(), "x": x, "branch": x.copy()})
    shared = cost("residual_forward", {"out": x, "x": x.copy(), "branch": x})
    assert (apart.arrays, shared.arrays) == ((2, 1, 0), (1, 0, 1))
    assert (apart.nbytes, shared.nbytes) == (12 * ROWS, 12 * ROWS)
    assert (apart.footprint, shared.footprint) == (12 * ROWS, 8 * ROWS)


def test_in_place_on_a_device() -> None:
    """Arrays that are not NumPy's say where they lie themselves: reading them would wait for a device."""
    class Elsewhere:
        shape, size, itemsize = (4, 8), 32, 4
        nbytes = 128

        def __init__(self, ptr: int) -> None:
            self.ptr = ptr

    x = Elsewhere(4096)
    for ptr, arrays in ((4096, (1, 0, 1)), (4096 + 64, (1, 0, 1)), (4096 + 128, (2, 1, 0)), (4096 - 128, (2, 1, 0))):
        found = cost("residual_forward", {"out": Elsewhere(ptr), "x": x, "branch": Elsewhere(1 << 20)})
        assert found.arrays == arrays


def test_what_bounds_it() -> None:
    """A large product multiplies, one row of it reads; nothing else multiplies."""
    def linear(M: int) -> Cost:
        x, w, out = (np.zeros(shape, np.float32) for shape in ((1, M, 768), (768, 768), (1, M, 768)))
        return cost("linear_forward", {"out": out, "x": x, "w": w, "b": None})

    assert linear(256).products and linear(256).unit == "GFLOP/s" and linear(256).amount == linear(256).flops
    assert not linear(1).products and linear(1).unit == "GB/s" and linear(1).amount == linear(1).nbytes
    assert not cost("zero", given("zero")).products


def test_unknown() -> None:
    with pytest.raises(KeyError):
        cost("fly", {})


def test_shape() -> None:
    assert costs.shape("linear_forward", given("linear_forward")) == "8 -> 12"
    assert costs.shape("gelu_linear_backward", given("gelu_linear_backward")) == "8 -> 12"
    assert costs.shape("adamw_step", given("adamw_step")) == ""
