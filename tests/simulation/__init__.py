"""A GPU for machines that have none.

`load()` puts three libraries into the process, under the names of the real ones: libcuda.so.1 (driver.cpp and the files
beside it), libnvrtc.so.13 (nvrtc.cpp, which has g++ compile the unmodified `.cu` files against simulation.h) and
libcublasLt.so.13 (cublaslt.cpp).  PyCUDA and llmc/_cuda then find them as they find NVIDIA's.  It must be called before
PyCUDA is imported.

Environment: SIMULATION_ORDER (forward, reverse, shuffle) and SIMULATION_SEED: which thread runs next;
SIMULATION_STREAMS=lazy: work waits until somebody waits for it; SIMULATION_PLACE=start: allocations begin, and do not
end, at a forbidden page; SIMULATION_SANITIZE=1: kernels under AddressSanitizer and UBSan (see `sanitized`);
SIMULATION_DEVICES, _CAPABILITY, _MULTIPROCESSORS, _DRIVER, _MEMORY, _NAME: what the GPU is; SIMULATION_FAULT: what
fails (driver.cpp); SIMULATION_TIMEOUT: seconds after which a launch counts as endless; SIMULATION_CACHE: where compiled
objects are kept.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARIES = {
    "libcuda.so.1": ("driver.cpp", "kernels.cpp", "memory.cpp", "streams.cpp", "fibres.cpp"),
    "libnvrtc.so.13": ("nvrtc.cpp",),
    "libcublasLt.so.13": ("cublaslt.cpp",),
}
_loaded: list[ctypes.CDLL] = []


class Unavailable(Exception):
    """Why this machine cannot simulate a GPU."""


def compiler() -> str:
    """g++, or what SIMULATION_CXX names."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        here = f"{sys.platform} on {platform.machine()}"
        raise Unavailable(f"the simulated GPU needs Linux on x86-64, and this is {here}")
    found = shutil.which(os.environ.get("SIMULATION_CXX") or "g++")
    if not found:
        raise Unavailable("the simulated GPU needs g++ (Debian, Ubuntu: apt install g++)")
    return found


@functools.cache
def build() -> Path:
    """The folder of the three libraries, made when it is not there yet."""
    cxx = compiler()
    sources = sorted([Path(__file__), *FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), *FOLDER.glob("*.cuh")])
    version = subprocess.run([cxx, "--version"], capture_output=True, check=True).stdout
    texts = (text for path in sources for text in (path.name.encode(), path.read_bytes()))
    parts = [str(FOLDER).encode(), version, *texts]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"llmc-simulation-{os.getuid()}" / key
    libraries = cache / "lib"
    if not libraries.is_dir():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in cache.parent.iterdir():
            if time.time() - old.stat().st_mtime > 7 * 24 * 3600:
                shutil.rmtree(old, ignore_errors=True)
        made = Path(tempfile.mkdtemp(dir=cache))
        for name, files in LIBRARIES.items():
            done = subprocess.run(
                [
                    cxx, "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-Wl,-soname,{name}",
                    f'-DSIMULATION_FOLDER="{FOLDER}"', *(str(FOLDER / file) for file in files), "-ldl",
                    "-o", str(made / name),
                ],
                capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr}")
        try:
            made.rename(libraries)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return libraries


def sanitized() -> dict[str, str]:
    """The environment of a process whose kernels run under AddressSanitizer and UBSan."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):  # the first looks for exceptions in the second when it is loaded
        said = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found.append(os.path.realpath(said.stdout.strip()))
    return {
        "SIMULATION_SANITIZE": "1",
        "LD_PRELOAD": ":".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def load() -> ctypes.CDLL:
    """Put the simulated GPU into this process; gives its libcuda.  Unavailable where that cannot be, RuntimeError where
    PyCUDA has already found another one."""
    if _loaded:
        return _loaded[0]
    libraries = build()
    if "pycuda._driver" in sys.modules:
        raise RuntimeError("PyCUDA has been imported before the simulated GPU was loaded")
    os.environ.setdefault("SIMULATION_CACHE", str(libraries.parent))
    os.environ.setdefault("LLMC_CUDA_CACHE", str(libraries.parent / os.environ.get("SIMULATION_SANITIZE", "0")))
    os.environ["LLMC_CUDA_LIBRARIES"] = str(libraries)
    for name in LIBRARIES:
        _loaded.append(ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL))
    _loaded[0].simulation_message.restype = ctypes.c_char_p
    return _loaded[0]
