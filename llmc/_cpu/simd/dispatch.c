/* Built with no instruction-set flags and no link-time optimisation: this must run on any CPU. */
#include "dispatch.h"

extern const Kernels kernels_scalar;
#ifdef LLMC_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef LLMC_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef LLMC_HAVE_AVX512BF16
extern const Kernels kernels_avx512bf16;
#endif
#ifdef LLMC_HAVE_AMX
extern const Kernels kernels_amx;
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
/* CPUID says whether there are tiles and their bf16 product, XGETBV whether the system saves them. */
static int has_amx(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3;
}
/* Linux wants to be asked before a process uses tiles: they make what it saves of a thread ten times as large. */
static int claim_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif
#ifdef LLMC_HAVE_NEON
extern const Kernels kernels_neon;
#endif
#ifdef LLMC_HAVE_NEONBF16
extern const Kernels kernels_neonbf16;
#ifdef __linux__
#include <sys/auxv.h>
static int has_bf16(void) { return (getauxval(AT_HWCAP2) >> 14 & 1) != 0; }
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int has_bf16(void) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, NULL, 0) == 0 && found;
}
#else
static int has_bf16(void) { return 0; }
#endif
#endif

const IsaEntry *dispatch_table(int *count) {
    static IsaEntry table[8];
    static int n = 0;
    *count = n;
    if (n > 0) return table; /* asking CPUID is slow in a virtual machine */
    table[n++] = (IsaEntry){&kernels_scalar, 1};
    /* __builtin_cpu_supports asks CPUID and, through XGETBV, whether the system saves the registers. */
#ifdef LLMC_HAVE_AVX2
    __builtin_cpu_init();
    table[n++] = (IsaEntry){&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
#endif
#ifdef LLMC_HAVE_AVX512
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    table[n++] = (IsaEntry){&kernels_avx512, avx512};
    /* Nobody has run amx yet, so it is not the last, which is the default. */
#ifdef LLMC_HAVE_AMX
    table[n++] = (IsaEntry){&kernels_amx, avx512 && __builtin_cpu_supports("avx512bf16") && has_amx()};
#endif
#ifdef LLMC_HAVE_AVX512BF16
    table[n++] = (IsaEntry){&kernels_avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16")};
#endif
#endif
#ifdef LLMC_HAVE_NEON
    table[n++] = (IsaEntry){&kernels_neon, 1}; /* part of every AArch64 */
#endif
#ifdef LLMC_HAVE_NEONBF16
    table[n++] = (IsaEntry){&kernels_neonbf16, has_bf16()};
#endif
    *count = n;
    return table;
}

int dispatch_claim(const Kernels *kernels) {
#ifdef LLMC_HAVE_AMX
    if (kernels == &kernels_amx) return claim_amx();
#endif
    (void)kernels;
    return 1;
}
