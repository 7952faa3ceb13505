"""Attention by cuDNN, where its Python frontend is installed: the optional fast path of bfloat16.

    S = scale q k^T, causal;  lse = log sum exp S;  out = exp(S - lse) v

A plan is a graph of one node (`sdpa` or `sdpa_backward`) for one shape, with the scratch that cuDNN asks for.  It is
made at the first call of its shape, which is why `graphs.record` calls a function before it captures it: making one
allocates, and cuDNN may load code.  Queries, keys and values are views of qkv: (B,H,T,D) and (B,G,T,D) with the
strides of (B,T,H + 2 G,D); nothing is transposed.  H / G neighbouring heads of queries share one of keys and values, as
cuDNN has it too, which makes the gradients of these for each head of queries, rounds them and adds.  The backward pass
is asked to be deterministic.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

from llmc._cuda import device, driver
from llmc.errors import DeviceError

SPARE_NBYTES = 1 << 20
OLDEST = 90000  # cuDNN 9.0: the first whose attention takes strided views in both passes
OLDEST_FRONTEND = (1, 13)  # the first that knows `generate_stats`
Q, K, V, OUT, LSE, DOUT, DQ, DK, DV = range(1, 10)  # of the tensors in a graph


class _Shape(NamedTuple):
    """What a graph is made for: the contract's letters, and what scores are multiplied by."""

    B: int
    H: int
    G: int
    T: int
    D: int
    scale: float


class _Plan(NamedTuple):
    graph: Any
    scratch: Any  # a DeviceArray, or None


class _State(NamedTuple):
    """What belongs to a GPU in use."""

    opened: Any  # `device.handle()`
    handle: Any  # cuDNN's, bound to the stream that ops run on
    plans: dict[tuple[str, _Shape], _Plan]


_states: list[_State] = []  # one at most
atexit.register(_states.clear)  # before the context goes


@functools.cache
def available() -> str | None:
    """The versions of cuDNN and its frontend; None where either is missing, too old or cannot be used.  Asks no
    device."""
    try:
        if find_spec("cudnn") is None:
            return None
        _preload()
        import cudnn

        number = cudnn.backend_version()  # of the library, which is looked for when the module is imported
        frontend = str(cudnn.__version__)
        if number < OLDEST or tuple(map(int, frontend.split(".")[:2])) < OLDEST_FRONTEND:
            return None
    except Exception:  # whatever goes wrong in an import of somebody else's, there is attention without it
        return None
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}, frontend {frontend}"


def _preload() -> None:
    """Load cuDNN from wherever pip has put it: the frontend looks in one folder, then for what is loaded already."""
    for path in driver.libraries("cudnn", "nvidia-cudnn"):
        try:
            ctypes.CDLL(path)
            return
        except OSError:
            continue


def scratch_nbytes(tokens: int, heads: int, head_size: int) -> int:
    """About what the plans of one shape take beside their arguments, for memory plans: cuDNN tells when it has made
    them.  Its backward pass sums dq in float32, may have dk and dv of every head of queries, and two numbers for each
    row."""
    return (4 + 2 * 2) * tokens * heads * head_size + 8 * tokens * heads + SPARE_NBYTES


def forward(out: Any, lse: Any, qkv: Any, G: int, scale: float) -> None:
    """`ops.attention_forward` without window and soft-cap: out (B,T,H D) and qkv (B,T,(H + 2 G) D) bfloat16,
    lse (B,H,T) float32.

    DeviceError, with cuDNN's own words, for what it does not support: head sizes that are no multiple of 8, or large.
    """
    shape = _shape(out, lse, qkv, G, scale)
    if 0 in shape:
        return
    q, k, v = _parts(qkv, shape)
    with _reported(shape):
        _run(_plan("forward", shape, _build_forward), {Q: q, K: k, V: v, OUT: out.ptr, LSE: lse.ptr})


def backward(dqkv: Any, dout: Any, qkv: Any, out: Any, lse: Any, G: int, scale: float) -> None:
    """`ops.attention_backward`; types and errors as in `forward`.  dqkv shares its memory with no other."""
    shape = _shape(out, lse, qkv, G, scale)
    if 0 in shape:
        return
    q, k, v = _parts(qkv, shape)
    dq, dk, dv = _parts(dqkv, shape)
    with _reported(shape):
        _run(
            _plan("backward", shape, _build_backward),
            {Q: q, K: k, V: v, OUT: out.ptr, LSE: lse.ptr, DOUT: dout.ptr, DQ: dq, DK: dk, DV: dv},
        )


