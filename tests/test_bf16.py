"""Matrix products of operands rounded to bf16, and what that leaves of a model's gradients.

Where the inputs are bf16 numbers already, rounding them changes nothing and the bounds of fp32 hold: so the shapes of
test_linear.py run again here, and attention's own.  Rounding itself is tested to the bit, by products with one.
"""

from __future__ import annotations

from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import reference
from attention_bounds import Told, backward_bound, forward_bounds, gathered, join, parts, split
from attention_bounds import gradients as attention_gradients
from attention_bounds import weights as attention_weights
from guard import Array, blank, check, floats
from numpy.random import Generator
from test_gpt2 import batch, build, gradients, norm_ratio
from test_linear import GELU_SHAPES, HEAVY, SHAPES, backward_bounds, gelu_linear_bounds, product_bound

from llmc import gpt2
from llmc.adamw import AdamW
from llmc.stories import Stories

BF16 = 2.0**-8  # relative error of a number rounded to bf16, which has eight significant bits
FEW_ROWS = 4  # up to here products may keep fp32 operands


def rounded(x: Array) -> Array:
    """x as bf16 holds it, in float32; NumPy's own type does the rounding."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def numbers(rng: Generator, *shape: int) -> Array:
    return rounded(floats(rng, *shape))


# ---- rounding --------------------------------------------------------------------------------------


def hard_numbers(rng: Generator) -> Array:
    """Ties both ways, neighbours of ties, carries into the exponent, the largest, zeros, infinities and NaN."""
    top = rng.integers(0x0100, 0x7F00, 400).astype(np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (top[:, None] | low).ravel()
    edges = np.array([0, 0x3F7FFFFF, 0x3FFFFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)
    bits = np.concatenate([bits, edges])
    return np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("which", ["x", "w", "dout"])
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, 64])
def test_rounding(ops_bf16: ModuleType, rng: Generator, which: str, rows: int) -> None:
    """Every operand of the three products, through each way of packing it, is rounded to nearest, ties to even.

    A product with a unit vector gives the number back; the sums' other terms are zeros (of either sign).
    """
    values = hard_numbers(rng)
    values = values[np.isfinite(values)]
    n = len(values) // rows * rows
    table = values[:n].reshape(rows, -1)
    width = table.shape[1]
    expected = rounded(table)
    expected[~np.isfinite(expected)] = np.inf * np.sign(table[~np.isfinite(expected)])
    found, finite = blank(1, *table.shape), np.isfinite(expected)
    table = np.where(finite, table, 0.0).astype(np.float32)  # inf times the zeros beside it would be NaN
    expected = np.where(finite, expected, 0.0)
    if which == "x":
        ops_bf16.linear_forward(found, table[None].copy(), np.eye(width, dtype=np.float32), None)
        np.testing.assert_array_equal(found[0], expected)
        return
    if which == "w":  # w is (rows, width); x the unit rows
        out = blank(1, width, rows)
        ops_bf16.linear_forward(out, np.eye(width, dtype=np.float32)[None].copy(), table, None)
        np.testing.assert_array_equal(out[0].T, expected)
    # dx = dout w and dw = dout^T x
    unit = np.eye(width, dtype=np.float32)
    dx, dw = blank(1, rows, width), blank(width, width)
    ops_bf16.linear_backward(dx, dw, None, table[None].copy(), blank(1, rows, width), unit, False)
    np.testing.assert_array_equal(dx[0], expected)
    eye = np.eye(rows, dtype=np.float32)
    dx, dw = blank(1, rows, rows), blank(width, rows)
    ops_bf16.linear_backward(dx, dw, None, table[None].copy(), eye[None].copy(), blank(width, rows), False)
    np.testing.assert_array_equal(dw.T, expected)
    dx, dw = blank(1, rows, width), blank(rows, width)
    ops_bf16.linear_backward(dx, dw, None, eye[None].copy(), table[None].copy(), table, False)
    np.testing.assert_array_equal(dx[0], expected)
    np.testing.assert_array_equal(dw, expected)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, 3.4e38])
def test_what_is_not_finite_stays_so(ops_bf16: ModuleType, bad: float) -> None:
    """A number beyond bf16's largest becomes infinite; NaN with any payload stays NaN."""
    x, w = np.ones((1, 9, 33), np.float32), np.ones((17, 33), np.float32)
    x[0, 3, 32] = bad
    x[0, 5, 0] = np.array([0x7F800001], np.uint32).view(np.float32)[0]  # a NaN that truncation would make infinite
    out = blank(1, 9, 17)
    ops_bf16.linear_forward(out, x, w, None)
    assert not np.isfinite(out[0, 3]).any() and np.isnan(out[0, 5]).all()
    assert (np.delete(out[0], (3, 5), axis=0) == 33).all()


