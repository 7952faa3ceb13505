"""Kernels: from a `.cu` file of this folder to a function that launches.

NVRTC compiles, by ctypes, in memory; nvcc does where there is no NVRTC.  The result, a cubin for one architecture, is
kept on disk under a name that says what it was made from, so a second process compiles nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from llmc._cuda import device, driver, gpu
from llmc.errors import DeviceError

FOLDER = Path(__file__).parent
PLACE = "llmc/_cuda"  # what files are called in messages and in line information
STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel has without asking
DRIVERS = {11: "450", 12: "525", 13: "580"}  # the first driver that runs what CUDA of this major version compiles
INSTALL = "pip install nvidia-cuda-nvrtc"


class Compiled(NamedTuple):
    """A cubin, and what the compiler said: registers and spills of each kernel."""

    cubin: bytes
    log: str


# ---- source ----------------------------------------------------------------------------------------


@functools.cache
def headers() -> dict[str, str]:
    """Name and text of every header, beginning with the name that errors are to show."""
    return {path.name: f'#line 1 "{PLACE}/{path.name}"\n{path.read_text("utf-8")}' for path in _files("*.cuh")}


def sources() -> list[str]:
    """The kernels' files, without `.cu`."""
    return [path.stem for path in _files("*.cu")]


def _files(pattern: str) -> list[Path]:
    return sorted(FOLDER.glob(pattern))


def options(architecture: str, bf16: bool) -> list[str]:
    """What both compilers are told.  `architecture` is "sm_90"."""
    return [f"-arch={architecture}", "-std=c++17", f"-DSTORAGE_BF16={int(bf16)}", "-lineinfo", "--ptxas-options=-v"]


def compile(file: str, architecture: str, bf16: bool) -> Compiled:
    """The file `<file>.cu` compiled for one architecture and storage type, by whichever compiler there is; no cache.

    DeviceError("llmc/_cuda/norm.cu:57: error: ...") for the first error in it.
    """
    return find().compile(file, architecture, options(architecture, bf16))


# ---- compilers -------------------------------------------------------------------------------------


class NVRTC:
    """NVIDIA's compiler as a library."""

    def __init__(self, path: str) -> None:
        if os.path.dirname(path):
            # Looked for by name later, and not beside the library.
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = c_char_p
        self._library.nvrtcCreateProgram.argtypes = [
            POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p),
        ]  # fmt: skip
        self._library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, POINTER(c_char_p)]
        for what in ("CUBIN", "ProgramLog"):
            getattr(self._library, f"nvrtcGet{what}Size").argtypes = [c_void_p, POINTER(c_size_t)]
            getattr(self._library, f"nvrtcGet{what}").argtypes = [c_void_p, c_char_p]
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.version = (major.value, minor.value)
        self.name = f"NVRTC {major.value}.{minor.value}"
        self.identity = _identity(self.name, path)

    def _call(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise DeviceError(f"{self.name}: {function}: {self._library.nvrtcGetErrorString(status).decode()}")

    def architectures(self) -> list[int]:
        """What it compiles for: 90 is sm_90."""
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        found = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, file: str, architecture: str, options: Sequence[str]) -> Compiled:
        texts = headers()
        program = c_void_p()
        self._call(
            "nvrtcCreateProgram", byref(program), (FOLDER / f"{file}.cu").read_bytes(), f"{PLACE}/{file}.cu".encode(),
            len(texts), _strings(texts.values()), _strings(texts),
        )  # fmt: skip
        try:
            given = [*options, "-default-device"]
            status = self._library.nvrtcCompileProgram(program, len(given), _strings(given))
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise compile_error(log, file, self.name)
            return Compiled(self._get(program, "CUBIN"), log)
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _get(self, program: c_void_p, what: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", program, byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw


def _strings(texts: Any) -> Any:
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)


