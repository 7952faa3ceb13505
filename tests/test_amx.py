"""The AMX table's bf16 product, its four tile instructions emulated in C: no machine with AMX has run it yet.

The kernels are compiled here with LLMC_AMX_EMULATED; packing, padding and edges are the table's own.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from guard import UNIT, Array, Guarded, summed

SIMD = Path(__file__).parent.parent / "llmc" / "_cpu" / "simd"
FLAGS = "-O2 -fPIC -shared -mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mprfchw -mavx512bf16"
SOURCE = """
#include "kernels.c"
long scratch_floats(void) { return KERNELS.gemm_scratch; }
double peak(long rounds, float *value) { return KERNELS.dot_loop(rounds, value); }
void product(float *c, long ldc, const float *a, long a_rs, long a_cs, const float *b, long b_rs, long b_cs, long M,
             long N, long K, int add, const float *bias, float *scratch) {
    KERNELS.gemm_bf16(c, ldc, a, a_rs, a_cs, b, b_rs, b_cs, M, N, K, add, bias, scratch);
}
"""
SHAPES = [
    (1, 1, 1), (16, 48, 32), (15, 47, 31), (17, 49, 33), (5, 64, 64), (33, 96, 1), (40, 16, 1025), (257, 50, 70),
    (300, 7, 65), (20, 1600, 40), (3, 5, 0), (0, 4, 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        flags = []
    if "avx512_bf16" not in flags:
        pytest.skip("this CPU lacks AVX512_BF16, which the rest of the AMX table is made of")
    folder = tmp_path_factory.mktemp("amx")
    (folder / "amx.c").write_text(SOURCE.replace("KERNELS", "kernels_amx"))
    command = [compiler, *FLAGS.split(), f"-I{SIMD}", "-DLLMC_ISA_AMX", "-DLLMC_AMX_EMULATED", "amx.c", "-o", "amx.so"]
    done = subprocess.run([*command, "-lm"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(folder / "amx.so"))
    found.scratch_floats.restype = ctypes.c_long
    found.peak.restype = ctypes.c_double
    return found


def test_peak(library: ctypes.CDLL) -> None:
    """Six products of tiles a round, each of 16 x 16 x 32, whose sums are exact: 32 times 2^-10 a round."""
    value = ctypes.c_float()
    assert library.peak(ctypes.c_long(5), ctypes.byref(value)) == 5 * 6 * 2 * 16 * 16 * 32
    assert value.value == 5 * 32 / 1024


def rounded(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("use", ["forward", "dx", "dw"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_product(
    library: ctypes.CDLL, rng: np.random.Generator, M: int, N: int, K: int, add: bool, use: str
) -> None:
    """C (+)= A B + bias, with A by rows or by columns and B likewise, against float64, flush with forbidden pages."""
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (K, N)))
    bias = rng.standard_normal(N).astype(np.float32)
    c = rng.standard_normal((M, N)).astype(np.float32)
    expected = rounded(a) @ rounded(b) + (c if add else bias)
    bound = UNIT * (summed(K) + 2) * (np.abs(a) @ np.abs(b) * 1.02 + np.abs(c) + np.abs(bias))
    stored_a = np.ascontiguousarray(a.T) if use == "dw" else a
    stored_b = np.ascontiguousarray(b.T) if use == "forward" else b
    a_strides = (1, M) if use == "dw" else (K, 1)
    b_strides = (1, K) if use == "forward" else (N, 1)
    scratch = np.full(library.scratch_floats(), np.nan, np.float32)
    for place in ("end", "start"):
        guards = [Guarded(x, place) for x in (c, stored_a, stored_b, bias)]
        at: Callable[[int], ctypes.c_void_p] = lambda i: ctypes.c_void_p(guards[i].array.ctypes.data)  # noqa: B023, E731
        sizes = [ctypes.c_long(x) for x in (*b_strides, M, N, K)]
        library.product(
            at(0), ctypes.c_long(N), at(1), *map(ctypes.c_long, a_strides), at(2), *sizes, int(add),
            None if add else at(3), ctypes.c_void_p(scratch.ctypes.data),
        )  # fmt: skip
        assert all(guard.intact() for guard in guards)
        assert (np.abs(guards[0].array - expected) <= bound).all()