def test_denormal_numbers(ops_bf16: ModuleType) -> None:
    """They are rounded, or count as zero."""
    bits = np.array([0x00000001, 0x00008000, 0x00012345, 0x007F8000, 0x80400000], np.uint32)
    x = np.zeros((1, 8, 5), np.float32)
    x[0, :5] = np.diag(bits.view(np.float32))
    out = blank(1, 8, 1)
    ops_bf16.linear_forward(out, x, np.ones((1, 5), np.float32), None)
    expected = rounded(bits.view(np.float32))
    assert ((out[0, :5, 0] == expected) | (out[0, :5, 0] == 0)).all()


def test_it_is_not_fp32(each_isa_bf16: ModuleType, rng: Generator) -> None:
    """The switch does something, in every op with a product."""
    for op, make in {
        "linear_forward": lambda: (blank(1, 8, 9), floats(rng, 1, 8, 7), floats(rng, 9, 7), None),
        "attention_forward": lambda: (blank(1, 8, 8), blank(1, 2, 8), floats(rng, 1, 8, 24), 0.5, 0, 0.0),
        "head_logits": lambda: (blank(1, 8, 9), floats(rng, 1, 8, 7), floats(rng, 9, 7), 9, 0.0),
    }.items():
        values = make()
        results = []
        for dtype in ("fp32", "bf16"):
            each_isa_bf16.configure(isa=each_isa_bf16.info()["isa"], threads=2, dtype=dtype)
            getattr(each_isa_bf16, op)(*values)
            results.append(values[0].copy())
        difference = np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()
        assert 1e-5 < difference < 0.02, op


# ---- the shapes of fp32 ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B, T, K, N", SHAPES + HEAVY)
def test_linear_forward(ops_bf16: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, bias: bool) -> None:
    x, w, b = numbers(rng, B, T, K), numbers(rng, N, K), floats(rng, N) if bias else None
    check(ops_bf16, "linear_forward", (blank(B, T, N), x, w, b), {"out": product_bound(x, w, b)})


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N", SHAPES + HEAVY)
def test_linear_backward(
    ops_bf16: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, accumulate: bool
) -> None:
    x, w, dout = numbers(rng, B, T, K), numbers(rng, N, K), numbers(rng, B, T, N)
    dw, db = floats(rng, N, K), floats(rng, N)
    bounds = backward_bounds(dw, db, dout, x, w, accumulate)
    check(ops_bf16, "linear_backward", (blank(B, T, K), dw, db, dout, x, w, accumulate), bounds)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("B, T, K, N", GELU_SHAPES)
def test_gelu_linear_backward(
    each_isa_bf16: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, shared: bool
) -> None:
    """Only the product is of bf16, and dpre is float32 throughout: GELU's slope is taken at pre as it is."""
    pre, w, dout = floats(rng, B, T, K, scale=2), numbers(rng, N, K), numbers(rng, B, T, N)
    dw, db, x = floats(rng, N, K), floats(rng, N), numbers(rng, B, T, K)
    bounds = gelu_linear_bounds(dw, db, dout, pre, x, w, shared)
    values = (blank(B, T, K), dw, db, dout, pre, x, w, shared)
    check(each_isa_bf16, "gelu_linear_backward", values, bounds, {"dpre": "x"} if shared else {})


ALONE = Told(1, 1)
ATTENTION = [
    *((1, T, 8, ALONE) for T in (1, 2, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97)),
    *((1, 6, D, ALONE) for D in (1, 2, 3, 5, 7, 9, 15, 17, 24, 33, 63, 65, 96)),
    *((2, 13, D, Told(3, 3)) for D in (16, 40, 64, 80, 128, 256)),
    *((1, 67, D, ALONE) for D in (1, 40, 64, 80, 256)),
    (0, 3, 4, Told(2, 2)), (2, 0, 4, Told(2, 2)), (5, 1, 3, Told(7, 7)),
    (2, 21, 40, Told(6, 3)), (1, 33, 64, Told(4, 1)), (2, 37, 16, Told(4, 2, window=5)),
    (1, 70, 32, Told(2, 2, window=64)), (2, 19, 24, Told(2, 1, scale=0.25, softcap=5.0)),
    (1, 50, 16, Told(6, 2, scale=0.1, window=17, softcap=2.0)),
    *(
        pytest.param(*shape, marks=pytest.mark.heavy)
        for shape in (
            (1, 128, 16, Told(2, 2)), (1, 257, 16, Told(2, 2)), (2, 130, 64, Told(3, 3)), (1, 259, 40, ALONE),
            (1, 193, 64, Told(4, 2, window=100)), (1, 300, 16, Told(4, 1, window=33, softcap=3.0)),
        )
    ),
]  # fmt: skip


