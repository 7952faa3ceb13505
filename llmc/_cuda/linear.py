"""Linear layers, y = x w^T + b, dx = dy w, dw = dy^T x; and `gemm`, the product that the head is made of.

cuBLASLt multiplies (`cublaslt.py`), or with `--gemm own` the kernels of `linear.cu`; all matrices are row-major here.
"""

from __future__ import annotations

from typing import Any

Pointer = Any  # a DeviceArray, or an int: a device address


def gemm(
    out: Pointer, a: Pointer, b: Pointer, M: int, N: int, K: int, *, ta: bool = False, tb: bool = False,
    beta: int = 0, lda: int | None = None, ldb: int | None = None, ldo: int | None = None, single: bool = False,
) -> None:
    """out (M,N) = op(a) (M,K) @ op(b) (K,N) + beta * out.

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
    raise NotImplementedError
