"""Linear layers, y = x w^T + b, dx = dy w, dw = dy^T x, and their adapters; `gemm`, the product that these and the head
are made of.

cuBLASLt multiplies (`cublaslt.py`), or with `--gemm own` the kernels of `linear.cu`; all matrices are row-major here.
What follows a product is done in the same kernel where that pays: a bias always; GELU and its derivative always in the
own kernels, in cuBLASLt's in bf16 from Hopper on (its older ones and those of float32 are said to be slower than one
more pass over the result); the gradient of a bias in cuBLASLt's product for dw, unless it accumulates, which the
library cannot.  What the library has no algorithm for, as may be for odd sizes, or only an older one, is done apart
or by the own kernels: see `declined`.
"""

from __future__ import annotations

import operator
from typing import Any

from llmc._cuda import activation, check, cublaslt, device
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray

Pointer = Any  # a DeviceArray, or an int: a device address

# Of linear.cu: the tile of out, threads, and bytes of shared memory by storage type.
BM, BN, THREADS = 128, 128, 256
SHARED = {"float32": 2 * 2 * 16 * 132 * 4, "bfloat16": 3 * 2 * 128 * 40 * 2}
PLAIN, GELU, DGELU = 0, 1, 2  # enum Finish

WARP = 32
CHUNKS, CHUNK_ROWS = 128, 64  # sums of columns: at most so many chunks, of at least so many rows
COLUMNS = 4096  # that are summed at a time; their partial sums are what the workspace is for

HOPPER = (9, 0)

_KERNELS = {  # by ta and tb
    (False, False): Kernel("linear", "gemm_nn", "PPPPPiiiqqqiiif"),
    (False, True): Kernel("linear", "gemm_nt", "PPPPPiiiqqqiiif"),
    (True, False): Kernel("linear", "gemm_tn", "PPPPPiiiqqqiiif"),
    (True, True): Kernel("linear", "gemm_tt", "PPPPPiiiqqqiiif"),
}
_partials = Kernel("linear", "column_partials", "PPiiqi")
_totals = Kernel("linear", "column_totals", "PPiii")


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> int:
    """Bytes of the workspace for the sums of a bias's gradient."""
    return _chunks(tokens)[1] * COLUMNS * 4


# ---- products --------------------------------------------------------------------------------------


def gemm(
    out: Pointer, a: Pointer, b: Pointer, M: int, N: int, K: int, *, ta: bool = False, tb: bool = False,
    alpha: float = 1.0, beta: int = 0, lda: int | None = None, ldb: int | None = None, ldo: int | None = None,
    single: bool = False,
) -> None:
    """out (M,N) = alpha * op(a) (M,K) @ op(b) (K,N) + beta * out.

    a, b and out are of the storage type, out of float32 with `single`.  op(a) is a or, with `ta`, the transpose of
    what lies in memory as (K,M); so is op(b) with `tb`, in memory (N,K).  `lda`, `ldb`, `ldo` are the elements from one
    row in memory to the next (None: rows are dense); products are fast where they and the addresses are multiples of 16
    bytes.  beta is 0 or 1; with 0 it does not matter what is in out.  out overlaps neither a nor b.  A size may be 0:
    with K = 0 the product is 0.

    Sums are fp32 and rounded to out's type once.  Takes nothing of `device.workspace`, which is the caller's to use.

        logits (n,V) = x w^T      gemm(logits, x, w, n, V, C, tb=True, ldo=Vp)
        dw (V,C) += dlogits^T x   gemm(dw, dlogits, x, V, C, n, ta=True, lda=Vp, beta=1)
        dx (n,C) = dlogits w      gemm(dx, dlogits, w, n, C, V, lda=Vp)
    """
    _product(out, a, b, M, N, K, ta=ta, tb=tb, alpha=alpha, beta=beta, lda=lda, ldb=ldb, ldo=ldo, single=single)


