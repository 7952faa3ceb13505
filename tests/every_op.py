"""Every op of the CUDA backend on small, ragged shapes: a program for what watches kernels while they run.

    compute-sanitizer --tool memcheck python every_op.py
    LLMC_TEST_CUDA=simulation SIMULATION_SANITIZE=1 LD_PRELOAD=libasan.so python every_op.py

Each array is an allocation of its own, so that one element too far is outside.  Results are compared with the float64
reference as a whole, since a tool that finds nothing in kernels that did nothing has shown nothing; bounds for single
elements are the tests' business.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

import numpy as np
from guard import OUTPUTS, Arguments, Sizes, example, expect, names
from on_device import stored

from llmc import ops

SHAPES = (
    Sizes(),
    Sizes(B=1, T=1, C=5, H=1, N=7, V=3, Vp=128, maxT=1),  # nothing is a multiple of anything
    Sizes(B=2, T=67, C=128, H=2, N=136, V=131, Vp=256, maxT=70),  # heads of 64, 128 and 256 channels
    Sizes(B=1, T=130, C=256, H=2, N=64, V=300, Vp=384, maxT=130),
    Sizes(B=1, T=33, C=256, H=1, N=768, V=257, Vp=384, maxT=64),
)
LIMITS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}  # of the norm of each output


def run(backend: Any, op: str, arguments: Arguments, limit: float) -> None:
    """One call, compared with the reference of the arguments as the device has them."""
    storage = backend.info()["storage"]
    given, seen = dict(arguments), dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            given[name] = backend.empty(value.shape, storage if stored(op, name, arguments) else value.dtype.name)
            given[name][...] = value
            seen[name] = np.asarray(given[name]).astype(value.dtype)
    expected = expect(op, seen)
    getattr(backend, op)(*(given[name] for name in names(op)))
    for name, exact in expected.items():
        found = np.asarray(given[name]).astype(np.float64)
        error = float(np.linalg.norm((found - exact).ravel())) / max(float(np.linalg.norm(exact.ravel())), 1e-30)
        if not error <= limit:
            sys.exit(f"{op}: {name} of shape {exact.shape} is off by {error:.2g} of its norm, more than {limit:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", default="fp32,bf16", metavar="A,B", help="of fp32, tf32, bf16 (fp32,bf16)")
    parser.add_argument("--gemm", choices=("cublaslt", "own"), help="who multiplies (cublaslt)")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help=f"the first N of {len(SHAPES)}")
    args = parser.parse_args()
    if os.environ.get("LLMC_TEST_CUDA") == "simulation":
        importlib.import_module("simulation").load()
    calls = 0
    for dtype in args.dtypes.split(","):
        backend = ops.load("cuda", dtype=dtype, gemm=args.gemm, attention="own")
        for sizes in SHAPES[: args.shapes]:
            backend.reserve(4 * sizes.C, sizes.Vp, 1 << 20, sizes.B * sizes.T, 4 * sizes.H, sizes.C // sizes.H)
            for op in OUTPUTS:
                for accumulate in (False, True) if "accumulate" in names(op) else (False,):
                    rng = np.random.default_rng(1)
                    run(backend, op, example(op, rng, sizes, accumulate), LIMITS[dtype])
                    calls += 1
    print(f"{calls} calls of {len(OUTPUTS)} ops")


if __name__ == "__main__":
    main()
