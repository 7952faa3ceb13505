"""A CPU has done an op when the call returns: the order of ops is that of the program, and their results are there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def record(function: Callable[[], None]) -> Callable[[], None]:
    """`function` itself: there is nothing between it and the kernels that a recording would spare."""
    return function


def fetch(x: Array) -> Callable[[], Array]:
    """A callable that gives `x` itself."""
    return lambda: x


def stamp() -> float:
    return time.perf_counter()


def elapsed(begin: float, end: float) -> float:
    return end - begin
