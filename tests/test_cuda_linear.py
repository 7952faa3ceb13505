"""Linear layers and `gemm` on a GPU or its simulation, both multipliers: bfloat16 and tf32, and what test_linear.py
does not reach.

Inputs are representable in bfloat16.  A result is off by what its fp32 sum may be (`guard.summed`) and by one rounding
to the storage type; where a product is stored before GELU's derivative is applied to it, by that one too.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import on_device
import pytest
import reference
from guard import TINY, UNIT, Array, floats, summed
from numpy.random import Generator
from test_activation import gelu_backward_bound, gelu_forward_bound
from test_linear import magnitude

from llmc._cuda import cublaslt, device, graphs, linear
from llmc._cuda.device import DeviceArray
from llmc.errors import DeviceError

BF16_UNIT = 2.0**-8  # half the distance from 1 to the next bfloat16
TF32_UNIT = 2.0**-11
BF16_TINY = 2.0**-133  # the smallest subnormal bfloat16
AMPERE = (8, 0)

# B, T, K, N: aligned, odd in each size, one row, across tiles of 128 and steps of 32
SHAPES = [
    (1, 1, 1, 1), (2, 3, 17, 33), (1, 5, 31, 8), (1, 1, 40, 24), (3, 7, 8, 16), (2, 12, 64, 64), (1, 65, 33, 130),
    (1, 131, 72, 136), (0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0),
]  # fmt: skip


@pytest.fixture(params=["fp32", "tf32", "bf16", "bf16 before Hopper", "fp32 own", "bf16 own"])
def way(request: pytest.FixtureRequest, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A precision, who multiplies and on what, set and set back."""
    before = {name: cuda.info()[name] for name in ("dtype", "gemm", "attention")}
    multiplies = "own" if request.param.endswith("own") else "cublaslt"
    cuda.configure(dtype=request.param.split()[0], gemm=multiplies, attention="own")
    cuda.reserve(64, 64, 64, 1024, 1, 64)
    if request.param.endswith("Hopper"):
        monkeypatch.setattr(device, "capability", lambda: AMPERE)
    yield request.param
    cuda.configure(**before)


def numbers(rng: Generator, *shape: int, scale: float = 1.0) -> Array:
    """Normal values that bfloat16 has."""
    return floats(rng, *shape, scale=scale).astype(ml_dtypes.bfloat16).astype(np.float32)


def put(values: Array | None, dtype: str | None = None) -> Any:
    if values is None:
        return None
    x = device.empty(values.shape, dtype or device.storage.name)
    x[...] = values
    return x


def nothing(*shape: int, dtype: str | None = None) -> DeviceArray:
    """An output: NaN everywhere, so that a gap shows."""
    return put(np.full(shape, np.nan, np.float32), dtype)


def get(x: DeviceArray) -> Array:
    return np.asarray(x).astype(np.float64)


def stored(exact: Array, off: Array | float) -> Array:
    """`off`, and one rounding to the storage type."""
    if device.storage.name == "float32":
        return off + TINY
    return off + BF16_UNIT * (np.abs(exact) + off) + BF16_TINY


def sum_error(terms: int, magnitudes: Array) -> Array:
    """Of a sum of products in fp32, operands being rounded first in tf32."""
    operands = 2.001 * TF32_UNIT if device.dtype == "tf32" else 0.0
    return (UNIT * summed(terms) + operands) * magnitudes


def close(name: str, found: DeviceArray, exact: Array, bound: Array) -> None:
    error = np.abs(get(found) - exact)
    assert (error <= bound).all(), f"{name}: off by {np.max(error / bound)} times what is allowed"  # NaN fails


# ---- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B, T, K, N", SHAPES)
def test_forward(cuda: ModuleType, way: str, rng: Generator, B: int, T: int, K: int, N: int, bias: bool) -> None:
    x, w, b = numbers(rng, B, T, K), numbers(rng, N, K), numbers(rng, N) if bias else None
    exact, out = np.empty((B, T, N)), nothing(B, T, N)
    reference.linear_forward(exact, x, w, b)
    off = sum_error(K + 1, magnitude(x) @ magnitude(w).T + (np.abs(b) if bias else 0)).reshape(exact.shape)
    cuda.linear_forward(out, put(x), put(w), put(b))
    close("out", out, exact, stored(exact, off))


