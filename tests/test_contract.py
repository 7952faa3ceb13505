"""Every backend has the functions of `ops.Ops`, with its signatures, and refuses whatever else is passed.

What a refusal must be: a ValueError (a TypeError for what is no array), naming the argument, before any
output was touched.
"""

from __future__ import annotations

import inspect
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from guard import OUTPUTS, Arguments, Array, Sizes, example, expect, names
from numpy.random import Generator

from llmc.errors import ConfigError
from llmc.ops import DTYPES, Ops, load

CONTRACT = {
    name: list(inspect.signature(function).parameters)[1:]
    for name, function in inspect.getmembers(Ops, inspect.isfunction)
    if not name.startswith("_")
}
SIZES = Sizes(C=15, H=3)  # neither H + 1 nor H - 1 divides C


# ---- the functions ---------------------------------------------------------------------------------


def missing_or_different(module: ModuleType) -> list[str]:
    """What keeps `module` from being a backend, in words."""
    faults = []
    for name, parameters in CONTRACT.items():
        function = getattr(module, name, None)
        if function is None:
            faults.append(f"{name} is missing")
        elif (found := list(inspect.signature(function).parameters)) != parameters:
            faults.append(f"{name} takes {found}, not {parameters}")
    return faults


def test_reference_is_a_backend() -> None:
    assert missing_or_different(reference) == []


def test_cpu_is_a_backend(cpu: ModuleType) -> None:
    assert missing_or_different(cpu) == []


def test_cuda_is_a_backend(cuda: ModuleType) -> None:
    assert missing_or_different(cuda) == []


