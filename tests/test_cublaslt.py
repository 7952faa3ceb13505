"""The binding of cuBLASLt against the library itself, and against NVIDIA's headers.

Descriptors, layouts and preferences need no GPU: what the binding sets is read back by the library's own functions.
Multiplying needs one; test_cuda_linear.py does that over the simulation.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest

from llmc._cuda import cublaslt, driver
from llmc._cuda.cublaslt import Algorithm, Library, Plan, Problem
from llmc.errors import DeviceError

# cublasLtMatrixLayoutAttribute_t
LAYOUT_TYPE, LAYOUT_ORDER, LAYOUT_ROWS, LAYOUT_COLS, LAYOUT_LD, LAYOUT_BATCH = range(6)
# further ones of cublasLtMatmulDescAttributes_t
DESC_COMPUTE, DESC_SCALE, DESC_POINTER_MODE = range(3)


@pytest.fixture(scope="module")
def lib() -> Library:
    """The library of pip's package, even where a stand-in is in use: it is linked so that it calls none but itself."""
    for root in driver.wheel_roots():
        for path in (*root.glob("cu13/lib/libcublasLt.so.*"), *root.glob("cublas/lib/libcublasLt.so.*")):
            return Library(ctypes.CDLL(str(path)))
    pytest.skip("the package nvidia-cublas is not installed")


@pytest.fixture(scope="module")
def constants() -> dict[str, int]:
    """The enumerators of cublasLt.h, cublas_api.h and library_types.h, by name."""
    found: dict[str, int] = {}
    folders = [root / "cu13" / "include" for root in driver.wheel_roots()]
    folders += [root / name / "include" for root in driver.wheel_roots() for name in ("cublas", "cuda_runtime")]
    folders += [toolkit / "include" for toolkit in driver.toolkits()]
    for name in ("library_types.h", "cublas_api.h", "cublasLt.h"):
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        if path is None:
            pytest.skip(f"{name} is not installed")
        _read_enumerators(path, found)
    return found


