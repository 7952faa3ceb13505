"""Random numbers; see `philox.cu`."""

from __future__ import annotations

import math

from llmc._cuda import check
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import blocks

THREADS = 256
GROUP, COUNTERS = 64, 16  # elements that lie together, and the counters they come from

SINGLE = Kernel("philox", "normal_single", "PqQQf")
STORED = Kernel("philox", "normal_stored", "PqQQf")


def normal(out: DeviceArray, seed: int, stream: int, std: float) -> None:
    n = check.numbers("out", out).size
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name}: must be from 0 to 2^64 - 1, got {value}")
    if not 0 <= std < math.inf:
        raise ValueError(f"std: must be a number of at least 0, got {std}")
    kernel = SINGLE if out.dtype == "float32" else STORED
    kernel(blocks(blocks(n, GROUP) * COUNTERS, THREADS), THREADS, out, n, seed, stream, std)