def test_every_op_has_tests() -> None:
    """guard.OUTPUTS and guard.example, on which the op tests stand, leave nothing out."""
    assert set(OUTPUTS) == set(CONTRACT) - {
        "info", "empty", "reserve", "workspace_nbytes", "memory", "record", "fetch", "stamp", "elapsed",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for op in OUTPUTS:
        assert list(example(op, rng, SIZES)) == CONTRACT[op]


def test_every_op_is_documented(cpu: ModuleType) -> None:
    for name in CONTRACT:
        assert (getattr(Ops, name).__doc__ or "").strip(), f"Ops.{name} has no docstring"


@pytest.mark.parametrize("op", OUTPUTS)
def test_examples_are_valid(each_device: ModuleType, rng: Generator, op: str) -> None:
    """The arguments that the refusals below start from are accepted, by position and by name."""
    getattr(each_device, op)(*example(op, rng, SIZES).values())
    getattr(each_device, op)(**example(op, rng, SIZES))


def test_load(cpu: ModuleType) -> None:
    assert load("cpu") is cpu
    with pytest.raises(ConfigError, match=r"device: 'tpu'.*cpu"):
        load("tpu")


@pytest.mark.parametrize("device, settings, message", [
    ("cpu:0", {}, r"device: 'cpu:0' is not available"),
    ("cuda:x", {}, r"device: 'cuda:x' is not available"),
    ("cpu", {"gemm": "own"}, r"gemm: 'own' means nothing on the device 'cpu'"),
    ("cpu", {"attention": "own"}, r"attention: 'own' means nothing on the device 'cpu'"),
    ("cuda", {"isa": "scalar"}, r"isa: 'scalar' means nothing on the device 'cuda'"),
    ("cuda:1", {"threads": 2}, r"threads: 2 means nothing on the device 'cuda:1'"),
    ("cpu", {"dtype": "fp8"}, r"dtype: 'fp8' is unknown; choose from fp32, tf32, bf16"),
    ("cpu", {"dtype": "tf32"}, r"dtype: tf32 is for GPUs; a CPU takes fp32 and bf16"),
])
def test_load_of_what_does_not_fit(cpu: ModuleType, device: str, settings: dict[str, Any], message: str) -> None:
    """Refused, and the backend is as it was."""
    before = cpu.info()
    with pytest.raises(ConfigError, match=message):
        load(device, **settings)
    assert cpu.info() == before


def test_types_of_products(cpu: ModuleType) -> None:
    """The kernels, which stand below the contract, know the same names in the same order, but for a GPU's own."""
    from llmc._cpu.isa import DTYPES as known

    assert known == tuple(dtype for dtype in DTYPES if dtype != "tf32")
    assert load("cpu").info()["dtype"] == DTYPES[0]


def test_info(cpu: ModuleType) -> None:
    """Precision is that of products; whatever lies in memory is float32, and no step is ahead of what is looked at."""
    for dtype in ("fp32", "bf16"):
        cpu.configure(isa=cpu.info()["isa"], threads=1, dtype=dtype)
        info = cpu.info()
        assert (info["device"], info["storage"], info["ahead"], info["dtype"]) == ("cpu", "float32", 0, dtype)
    for backend in (cpu, reference):
        assert {"device", "dtype", "storage", "ahead"} <= set(backend.info())


# ---- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_record(cpu: ModuleType, backend: str) -> None:
    """What is recorded is done at every call, the first included, on what the arrays hold by then."""
    ops = cpu if backend == "cpu" else reference
    x, y, total = ops.empty((3, 5), "float32"), ops.empty((3, 5), "float32"), ops.empty((1,), "float64")

    def function() -> None:
        ops.residual_forward(y, y, x)
        ops.sum_losses(total, y, 0.5, True)

    replay = ops.record(function)
    assert not np.asarray(total).any(), "recording does nothing yet"
    expected, summed = 0.0, 0.0
    for value in (1.0, 2.0, -3.0, 4.0, 0.5):
        x[...] = value
        assert replay() is None
        expected += value
        summed += 0.5 * 15 * expected
        assert (np.asarray(y) == expected).all() and np.asarray(total)[0] == summed


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fetch(cpu: ModuleType, backend: str) -> None:
    """The values after the ops so far, again and again, of any type and shape."""
    ops = cpu if backend == "cpu" else reference
    for shape, dtype in (((2, 3), "float32"), ((1,), "float64"), ((0, 4), "float32"), ((2, 2), "int32")):
        x = ops.empty(shape, dtype)
        x[...] = 3
        values = ops.fetch(x)
        for _ in range(2):
            found = values()
            assert isinstance(found, np.ndarray) and found.dtype == np.dtype(dtype) and found.shape == shape
            assert (found == 3).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_stamps(cpu: ModuleType, backend: str) -> None:
    """Time passes between two stamps, and adds up."""
    ops = cpu if backend == "cpu" else reference
    x = ops.empty((1 << 16,), "float32")
    first = ops.stamp()
    ops.gelu_forward(x, x)
    second = ops.stamp()
    ops.gelu_forward(x, x)
    third = ops.stamp()
    parts = ops.elapsed(first, second), ops.elapsed(second, third)
    assert min(parts) > 0 and sum(parts) == pytest.approx(ops.elapsed(first, third), abs=1e-6)
    assert ops.elapsed(first, third) < 60


def test_memory_is_the_machines(cpu: ModuleType) -> None:
    assert cpu.memory() is None


# ---- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int32", "uint16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (0,), (2, 0), (1000003,), (4 << 20,)])
def test_empty(cpu: ModuleType, shape: tuple[int, ...], dtype: str) -> None:
    """Zero-filled, contiguous, aligned to a cache line, writable, and its own."""
    first, second = cpu.empty(shape, dtype), cpu.empty(shape, dtype)
    for array in (first, second):
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.flags.c_contiguous and array.flags.writeable and not array.any()
        assert array.size == 0 or array.ctypes.data % 64 == 0
    first[...] = 1
    assert not second.any()


def test_empty_outlives_its_views(cpu: ModuleType) -> None:
    """A view keeps the memory alive."""
    view = cpu.empty((1 << 22,), "float32")[7:9]
    for _ in range(4):
        cpu.empty((1 << 22,), "float32")[...] = 3
    assert view.tolist() == [0.0, 0.0]


# ---- refusals --------------------------------------------------------------------------------------


def arrays_of(op: str) -> list[str]:
    """The op's array arguments."""
    given = example(op, np.random.default_rng(0), SIZES)
    return [name for name, value in given.items() if isinstance(value, np.ndarray)]


def refuse(
    backend: ModuleType, op: str, arguments: Arguments, error: type[Exception] | tuple[type[Exception], ...],
    naming: list[str],
) -> None:
    """The op raises `error`, its message has one of the names in it, and nothing was written."""
    before = {name: value.tobytes() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    with pytest.raises(error) as caught:
        getattr(backend, op)(*(arguments[name] for name in names(op)))
    message = str(caught.value)
    assert any(re.search(rf"\b{name}\b", message) for name in naming), f"{message!r} names none of {naming}"
    for name, content in before.items():
        assert arguments[name].tobytes() == content, f"{op} wrote to {name} before it refused"


ARRAYS = [(op, name) for op in OUTPUTS for name in arrays_of(op)]
OPTIONAL = {
    ("embedding_forward", "wpe"), ("embedding_backward", "dwpe"), ("rmsnorm_backward", "dw"), ("linear_forward", "b"),
    ("linear_backward", "db"), ("linear_gelu_forward", "b"), ("gelu_linear_backward", "db"), ("head_loss", "dw"),
    ("adamw_step", "copy"),
}
# What may be None with another: either both are arrays or both are None, or there is no first without the second.
PAIRS = {
    ("layernorm_backward", "dw"): "db", ("layernorm_backward", "db"): "dw", ("linear_backward", "dw"): "db",
    ("gelu_linear_backward", "dw"): "db", ("head_loss", "dx"): "dw",
}  # fmt: skip


@pytest.mark.parametrize("wrong", ["other float", "float16", "uint8", "other integer", "big-endian"])
@pytest.mark.parametrize("op, name", ARRAYS)
def test_wrong_dtype(each_device: ModuleType, rng: Generator, op: str, name: str, wrong: str) -> None:
    given = example(op, rng, SIZES)
    own = given[name].dtype
    others = {
        "other float": "float32" if own == np.float64 else "float64",
        "other integer": "int64" if own == np.int32 else "int32", "big-endian": own.newbyteorder(">"),
    }  # fmt: skip
    given[name] = given[name].astype(others.get(wrong, wrong))
    refuse(each_device, op, given, ValueError, [name])


# Matrices that may be bfloat16 on a CPU where they are not trained, and what is None then.
UNTRAINED: dict[tuple[str, str], tuple[str, ...]] = {
    ("embedding_forward", "wte"): (), ("embedding_forward", "wpe"): (), ("linear_forward", "w"): (),
    ("linear_gelu_forward", "w"): (), ("linear_backward", "w"): ("dw", "db"),
    ("gelu_linear_backward", "w"): ("dw", "db"), ("head_loss", "w"): ("dw",), ("head_logits", "w"): (),
}  # fmt: skip


@pytest.mark.parametrize("op, name", ARRAYS)
def test_bfloat16(cpu: ModuleType, rng: Generator, op: str, name: str) -> None:
    """Matrices that are not trained may be, whatever they multiply; nothing else, but for what is copied."""
    given = example(op, rng, SIZES)
    given[name] = given[name].astype(ml_dtypes.bfloat16)
    untrained = UNTRAINED.get((op, name))
    if op == "copy":
        cpu.copy(**given)
        np.testing.assert_array_equal(given["out"], given["x"].astype(given["out"].dtype))
        return
    if untrained is None:
        refuse(cpu, op, given, ValueError, [name])
        return
    if untrained:
        refuse(cpu, op, given, ValueError, [name, *untrained])
    given.update(dict.fromkeys(untrained))
    expected = expect(op, given)
    getattr(cpu, op)(**given)
    for output, exact in expected.items():
        np.testing.assert_allclose(given[output], exact, rtol=1e-5, atol=1e-5)


ANY_SHAPE = {("zero", "x"), ("normal", "out"), ("global_norm", "x")}
ANY_SIZE = {("sum_losses", "losses")}
ANY_RANK = {"copy", "gelu_forward", "gelu_backward", "residual_forward"}  # that of the others


@pytest.mark.parametrize("change", ["one more", "one less", "flat"])
@pytest.mark.parametrize("op, name", ARRAYS)
def test_wrong_rank(each_device: ModuleType, rng: Generator, op: str, name: str, change: str) -> None:
    given = example(op, rng, SIZES)
    shape = given[name].shape
    new = {"one more": (1, *shape), "one less": (-1, *shape[2:]), "flat": (-1,)}[change]
    if change != "one more" and len(shape) == 1:
        pytest.skip("has one axis already")
    if (op, name) in ANY_SHAPE:
        pytest.skip("takes any shape")
    given[name] = given[name].reshape(new)
    refuse(each_device, op, given, ValueError, arrays_of(op) if op in ANY_RANK else [name])


@pytest.mark.parametrize("op, name", ARRAYS)
def test_not_contiguous(each_device: ModuleType, rng: Generator, op: str, name: str) -> None:
    value = example(op, rng, SIZES)[name]
    spread = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)[..., ::2]
    for strided in (spread, value[::-1], np.asfortranarray(value)):
        if strided.flags.c_contiguous:
            continue  # Fortran order is C order along one axis
        given = example(op, rng, SIZES)
        given[name] = strided
        refuse(each_device, op, given, ValueError, [name])


@pytest.mark.parametrize("what", ["None", "list", "str", "int", "bytes"])
@pytest.mark.parametrize("op, name", ARRAYS)
def test_no_array(each_device: ModuleType, rng: Generator, op: str, name: str, what: str) -> None:
    given = example(op, rng, SIZES)
    if what == "None" and (op, name) in OPTIONAL:
        pytest.skip("may be None")
    wrong: dict[str, Any] = {"None": None, "list": [[0.0]], "str": "x", "int": 3, "bytes": b"1234"}
    given[name] = wrong[what]
    if what == "None" and (op, name) in PAIRS:
        refuse(each_device, op, given, ValueError, [name, PAIRS[op, name]])
        given[PAIRS[op, name]] = None
        getattr(each_device, op)(**given)
    else:
        refuse(each_device, op, given, TypeError, [name])


OUTPUT_ARRAYS = [(op, name) for op in OUTPUTS for name in OUTPUTS[op]]


@pytest.mark.parametrize("op, name", OUTPUT_ARRAYS)
def test_read_only_output(each_device: ModuleType, rng: Generator, op: str, name: str) -> None:
    given = example(op, rng, SIZES)
    given[name].flags.writeable = False
    refuse(each_device, op, given, ValueError, [name])


# Axes that nothing else determines: a padded table, positions beyond those in use, channels beside those in use.
MAY_BE_LONGER = {
    ("embedding_forward", "wte", 0), ("embedding_forward", "wpe", 0), ("embedding_backward", "dwte", 0),
    ("embedding_backward", "dwpe", 0), ("head_logits", "w", 0), ("rope_forward", "table", 0),
    ("rope_forward", "qkv", 2), ("rope_backward", "table", 0), *(("rope_backward", "dqkv", axis) for axis in range(3)),
    ("lora_forward", "out", 2), ("lora_backward", "dout", 2),
}  # fmt: skip
MAY_BE_SHORTER = {
    ("rope_forward", "qkv", 1), ("rope_forward", "qkv", 2), ("rope_backward", "table", 0), ("lora_forward", "b", 0),
    *(("rope_backward", "dqkv", axis) for axis in range(3)),
}  # fmt: skip


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize(
    "op, name, axis",
    [
        (op, name, axis)
        for op, name in ARRAYS
        for axis in range(example(op, np.random.default_rng(0), SIZES)[name].ndim)
        if (op, name) not in ANY_SHAPE | ANY_SIZE
    ],
)
def test_wrong_size(each_device: ModuleType, rng: Generator, op: str, name: str, axis: int, by: int) -> None:
    """One axis of one array a step longer or shorter than the others say."""
    if (op, name, axis) in (MAY_BE_LONGER if by == 1 else MAY_BE_SHORTER):
        pytest.skip("may be longer, or shorter")
    # as short as it may be, so that one row less is too few
    given = example(op, rng, SIZES._replace(V=SIZES.Vp))
    shape = list(given[name].shape)
    shape[axis] += by
    given[name] = np.zeros(shape, given[name].dtype)
    if (op, name, axis) == ("embedding_backward", "dwte", 0):
        given["tokens"][0, 0] = SIZES.Vp - 1
    if (op, name, axis) == ("embedding_backward", "dwpe", 0):
        given[name] = np.zeros((SIZES.T - 1, SIZES.C), np.float32)
    refuse(each_device, op, given, ValueError, names(op))


@pytest.mark.parametrize("index", [0, 3, -1])
@pytest.mark.parametrize("token", [-1, SIZES.V, SIZES.Vp, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op, name", [
    ("embedding_forward", "tokens"), ("embedding_backward", "tokens"), ("head_loss", "targets"),
])
def test_token_out_of_range(
    each_device: ModuleType, rng: Generator, op: str, name: str, token: int, index: int
) -> None:
    given = example(op, rng, SIZES)
    given[name].flat[index] = token
    if op == "embedding_backward" and token == SIZES.V:
        pytest.skip("knows the padded table alone")
    refuse(each_device, op, given, ValueError, [name])


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("place", [-1, SIZES.maxT - SIZES.T + 1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op", ["embedding_forward", "rope_forward", "attention_decode"])
def test_place_out_of_range(each_device: ModuleType, rng: Generator, op: str, place: int, index: int) -> None:
    """Of one sequence, with room enough for the others."""
    given = example(op, rng, SIZES)
    given["positions"][index] = place
    refuse(each_device, op, given, ValueError, ["positions"])


@pytest.mark.parametrize("op", ["rope_forward", "rope_backward"])
def test_rows_of_the_table_of_angles(each_device: ModuleType, rng: Generator, op: str) -> None:
    """One too few; and an odd number of channels, which has no halves."""
    given = example(op, rng, SIZES)
    given["table"] = np.zeros((SIZES.T - 1, given["table"].shape[1]), np.float32)
    refuse(each_device, op, given, ValueError, ["table", "positions"])
    given["table"] = np.zeros((SIZES.maxT, 5), np.float32)
    refuse(each_device, op, given, ValueError, ["table"])


CAPPED = ("attention_forward", "attention_backward", "attention_decode", "head_loss", "head_logits")
SCALARS = [
    ("embedding_forward", "V", SIZES.Vp + 1), ("embedding_forward", "V", -1), ("embedding_forward", "V", 0),
    ("attention_decode", "H", 0), ("attention_decode", "H", -2), ("attention_decode", "H", 4),
    ("rope_forward", "heads", -1), ("rope_forward", "heads", 4), ("rope_forward", "heads", 2**62),
    ("rope_backward", "heads", -1), ("rope_backward", "heads", 4), ("rope_backward", "heads", 2**62),
    ("lora_forward", "column", -1), ("lora_forward", "column", SIZES.N // 3 + 1), ("lora_forward", "column", 2**62),
    ("lora_backward", "column", -1), ("lora_backward", "column", SIZES.N // 3 + 1), ("lora_backward", "column", 2**62),
    ("head_loss", "V", SIZES.Vp + 1), ("head_loss", "V", 0), ("head_loss", "V", -1),
    ("head_logits", "V", SIZES.V + 1), ("head_logits", "V", SIZES.V - 1), ("head_logits", "V", -1),
    *((op, "softcap", value) for op in CAPPED for value in (-1.0, math.nan, math.inf)),
    ("normal", "seed", -1), ("normal", "seed", 2**64), ("normal", "stream", -1), ("normal", "stream", 2**64),
    ("normal", "std", -0.5), ("normal", "std", math.nan), ("normal", "std", math.inf),
    ("adamw_step", "spans", [(-1, 3, 0.0)]), ("adamw_step", "spans", [(0, SIZES.N * SIZES.C + 1, 0.0)]),
    ("adamw_step", "spans", [(3, 2, 0.0)]), ("adamw_step", "spans", [(0, 5, 0.0), (4, 6, 0.0)]),
    ("adamw_step", "spans", [(5, 6, 0.0), (0, 2, 0.0)]), ("adamw_step", "spans", [(0, 2, 0.0), (2**62, 2**63, 0.0)]),
]


@pytest.mark.parametrize("op, name, value", SCALARS)
def test_wrong_scalar(each_device: ModuleType, rng: Generator, op: str, name: str, value: Any) -> None:
    given = example(op, rng, SIZES)
    given[name] = value
    related = {"V": ["V", "tokens", "targets", "wte", "w", "logits"], "H": ["H"]}
    refuse(each_device, op, given, ValueError, related.get(name, [name]))


@pytest.mark.parametrize("op", OUTPUTS)
def test_number_of_arguments(each_device: ModuleType, rng: Generator, op: str) -> None:
    values = list(example(op, rng, SIZES).values())
    with pytest.raises(TypeError):
        getattr(each_device, op)(*values[:-1])
    with pytest.raises(TypeError):
        getattr(each_device, op)(*values, None)


def test_heads_that_do_not_divide(each_device: ModuleType, rng: Generator) -> None:
    for op in ("attention_forward", "attention_backward"):
        for heads in (0, 2, 16):
            given = example(op, rng, SIZES)
            given["lse"] = np.zeros((SIZES.B, heads, SIZES.T), np.float32)
            refuse(each_device, op, given, ValueError, names(op))


# ---- the guard page itself -------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals have no numbers there")
@pytest.mark.parametrize("place, index", [("end", 10), ("start", -1)])
@pytest.mark.parametrize("write", [False, True])
def test_guard_page_kills(place: str, index: int, write: bool) -> None:
    """One element too far ends the process; one less does not."""
    body = "p[i] = 1" if write else "p[i]"
    program = (
        "import ctypes, numpy as np; from guard import flush\n"
        f"a = flush(np.zeros(10, np.float32), {place!r})\n"
        "p = ctypes.cast(a.ctypes.data, ctypes.POINTER(ctypes.c_float))\n"
        f"for i in ({index - 1 if index > 0 else 0}, {index}):\n"
        f"    {body}\n"
        "    print('alive', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.stdout == "alive\n"
    assert -done.returncode in (signal.SIGSEGV, signal.SIGBUS)


def test_check_sees_faults(rng: Generator) -> None:
    """guard.check fails an op that leaves a gap, modifies an input, strays or is imprecise."""
    from guard import check, floats

    class Faulty(ModuleType):
        pass

    def residual(kind: str) -> Any:
        def op(out: Array, x: Array, branch: Array) -> None:
            reference.residual_forward(out, x, branch)
            if kind == "gap":
                out[-1] = math.nan
            if kind == "input":
                x[0] += 1
            if kind == "imprecise":
                out[0] *= 1 + 1e-5
            if kind == "stray":  # within the page, where only the fill shows it
                base = out.base
                base = np.frombuffer(base, np.uint8)
                begin = out.ctypes.data - base.ctypes.data
                base[begin + out.nbytes if (out.ctypes.data % 4096) == 0 else begin - 1] = 0

        return op

    x = floats(rng, 10)
    for kind in ("none", "gap", "input", "imprecise", "stray"):
        faulty = Faulty("faulty")
        faulty.residual_forward = residual(kind)  # type: ignore[attr-defined]
        faulty.info = reference.info  # type: ignore[attr-defined]
        given, bound = (x, x, x), {"out": 1e-6}
        if kind == "none":
            check(faulty, "residual_forward", given, bound)
        else:
            with pytest.raises(AssertionError):
                check(faulty, "residual_forward", given, bound)