def declined() -> list[str]:
    """What cuBLASLt had no algorithm for, or only a worse one than without the epilogue, in words."""
    return _multiplier().declined() if device.gemm == "cublaslt" else []


def _product(
    out: Pointer, a: Pointer, b: Pointer, M: int, N: int, K: int, *, bias: DeviceArray | None = None, **how: Any
) -> None:
    """`gemm`, and + bias (N,)."""
    epilogue = cublaslt.DEFAULT if bias is None else cublaslt.BIAS
    if not _by_library(out, a, b, M, N, K, epilogue=epilogue, bias=bias, **how):
        _by_kernel(out, a, b, M, N, K, bias=bias, **how)


def _by_library(
    out: Pointer, a: Pointer, b: Pointer, M: int, N: int, K: int, *, ta: bool = False, tb: bool = False,
    alpha: float = 1.0, beta: int = 0, lda: int | None = None, ldb: int | None = None, ldo: int | None = None,
    single: bool = False, epilogue: int = cublaslt.DEFAULT, bias: DeviceArray | None = None,
    aux: DeviceArray | None = None,
) -> bool:
    """The product by cuBLASLt; False, with nothing done, where it is not to be had.  aux (M,N) is dense."""
    if device.gemm != "cublaslt" or not M * N * K:
        return False
    return _multiplier().matmul(
        _address(out), _address(a), _address(b), M, N, K, ta=ta, tb=tb, lda=_rows(lda, ta, M, K),
        ldb=_rows(ldb, tb, K, N), ldo=_rows(ldo, False, M, N), operands=device.storage.name,
        result="float32" if single else device.storage.name,
        compute=cublaslt.COMPUTE_32F_FAST_TF32 if device.dtype == "tf32" else cublaslt.COMPUTE_32F, alpha=alpha,
        beta=beta, epilogue=epilogue, bias=_address(bias), aux=_address(aux), ldaux=0 if aux is None else N,
    )  # fmt: skip