class NVCC:
    """NVIDIA's compiler as a program, which needs a host compiler too."""

    def __init__(self, path: str) -> None:
        self.path = path
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", said)
        if found is None:
            raise DeviceError(f"{path} --version does not say which release it is")
        self.version = (int(found[1]), int(found[2]))
        self.name = f"nvcc {found[1]}.{found[2]}"
        self.identity = _identity(self.name, path)

    def architectures(self) -> list[int]:
        said = subprocess.run([self.path, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        return [int(number) for number in re.findall(r"^sm_(\d+)$", said, re.M)]

    def compile(self, file: str, architecture: str, options: Sequence[str]) -> Compiled:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / f"{file}.cubin"
            command = [self.path, "-cubin", *options, "-o", str(cubin), f"{PLACE}/{file}.cu"]
            done = subprocess.run(command, cwd=FOLDER.parent.parent, capture_output=True, text=True)
            log = done.stdout + done.stderr
            if done.returncode:
                raise compile_error(log, file, self.name)
            return Compiled(cubin.read_bytes(), log)


def _identity(name: str, path: str) -> str:
    """A compiler as the cache knows it: two of one version may differ (the tests' makes no code for a GPU)."""
    try:
        found = os.stat(path)
    except OSError:
        return f"{name} {path}"  # of the loader's
    return f"{name} {os.path.realpath(path)} {found.st_size} {found.st_mtime_ns}"


def compile_error(log: str, file: str, compiler: str) -> DeviceError:
    """The first error of a compiler's log, with its file and line; NVIDIA writes norm.cu(57), others norm.cu:57:9."""
    pattern = r"^(?P<file>[^\s(:]+)(?:\((?P<line>\d+)\)|:(?P<other>\d+)(?::\d+)?): (?:\w+ )?error\b[^:]*: (?P<text>.*)$"
    found = list(re.finditer(pattern, log, re.M))
    if not found:
        said = " ".join(log.split())[:500] or "it did not say why"
        return DeviceError(f"{PLACE}/{file}.cu: {compiler} cannot compile it: {said}")
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return DeviceError(f"{first['file']}:{first['line'] or first['other']}: error: {first['text'].strip()}{more}")


def find() -> NVRTC | NVCC:
    """The best compiler for the driver, if one is in use: NVRTC, else nvcc.  DeviceError where there is none."""
    return _find(device.handle().driver_version if device.is_open() else None)


@functools.cache
def _find(driver_version: int | None) -> NVRTC | NVCC:
    limit = math.inf if driver_version is None else driver_version // 1000
    newer: list[NVRTC | NVCC] = []
    for path in driver.libraries("nvrtc", "nvidia-cuda-nvrtc"):
        try:
            nvrtc = NVRTC(path)
        except OSError:
            continue
        if nvrtc.version[0] <= limit:
            return nvrtc
        newer.append(nvrtc)
    for path in _nvcc_paths():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            nvcc = NVCC(path)
            if nvcc.version[0] <= limit:
                return nvcc
            newer.append(nvcc)
    if newer and driver_version is not None:
        needed = newer[0].version[0]
        first = DRIVERS.get(needed, DRIVERS[max(DRIVERS)])
        raise DeviceError(
            f"the NVIDIA driver is too old: it runs CUDA {gpu.cuda_version(driver_version)}, and what "
            f"{newer[0].name} compiles needs CUDA {needed}.0, which is driver {first} or newer"
        )
    raise DeviceError(f"there is no compiler for CUDA, neither NVRTC nor nvcc: {INSTALL}")


def _nvcc_paths() -> list[str]:
    name = "nvcc.exe" if sys.platform == "win32" else "nvcc"
    folders = [*driver.toolkits(), *(root / "cu13" for root in driver.wheel_roots())]
    found = [str(folder / "bin" / name) for folder in folders if (folder / "bin" / name).is_file()]
    return [*filter(None, [shutil.which("nvcc")]), *found]


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: the GPU's own architecture, or the nearest older one of the same major version, whose code
    it runs too, where the compiler does not know it yet."""
    major, minor = capability
    known = [number for number in find().architectures() if number // 10 == major and number % 10 <= minor]
    if not known:
        raise DeviceError(f"{find().name} cannot compile for sm_{major}{minor}: {INSTALL} --upgrade")
    return f"sm_{max(known)}"


# ---- cache -----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """LLMC_CUDA_CACHE, else a folder of the user's cache."""
    if chosen := os.environ.get("LLMC_CUDA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmc" / "cuda"


def cubin(file: str, architecture: str, bf16: bool) -> bytes:
    """The compiled file, from the cache if it was compiled before."""
    compiler = find()
    given = options(architecture, bf16)
    source = (FOLDER / f"{file}.cu").read_text("utf-8")
    included = [text for header in sorted(headers().items()) for text in header]
    key = hashlib.sha256("\0".join([compiler.identity, *given, file, source, *included]).encode()).hexdigest()
    path = cache_folder() / f"{file}-{architecture}-{key[:32]}.cubin"
    if (kept := _read(path)) is not None:
        return kept
    made = compiler.compile(file, architecture, given).cubin
    _write(path, made)
    return made


def _read(path: Path) -> bytes | None:
    """What `_write` has written; None where it is not there or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:32], data[32:]
    return content if hashlib.sha256(content).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Keep it, whole or not at all.  A folder that cannot be written to costs time in the next process, and no more."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(content).digest() + content)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                file.close()
                os.unlink(file.name)
                raise


# ---- kernels ---------------------------------------------------------------------------------------


class Kernel:
    """`extern "C" __global__ void name(...)` of `<file>.cu`, compiled at its first call.

    `signature` has a letter for each parameter: P a pointer, i int, q long long, Q unsigned long long, f float,
    d double.  Called as `kernel(grid, block, *arguments, shared=0)`: grid and block are ints or tuples, and a grid with
    a 0 launches nothing; an array passes its address, None a null pointer; `shared` is bytes of dynamic shared memory.
    """

    def __init__(self, file: str, name: str, signature: str) -> None:
        self.file, self.name, self.signature = file, name, signature

    def __call__(self, grid: Any, block: Any, *arguments: Any, shared: int = 0) -> None:
        if not isinstance(grid, tuple):
            grid = (grid,)
        if 0 in grid:
            return
        opened = device.handle()
        key = self, device.storage
        function = opened.functions.get(key) or opened.functions.setdefault(key, self._function(opened))
        if shared > STATIC_SHARED:
            self._raise_shared(opened, function, shared)
        values = [a.ptr if isinstance(a, device.DeviceArray) else 0 if a is None else a for a in arguments]
        block = block if isinstance(block, tuple) else (block,)
        function.prepared_async_call(
            (*grid, 1, 1)[:3], (*block, 1, 1)[:3], opened.compute, *values, shared_size=shared
        )

    def _function(self, opened: Any) -> Any:
        bf16 = device.storage.name == "bfloat16"
        key = "module", self.file, bf16
        module = opened.functions.get(key)
        if module is None:
            code = cubin(self.file, architecture(opened.capability), bf16)
            try:
                module = opened.functions[key] = opened.cuda.module_from_buffer(code)
            except opened.cuda.MemoryError:
                raise  # `device.fault` has the words for it
            except opened.errors as error:
                raise DeviceError(f"{PLACE}/{self.file}.cu: the driver refuses what was compiled: {error}") from error
        try:
            function = module.get_function(self.name)
        except opened.errors as error:
            raise DeviceError(f"{PLACE}/{self.file}.cu has no kernel {self.name}: {error}") from error
        return function.prepare(self.signature)

    def _raise_shared(self, opened: Any, function: Any, shared: int) -> None:
        key = "shared", self, device.storage
        if shared <= opened.functions.get(key, 0):
            return
        if shared > opened.shared_limit:
            raise DeviceError(
                f"{self.name} needs {shared:,} bytes of shared memory per block, and {opened.name} has "
                f"{opened.shared_limit:,}"
            )
        function.set_attribute(opened.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        opened.functions[key] = shared
