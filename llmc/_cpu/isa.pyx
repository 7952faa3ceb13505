"""The active kernel table, the matrix product's precision and the number of threads: every other module of this package
reads them here."""

import os
import pathlib
import subprocess
import sys

from llmc._cpu import waiting
from llmc.errors import ConfigError

cdef extern from "simd/dispatch.h":
    ctypedef struct IsaEntry:
        const Kernels *kernels
        int supported
    const IsaEntry *dispatch_table(int *count)
    int dispatch_claim(const Kernels *kernels)

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    /* The version of the OpenMP specification, as its date. */
    static int llmc_openmp(void) { return _OPENMP; }
    /* Ends the pool of worker threads; the next parallel region starts a new one.  Older runtimes cannot. */
    #if defined(__clang__) || __GNUC__ >= 9
    static void llmc_pause_threads(void) { omp_pause_resource_all(omp_pause_hard); }
    #else
    static void llmc_pause_threads(void) {}
    #endif
    static void llmc_start_openmp(void) { (void)omp_get_max_threads(); }
    #else
    static int llmc_openmp(void) { return 0; }
    static void llmc_pause_threads(void) {}
    static void llmc_start_openmp(void) {}
    #endif
    """
    int llmc_openmp()
    void llmc_pause_threads()
    void llmc_start_openmp()

# LLVM's library reads the environment at its first call, not when it is loaded: this is the call, while
# `waiting.policy` holds.
llmc_start_openmp()

DTYPES = ("fp32", "bf16")

kernels = NULL
gemm = NULL
tile_rows = 1
packs_rows = False  # whether gemm packs rows of A too, and does not use them where they lie
threads = 1


cdef int team(Py_ssize_t tasks) noexcept nogil:
    """How many threads share so many tasks: with one there is no team to be called together."""
    return <int> max(1, min(<Py_ssize_t> threads, tasks))


def all_isas():
    """Names of the kernel tables that were built; the last that the CPU can run is the default."""
    cdef int count = 0
    cdef const IsaEntry *table = dispatch_table(&count)
    return tuple([table[i].kernels.name.decode() for i in range(count)])


def isas():
    """Those of `all_isas()` that this CPU can run."""
    cdef int count = 0
    cdef const IsaEntry *table = dispatch_table(&count)
    return tuple([table[i].kernels.name.decode() for i in range(count) if table[i].supported])


def resolve_isa(name=None):
    """`name`, else LLMC_ISA, else the best there is.  ConfigError lists the valid names."""
    source = "isa"
    if name is None and os.environ.get("LLMC_ISA"):
        name, source = os.environ["LLMC_ISA"], "LLMC_ISA"
    usable = isas()
    if name is None:
        name = usable[len(usable) - 1]  # extensions are built without wraparound: no index -1
    if name not in usable:
        why = "is not supported by this CPU" if name in all_isas() else "is unknown here"
        raise ConfigError(source, f"{name!r} {why}; choose from {', '.join(usable)}")
    return name


def resolve_threads(count=None):
    """`count`, else OMP_NUM_THREADS, else the physical cores this process may run on; 1 without OpenMP."""
    source = "threads"
    if count is None and os.environ.get("OMP_NUM_THREADS"):
        # A list gives one number per nesting level; the first is ours.
        count, source = os.environ["OMP_NUM_THREADS"].split(",")[0], "OMP_NUM_THREADS"
    if count is None:
        count = physical_cores()
    try:
        count = int(count)
    except ValueError:
        raise ConfigError(source, f"{count!r} is not a number") from None
    if not 1 <= count <= 1024:
        raise ConfigError(source, f"must be from 1 to 1024, got {count}")
    return count if llmc_openmp() else 1


cdef const Kernels *_find(str name) except NULL:
    cdef int count = 0
    cdef const IsaEntry *table = dispatch_table(&count)
    for i in range(count):
        if table[i].kernels.name.decode() == name:
            return table[i].kernels
    raise ConfigError("isa", f"{name!r} was not built")


cdef Py_ssize_t gemm_scratch(str name) except -1:
    """Floats of scratch that the GEMM of table `name` needs per thread."""
    return _find(name).gemm_scratch


def resolve_dtype(name=None):
    """`name`, else fp32.  ConfigError for anything but one of DTYPES."""
    if name is None:
        name = DTYPES[0]
    if name == "tf32":
        raise ConfigError("dtype", f"tf32 is for GPUs; a CPU takes {' and '.join(DTYPES)}")
    if name not in DTYPES:
        raise ConfigError("dtype", f"{name!r} is unknown here; choose from {', '.join(DTYPES)}")
    return name


def activate(name, count, dtype):
    """Use the table `name`, one of `isas()`, on `count` threads, with operands of products as `dtype`, from now on."""
    global kernels, gemm, tile_rows, packs_rows, threads
    cdef const Kernels *found = _find(name)
    if not dispatch_claim(found):
        raise ConfigError("isa", f"the system does not let this process use {name!r}")
    kernels = found
    packs_rows = dtype == "bf16"
    gemm = kernels.gemm_bf16 if packs_rows else kernels.gemm
    tile_rows = kernels.tile_rows_bf16 if packs_rows else kernels.tile_rows
    threads = count


def info():
    """What is active: the contract's entries, and isa, tile, threads, whether the table multiplies bf16 pairs in one
    instruction (else it rounds, and multiplies in fp32), how threads wait, and the OpenMP specification's date (0:
    built without)."""
    return {
        "device": "cpu",
        "storage": "float32",
        "ahead": 0,
        "isa": kernels.name.decode(),
        "isas": isas(),
        "tile": (tile_rows, kernels.tile_columns),
        "dtype": "bf16" if packs_rows else "fp32",
        "bf16_products": bool(kernels.has_dot),
        "threads": threads,
        "waiting": waiting.described() if llmc_openmp() else "one thread has nothing to wait for",
        "openmp": llmc_openmp(),
    }


def physical_cores():
    """Physical cores among the CPUs this process may use: hyper-threads share the units that matter here."""
    if sys.platform == "darwin":
        try:
            return max(1, int(subprocess.check_output(["sysctl", "-n", "hw.physicalcpu"])))
        except (OSError, ValueError, subprocess.CalledProcessError):
            return os.cpu_count() or 1
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in usable:
        try:
            siblings = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings.strip())
    return max(1, len(cores))


def _pause_threads():
    llmc_pause_threads()


# A child of fork() inherits libgomp's idea of its worker threads but not the threads: its first parallel
# region would wait for them for ever.  With the pool ended before the fork, both sides start their own.
if llmc_openmp() and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pause_threads)
