"""How threads wait for the next parallel region: they spin for a moment, and sleep when it does not come.

The regions of a step follow one another within microseconds; a sleeping thread would cost each of them tens of
microseconds to wake, a thread that spins for ever takes a core from whoever needs it.  The OpenMP libraries have that
rule but read its length from the environment, once, when they start.  So this module is built without OpenMP, and
`policy` sets the environment while the package loads the extensions that need it.

LLVM's library counts milliseconds (KMP_BLOCKTIME).  GNU's counts turns of a loop (GOMP_SPINCOUNT) around the CPU's
pause instruction, whose time differs between CPUs by a factor of forty: it is measured.  With more threads than CPUs
GNU's library spins for no more than a hundred turns, whatever this count.
"""

import os
from contextlib import contextmanager

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPIN_MS = 1.5  # several times the longest pause between two regions of a step, and no burden on an idle machine

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <time.h>

    static double llmc_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
    }

    /* Nanoseconds of one turn of libgomp's waiting loop: the least of several tries, since anything may interrupt. */
    static double llmc_turn_ns(void) {
        enum { TRIES = 9, TURNS = 400 };
        double least = 1e9;
        int word = 0;
        for (int i = 0; i < TRIES; i++) {
            double began = llmc_now_ns();
            for (int j = 0; j < TURNS && __atomic_load_n(&word, __ATOMIC_RELAXED) == 0; j++) {
    #if defined(__x86_64__) || defined(__i386__)
                __builtin_ia32_pause();
    #else
                __asm__ volatile("" : : : "memory");
    #endif
            }
            double each = (llmc_now_ns() - began) / TURNS;
            if (each < least) least = each;
        }
        return least;
    }

    /* Whether an OpenMP library is in this process already; one is shared by all who load it by the same name. */
    static int llmc_openmp_loaded(void) {
        const char *names[] = {"libgomp.so.1", "libomp.so", "libomp.so.5", "libomp.dylib"};
        for (int i = 0; i < 4; i++) {
            void *handle = dlopen(names[i], RTLD_LAZY | RTLD_NOLOAD);
            if (handle) {
                dlclose(handle);
                return 1;
            }
        }
        return 0;
    }
    """
    double llmc_turn_ns()
    int llmc_openmp_loaded()

_described = ""


@contextmanager
def policy():
    """While OpenMP's library is loaded within this block, it reads our policy; after it the environment is as before,
    so that no child inherits it.  A user's own variables win.  Where another package has loaded the library first
    (PyTorch brings a copy by the same name, and then that copy serves both), nothing can be set any more: it stays at
    what was read then, by default 300000 turns."""
    global _described
    own = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if own:
        _described = f"as {', '.join(own)} says"
        yield
    elif llmc_openmp_loaded():
        _described = "as was set when another package loaded OpenMP, before llmc"
        yield
    else:
        turns = spin_count(llmc_turn_ns())
        ours = {"GOMP_SPINCOUNT": str(turns), "KMP_BLOCKTIME": str(max(1, round(SPIN_MS)))}
        _described = f"spin for {SPIN_MS:g} ms ({turns} turns), then sleep"
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


def spin_count(turn_ns):
    """Turns that take SPIN_MS, kept within what CPUs are known to need: 0.5 to 150 ns for each."""
    return round(SPIN_MS * 1e6 / min(150.0, max(0.5, turn_ns)))


def described():
    """The policy in effect, in words."""
    return _described