def _by_kernel(
    out: Pointer, a: Pointer, b: Pointer, M: int, N: int, K: int, *, ta: bool = False, tb: bool = False,
    alpha: float = 1.0, beta: int = 0, lda: int | None = None, ldb: int | None = None, ldo: int | None = None,
    single: bool = False, finish: int = PLAIN, bias: DeviceArray | None = None, aux: DeviceArray | None = None,
) -> None:
    _KERNELS[bool(ta), bool(tb)](
        (-(-N // BN), -(-M // BM)), THREADS, _address(out), _address(a), _address(b), bias, aux, M, N, K,
        _rows(lda, ta, M, K), _rows(ldb, tb, K, N), _rows(ldo, False, M, N), finish, int(beta), int(single), alpha,
        shared=SHARED[device.storage.name],
    )  # fmt: skip


def _multiplier() -> cublaslt.Multiplier:
    held = device.handle().functions
    if "cublaslt" not in held:
        held["cublaslt"] = cublaslt.Multiplier(device.library_workspace(), device.stream().handle)
    return held["cublaslt"]


def _address(x: Pointer | None) -> int:
    return 0 if x is None else x.ptr if isinstance(x, DeviceArray) else x


def _rows(ld: int | None, transposed: bool, rows: int, columns: int) -> int:
    """Elements from row to row in memory of what is (rows, columns) after transposing."""
    return ld if ld is not None else rows if transposed else columns


# ---- sums of columns -------------------------------------------------------------------------------


def _chunks(M: int) -> tuple[int, int]:
    """Rows of a chunk, and how many chunks M rows make."""
    rows = max(CHUNK_ROWS, -(-M // CHUNKS))
    return rows, -(-M // rows)


def _column_sums(out: DeviceArray, x: DeviceArray, M: int, N: int, accumulate: bool) -> None:
    """out (N,) (+)= the sums over the rows of x (M,N)."""
    rows, chunks = _chunks(M)
    strip = WARP * 16 // x.itemsize
    for start in range(0, N, COLUMNS):
        n, offset = min(COLUMNS, N - start), start * x.itemsize
        partial = device.workspace(chunks * n * 4)
        _partials((-(-n // strip), chunks), THREADS, partial, x.ptr + offset, M, n, N, rows)
        _totals(-(-n // WARP), THREADS, out.ptr + offset, partial, n, chunks, int(accumulate))


# ---- layers ----------------------------------------------------------------------------------------


def _check_forward(out: DeviceArray, x: DeviceArray, w: DeviceArray, b: DeviceArray | None) -> tuple[int, int, int]:
    """M, N, K: tokens, and the widths of out and x."""
    check.cube("out", out)
    K, N = check.cube("x", x).shape[2], check.matrix("w", w).shape[0]
    check.expect("w", w.shape, (N, K))
    check.expect("out", out.shape, (*x.shape[:2], N))
    if b is not None:
        check.expect("b", check.vector("b", b).shape, (N,))
    return x.shape[0] * x.shape[1], N, K


def _check_backward(
    dx: DeviceArray, dw: DeviceArray | None, db: DeviceArray | None, dout: DeviceArray, x: DeviceArray, w: DeviceArray,
    dx_name: str = "dx",
) -> tuple[int, int, int]:
    """M, N, K as in the forward pass."""
    K, N = check.cube("x", x).shape[2], check.matrix("w", w).shape[0]
    check.cube(dx_name, dx)
    check.cube("dout", dout)
    check.expect("w", w.shape, (N, K))
    if dw is not None:
        check.expect("dw", check.matrix("dw", dw).shape, (N, K))
    check.expect(dx_name, dx.shape, x.shape)
    check.expect("dout", dout.shape, (*x.shape[:2], N))
    if db is not None:
        check.expect("db", check.vector("db", db).shape, (N,))
        if dw is None:
            raise ValueError("db: must be None where dw is")
    return x.shape[0] * x.shape[1], N, K


def _parameter_gradients(
    dw: DeviceArray | None, db: DeviceArray | None, dout: DeviceArray, x: DeviceArray, M: int, N: int, K: int,
    accumulate: bool,
) -> None:
    if dw is None:
        return
    if db is not None and not accumulate:
        if _by_library(dw, dout, x, N, K, M, ta=True, epilogue=cublaslt.BGRADB, bias=db):
            return
    if db is not None:
        _column_sums(db, dout, M, N, accumulate)
    _product(dw, dout, x, N, K, M, ta=True, beta=int(accumulate))


def _library_fuses_gelu(aux: DeviceArray) -> bool:
    return (
        device.gemm == "cublaslt" and device.storage.name == "bfloat16" and device.capability() >= HOPPER
        and aux.shape[-1] % cublaslt.AUX_LD_MULTIPLE == 0
    )  # fmt: skip


def linear_forward(out: DeviceArray, x: DeviceArray, w: DeviceArray, b: DeviceArray | None) -> None:
    M, N, K = _check_forward(out, x, w, b)
    _product(out, x, w, M, N, K, tb=True, bias=b)


def linear_backward(
    dx: DeviceArray, dw: DeviceArray | None, db: DeviceArray | None, dout: DeviceArray, x: DeviceArray, w: DeviceArray,
    accumulate: bool,
) -> None:
    M, N, K = _check_backward(dx, dw, db, dout, x, w)
    _parameter_gradients(dw, db, dout, x, M, N, K, accumulate)
    _product(dx, dout, w, M, K, N)


def linear_gelu_forward(
    out: DeviceArray, pre: DeviceArray, x: DeviceArray, w: DeviceArray, b: DeviceArray | None
) -> None:
    M, N, K = _check_forward(out, x, w, b)
    check.expect("pre", check.cube("pre", pre).shape, out.shape)
    if device.gemm == "own":
        _by_kernel(out, x, w, M, N, K, tb=True, bias=b, finish=GELU, aux=pre)
        return
    if _library_fuses_gelu(pre):
        epilogue = cublaslt.GELU_AUX if b is None else cublaslt.GELU_AUX_BIAS
        if _by_library(out, x, w, M, N, K, tb=True, epilogue=epilogue, bias=b, aux=pre):
            return
    _product(pre, x, w, M, N, K, tb=True, bias=b)
    activation.gelu_forward(out, pre)


def gelu_linear_backward(
    dpre: DeviceArray, dw: DeviceArray | None, db: DeviceArray | None, dout: DeviceArray, pre: DeviceArray,
    x: DeviceArray, w: DeviceArray, accumulate: bool,
) -> None:
    M, N, K = _check_backward(dpre, dw, db, dout, x, w, "dpre")
    check.expect("pre", check.cube("pre", pre).shape, x.shape)
    _parameter_gradients(dw, db, dout, x, M, N, K, accumulate)
    if device.gemm == "own":
        _by_kernel(dpre, dout, w, M, K, N, finish=DGELU, aux=pre)
        return
    if _library_fuses_gelu(pre) and _by_library(dpre, dout, w, M, K, N, epilogue=cublaslt.DGELU, aux=pre):
        return
    _product(dpre, dout, w, M, K, N)
    activation.gelu_backward(dpre, dpre, pre)


# ---- adapters --------------------------------------------------------------------------------------


def _adapter(
    wide_name: str, wide: DeviceArray, hidden: DeviceArray, hidden_name: str, b: DeviceArray, column: int
) -> tuple[int, int, int, int, int]:
    """B T, N, r, n and the address of the columns of `wide` (B,T,N) from `column` on, which `b` (n,r) is for."""
    B, T, N = check.cube(wide_name, wide).shape
    n, r = check.matrix("b", b).shape
    check.expect(hidden_name, check.cube(hidden_name, hidden).shape, (B, T, r))
    column = operator.index(column)
    if not 0 <= column <= N - n:
        raise ValueError(f"column: {n} columns from {column} exceed the {N} of {wide_name}")
    return B * T, N, r, n, wide.ptr + column * wide.itemsize


def lora_forward(
    out: DeviceArray, hidden: DeviceArray, x: DeviceArray, a: DeviceArray, b: DeviceArray, scale: float, column: int
) -> None:
    M, N, r, n, part = _adapter("out", out, hidden, "hidden", b, column)
    K = check.cube("x", x).shape[2]
    check.expect("x", x.shape, (*out.shape[:2], K))
    check.expect("a", check.matrix("a", a).shape, (r, K))
    gemm(hidden, x, a, M, r, K, tb=True, alpha=scale)
    gemm(part, hidden, b, M, n, r, tb=True, beta=1, ldo=N)


def lora_backward(
    da: DeviceArray, db: DeviceArray, dhidden: DeviceArray, dout: DeviceArray, hidden: DeviceArray, x: DeviceArray,
    b: DeviceArray, scale: float, column: int, accumulate: bool,
) -> None:
    M, N, r, n, part = _adapter("dout", dout, hidden, "hidden", b, column)
    K = check.cube("x", x).shape[2]
    check.expect("x", x.shape, (*dout.shape[:2], K))
    check.expect("da", check.matrix("da", da).shape, (r, K))
    check.expect("db", check.matrix("db", db).shape, (n, r))
    check.expect("dhidden", check.cube("dhidden", dhidden).shape, hidden.shape)
    gemm(db, part, hidden, n, r, M, ta=True, lda=N, beta=int(accumulate))
    gemm(dhidden, part, b, M, r, n, lda=N, alpha=scale)
    gemm(da, dhidden, x, r, K, M, ta=True, beta=int(accumulate))


def lora_backward_input(dx: DeviceArray, dhidden: DeviceArray, a: DeviceArray) -> None:
    B, T, K = check.cube("dx", dx).shape
    r = check.matrix("a", a).shape[0]
    check.expect("a", a.shape, (r, K))
    check.expect("dhidden", check.cube("dhidden", dhidden).shape, (B, T, r))
    gemm(dx, dhidden, a, B * T, K, r, beta=1)