def widths(D: int, told: Told) -> tuple[int, int]:
    """Of out and of qkv."""
    return told.H * D, (told.H + 2 * told.G) * D


@pytest.mark.parametrize(("B", "T", "D", "told"), ATTENTION)
def test_attention_forward(ops_bf16: ModuleType, rng: Generator, B: int, T: int, D: int, told: Told) -> None:
    """Beside fp32's errors, each weight is rounded once before it meets its value."""
    C, N = widths(D, told)
    qkv = numbers(rng, B, T, N)
    q, k, v = parts(qkv, told)
    out, lse = forward_bounds(q, k, v, 0, told)
    out += BF16 * join(attention_weights(q, k, 0, told).p @ np.abs(v))
    values = (blank(B, T, C), blank(B, told.H, T), qkv, *told.scalars(D))
    check(ops_bf16, "attention_forward", values, {"out": out, "lse": lse})


@pytest.mark.parametrize(("B", "T", "D", "told"), ATTENTION)
def test_attention_backward(ops_bf16: ModuleType, rng: Generator, B: int, T: int, D: int, told: Told) -> None:
    """P is rounded before dV = P^T dO, dS before dQ = dS K and dK = dS^T Q."""
    C, N = widths(D, told)
    qkv, dout = numbers(rng, B, T, N), numbers(rng, B, T, C)
    out, lse = blank(B, T, C), blank(B, told.H, T)
    reference.attention_forward(out, lse, qkv, *told.scalars(D))
    q, k, _ = parts(qkv, told)
    g = attention_gradients(dout, qkv, out, lse, told)
    ds, do = np.abs(g.ds), np.abs(split(dout, told.H))
    rounding = gathered(ds @ np.abs(k), ds.swapaxes(-1, -2) @ np.abs(q), g.p.swapaxes(-1, -2) @ do, told)
    bound = backward_bound(dout, qkv, out, lse, told) + BF16 * rounding
    values = (blank(B, T, N), dout, qkv, out, lse, *told.scalars(D))
    check(ops_bf16, "attention_backward", values, {"dqkv": bound})


# ---- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["raw", "perturbed"])
def test_gradients(each_isa_bf16: ModuleType, state: str) -> None:
    """Each gradient tensor within 2e-2 of float64's, by relative norm: the project's goal."""
    model, judge = build(each_isa_bf16, state), build(reference, state, dtype="float64")
    x, y = batch()
    losses = []
    for each in (model, judge):
        losses.append(each.forward(x, y))
        each.backward()
    assert abs(losses[0] - losses[1]) < 2e-2 * losses[1]
    worst = {name: norm_ratio(gradient, gradients(judge)[name]) for name, gradient in gradients(model).items()}
    assert max(worst.values()) < 2e-2, worst
    assert max(worst.values()) > 1e-4, "bf16 was not in use"


@pytest.mark.heavy
def test_training_keeps_up_with_fp32(cpu: ModuleType) -> None:
    """Over 400 steps on fresh data the mean of the last 50 losses is within 0.5 % of fp32's.

    At this learning rate the curve is smooth and bf16 stays within 0.03 %; at ten times as much it falls so steeply
    that two runs of any kind drift apart by more than the limit.
    """
    config = gpt2.Config(max_seq_len=64, vocab_size=Stories.vocab_size, num_layers=3, num_heads=3, channels=96)
    means = {}
    for dtype in ("fp32", "bf16"):
        cpu.configure(isa=cpu.info()["isa"], threads=2, dtype=dtype)
        model = gpt2.GPT2(config, cpu)
        model.initialise(seed=3)
        model.prepare(8, 64)
        assert model.grads is not None
        settings = {"beta2": 0.95, "weight_decay": 0.1, "grad_clip": 1.0}
        optimizer = AdamW(model.params.table, model.params, model.grads, cpu, **settings)
        data, losses = Stories(8, 64, seed=1, split="train"), []
        for step in range(400):
            x, y = data.next()
            losses.append(model.forward(x, y))
            model.backward()
            optimizer.step(3e-4 * min(1.0, (step + 1) / 40))
        means[dtype] = float(np.mean(losses[-50:]))
    assert means["fp32"] < 1.5, "it learns"
    assert means["bf16"] != means["fp32"]
    assert abs(means["bf16"] / means["fp32"] - 1) < 0.005, means