def _read_enumerators(path: Path, found: dict[str, int]) -> None:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)
    for name, value in re.findall(r"^\s*(\w+)\s*=\s*([^,\n}]+)", text, re.M):
        terms = [term.strip(" ()") for term in value.split("|")]
        numbers = [int(term, 0) if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", term) else found.get(term) for term in terms]
        total = 0
        for number in numbers:
            if number is None:
                break
            total |= number
        else:
            found[name] = total


def problem(**changes: Any) -> Problem:
    """A product of which no two sizes, types or alignments are the same."""
    values = Problem(
        M=3, N=10, K=7, ta=False, tb=False, lda=11, ldb=13, ldo=17, operands="bfloat16", result="float32",
        compute=cublaslt.COMPUTE_32F, beta=0, epilogue=cublaslt.DEFAULT, ldaux=0, align_a=16, align_b=32, align_out=64,
        align_bias=4, align_aux=16,
    )  # fmt: skip
    return values._replace(**changes)


def get(lib: Library, kind: str, descriptor: c_void_p, attribute: int, like: type) -> Any:
    """An attribute by the library's own function; its size must be that of `like`."""
    function = getattr(lib.lib, f"cublasLt{kind}GetAttribute")
    function.argtypes = [c_void_p, c_int, c_void_p, c_size_t, c_void_p]
    value, written = like(), c_size_t()
    status = function(descriptor, attribute, byref(value), ctypes.sizeof(value), byref(written))
    assert status == cublaslt.SUCCESS
    assert written.value == ctypes.sizeof(value)
    return value.value


def test_constants(constants: dict[str, int]) -> None:
    names = {
        "SUCCESS": "CUBLAS_STATUS_SUCCESS", "INVALID_VALUE": "CUBLAS_STATUS_INVALID_VALUE",
        "NOT_SUPPORTED": "CUBLAS_STATUS_NOT_SUPPORTED", "COMPUTE_32F": "CUBLAS_COMPUTE_32F",
        "COMPUTE_32F_FAST_TF32": "CUBLAS_COMPUTE_32F_FAST_TF32", "OP_N": "CUBLAS_OP_N", "OP_T": "CUBLAS_OP_T",
        "DESC_TRANSA": "CUBLASLT_MATMUL_DESC_TRANSA", "DESC_TRANSB": "CUBLASLT_MATMUL_DESC_TRANSB",
        "DESC_EPILOGUE": "CUBLASLT_MATMUL_DESC_EPILOGUE", "DESC_BIAS_POINTER": "CUBLASLT_MATMUL_DESC_BIAS_POINTER",
        "DESC_AUX_POINTER": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER",
        "DESC_AUX_LD": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD",
        "DESC_AUX_TYPE": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE",
        "DESC_BIAS_TYPE": "CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE",
        "PREF_WORKSPACE": "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES",
        "PREF_REDUCTION": "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK",
        "CONFIG_ID": "CUBLASLT_ALGO_CONFIG_ID",
        "REDUCTION_COMPUTE_TYPE": "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE",
    }  # fmt: skip
    names |= {f"PREF_ALIGNMENT_{x}": f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{x}_BYTES" for x in "ABCD"}
    epilogues = ("DEFAULT", "BIAS", "GELU_AUX", "GELU_AUX_BIAS", "DGELU", "BGRADB")
    names |= {name: f"CUBLASLT_EPILOGUE_{name}" for name in epilogues}
    assert {ours: getattr(cublaslt, ours) for ours in names} == {ours: constants[name] for ours, name in names.items()}
    assert cublaslt.TYPES == {"float32": constants["CUDA_R_32F"], "bfloat16": constants["CUDA_R_16BF"]}


def test_algorithm_size() -> None:
    """cublasLtMatmulHeuristicResult_t: 64 bytes of algorithm, a size_t, an enum, a float, four ints."""
    assert ctypes.sizeof(Algorithm) == 96
    assert (Algorithm.workspace.offset, Algorithm.state.offset, Algorithm.waves.offset) == (64, 72, 76)


@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
def test_layouts(lib: Library, ta: bool, tb: bool) -> None:
    """Each matrix, seen by columns, is the transpose of ours: its rows are our columns in memory."""
    plan = Plan(lib, problem(ta=ta, tb=tb))
    memory = {"A": (7, 10) if not tb else (10, 7), "B": (3, 7) if not ta else (7, 3), "D": (3, 10)}
    kinds = {"A": (14, 13), "B": (14, 11), "D": (0, 17)}
    for name, (rows, cols) in memory.items():
        layout = getattr(plan, name)
        assert get(lib, "MatrixLayout", layout, LAYOUT_ROWS, c_uint64) == cols
        assert get(lib, "MatrixLayout", layout, LAYOUT_COLS, c_uint64) == rows
        dtype, ld = kinds[name]
        assert get(lib, "MatrixLayout", layout, LAYOUT_TYPE, c_uint32) == dtype
        assert get(lib, "MatrixLayout", layout, LAYOUT_LD, c_int64) == ld
        assert get(lib, "MatrixLayout", layout, LAYOUT_ORDER, c_int32) == 0  # by columns
        assert get(lib, "MatrixLayout", layout, LAYOUT_BATCH, c_int32) == 1
    assert get(lib, "MatmulDesc", plan.desc, cublaslt.DESC_TRANSA, c_int32) == int(tb)
    assert get(lib, "MatmulDesc", plan.desc, cublaslt.DESC_TRANSB, c_int32) == int(ta)


@pytest.mark.parametrize("compute", [cublaslt.COMPUTE_32F, cublaslt.COMPUTE_32F_FAST_TF32])
def test_compute_type(lib: Library, compute: int) -> None:
    plan = Plan(lib, problem(compute=compute))
    assert get(lib, "MatmulDesc", plan.desc, DESC_COMPUTE, c_int32) == compute
    assert get(lib, "MatmulDesc", plan.desc, DESC_SCALE, c_int32) == cublaslt.TYPES["float32"]
    assert get(lib, "MatmulDesc", plan.desc, DESC_POINTER_MODE, c_int32) == 0  # alpha and beta are on the host


@pytest.mark.parametrize(
    "epilogue, bias, aux",
    [
        (cublaslt.DEFAULT, False, False), (cublaslt.BIAS, True, False), (cublaslt.GELU_AUX, False, True),
        (cublaslt.GELU_AUX_BIAS, True, True), (cublaslt.DGELU, False, True), (cublaslt.BGRADB, True, False),
    ],
)  # fmt: skip
def test_epilogue(lib: Library, epilogue: int, bias: bool, aux: bool) -> None:
    """Pointers, types and the auxiliary leading dimension are set where the epilogue has them, and no others are."""
    plan = Plan(lib, problem(epilogue=epilogue, result="bfloat16", ldaux=24 if aux else 0))
    for vector, matrix in ((0x1000, 0x2000), (0x1004, 0x2000), (0x1004, 0x2010)):
        plan.point(vector, matrix)
        expected = vector if bias else None, matrix if aux else None
        pointers = cublaslt.DESC_BIAS_POINTER, cublaslt.DESC_AUX_POINTER
        assert tuple(get(lib, "MatmulDesc", plan.desc, pointer, c_void_p) for pointer in pointers) == expected
    assert get(lib, "MatmulDesc", plan.desc, cublaslt.DESC_EPILOGUE, c_uint32) == epilogue
    assert get(lib, "MatmulDesc", plan.desc, cublaslt.DESC_BIAS_TYPE, c_int32) == (14 if bias else -1)
    assert get(lib, "MatmulDesc", plan.desc, cublaslt.DESC_AUX_TYPE, c_int32) == (14 if aux else -1)
    assert get(lib, "MatmulDesc", plan.desc, cublaslt.DESC_AUX_LD, c_int64) == (24 if aux else 0)


def test_preference(lib: Library) -> None:
    """Alignments change places with the operands."""
    with Plan(lib, problem()).preference(1 << 25) as preference:
        expected = {
            cublaslt.PREF_ALIGNMENT_A: 32, cublaslt.PREF_ALIGNMENT_B: 16, cublaslt.PREF_ALIGNMENT_C: 64,
            cublaslt.PREF_ALIGNMENT_D: 64, cublaslt.PREF_REDUCTION: cublaslt.REDUCTION_COMPUTE_TYPE,
        }  # fmt: skip
        for attribute, value in expected.items():
            assert get(lib, "MatmulPreference", preference, attribute, c_uint32) == value
        assert get(lib, "MatmulPreference", preference, cublaslt.PREF_WORKSPACE, c_uint64) == 1 << 25


def test_errors_name_function_status_and_shape(lib: Library) -> None:
    plan = Plan(lib, problem())
    message = "cublasLtMatmulDescSetAttribute: CUBLAS_STATUS_INVALID_VALUE for attribute 7 of .*times \\(7,10\\)"
    with pytest.raises(DeviceError, match=message):
        lib.set("MatmulDesc", plan.desc, cublaslt.DESC_EPILOGUE, c_int64(1), plan.problem)  # of 8 bytes, not 4


def test_products_without_a_handle(lib: Library) -> None:
    """As far as a machine without a GPU gets: the library reads the arguments, and misses the handle."""
    plan = Plan(lib, problem(epilogue=cublaslt.GELU_AUX_BIAS, ldaux=16))
    plan.point(0x1000, 0x2000)
    about = re.escape(f"CUBLAS_STATUS_NOT_INITIALIZED for {plan.problem}")
    with pytest.raises(DeviceError, match=f"cublasLtMatmulAlgoGetHeuristic: {about}"):
        plan.choose(c_void_p(), 1 << 25)
    plan._algorithm = Algorithm()
    with pytest.raises(DeviceError, match=f"cublasLtMatmul: {about}"):
        plan.run(c_void_p(), 0x3000, 0x4000, 0x5000, (0x6000, 1 << 25), 0)
    assert plan.number() == 0


def test_allowed_status_is_given_back(lib: Library) -> None:
    plan, wrong = Plan(lib, problem()), c_float(0)
    args = plan.desc, 9999, byref(wrong), ctypes.sizeof(wrong)
    allowed = (cublaslt.INVALID_VALUE, cublaslt.NOT_SUPPORTED)
    assert lib.call("cublasLtMatmulDescSetAttribute", *args, allow=allowed) in allowed


def test_version(lib: Library) -> None:
    assert re.fullmatch(r"1[2-9]\.\d+\.\d+", lib.version())


@pytest.mark.parametrize(
    "address, expected", [(0, 256), (1, 1), (2, 2), (6, 2), (16, 16), (48, 16), (256, 256), (1 << 20, 256), (384, 128)]
)
def test_alignment(address: int, expected: int) -> None:
    assert cublaslt.alignment(address) == expected