def _shape(out: Any, lse: Any, qkv: Any, G: int, scale: float) -> _Shape:
    if qkv.dtype.name != "bfloat16":
        raise TypeError(f"qkv: cuDNN's attention takes bfloat16, got {qkv.dtype.name}")
    B, H, T = lse.shape
    return _Shape(B, H, G, T, out.shape[-1] // max(1, H), scale)


def _parts(qkv: Any, shape: _Shape) -> tuple[int, int, int]:
    """Where the first query, key and value lie."""
    head = shape.D * qkv.itemsize
    return qkv.ptr, qkv.ptr + shape.H * head, qkv.ptr + (shape.H + shape.G) * head


@contextmanager
def _reported(shape: _Shape) -> Iterator[None]:
    try:
        yield
    except (DeviceError, MemoryError):
        raise
    except Exception as error:  # its own types, and RuntimeError, ValueError of the binding
        said = " ".join(str(error).split()) or type(error).__name__
        heads = f"{shape.H} heads of {shape.D}" + (f" on {shape.G}" if shape.G != shape.H else "")
        raise DeviceError(
            f"cuDNN's attention, B={shape.B} T={shape.T}, {heads}: {said} (--attention own does without it)"
        ) from error


# ---- plans -----------------------------------------------------------------------------------------


def _state() -> _State:
    import cudnn

    opened = device.handle()
    if not _states or _states[0].opened is not opened:
        handle = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=int(device.stream().handle))
        _states[:] = [_State(opened, handle, {})]
    return _states[0]


def _plan(name: str, shape: _Shape, build: Callable[[Any, _Shape], Any]) -> _Plan:
    state = _state()
    if (name, shape) not in state.plans:
        import cudnn

        device.not_captured("making a plan of cuDNN's")
        graph = build(state.handle, shape)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        nbytes = graph.get_workspace_size()
        state.plans[name, shape] = _Plan(graph, device.empty((nbytes,), "uint8") if nbytes else None)
    return state.plans[name, shape]


def _run(plan: _Plan, pointers: dict[int, int]) -> None:
    plan.graph.execute(pointers, plan.scratch.ptr if plan.scratch is not None else 0, handle=_state().handle)


def _graph(handle: Any) -> Any:
    import cudnn

    return cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT, handle=handle,
    )  # fmt: skip


def _view(shape: _Shape, heads: int, packed: bool) -> dict[str, list[int]]:
    """Sizes and strides of some of the heads of (B,T,H + 2 G,D), or of all of (B,T,H,D), as (B,heads,T,D)."""
    width = (shape.H + 2 * shape.G if packed else shape.H) * shape.D
    return {"dim": [shape.B, heads, shape.T, shape.D], "stride": [shape.T * width, shape.D, width, 1]}


def _rows(shape: _Shape) -> dict[str, list[int]]:
    """Sizes and strides of lse, as cuDNN sees it."""
    return {"dim": [shape.B, shape.H, shape.T, 1], "stride": [shape.H * shape.T, shape.T, 1, 1]}


def _attention(shape: _Shape) -> dict[str, Any]:
    """What both passes are told: nothing right of the diagonal takes part."""
    import cudnn

    return {
        "attn_scale": shape.scale, "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_right_bound": 0,
    }  # fmt: skip


def _give(tensor: Any, uid: int, view: dict[str, list[int]]) -> Any:
    """Make a tensor of the graph an output, at a place of its own."""
    return tensor.set_output(True).set_uid(uid).set_dim(view["dim"]).set_stride(view["stride"])


def _build_forward(handle: Any, shape: _Shape) -> Any:
    import cudnn

    graph = _graph(handle)
    q, k, v = (
        graph.tensor(name=name, uid=uid, **_view(shape, heads, True))
        for name, uid, heads in (("q", Q, shape.H), ("k", K, shape.G), ("v", V, shape.G))
    )
    out, lse = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **_attention(shape))
    _give(out, OUT, _view(shape, shape.H, False))
    _give(lse, LSE, _rows(shape)).set_data_type(cudnn.data_type.FLOAT)
    return graph


def _build_backward(handle: Any, shape: _Shape) -> Any:
    import cudnn

    graph = _graph(handle)
    q, k, v, out, dout = (
        graph.tensor(name=name, uid=uid, **_view(shape, heads, packed))
        for name, uid, heads, packed in (
            ("q", Q, shape.H, True), ("k", K, shape.G, True), ("v", V, shape.G, True), ("out", OUT, shape.H, False),
            ("dout", DOUT, shape.H, False),
        )
    )  # fmt: skip
    lse = graph.tensor(name="lse", uid=LSE, data_type=cudnn.data_type.FLOAT, **_rows(shape))
    gradients = graph.sdpa_backward(
        q=q, k=k, v=v, o=out, dO=dout, stats=lse, use_deterministic_algorithm=True, **_attention(shape)
    )
    for tensor, uid, heads in zip(gradients, (DQ, DK, DV), (shape.H, shape.G, shape.G), strict=True):
        _give(tensor, uid, _view(shape, heads, True))
    return graph
