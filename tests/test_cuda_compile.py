"""What the compiler makes of every kernel, for each architecture that is supported: no GPU is needed for that.

The compiler's report gives registers and spills, nvdisasm the instructions.  Compiled is what a run compiles, by
`llmc._cuda.compiler` with NVRTC, in processes of their own, which the simulation's stand-ins do not reach.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "llmc/_cuda"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
STORAGES = ("fp32", "bf16")
FILES = tuple(sorted(path.stem for path in CUDA.glob("*.cu")))
BF16_ONLY = tuple(file for file in FILES if file.startswith("flash"))  # no run compiles these for float32
REGISTERS = 1 << 16  # of a multiprocessor, the same on all of these

COMPILE = """
import json, sys
from llmc._cuda import compiler
from llmc.errors import LlmcError
folder, architecture = sys.argv[1:]
for file in compiler.sources():
    for bf16 in (True,) if file.startswith("flash") else (False, True):
        stem = f"{folder}/{file}-{architecture}-{'bf16' if bf16 else 'fp32'}"
        try:
            made = compiler.compile(file, architecture, bf16)
        except LlmcError as error:
            open(f"{stem}.error", "w").write(str(error))
        else:
            open(f"{stem}.log", "w").write(made.log)
            open(f"{stem}.cubin", "wb").write(made.cubin)
"""


class Kernel(NamedTuple):
    """What was made of one kernel: the compiler's report, what the driver will read, instructions without operands."""

    file: str
    registers: int  # of a thread
    stack: int  # bytes
    spilled: int  # bytes
    parameters: tuple[tuple[int, int], ...]  # offset and bytes of each
    threads: int  # the most that a block may have
    opcodes: frozenset[str]


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process that finds the compilers of this machine."""
    environment = {name: value for name, value in os.environ.items() if name != "LLMC_CUDA_LIBRARIES"}
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    # In this folder, where `import llmc` does not find the checkout's bare sources.
    return subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")


def tool(name: str) -> str | None:
    """A program of the toolkit, from its wheel or the PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := shutil.which(name, path=f"{folder}/cu13/bin"):
            return found
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


# ---- reading what was made -------------------------------------------------------------------------


def read_log(log: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of stack and bytes spilled of each kernel."""
    found = {}
    for text in log.split("Compiling entry function '")[1:]:
        name = text.split("'")[0]
        wanted = (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill st", r"(\d+) bytes spill lo")
        numbers = [re.search(pattern, text) for pattern in wanted]
        assert all(numbers), f"the compiler's report of {name} reads otherwise than expected: {text}"
        registers, stack, stores, loads = (int(number[1]) for number in numbers if number)
        found[name] = registers, stack, stores + loads
    return found


def read_attributes(cubin: bytes) -> dict[str, tuple[tuple[tuple[int, int], ...], int]]:
    """Place and size of each kernel's parameters, and its launch bound (1024 without one), from the sections
    .nv.info.<kernel> of the ELF file."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    found = {}
    for name_at, _, _, _, at, nbytes in sections:
        begin = sections[names][4] + name_at
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if not name.startswith(".nv.info."):
            continue
        end, parameters, threads = at + nbytes, [], 1024
        while at < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form != 4:  # else `value` bytes follow
                continue
            if attribute == 0x17:  # EIATTR_KPARAM_INFO: index, ordinal, offset, size from bit 18 on
                _, _, offset, bits = struct.unpack_from("<IHHI", cubin, at)
                parameters.append((offset, bits >> 18))
            elif attribute == 0x05:  # EIATTR_MAX_THREADS
                threads = math.prod(struct.unpack_from("<III", cubin, at))
            at += value
        found[name.removeprefix(".nv.info.")] = tuple(sorted(parameters)), threads
    return found


def read_code(text: str) -> dict[str, frozenset[str]]:
    """The opcodes of each kernel, such as LDG.E.128, in what nvdisasm printed."""
    found = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][\w.]*)", part, flags=re.M)
        found[re.split(r'[",\s]', part, maxsplit=1)[0]] = frozenset(opcodes)
    return found


def compile_for(architecture: str, folder: Path) -> None:
    done = python(COMPILE, folder, architecture)
    assert done.returncode == 0, done.stderr
    if program := tool("nvdisasm"):
        for cubin in folder.glob(f"*-{architecture}-*.cubin"):
            with open(cubin.with_suffix(".sass"), "w") as file:
                subprocess.run([program, "-c", cubin], check=True, stdout=file)


