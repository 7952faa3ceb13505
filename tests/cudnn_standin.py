"""A stand-in for cuDNN's Python frontend, as far as attention needs it: it holds callers to the frontend's rules, and
computes in float64 what the graph that was built says, on tensors as the graph describes them, in the stream that the
handle is bound to.

    with installed(library) as made: ...        # `library` is the simulated libcuda; `made` lists the graphs

Whatever it finds wrong in the stream it keeps in `made.wrong`, since an error cannot pass through the driver.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {"bfloat16": BFLOAT16, "float": np.dtype(np.float32)}
WORKSPACE = {"sdpa": 0, "sdpa_backward": 1000}  # bytes
STEPS = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
SMALLEST, LARGEST = 8, 128  # head sizes that are supported: multiples of the first up to the second
RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class cudnnGraphNotSupportedError(RuntimeError):
    pass


class Made(list[Any]):
    """Graphs in the order in which they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.handles: list[Handle] = []


class Handle:
    def __init__(self) -> None:
        self.stream = 0


class Tensor:
    """A tensor of a graph; setters return it, as the frontend's do."""

    def __init__(self, graph: Graph, name: str, **given: Any) -> None:
        self.graph, self.name = graph, name
        self.dim, self.stride = given.get("dim"), given.get("stride")
        self.uid, self.data_type = given.get("uid", -1), given.get("data_type")
        self.virtual = given.get("virtual", False)

    def set_output(self, output: bool) -> Tensor:
        self.virtual = not output
        return self

    def set_uid(self, uid: int) -> Tensor:
        self.uid = uid
        return self

    def set_dim(self, dim: list[int]) -> Tensor:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Tensor:
        self.stride = stride
        return self

    def set_data_type(self, data_type: str) -> Tensor:
        self.data_type = data_type
        return self

    def view(self, pointer: int) -> np.ndarray[Any, Any]:
        """The tensor at an address."""
        dtype = TYPES[self.data_type or self.graph.io_data_type]
        last = sum((n - 1) * step for n, step in zip(self.dim, self.stride, strict=True))
        memory = (ctypes.c_char * ((last + 1) * dtype.itemsize)).from_address(pointer)
        strides = [step * dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(np.frombuffer(memory, dtype), self.dim, strides)


class Graph:
    """`cudnn.pygraph`, of one node."""

    def __init__(
        self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: Handle, made: Made,
        library: Any,
    ) -> None:
        self.io_data_type, self.handle, self.library = io_data_type, handle, library
        self.types = (io_data_type, intermediate_data_type, compute_data_type)
        self.made, self.tensors, self.steps, self.runs = made, [], [], 0
        self.kind, self.node, self.outputs = "", {}, {}
        self._kept: list[Any] = []  # callbacks that a recording may call again
        made.append(self)

    def tensor(
        self, *, dim: list[int], stride: list[int], uid: int, name: str = "", data_type: str | None = None
    ) -> Tensor:
        self.tensors.append(Tensor(self, name, dim=dim, stride=stride, uid=uid, data_type=data_type))
        return self.tensors[-1]

    def _node(self, kind: str, outputs: tuple[str, ...], given: dict[str, Any]) -> tuple[Tensor, ...]:
        self.kind, self.node = kind, given
        made = tuple(Tensor(self, name, virtual=True) for name in outputs)
        self.tensors += made
        self.outputs = dict(zip(outputs, made, strict=True))
        return made

    def sdpa(
        self, *, q: Tensor, k: Tensor, v: Tensor, attn_scale: float, generate_stats: bool,
        diagonal_alignment: str = "top_left", diagonal_band_right_bound: int | None = None,
    ) -> tuple[Tensor, ...]:
        given = {name: value for name, value in locals().items() if name != "self"}
        return self._node("sdpa", ("o", "stats"), given)

    def sdpa_backward(
        self, *, q: Tensor, k: Tensor, v: Tensor, o: Tensor, dO: Tensor, stats: Tensor, attn_scale: float,
        diagonal_alignment: str = "top_left", diagonal_band_right_bound: int | None = None,
        use_deterministic_algorithm: bool = False,
    ) -> tuple[Tensor, ...]:
        given = {name: value for name, value in locals().items() if name != "self"}
        return self._node("sdpa_backward", ("dQ", "dK", "dV"), given)

    def _step(self, name: str) -> None:
        if self.steps != list(STEPS[: STEPS.index(name)]):
            raise RuntimeError(f"{name} after {self.steps}")
        self.steps.append(name)

    def validate(self) -> None:
        self._step("validate")
        uids = [tensor.uid for tensor in self.tensors if not tensor.virtual]
        if -1 in uids or len(set(uids)) != len(uids):
            raise RuntimeError(f"uids {uids}")
        if any(tensor.dim is None or tensor.stride is None for tensor in self.tensors if not tensor.virtual):
            raise RuntimeError("a tensor without dim or stride")
        heads, shared = self.node["q"].dim[1], self.node["k"].dim[1]
        if heads % shared or self.node["v"].dim[1] != shared:
            raise cudnnGraphNotSupportedError(f"{heads} heads of queries, {shared} of keys")

    def build_operation_graph(self) -> None:
        self._step("build_operation_graph")

    def create_execution_plans(self, modes: list[str]) -> None:
        self._step("create_execution_plans")
        if not modes:
            raise RuntimeError("no heuristics")

    def check_support(self) -> None:
        self._step("check_support")
        size = self.node["q"].dim[3]
        if size % SMALLEST or size > LARGEST:
            raise cudnnGraphNotSupportedError(f"hidden_dim {size}\nis not supported")

    def build_plans(self) -> None:
        self._step("build_plans")

    def get_workspace_size(self) -> int:
        return WORKSPACE[self.kind]

    def execute(self, pointers: dict[int, int], workspace: int, *, handle: Handle) -> None:
        if self.steps != list(STEPS):
            raise RuntimeError(f"execute after {self.steps}")
        wanted = {tensor.uid for tensor in self.tensors if not tensor.virtual}
        if set(pointers) != wanted:
            raise RuntimeError(f"tensors {sorted(pointers)} given, {sorted(wanted)} wanted")
        if not all(type(pointer) is int and pointer % 16 == 0 for pointer in pointers.values()):
            raise RuntimeError("an address is no int, or not aligned to 16 bytes")
        if handle is not self.handle or not handle.stream:
            raise RuntimeError("another handle than the plan's, or one without a stream")
        if bool(workspace) != bool(WORKSPACE[self.kind]):
            raise RuntimeError(f"workspace {workspace:#x} for {WORKSPACE[self.kind]} bytes")

        def run(data: object) -> None:
            try:
                if workspace:
                    ctypes.memset(workspace, 0xA5, WORKSPACE[self.kind])
                getattr(self, f"_{self.kind}")(pointers)
                self.runs += 1
            except Exception as error:
                self.made.wrong.append(f"{type(error).__name__}: {error}")

        callback = RUN(run)
        self._kept.append(callback)
        self.library.simulation_enqueue(ctypes.c_void_p(handle.stream), callback, ctypes.byref(ctypes.c_char()), 1)

    # ---- the arithmetic --------------------------------------------------------------------------------

    def _read(self, name: str, pointers: dict[int, int]) -> np.ndarray[Any, Any]:
        """The tensor in float64; of keys and values every head as often as those of queries share it."""
        tensor = self.node[name]
        value = tensor.view(pointers[tensor.uid]).astype(np.float64)
        return value.repeat(self.node["q"].dim[1] // tensor.dim[1], axis=1)

    def _write(self, name: str, pointers: dict[int, int], value: np.ndarray[Any, Any]) -> None:
        """What belongs to each head of queries, rounded and then added where the tensor has fewer."""
        tensor = self.outputs[name]
        if not tensor.virtual:
            B, H, T, D = value.shape
            G = tensor.dim[1]
            if G < H:
                value = value.astype(TYPES[self.io_data_type]).astype(np.float64)
                value = value.reshape(B, G, H // G, T, D).sum(axis=2)
            tensor.view(pointers[tensor.uid])[...] = value

    def _scores(self, pointers: dict[int, int]) -> np.ndarray[Any, Any]:
        q, k = self._read("q", pointers), self._read("k", pointers)
        scores = self.node["attn_scale"] * q @ k.swapaxes(-1, -2)
        T, bound = scores.shape[-1], self.node["diagonal_band_right_bound"]
        if bound is not None:
            if self.node["diagonal_alignment"] != "top_left":
                raise RuntimeError("the other alignment is not simulated")
            scores[..., np.triu(np.ones((T, T), bool), 1 + bound)] = -np.inf
        return scores

    def _sdpa(self, pointers: dict[int, int]) -> None:
        scores = self._scores(pointers)
        most = scores.max(-1, keepdims=True)
        lse = most + np.log(np.exp(scores - most).sum(-1, keepdims=True))
        self._write("o", pointers, np.exp(scores - lse) @ self._read("v", pointers))
        if self.node["generate_stats"]:
            self._write("stats", pointers, lse)

    def _sdpa_backward(self, pointers: dict[int, int]) -> None:
        q, k, v, o, do, stats = (self._read(name, pointers) for name in ("q", "k", "v", "o", "dO", "stats"))
        p = np.exp(self._scores(pointers) - stats)
        ds = p * (do @ v.swapaxes(-1, -2) - (do * o).sum(-1, keepdims=True)) * self.node["attn_scale"]
        for name, value in (("dQ", ds @ k), ("dK", ds.swapaxes(-1, -2) @ q), ("dV", p.swapaxes(-1, -2) @ do)):
            self._write(name, pointers, value)


def module(library: Any, made: Made, version: int) -> ModuleType:
    """`cudnn`, at the version that cuDNN would tell; 0: there is none."""
    fake: Any = ModuleType("cudnn")
    fake.__version__ = "1.18.0"
    fake.__spec__ = SimpleNamespace(name="cudnn")
    fake.data_type = SimpleNamespace(BFLOAT16="bfloat16", FLOAT="float")
    fake.diagonal_alignment = SimpleNamespace(TOP_LEFT="top_left", BOTTOM_RIGHT="bottom_right")
    fake.heur_mode = SimpleNamespace(A="A", FALLBACK="fallback")
    fake.cudnnGraphNotSupportedError = cudnnGraphNotSupportedError

    def backend_version() -> int:
        if not version:
            raise RuntimeError("Unable to find symbol cudnnGetVersion")
        return version

    def create_handle() -> Handle:
        made.handles.append(Handle())
        return made.handles[-1]

    def set_stream(handle: Handle, stream: int) -> None:
        handle.stream = stream

    fake.backend_version, fake.create_handle, fake.set_stream = backend_version, create_handle, set_stream
    fake.pygraph = lambda **given: Graph(**given, made=made, library=library)
    return fake


@contextmanager
def installed(library: Any, version: int = 91300) -> Iterator[Made]:
    """`import cudnn` gives the stand-in, and `llmc._cuda.cudnn` knows nothing of before."""
    from llmc._cuda import cudnn

    made, before = Made(), sys.modules.get("cudnn")
    sys.modules["cudnn"] = module(library, made, version)
    cudnn.available.cache_clear()
    cudnn._states.clear()
    try:
        yield made
    finally:
        cudnn.available.cache_clear()
        cudnn._states.clear()
        if before is None:
            del sys.modules["cudnn"]
        else:
            sys.modules["cudnn"] = before


