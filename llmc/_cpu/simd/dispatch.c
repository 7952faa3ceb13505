/* Built with no instruction-set flags and no link-time optimisation: this must run on any CPU. */
#include "dispatch.h"

extern const Kernels kernels_scalar;
#ifdef LLMC_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef LLMC_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef LLMC_HAVE_NEON
extern const Kernels kernels_neon;
#endif

const IsaEntry *dispatch_table(int *count) {
    static IsaEntry table[4];
    int n = 0;
    table[n++] = (IsaEntry){&kernels_scalar, 1};
    /* __builtin_cpu_supports asks CPUID and, through XGETBV, whether the system saves the registers. */
#ifdef LLMC_HAVE_AVX2
    __builtin_cpu_init();
    table[n++] = (IsaEntry){&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
#endif
#ifdef LLMC_HAVE_AVX512
    table[n++] =
        (IsaEntry){&kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")};
#endif
#ifdef LLMC_HAVE_NEON
    table[n++] = (IsaEntry){&kernels_neon, 1}; /* part of every AArch64 */
#endif
    *count = n;
    return table;
}