class Compiled:
    """All kernels by architecture and storage; two architectures are compiled at a time."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor, architectures: Iterable[str]) -> None:
        self.folder = folder
        self.jobs = {architecture: pool.submit(compile_for, architecture, folder) for architecture in architectures}
        self.read: dict[tuple[str, str], dict[str, Kernel]] = {}

    def errors(self, architecture: str, storage: str) -> list[str]:
        self.jobs[architecture].result()
        return [path.read_text() for path in sorted(self.folder.glob(f"*-{architecture}-{storage}.error"))]

    def kernels(self, architecture: str, storage: str) -> dict[str, Kernel]:
        """Those of all files that could be compiled."""
        self.jobs[architecture].result()
        key = architecture, storage
        if key not in self.read:
            self.read[key] = {name: kernel for file in FILES for name, kernel in self.file(file, *key)}
        return self.read[key]

    def file(self, file: str, architecture: str, storage: str) -> Iterator[tuple[str, Kernel]]:
        stem = self.folder / f"{file}-{architecture}-{storage}"
        if not stem.with_suffix(".cubin").exists():
            return
        attributes = read_attributes(stem.with_suffix(".cubin").read_bytes())
        code = read_code(stem.with_suffix(".sass").read_text()) if stem.with_suffix(".sass").exists() else {}
        for name, report in read_log(stem.with_suffix(".log").read_text()).items():
            yield name, Kernel(file, *report, *attributes[name], code.get(name, frozenset()))


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    found = python("from llmc._cuda import compiler; print(compiler.find().name)")
    if not found.stdout.startswith("NVRTC"):
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = dict.fromkeys(params["architecture"] for params in chosen if "architecture" in params)
    with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
        yield Compiled(tmp_path_factory.mktemp("compiled"), pool, wanted)
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def disassembled(compiled: Compiled) -> Compiled:
    if tool("nvdisasm") is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    return compiled


PAIRS = [(architecture, storage) for architecture in ARCHITECTURES for storage in STORAGES]
each = pytest.mark.parametrize(("architecture", "storage"), PAIRS, ids=["-".join(pair) for pair in PAIRS])

# ---- what is wanted --------------------------------------------------------------------------------


class Hot(NamedTuple):
    """Kernels that a step spends its time in: `blocks` of `threads` each must find room on a multiprocessor at a time,
    as far as registers go, and instructions of these kinds must be among theirs."""

    names: str
    threads: int
    blocks: int
    both: tuple[str, ...] = ()
    bf16: tuple[str, ...] = ()


WIDE = (r"LDG\.E\S*\.128", r"STG\.E\S*\.128")  # accesses of 16 bytes
TENSOR = (r"HMMA\.16816\.F32\.BF16", r"LDSM\.")
COPIED = (r"LDGSTS\.E\S*\.128",)  # cp.async
HOT = (
    Hot(r"layernorm_forward|residual_layernorm_forward", 192, 6, WIDE),
    Hot(r"layernorm_backward|layernorm_backward_input", 192, 2, WIDE),
    Hot(r"rmsnorm_forward|residual_rmsnorm_forward", 384, 3, WIDE),
    Hot(r"rmsnorm_backward|rmsnorm_backward_input", 384, 1, WIDE),
    Hot(r"gelu_forward|gelu_backward|residual_forward|widen|narrow", 256, 5, WIDE),
    Hot(r"(swiglu|geglu)_(forward|backward)", 256, 4, WIDE),
    Hot(r"rope", 256, 5, WIDE),
    Hot(r"embedding_(forward|words|positions|rows)", 256, 4, WIDE),
    Hot(r"classifier|capped_classifier", 512, 2, WIDE),
    Hot(r"classifier_held", 512, 2, (*COPIED, r"LDS\.128", WIDE[1])),
    Hot(r"adamw_step|adamw_step_stored", 256, 4, WIDE),
    Hot(r"square_sums_(single|stored)", 256, 6, WIDE[:1]),
    Hot(r"flash_\w+_\d+", 128, 2, (*TENSOR, *COPIED, WIDE[1])),
    Hot(r"gemm_[nt][nt]", 256, 2, bf16=(*TENSOR, *COPIED)),
    Hot(r"column_partials", 256, 5, WIDE[:1]),
    Hot(r"attention_(forward|backward_\w+)_\d+", 64, 4),
    Hot(r"attention_decode_\d+", 128, 5),
)


@pytest.fixture(scope="module")
def launched(compiled: Compiled) -> dict[str, tuple[str, str]]:
    """What the package launches: file and signature of each kernel."""
    done = python(LAUNCHED)
    assert done.returncode == 0, done.stderr
    return {name: (file, signature) for file, name, signature in json.loads(done.stdout)}


LAUNCHED = """
import gc, json
import llmc._cuda
from llmc._cuda.compiler import Kernel
print(json.dumps([(k.file, k.name, k.signature) for k in gc.get_objects() if isinstance(k, Kernel)]))
"""


@each
def test_compiles(
    compiled: Compiled, launched: dict[str, tuple[str, str]], architecture: str, storage: str
) -> None:
    """All files, and they hold the kernels that are launched, no other."""
    assert compiled.errors(architecture, storage) == []
    kernels = compiled.kernels(architecture, storage)
    absent = BF16_ONLY if storage == "fp32" else ()
    files = {name: file for name, (file, _) in launched.items() if file not in absent}
    assert {name: kernel.file for name, kernel in kernels.items()} == files


@each
def test_what_is_passed_is_what_is_taken(
    compiled: Compiled, launched: dict[str, tuple[str, str]], architecture: str, storage: str
) -> None:
    """Place and size of each parameter; a struct takes what is passed as its members."""
    for name, kernel in compiled.kernels(architecture, storage).items():
        passed = places(launched[name][1])
        for at, size in kernel.parameters:
            taken = [(start, nbytes) for start, nbytes in passed if at <= start < at + size]
            whole = taken and taken[0][0] == at and sum(taken[-1]) == at + size and (size > 8 or len(taken) == 1)
            assert whole, f"{kernel.file}.cu: {name}: {size} bytes at {at} get {taken}"
        assert sum(passed[-1]) == sum(kernel.parameters[-1]), f"{kernel.file}.cu: {name}"


def places(signature: str) -> list[tuple[int, int]]:
    """Offset and size of each letter's value, one after another, each at a multiple of its size."""
    ends = [struct.calcsize(signature[: i + 1]) for i in range(len(signature))]
    sizes = [struct.calcsize(letter) for letter in signature]
    return [(end - size, size) for end, size in zip(ends, sizes, strict=True)]


