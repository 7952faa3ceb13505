"""What a call costs, against counts made by hand."""

from __future__ import annotations

from typing import Any

import ml_dtypes
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
    ("embedding_forward", 0, ROWS + 3 * 8 + TOKENS + 2, ROWS, (2, 1, 0)),
    ("embedding_backward", 0, 2 * ROWS + TOKENS, ROWS + 7 * 8, (1, 1, 1)),
    ("layernorm_forward", 0, ROWS + 2 * 8, ROWS + 2 * TOKENS, (1, 1, 0)),
    ("layernorm_backward", 0, 3 * ROWS + 2 * TOKENS + 8, ROWS + 2 * 8, (2, 0, 1)),
    ("residual_layernorm_forward", 0, 2 * ROWS + 2 * 8, 2 * ROWS + 2 * TOKENS, (2, 2, 0)),
    ("rmsnorm_forward", 0, ROWS + 8, ROWS + TOKENS, (1, 1, 0)),
    ("rmsnorm_backward", 0, 3 * ROWS + TOKENS + 8, ROWS + 8, (2, 0, 1)),
    ("residual_rmsnorm_forward", 0, 2 * ROWS + 8, 2 * ROWS + TOKENS, (2, 2, 0)),
    # one head of 4 channels of each token, and three rows of the table, which both sequences may share
    ("rope_forward", 0, 24 + 12 + 2, 24, (1, 0, 1)),
    ("rope_backward", 0, 24 + 12, 24, (1, 0, 1)),
    ("linear_forward", 2 * 6 * 12 * 8, ROWS + 96 + 12, 72, (2, 1, 0)),
    ("linear_backward", 4 * 6 * 12 * 8, 72 + ROWS + 96, ROWS + 96 + 12, (3, 2, 0)),
    # rank 3 beside the last 8 of 12 columns
    ("lora_forward", 2 * 6 * 3 * (8 + 8), 48 + ROWS + 24 + 24, 48 + 18, (3, 1, 1)),
    ("lora_backward", 2 * 6 * 3 * (8 + 8 + 8), 48 + 18 + ROWS + 24, 24 + 24 + 18, (4, 3, 0)),
    ("lora_backward_input", 2 * 6 * 3 * 8, ROWS + 18 + 24, ROWS, (2, 0, 1)),
    ("linear_gelu_forward", 2 * 6 * 12 * 8, ROWS + 96 + 12, 2 * 72, (2, 2, 0)),
    ("gelu_linear_backward", 4 * 6 * 12 * 8, 72 + 2 * ROWS + 96, ROWS + 96 + 12, (4, 2, 0)),
    ("gelu_forward", 0, ROWS, ROWS, (1, 1, 0)),
    ("gelu_backward", 0, 2 * ROWS, ROWS, (2, 1, 0)),
    ("residual_forward", 0, 2 * ROWS, ROWS, (2, 1, 0)),
    ("swiglu_forward", 0, 2 * ROWS, ROWS, (1, 1, 0)),
    ("swiglu_backward", 0, 3 * ROWS, 2 * ROWS, (2, 1, 0)),
    ("geglu_forward", 0, 2 * ROWS, ROWS, (1, 1, 0)),
    ("geglu_backward", 0, 3 * ROWS, 2 * ROWS, (2, 1, 0)),
    # 5 of 9 scores, a window of two, in each of 2 x 2 heads of 4 channels that share one of keys and values
    ("attention_forward", 2 * 2 * 20 * 4, 2 * ROWS, ROWS + 12, (1, 1, 0)),
    ("attention_backward", 5 * 2 * 20 * 4, 4 * ROWS + 12, 2 * ROWS, (3, 1, 0)),
    # three tokens after four see two keys each, in two products of 2 * 8, twice; one of the four is seen
    ("attention_decode", 2 * 2 * 6 * 2 * 8, 2 * 2 * 4 + 2 * ROWS + 2, ROWS + 2 * 2 * 3 * 4, (1, 2, 0)),
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


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 5, 6, 7, 100])
def test_windows(window: int) -> None:
    """Every key that a token sees, counted one by one."""
    channels, pair = 8, 2 * 4  # of queries; of keys and values
    for op, products in (("attention_forward", 2), ("attention_backward", 5)):
        seen = sum(min(t + 1, window or t + 1) for t in range(3))
        assert cost(op, given(op, window=window)).flops == products * 2 * 2 * channels * seen
    decode = given("attention_decode", window=window, positions=np.array([4, 1], np.int32))
    seen = sum(min(start + t + 1, window or 9) for start in (4, 1) for t in range(3))
    assert cost("attention_decode", decode).flops == 2 * 2 * channels * seen
    kept = sum(min(start, window - 1 if window else 9) for start in (4, 1))
    assert cost("attention_decode", decode).read == 4 * (kept * pair + 2 * ROWS + 2)


def test_what_is_absent_costs_nothing() -> None:
    bare = cost("linear_forward", given("linear_forward", b=None))
    assert bare.read == 4 * (ROWS + 96)
    masters = cost("adamw_step", given("adamw_step", copy=None))
    assert masters.written == 4 * 3 * 80 and masters.arrays == (1, 0, 3)
    alone = cost("head_loss", given("head_loss", dx=None, dw=None))
    assert (alone.flops, alone.written) == (2 * 6 * 11 * 8, 4 * TOKENS)
    untrained = cost("head_loss", given("head_loss", dw=None))
    assert (untrained.flops, untrained.written) == (2 * 2 * 6 * 11 * 8, 4 * (TOKENS + ROWS))
    for op in ("linear_backward", "gelu_linear_backward"):
        found, both = cost(op, given(op, dw=None, db=None)), cost(op, given(op))
        assert (2 * found.flops, both.written - found.written) == (both.flops, 4 * (96 + 12))
    assert cost("embedding_forward", given("embedding_forward", wpe=None)).read == 4 * (ROWS + TOKENS + 2)
    assert cost("rmsnorm_backward", given("rmsnorm_backward", dw=None)).written == 4 * ROWS


def test_a_matrix_of_bfloat16_is_half_as_much() -> None:
    narrow = example("linear_forward", np.random.default_rng(0), SIZES)["w"].astype(ml_dtypes.bfloat16)
    found = cost("linear_forward", given("linear_forward", w=narrow, b=None))
    assert found.read == 4 * ROWS + 2 * 96 and found.flops == 2 * 6 * 12 * 8


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
    assert costs.shape("lora_forward", given("lora_forward")) == "8 -> 3 -> 8"
    assert costs.shape("lora_backward", given("lora_backward")) == "8 -> 3 -> 8"
    assert costs.shape("lora_backward_input", given("lora_backward_input")) == "8 -> 3"
    assert costs.shape("adamw_step", given("adamw_step")) == ""
