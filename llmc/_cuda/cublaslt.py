"""cuBLASLt by ctypes: matrix products with what follows them in the same kernel.

Outside this file all matrices are row-major; cuBLASLt's are column-major.  A row-major matrix of r rows and leading
dimension ld is, in the same memory, its column-major transpose: r columns, the same ld.  So

    out = op(a) op(b)  (M,N), row-major      is made as      out^T = op(b)^T op(a)^T  (N,M), column-major:

cuBLASLt's A is our b (N by K, or K by N and transposed where `tb`), its B is our a (K by M, or M by K and transposed
where `ta`), its D is our out, N by M.  What runs along the rows of D runs along our columns: a bias has N elements.
BGRADB, the sums of op(B) over its K rows, is the sum over k of our op(a)[m,k]: M elements.

A product's descriptors and the algorithm that the library's heuristic puts first are kept for each `Problem`; a call
sets only the pointers that have changed.  Split-K may reduce in fp32 alone, so that results are rounded once; an
algorithm always gives the same bits for the same operands.

Not every algorithm has every epilogue, and an older one costs more than a pass of our own over the result.  So GELU's
epilogues and BGRADB are used where the library puts the same algorithm first with them as without.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

from llmc._cuda import driver
from llmc.errors import DeviceError

# cublasStatus_t
SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 7, 15
# cublasComputeType_t
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
# cudaDataType_t
TYPES = {"float32": 0, "bfloat16": 14}
# cublasOperation_t
OP_N, OP_T = 0, 1
# cublasLtEpilogue_t
DEFAULT, BIAS, GELU_AUX, GELU_AUX_BIAS, DGELU, BGRADB = 1, 4, 160, 164, 192, 512
# cublasLtMatmulDescAttributes_t
DESC_TRANSA, DESC_TRANSB, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 4, 7, 8
DESC_AUX_POINTER, DESC_AUX_LD, DESC_AUX_TYPE, DESC_BIAS_TYPE = 11, 12, 22, 26
# cublasLtMatmulPreferenceAttributes_t
PREF_WORKSPACE, PREF_REDUCTION = 1, 3
PREF_ALIGNMENT_A, PREF_ALIGNMENT_B, PREF_ALIGNMENT_C, PREF_ALIGNMENT_D = 5, 6, 7, 8
# cublasLtMatmulAlgoConfigAttributes_t
CONFIG_ID = 0
# cublasLtReductionScheme_t: in the type of the sums, never in that of the result
REDUCTION_COMPUTE_TYPE = 2

BIASED = (BIAS, GELU_AUX_BIAS, BGRADB)  # epilogues that read or write a vector
AUXILIARY = (GELU_AUX, GELU_AUX_BIAS, DGELU)  # that write or read a matrix
RARE = (*AUXILIARY, BGRADB)  # that not every algorithm has
AUX_LD_MULTIPLE = 8  # elements

_ALIGNMENT = 256  # bytes; no algorithm asks for more


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, whose first member is the algorithm."""

    _fields_ = (
        ("algo", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    )  # fmt: skip


class Problem(NamedTuple):
    """All that an algorithm depends on, row-major as in `matmul`."""

    M: int
    N: int
    K: int
    ta: bool
    tb: bool
    lda: int
    ldb: int
    ldo: int
    operands: str  # a key of TYPES, for a and b
    result: str  # for out; bias and aux are of this type too
    compute: int
    beta: int
    epilogue: int
    ldaux: int
    align_a: int  # bytes
    align_b: int
    align_out: int
    align_bias: int
    align_aux: int

    def __str__(self) -> str:
        a = f"{self.operands} ({self.M},{self.K}){' transposed' if self.ta else ''}"
        b = f"({self.K},{self.N}){' transposed' if self.tb else ''}"
        return f"{a} times {b}, epilogue {self.epilogue}, leading dimensions {self.lda}, {self.ldb}, {self.ldo}"


class Library:
    """libcublasLt: `call` by name, an error for each status that is not SUCCESS."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        for name, argtypes in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = argtypes, c_int
        lib.cublasLtGetStatusName.argtypes, lib.cublasLtGetStatusName.restype = [c_int], c_char_p
        lib.cublasLtGetVersion.argtypes, lib.cublasLtGetVersion.restype = [], c_size_t

    def call(self, name: str, *args: Any, about: object = "", allow: tuple[int, ...] = ()) -> int:
        """DeviceError with the status's name and what it is `about`, unless the status is one to `allow`."""
        status: int = getattr(self.lib, name)(*args)
        if status != SUCCESS and status not in allow:
            code = self.lib.cublasLtGetStatusName(status).decode()
            raise DeviceError(f"{name}: {code}{f' for {about}' if about else ''}")
        return status

    def set(self, kind: str, descriptor: c_void_p, attribute: int, value: Any, about: object) -> None:
        """Set an attribute of a descriptor of `kind`, MatmulDesc or MatmulPreference."""
        name, what = f"cublasLt{kind}SetAttribute", f"attribute {attribute} of {about}"
        self.call(name, descriptor, attribute, byref(value), ctypes.sizeof(value), about=what)

    def version(self) -> str:
        """Such as "13.1.0"."""
        number = self.lib.cublasLtGetVersion()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


_SIGNATURES: dict[str, list[Any]] = {
    "cublasLtCreate": [POINTER(c_void_p)],
    "cublasLtMatmulDescCreate": [POINTER(c_void_p), c_int, c_int],
    "cublasLtMatmulDescDestroy": [c_void_p],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatrixLayoutCreate": [POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatrixLayoutDestroy": [c_void_p],
    "cublasLtMatmulPreferenceCreate": [POINTER(c_void_p)],
    "cublasLtMatmulPreferenceDestroy": [c_void_p],
    "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulAlgoGetHeuristic": [c_void_p] * 7 + [c_int, POINTER(Algorithm), POINTER(c_int)],
    "cublasLtMatmulAlgoConfigGetAttribute": [c_void_p, c_int, c_void_p, c_size_t, POINTER(c_size_t)],
    "cublasLtMatmul": [c_void_p] * 14 + [c_size_t, c_void_p],
}


@cache
def library() -> Library:
    """The library of this machine; DeviceError where there is none."""
    return Library(driver.library("cublasLt", "nvidia-cublas"))


def alignment(pointer: int) -> int:
    """Bytes that an address is a multiple of, as far as algorithms care."""
    return pointer & -pointer & (_ALIGNMENT - 1) or _ALIGNMENT


class Plan:
    """The descriptors of one `Problem`, and the algorithm once `choose` has found one."""

    def __init__(self, lib: Library, problem: Problem) -> None:
        p = self.problem = problem
        self._lib = lib
        self.desc, self.A, self.B, self.D = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        operands, result = TYPES[p.operands], TYPES[p.result]
        lib.call("cublasLtMatmulDescCreate", byref(self.desc), p.compute, TYPES["float32"], about=p)
        self._set(DESC_TRANSA, c_int32(OP_T if p.tb else OP_N))
        self._set(DESC_TRANSB, c_int32(OP_T if p.ta else OP_N))
        self._set(DESC_EPILOGUE, c_uint32(p.epilogue))
        if p.epilogue in BIASED:
            self._set(DESC_BIAS_TYPE, c_int32(result))
        if p.epilogue in AUXILIARY:
            self._set(DESC_AUX_TYPE, c_int32(result))
            self._set(DESC_AUX_LD, c_int64(p.ldaux))
        a = (p.M, p.K) if p.ta else (p.K, p.M)
        b = (p.K, p.N) if p.tb else (p.N, p.K)
        for layout, dtype, shape, ld in (
            (self.A, operands, b, p.ldb), (self.B, operands, a, p.lda), (self.D, result, (p.N, p.M), p.ldo),
        ):  # fmt: skip
            lib.call("cublasLtMatrixLayoutCreate", byref(layout), dtype, *shape, ld, about=p)
        self._pointers = (0, 0)
        self._algorithm: Algorithm | None = None

    def __del__(self) -> None:
        for layout in (self.A, self.B, self.D):
            self._lib.lib.cublasLtMatrixLayoutDestroy(layout)
        self._lib.lib.cublasLtMatmulDescDestroy(self.desc)

    def _set(self, attribute: int, value: Any) -> None:
        self._lib.set("MatmulDesc", self.desc, attribute, value, self.problem)

    def point(self, bias: int, aux: int) -> None:
        """Set the epilogue's pointers."""
        if (bias, aux) != self._pointers:
            if self.problem.epilogue in BIASED:
                self._set(DESC_BIAS_POINTER, c_void_p(bias))
            if self.problem.epilogue in AUXILIARY:
                self._set(DESC_AUX_POINTER, c_void_p(aux))
            self._pointers = (bias, aux)

    @contextmanager
    def preference(self, workspace: int) -> Iterator[c_void_p]:
        """A descriptor of what algorithms may use."""
        p, preference = self.problem, c_void_p()
        self._lib.call("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            for attribute, value in (
                (PREF_WORKSPACE, c_uint64(workspace)), (PREF_REDUCTION, c_uint32(REDUCTION_COMPUTE_TYPE)),
                (PREF_ALIGNMENT_A, c_uint32(p.align_b)), (PREF_ALIGNMENT_B, c_uint32(p.align_a)),
                (PREF_ALIGNMENT_C, c_uint32(p.align_out)), (PREF_ALIGNMENT_D, c_uint32(p.align_out)),
            ):  # fmt: skip
                self._lib.set("MatmulPreference", preference, attribute, value, p)
            yield preference
        finally:
            self._lib.lib.cublasLtMatmulPreferenceDestroy(preference)

    def choose(self, handle: c_void_p, workspace: int) -> bool:
        """Ask for the best algorithm with `workspace` bytes; False where the library has none.  `point` comes first,
        for the pointers' alignment counts."""
        found, count = Algorithm(), c_int(0)
        with self.preference(workspace) as preference:
            status = self._lib.call(
                "cublasLtMatmulAlgoGetHeuristic", handle, self.desc, self.A, self.B, self.D, self.D, preference, 1,
                byref(found), byref(count), about=self.problem, allow=(NOT_SUPPORTED, INVALID_VALUE),
            )  # fmt: skip
        if status == SUCCESS and count.value and found.state == SUCCESS:
            self._algorithm = found
        return self._algorithm is not None

    def number(self) -> int:
        """Of the algorithm that was found: which kind of kernel it is, apart from tiles and the like."""
        value, written, algorithm = c_int32(), c_size_t(), self._algorithm
        assert algorithm is not None
        self._lib.call(
            "cublasLtMatmulAlgoConfigGetAttribute", byref(algorithm), CONFIG_ID, byref(value), ctypes.sizeof(value),
            byref(written), about=self.problem,
        )  # fmt: skip
        return value.value

    def run(
        self, handle: c_void_p, out: int, a: int, b: int, workspace: tuple[int, int], stream: int, alpha: float = 1.0
    ) -> None:
        """Send the product, times alpha, to the stream; `choose` has found how."""
        algorithm, beta = self._algorithm, c_float(self.problem.beta)
        assert algorithm is not None
        self._lib.call(
            "cublasLtMatmul", handle, self.desc, byref(c_float(alpha)), b, self.A, a, self.B, byref(beta), out, self.D,
            out, self.D, byref(algorithm), *workspace, stream, about=self.problem,
        )  # fmt: skip


class Multiplier:
    """A cuBLASLt handle in the current context, with the plans made so far.

    `workspace` (address, bytes) is the library's alone, and all its work is on `stream`.
    """

    def __init__(self, workspace: tuple[int, int], stream: int) -> None:
        self._handle, self._workspace, self._stream = c_void_p(), workspace, stream
        self._plans: dict[Problem, Plan | None] = {}
        self._declined: dict[Problem, str] = {}
        self._lib = library()
        self._lib.call("cublasLtCreate", byref(self._handle))

    def declined(self) -> list[str]:
        """The products that `matmul` does not make, and why."""
        return [f"{problem}: {why}" for problem, why in self._declined.items()]

    def _plan(self, problem: Problem, bias: int = 0, aux: int = 0) -> Plan | None:
        """The plan of a problem, made where there is none yet."""
        if problem not in self._plans:
            plan = Plan(self._lib, problem)
            plan.point(bias, aux)
            why = self._objection(plan)
            if why:
                self._declined[problem] = why
            self._plans[problem] = None if why else plan
        return self._plans[problem]

    def _objection(self, plan: Plan) -> str:
        """Have the plan choose an algorithm; why it is not to be used, or nothing."""
        if not plan.choose(self._handle, self._workspace[1]):
            return "the library has no algorithm"
        if plan.problem.epilogue in RARE:
            bare = plan.problem._replace(epilogue=DEFAULT, ldaux=0, align_bias=alignment(0), align_aux=alignment(0))
            other = self._plan(bare)
            if other is not None and other.number() != plan.number():
                return f"algorithm {plan.number()}, without the epilogue {other.number()}"
        return ""

    def matmul(
        self, out: int, a: int, b: int, M: int, N: int, K: int, *, ta: bool, tb: bool, lda: int, ldb: int, ldo: int,
        operands: str, result: str, compute: int, alpha: float = 1.0, beta: int = 0, epilogue: int = DEFAULT,
        bias: int = 0, aux: int = 0, ldaux: int = 0,
    ) -> bool:
        """out (M,N) = epilogue(alpha * op(a) (M,K) @ op(b) (K,N) + beta * out), all row-major; False, with nothing
        done, where the library has no algorithm for it, or a worse one than without the epilogue.

        `lda`, `ldb`, `ldo`, `ldaux` count elements from row to row in memory.  By `epilogue`:

        BIAS           + bias (N,)
        GELU_AUX       aux (M,N) = the product, out = gelu(aux) in the tanh form; GELU_AUX_BIAS adds bias (N,) first
        DGELU          out = the product * gelu'(aux)
        BGRADB         bias (M,) = sum over k of op(a)[m,k], overwritten

        M, N and K are at least 1; ldaux is a multiple of AUX_LD_MULTIPLE.
        """
        problem = Problem(
            M, N, K, ta, tb, lda, ldb, ldo, operands, result, compute, beta, epilogue, ldaux, alignment(a),
            alignment(b), alignment(out), alignment(bias), alignment(aux),
        )  # fmt: skip
        plan = self._plan(problem, bias, aux)
        if plan is None:
            return False
        plan.point(bias, aux)
        plan.run(self._handle, out, a, b, self._workspace, self._stream, alpha)
        return True
