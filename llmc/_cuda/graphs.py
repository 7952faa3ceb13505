"""`record`: a sequence of ops as one launch.

The first call runs the function as it is, waiting after each op: modules are loaded, libraries choose algorithms, and a
fault is named.  The second captures what the ops send to the compute stream into a graph (nothing runs) and launches
it; every later one launches it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llmc._cuda import device, driver
from llmc.errors import DeviceError


def record(function: Callable[[], None]) -> Callable[[], None]:
    """`ops.record`.  With LLMC_CUDA_CHECK=1 nothing is recorded: every call runs the function, op by op."""
    return Recording(function)


def require(check: Callable[[], None]) -> None:
    """Call `check`, which raises; in a capture, have it called before every launch of what is captured instead."""
    opened = device.handle()
    if opened.capturing:
        opened.recording.conditions.append(check)
    else:
        check()


class Recording:
    """A function and, from its second call on, its graph.

    A graph belongs to the context it was captured in, and to the workspace and the settings of that time; after a
    `configure` that changes the settings the function is recorded anew.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        named = getattr(function, "func", function)  # of a partial
        self.name = getattr(named, "__qualname__", type(named).__name__)
        self.conditions: list[Callable[[], None]] = []
        self.nodes = 0  # launches and copies in the graph
        self._ran = False
        self._executable = 0
        self._settings: Any = None
        self._opened: Any = None
        self._held: Any = None  # the workspace, to which the graph has pointers

    def __call__(self) -> None:
        device.run(f"recording of {self.name}", self._do)

    def _do(self) -> None:
        opened = device.handle()
        if opened.recording is not None:
            raise RuntimeError(f"the recording of {self.name} cannot be part of that of {opened.recording.name}")
        settings = device.storage, device.dtype, device.gemm, device.attention
        if settings != self._settings:
            self._drop()
            self._settings = settings
        if opened.always_checks:
            self._function()
        elif not self._ran:
            self._run(opened)
        elif not self._executable:
            self._capture(opened)
            self._launch(opened)
        else:
            self._launch(opened)

    def _run(self, opened: Any) -> None:
        opened.recording, opened.checks = self, True
        try:
            self._function()
        finally:
            opened.recording, opened.checks = None, False
        self._ran = True

    def _capture(self, opened: Any) -> None:
        stream = opened.compute.handle
        self.conditions.clear()
        driver.begin_capture(stream)
        opened.recording, opened.capturing = self, True
        graph = 0
        try:
            self._function()
        except BaseException:
            self._discard(stream)
            raise
        finally:
            opened.recording, opened.capturing = None, False
        graph = driver.end_capture(stream)
        try:
            self.nodes = driver.count_nodes(graph)
            self._executable = driver.instantiate(graph)
        finally:
            driver.destroy_graph(graph)
        self._opened, self._held = opened, opened.workspace
        opened.bury()

    @staticmethod
    def _discard(stream: int) -> None:
        """End a capture that has failed."""
        try:
            graph = driver.end_capture(stream)
        except driver.CallError:
            return  # the failure had broken the capture already, which is over now
        driver.destroy_graph(graph)

    def _launch(self, opened: Any) -> None:
        if self._opened is not opened:
            raise DeviceError(f"the recording of {self.name} was made on a GPU that has been closed since")
        for check in self.conditions:
            check()
        driver.launch(self._executable, opened.compute.handle)

    def _drop(self) -> None:
        if self._executable and self._opened is not None:
            self._opened.discard(functools.partial(driver.destroy_executable, self._executable))
        self._ran, self._executable, self._held = False, 0, None

    def __del__(self) -> None:
        self._drop()