@each
def test_registers_suffice_for_a_block(compiled: Compiled, architecture: str, storage: str) -> None:
    """Or the launch would fail, which no simulation shows."""
    for name, kernel in compiled.kernels(architecture, storage).items():
        assert taken(kernel.registers, kernel.threads) <= REGISTERS, f"{kernel.file}.cu: {name}"


def taken(registers: int, threads: int) -> int:
    """Registers of a block: those of a thread come in eights, and threads in warps."""
    return -(-registers // 8) * 8 * -(-threads // 32) * 32


@each
def test_nothing_spills(disassembled: Compiled, architecture: str, storage: str) -> None:
    for name, kernel in disassembled.kernels(architecture, storage).items():
        assert (kernel.stack, kernel.spilled) == (0, 0), f"{kernel.file}.cu: {name}"
        assert kernel.opcodes, f"no instructions of {name} were read"
        local = sorted(code for code in kernel.opcodes if re.match(r"(LDL|STL)\b", code))
        assert not local, f"{kernel.file}.cu: {name} has local memory: {local}"


@each
@pytest.mark.parametrize("hot", HOT, ids=lambda hot: hot.names.split("|")[0])
def test_hot_kernels(disassembled: Compiled, architecture: str, storage: str, hot: Hot) -> None:
    if storage == "fp32" and hot.names.startswith("flash"):
        pytest.skip("compiled for bf16 alone")
    kernels = disassembled.kernels(architecture, storage)
    found = {name: kernel for name, kernel in kernels.items() if re.fullmatch(hot.names, name)}
    assert found, f"no kernel is called {hot.names}"
    for name, kernel in found.items():
        assert hot.threads <= kernel.threads, f"{name} is not made for blocks of {hot.threads}"
        registers = hot.blocks * taken(kernel.registers, hot.threads)
        assert registers <= REGISTERS, f"{name}: {kernel.registers} registers leave no room for {hot.blocks} blocks"
        for pattern in (*hot.both, *(hot.bf16 if storage == "bf16" else ())):
            assert any(re.match(pattern, code) for code in kernel.opcodes), f"{name} has no {pattern}"


# ---- what is said of a mistake ---------------------------------------------------------------------

PLANTED = "int planted = undeclared;"
COMPILE_COPY = """
import sys
from pathlib import Path
from llmc._cuda import compiler
from llmc.errors import DeviceError
compiler.FOLDER = Path(sys.argv[1])
try:
    compiler.compile("norm", "sm_90", True)
except DeviceError as error:
    print(error)
"""


@pytest.mark.parametrize("file", ["norm.cu", "common.cuh", "ptx.cuh"])
def test_an_error_names_file_and_line(compiled: Compiled, tmp_path: Path, file: str) -> None:
    for path in CUDA.glob("*.cu*"):
        shutil.copy(path, tmp_path)
    lines = (tmp_path / file).read_text().splitlines()
    assert lines[-1] == "}"
    lines.insert(len(lines), PLANTED)
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    done = python(COMPILE_COPY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"llmc/_cuda/{file}:{len(lines)}: error: "), done.stdout
    assert "undeclared" in done.stdout


COMPILE_BY_NVCC = """
import sys
from llmc._cuda import compiler
from llmc.errors import DeviceError
paths = compiler._nvcc_paths()
if not paths:
    sys.exit("nvcc is not installed")
nvcc = compiler.NVCC(paths[0])
architecture = sys.argv[1]
print(nvcc.compile("norm", architecture, compiler.options(architecture, True)).log)
"""


@pytest.mark.parametrize("architecture", ["sm_90"])
def test_nvcc_in_the_place_of_nvrtc(compiled: Compiled, architecture: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("nvcc needs g++")
    done = python(COMPILE_BY_NVCC, architecture)
    if "nvcc is not installed" in done.stderr:
        pytest.skip("nvcc is not installed: pip install nvidia-cuda-nvcc nvidia-cuda-runtime")
    assert done.returncode == 0, done.stderr
    ours = {name for name, kernel in compiled.kernels(architecture, "bf16").items() if kernel.file == "norm"}
    assert set(read_log(done.stdout)) == ours != set()