def backward_exact(
    dw: Array, db: Array | None, dout: Array, x: Array, w: Array, accumulate: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The three gradients, and what their fp32 sums may be off by."""
    M, N, K = dout.size // max(1, len(w)), *w.shape
    exact = {"dx": np.empty(x.shape), "dw": dw.astype(np.float64)}
    if db is not None:
        exact["db"] = db.astype(np.float64)
    reference.linear_backward(exact["dx"], exact["dw"], exact.get("db"), dout, x, w, accumulate)
    g, old = magnitude(dout), int(accumulate)
    off = {
        "dx": sum_error(N, g @ magnitude(w)).reshape(x.shape),
        "dw": sum_error(M + 1, g.T @ magnitude(x) + old * np.abs(dw)),
    }
    if db is not None:
        off["db"] = sum_error(M + 1, g.sum(axis=0) + old * np.abs(db))
    assert off["dw"].shape == (N, K)
    return exact, off


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N", SHAPES)
def test_backward(
    cuda: ModuleType, way: str, rng: Generator, B: int, T: int, K: int, N: int, accumulate: bool
) -> None:
    """dx takes the place of x, which dw must have been made of by then."""
    x, w, dout, dw = numbers(rng, B, T, K), numbers(rng, N, K), numbers(rng, B, T, N), numbers(rng, N, K)
    for db in (numbers(rng, N), None):
        exact, off = backward_exact(dw, db, dout, x, w, accumulate)
        found = {"dx": put(x), "dw": put(dw), "db": put(db)}
        if not accumulate:
            found["dw"] = nothing(N, K)
            found["db"] = None if db is None else nothing(N)
        cuda.linear_backward(found["dx"], found["dw"], found["db"], put(dout), found["dx"], put(w), accumulate)
        for name in exact:
            close(name, found[name], exact[name], stored(exact[name], off[name]))


@pytest.mark.parametrize("B, T, K, N", [(1, 1, 1, 1), (2, 3, 17, 33), (2, 12, 64, 64), (0, 3, 4, 5)])
def test_backward_of_weights_that_are_not_trained(
    cuda: ModuleType, way: str, rng: Generator, B: int, T: int, K: int, N: int
) -> None:
    """Neither dw nor db: dx, and dpre, have the bits that they have with both."""
    x, w, dout, pre = put(numbers(rng, B, T, K)), put(numbers(rng, N, K)), put(numbers(rng, B, T, N)), nothing(B, T, K)
    pre[...] = numbers(rng, B, T, K)
    results = []
    for dw, db in ((nothing(N, K), nothing(N)), (None, None)):
        dx, dpre = nothing(B, T, K), nothing(B, T, K)
        cuda.linear_backward(dx, dw, db, dout, x, w, False)
        cuda.gelu_linear_backward(dpre, dw, db, dout, pre, x, w, False)
        results.append((get(dx), get(dpre)))
    for one, other in zip(*results, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)
    for op, given in (("linear_backward", (dout, x)), ("gelu_linear_backward", (dout, pre, x))):
        with pytest.raises(ValueError, match="db: must be None where dw is"):
            getattr(cuda, op)(dx, None, nothing(N), *given, w, False)


# ---- adapters --------------------------------------------------------------------------------------

# B, T, K, N, r, n, column: odd everywhere, aligned as models have them, the last of the columns, none of something
ADAPTERS = [
    (2, 3, 17, 33, 3, 11, 5), (1, 37, 64, 192, 8, 64, 128), (1, 130, 40, 96, 16, 32, 32), (2, 5, 24, 48, 16, 48, 0),
    (1, 1, 8, 8, 1, 1, 7), (0, 3, 8, 16, 4, 8, 8), (2, 3, 8, 16, 0, 8, 8), (2, 3, 8, 16, 4, 0, 16),
]  # fmt: skip


@pytest.mark.parametrize("B, T, K, N, r, n, column", ADAPTERS)
def test_lora_forward(
    cuda: ModuleType, way: str, rng: Generator, B: int, T: int, K: int, N: int, r: int, n: int, column: int
) -> None:
    """out from hidden as it is stored; columns that the adapter is not for stay as they were."""
    x, a, b, old = numbers(rng, B, T, K), numbers(rng, r, K), numbers(rng, n, r), numbers(rng, B, T, N)
    out, hidden = put(old), nothing(B, T, r)
    cuda.lora_forward(out, hidden, put(x), put(a), put(b), 0.75, column)
    exact = 0.75 * x.astype(np.float64) @ a.T
    off = 0.75 * sum_error(K + 1, magnitude(x) @ magnitude(a).T).reshape(exact.shape)
    close("hidden", hidden, exact, stored(exact, off))
    narrow, part = get(hidden), slice(column, column + n)
    exact = old[..., part] + narrow @ b.T
    off = sum_error(r + 1, np.abs(narrow) @ np.abs(b).T + np.abs(old[..., part]))
    assert (np.abs(get(out)[..., part] - exact) <= stored(exact, off)).all()
    np.testing.assert_array_equal(np.delete(get(out), part, axis=-1), np.delete(old, part, axis=-1))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N, r, n, column", ADAPTERS)
def test_lora_backward(
    cuda: ModuleType, way: str, rng: Generator, B: int, T: int, K: int, N: int, r: int, n: int, column: int,
    accumulate: bool,
) -> None:
    """da and dx from dhidden as it is stored; of dout nothing counts but the adapter's columns."""
    x, a, b, hidden = numbers(rng, B, T, K), numbers(rng, r, K), numbers(rng, n, r), numbers(rng, B, T, r)
    dout, da, db, dx = numbers(rng, B, T, N), numbers(rng, r, K), numbers(rng, n, r), numbers(rng, B, T, K)
    part = dout[..., column : column + n].copy()
    dout[...] = np.nan
    dout[..., column : column + n] = part
    found = [put(da), put(db), nothing(B, T, r)] if accumulate else [nothing(r, K), nothing(n, r), nothing(B, T, r)]
    cuda.lora_backward(*found, put(dout), put(hidden), put(x), put(b), 0.75, column, accumulate)
    into = put(dx)
    cuda.lora_backward_input(into, found[2], put(a))
    tokens, old, g = B * T, int(accumulate), magnitude(part)

    exact = 0.75 * part.astype(np.float64) @ b
    off = 0.75 * sum_error(n + 1, g @ magnitude(b)).reshape(exact.shape)
    close("dhidden", found[2], exact, stored(exact, off))
    rows = part.reshape(tokens, n).astype(np.float64)
    exact = old * db + rows.T @ hidden.reshape(tokens, r)
    close("db", found[1], exact, stored(exact, sum_error(tokens + 1, g.T @ magnitude(hidden) + old * np.abs(db))))
    narrow = get(found[2])
    exact = old * da + narrow.reshape(tokens, r).T @ x.reshape(tokens, K)
    off = sum_error(tokens + 1, magnitude(narrow).T @ magnitude(x) + old * np.abs(da))
    close("da", found[0], exact, stored(exact, off))
    exact = dx + narrow @ a
    close("dx", into, exact, stored(exact, sum_error(r + 1, np.abs(narrow) @ np.abs(a) + np.abs(dx))))


@pytest.mark.parametrize("column", [-1, 6, 1 << 40])
def test_columns_that_there_are_not(cuda: ModuleType, column: int) -> None:
    out, hidden, x, a, b = (put(np.zeros(shape)) for shape in ((1, 2, 8), (1, 2, 4), (1, 2, 5), (4, 5), (3, 4)))
    with pytest.raises(ValueError, match=f"column: 3 columns from {column} exceed the 8 of out"):
        cuda.lora_forward(out, hidden, x, a, b, 1.0, column)
    with pytest.raises(ValueError, match=f"column: 3 columns from {column} exceed the 8 of dout"):
        cuda.lora_backward(a, b, hidden, out, hidden, x, b, 1.0, column, False)


# ---- layers with GELU ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B, T, K, N", SHAPES)
def test_gelu_forward(cuda: ModuleType, way: str, rng: Generator, B: int, T: int, K: int, N: int, bias: bool) -> None:
    x, w, b = numbers(rng, B, T, K), numbers(rng, N, K), numbers(rng, N) if bias else None
    exact, out, pre = np.empty((B, T, N)), nothing(B, T, N), nothing(B, T, N)
    reference.linear_forward(exact, x, w, b)
    off = sum_error(K + 1, magnitude(x) @ magnitude(w).T + (np.abs(b) if bias else 0)).reshape(exact.shape)
    cuda.linear_gelu_forward(out, pre, put(x), put(w), put(b))
    bound = stored(exact, off)
    close("pre", pre, exact, bound)
    result = np.empty(exact.shape)
    reference.gelu_forward(result, exact)
    close("out", out, result, stored(result, 1.13 * bound + gelu_forward_bound(np.abs(exact) + bound)))


def library_slope_error(x: Array) -> Array:
    """Of gelu' as cuBLASLt may take it, which is not said: with the GPU's own tanh, off by 2^-11 of itself (PTX's
    tanh.approx), gelu' = (1 + tanh y) / 2 + x/2 (1 - tanh^2 y) y' is off by so much."""
    x = x.astype(np.float64)
    slope = reference.GELU_SCALE * (1 + 3 * reference.GELU_CUBIC * x**2)
    t = np.tanh(reference.GELU_SCALE * (x + reference.GELU_CUBIC * x**3))
    return 2.0**-11 * np.abs(t) * (0.5 + np.abs(x * slope * t))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N", SHAPES)
def test_gelu_backward(
    cuda: ModuleType, way: str, rng: Generator, B: int, T: int, K: int, N: int, accumulate: bool
) -> None:
    """dpre takes the place of x."""
    pre, w, dout, dw = numbers(rng, B, T, K, scale=2), numbers(rng, N, K), numbers(rng, B, T, N), numbers(rng, N, K)
    x, db = np.empty(pre.shape, np.float32), numbers(rng, N)
    reference.gelu_forward(x, pre)
    x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    exact, off = backward_exact(dw, db, dout, x, w, accumulate)
    product, product_off = exact.pop("dx"), off.pop("dx")
    exact["dpre"] = np.empty(pre.shape)
    reference.gelu_backward(exact["dpre"], product, pre)
    fused = way.endswith("own") or (way == "bf16" and K % 8 == 0)
    product_off = product_off if fused else stored(product, product_off)
    off["dpre"] = 1.13 * product_off + gelu_backward_bound(np.abs(product) + product_off, pre)
    if way == "bf16" and K % 8 == 0:
        off["dpre"] += library_slope_error(pre) * np.abs(product)
    found = {"dpre": put(x), "dw": put(dw), "db": put(db)}
    cuda.gelu_linear_backward(
        found["dpre"], found["dw"], found["db"], put(dout), put(pre), found["dpre"], put(w), accumulate
    )
    for name in exact:
        close(name, found[name], exact[name], stored(exact[name], off[name]))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("M, N", [(255, 3), (256, 40), (257, 300), (33000, 5), (3, 4096), (3, 4099), (2, 8200)])
def test_bias_gradient(
    cuda: ModuleType, way: str, rng: Generator, M: int, N: int, accumulate: bool
) -> None:
    """Sums of columns over many rows, and of more columns than are summed at a time."""
    cuda.reserve(64, 64, 64, M, 1, 64)
    dout, db = numbers(rng, M, N), numbers(rng, N)
    exact = dout.astype(np.float64).sum(axis=0) + (db if accumulate else 0)
    found = put(db) if accumulate else nothing(N)
    linear._column_sums(found, put(dout), M, N, accumulate)
    close("db", found, exact, stored(exact, UNIT * summed(M + 1) * (np.abs(dout).sum(axis=0) + np.abs(db))))


# ---- gemm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1, 8])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("ta, tb", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("M, N, K", [(5, 9, 7), (33, 130, 70), (129, 16, 64)])
def test_gemm(
    cuda: ModuleType, way: str, rng: Generator, M: int, N: int, K: int, ta: bool, tb: bool, beta: int, single: bool,
    pad: int,
) -> None:
    """Every transposition with rows `pad` elements longer in memory, where there is NaN, which stays there."""

    def padded(values: Array, dtype: str | None = None) -> DeviceArray:
        return put(np.pad(values, ((0, 0), (0, pad)), constant_values=np.nan), dtype)

    a, b, old = numbers(rng, M, K), numbers(rng, K, N), numbers(rng, M, N)
    alpha = 1.0 if pad else -0.7
    exact = alpha * (a.astype(np.float64) @ b.astype(np.float64)) + beta * old
    left, right = padded(a.T if ta else a), padded(b.T if tb else b)
    dtype = "float32" if single else None
    out = padded(old if beta else np.full((M, N), np.nan), dtype)
    linear.gemm(
        out, left, right.ptr, M, N, K, ta=ta, tb=tb, alpha=alpha, beta=beta, lda=left.shape[1], ldb=right.shape[1],
        ldo=N + pad, single=single,
    )  # fmt: skip
    off = sum_error(K + 1, np.abs(a).astype(np.float64) @ np.abs(b) + beta * np.abs(old))
    bound = off + TINY if single else stored(exact, off)
    assert (np.abs(get(out)[:, :N] - exact) <= bound).all()
    assert np.isnan(get(out)[:, N:]).all()


@pytest.mark.parametrize("M, N", [(1025, 300), (2100, 130), (130, 2100)])
def test_gemm_of_many_tiles(cuda: ModuleType, way: str, rng: Generator, M: int, N: int) -> None:
    """More tiles along M than the own kernels make one after another."""
    a, b, out = numbers(rng, M, 9), numbers(rng, 9, N), nothing(M, N)
    linear.gemm(out, put(a), put(b), M, N, 9)
    exact = a.astype(np.float64) @ b
    close("out", out, exact, stored(exact, sum_error(9, np.abs(a).astype(np.float64) @ np.abs(b))))


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("M, N, K", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_gemm_of_nothing(cuda: ModuleType, way: str, M: int, N: int, K: int, beta: int) -> None:
    """An empty sum is 0, and the library is not asked for it."""
    if not way.endswith("own"):
        forget()  # what it declined in other tests
    out = put(np.full((M, N), 2.0)) if beta else nothing(M, N)
    linear.gemm(out, put(np.zeros((M, K))), put(np.zeros((K, N))), M, N, K, beta=beta)
    assert (get(out) == 2 * beta).all()
    assert linear.declined() == []


def test_rows_off_their_alignment(cuda: ModuleType, way: str, rng: Generator) -> None:
    """Operands and results that begin at one element past 16 bytes; what lies around a result stays as it was."""
    M, N, K = 9, 16, 24
    for shift in (1, 2, 4):
        x, w, b = numbers(rng, M, K), numbers(rng, N, K), numbers(rng, N)

        def shifted(values: Array, shift: int = shift) -> DeviceArray:
            whole = nothing(values.size + shift + 1)
            whole[shift:-1] = values.reshape(-1)
            return whole[shift:-1].reshape(values.shape)

        around, out = nothing(2, M * N + shift + 1), []
        for k in range(2):
            out.append(around[k][shift:-1].reshape(1, M, N))
        cuda.linear_gelu_forward(out[0], out[1], shifted(x[None]), shifted(w), shifted(b))
        exact = x.astype(np.float64) @ w.T + b
        bound = stored(exact, sum_error(K + 1, np.abs(x) @ np.abs(w).T + np.abs(b)))
        close("pre", out[1], exact[None], bound[None])
        assert np.isnan(get(around)[:, [*range(shift), -1]]).all()
        assert np.isfinite(get(out[0])).all()


# ---- the library -----------------------------------------------------------------------------------


def plans() -> dict[Any, Any]:
    return linear._multiplier()._plans


def forget() -> None:
    """Plan anew."""
    plans().clear()
    linear._multiplier()._declined.clear()


def test_plans_are_kept(cuda: ModuleType, way: str, rng: Generator) -> None:
    """A product is planned once for its shape and its pointers' alignment, wherever those point."""
    if way.endswith("own"):
        pytest.skip("the own kernels need no plan")
    forget()
    w = put(numbers(rng, 24, 40))
    for _ in range(3):
        linear.gemm(nothing(8, 24), put(numbers(rng, 8, 40)), w, 8, 24, 40, tb=True)
    assert len(plans()) == 1
    linear.gemm(nothing(8, 24), nothing(321)[1:].reshape(8, 40), w, 8, 24, 40, tb=True)
    assert len(plans()) == 2


def test_declined_products_are_made_all_the_same(
    cuda: ModuleType, way: str, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library has no algorithm, the own kernels make the product, and `declined` says so."""
    if way.endswith("own"):
        assert linear.declined() == []
        return
    forget()
    monkeypatch.setattr(cublaslt.Plan, "choose", lambda self, handle, workspace: False)
    M, N, K = 37, 11, 21
    x, w, dout = numbers(rng, 1, M, K), numbers(rng, N, K), numbers(rng, 1, M, N)
    dw, db = numbers(rng, N, K), numbers(rng, N)
    exact, off = backward_exact(dw, db, dout, x, w, False)
    found = {"dx": nothing(1, M, K), "dw": nothing(N, K), "db": nothing(N)}
    cuda.linear_backward(found["dx"], found["dw"], found["db"], put(dout), put(x), put(w), False)
    for name in exact:
        close(name, found[name], exact[name], stored(exact[name], off[name]))
    assert f"{device.storage.name} ({M},{N}) times ({N},{K}), epilogue 1" in "\n".join(linear.declined())
    forget()


def test_epilogues_in_use(cuda: ModuleType, way: str, rng: Generator) -> None:
    """What follows a product is done in it: which is seen from the plans that were made."""
    if way.endswith("own"):
        pytest.skip("the own kernels need no plan")
    forget()
    M, N, K = 24, 16, 40
    x, w, b, dout = put(numbers(rng, 1, M, K)), put(numbers(rng, N, K)), put(numbers(rng, N)), nothing(1, M, N)
    pre = put(numbers(rng, 1, M, K))
    cuda.linear_gelu_forward(dout, nothing(1, M, N), x, w, b)
    cuda.gelu_linear_backward(nothing(1, M, K), nothing(N, K), nothing(N), dout, pre, x, w, False)
    made = {problem.epilogue for problem in plans()}
    wanted = {cublaslt.DEFAULT, cublaslt.BIAS, cublaslt.BGRADB}
    if way == "bf16":
        wanted = {cublaslt.DEFAULT, cublaslt.GELU_AUX_BIAS, cublaslt.DGELU, cublaslt.BGRADB}
    compute = cublaslt.COMPUTE_32F_FAST_TF32 if way == "tf32" else cublaslt.COMPUTE_32F
    assert {(problem.compute, problem.beta) for problem in plans()} == {(compute, 0)}
    if linear.declined() and on_device.mode()[0] == "device":
        # A product more for each; on a GPU the library may decline what its description allows, which is to be known.
        warnings.warn(f"cuBLASLt has no algorithm for {linear.declined()}", stacklevel=1)
        assert made >= wanted
    else:
        assert made == wanted and linear.declined() == []


def test_epilogues_of_other_algorithms_are_not_used(
    cuda: ModuleType, way: str, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an epilogue costs the best algorithm, it is left out; results are right all the same."""
    if way.endswith("own"):
        pytest.skip("the own kernels have all epilogues")
    forget()
    monkeypatch.setattr(cublaslt.Plan, "number", lambda self: 6 if self.problem.epilogue in cublaslt.RARE else 66)
    M, N, K = 24, 16, 40
    x, w, dout, pre = numbers(rng, 1, M, K), numbers(rng, N, K), numbers(rng, 1, M, N), numbers(rng, 1, M, K)
    dw, db = numbers(rng, N, K), numbers(rng, N)
    exact, off = backward_exact(dw, db, dout, x, w, False)
    product, product_off = exact.pop("dx"), off.pop("dx")
    exact["dpre"] = np.empty(pre.shape)
    reference.gelu_backward(exact["dpre"], product, pre)
    product_off = stored(product, product_off)
    off["dpre"] = 1.13 * product_off + gelu_backward_bound(np.abs(product) + product_off, pre)
    found = {"dpre": nothing(1, M, K), "dw": nothing(N, K), "db": nothing(N)}
    cuda.gelu_linear_backward(*found.values(), put(dout), put(pre), put(x), put(w), False)
    for name in exact:
        close(name, found[name], exact[name], stored(exact[name], off[name]))
    assert {problem.epilogue for problem in plans() if plans()[problem]} == {cublaslt.DEFAULT}
    declined = "\n".join(linear.declined())
    assert f"({N},{M}) transposed times ({M},{K}), epilogue 512" in declined
    # A GPU's library may have no algorithm at all with an epilogue on such a shape.
    missing = on_device.mode()[0] == "device" and "the library has no algorithm" in declined
    assert "algorithm 6, without the epilogue 66" in declined or missing
    assert ("epilogue 192" in declined) == (way == "bf16")
    forget()


def test_library_declines(cuda: ModuleType, way: str, rng: Generator) -> None:
    """An auxiliary matrix whose rows are no multiple of 8 elements apart: False, and nothing is touched."""
    if way.endswith("own"):
        pytest.skip("the own kernels take any rows")
    storage, (M, N, K) = device.storage.name, (8, 8, 16)
    out, aux = nothing(M, N), nothing(M, 12)
    a, b = put(numbers(rng, M, K)), put(numbers(rng, N, K))
    done = linear._multiplier().matmul(
        out.ptr, a.ptr, b.ptr, M, N, K, ta=False, tb=True, lda=K, ldb=K, ldo=N, operands=storage, result=storage,
        compute=cublaslt.COMPUTE_32F, epilogue=cublaslt.GELU_AUX, aux=aux.ptr, ldaux=12,
    )  # fmt: skip
    if done and on_device.mode()[0] == "device":
        forget()
        pytest.skip("this GPU's library takes such rows")
    assert not done
    assert np.isnan(get(out)).all() and np.isnan(get(aux)).all()
    forget()


def test_error_names_status_and_shape(cuda: ModuleType, way: str) -> None:
    if way.endswith("own"):
        pytest.skip("the own kernels have no status")
    forget()
    a, b, out = put(np.zeros((3, 5))), put(np.zeros((5, 7))), nothing(3, 7)
    linear.gemm(out, a, b, 3, 7, 5)
    (plan,) = plans().values()
    message = rf"cublasLtMatmul: CUBLAS_STATUS_NOT_INITIALIZED for {device.storage.name} \(3,5\) times \(5,7\)"
    with pytest.raises(DeviceError, match=message):
        plan.run(ctypes.c_void_p(), out.ptr, a.ptr, b.ptr, device.library_workspace(), device.stream().handle)


def test_recording(cuda: ModuleType, way: str, rng: Generator) -> None:
    """A layer's products as a graph: replays take what the arrays hold by then."""
    M, N, K = 19, 24, 40
    x, w, b = put(np.zeros((1, M, K))), put(numbers(rng, N, K)), put(numbers(rng, N))
    out, dx, dw, db = nothing(1, M, N), nothing(1, M, K), nothing(N, K), nothing(N)

    def layer() -> None:
        cuda.linear_forward(out, x, w, b)
        cuda.linear_backward(dx, dw, db, out, x, w, False)

    recording = graphs.record(layer)
    for _ in range(4):
        values = numbers(rng, 1, M, K)
        x[...] = values
        recording()
        found = [get(array) for array in (out, dx, dw, db)]
        layer()
        for array, replayed in zip((out, dx, dw, db), found, strict=True):
            np.testing.assert_array_equal(get(array), replayed)
        exact = np.empty((1, M, N))
        reference.linear_forward(exact, values, get(w), get(b))
        off = sum_error(K + 1, magnitude(values) @ np.abs(get(w)).T + np.abs(get(b)))
        assert (np.abs(found[0] - exact) <= stored(exact, off[None])).all()
