"""Every case of test_linear.py and test_head.py with the GPU's own GEMM (`--gemm own`), for which they have no
parameter."""

from __future__ import annotations

from collections.abc import Iterator

import on_device
import pytest
import test_head
import test_linear
from conftest import WORKSPACE


@pytest.fixture
def ops() -> Iterator[on_device.Adapter]:
    """A GPU or a simulated one, in fp32; arrays are NumPy's."""
    for backend in on_device.configured("fp32", WORKSPACE):
        backend.configure(dtype="fp32", gemm="own", attention="own")
        assert backend.info()["gemm"] == "own"
        yield backend
        backend.configure(dtype="fp32", gemm="cublaslt", attention="own")


def _cases() -> Iterator[tuple[str, object]]:
    for module in (test_linear, test_head):
        for name, case in vars(module).items():
            if name.startswith("test_") and "ops" in case.__code__.co_varnames[: case.__code__.co_argcount]:
                yield f"{name}_of_{module.__name__.removeprefix('test_')}", case


globals().update(_cases())
