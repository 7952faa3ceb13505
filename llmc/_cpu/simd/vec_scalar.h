/* One float at a time: the baseline that the others are measured against.  Built without auto-vectorisation. */
#include <math.h>
#include <string.h>

#define ISA_NAME scalar
#define LLMC_MR 4
enum { VL = 1, MR = LLMC_MR, NV = 3 };

typedef float vec;
typedef double vecd;
typedef uint32_t vecu;

static inline vec v_load(const float *p) { return *p; }
static inline void v_store(float *p, vec a) { *p = a; }
static inline vec v_load_n(const float *p, ptrdiff_t n) { return n > 0 ? *p : 0.0f; }
static inline void v_store_n(float *p, vec a, ptrdiff_t n) {
    if (n > 0) *p = a;
}
static inline vec v_set(float a) { return a; }
static inline vec v_add(vec a, vec b) { return a + b; }
static inline vec v_sub(vec a, vec b) { return a - b; }
static inline vec v_mul(vec a, vec b) { return a * b; }
static inline vec v_div(vec a, vec b) { return a / b; }
static inline vec v_sqrt(vec a) { return sqrtf(a); }
static inline vec v_fma(vec a, vec b, vec c) { return a * b + c; }
static inline vec v_max(vec a, vec b) { return a > b ? a : b; }
static inline vec v_min(vec a, vec b) { return a < b ? a : b; }
static inline vec v_round(vec a) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves no bits for a fraction */
    return (a + magic) - magic;
}
static inline vec v_exp2i(vec n) {
    /* NaN has no exponent to build; the product in v_exp keeps it NaN whatever this returns. */
    int32_t bits = (n >= -127.0f && n <= 127.0f ? (int32_t)n + 127 : 127) * (1 << 23);
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
static inline float v_sum(vec a) { return a; }
static inline float v_hmax(vec a) { return a; }
static inline void v_transpose(vec *rows) { (void)rows; }

static inline vecu vu_set(uint32_t a) { return a; }
static inline vecu vu_lanes(void) { return 0; }
static inline vecu vu_add(vecu a, vecu b) { return a + b; }
static inline vecu vu_xor(vecu a, vecu b) { return a ^ b; }
static inline vecu vu_shr8(vecu a) { return a >> 8; }
static inline vecu vu_mul(vecu a, vecu b, vecu *hi) {
    uint64_t product = (uint64_t)a * b;
    *hi = (uint32_t)(product >> 32);
    return (uint32_t)product;
}
static inline vec v_from_u(vecu a) { return (float)a; }
static inline vec v_frexp(vec x, vec *e) {
    const int32_t root = 0x3f3504f3; /* the bits of sqrt(1/2) */
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t n = (bits - root) >> 23;
    bits -= n * (1 << 23);
    *e = (float)n;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline vecd vd_zero(void) { return 0.0; }
static inline vecd vd_sqacc(vecd acc, vec x) { return acc + (double)x * (double)x; }
static inline double vd_sum(vecd a) { return a; }

static inline vec v_round_bf16(vec a) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    bits = a != a ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
    bits &= 0xFFFF0000u;
    memcpy(&a, &bits, sizeof a);
    return a;
}

static inline vec v_load_bf16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
static inline void v_store_bf16(uint16_t *p, vec a) {
    uint32_t bits;
    a = v_round_bf16(a);
    memcpy(&bits, &a, sizeof bits);
    *p = (uint16_t)(bits >> 16);
}
static inline void v_load_bf16_pairs(const uint16_t *p, vec *even, vec *odd) {
    *even = v_load_bf16(p);
    *odd = v_load_bf16(p + 1);
}
static inline vec v_load_bf16_n(const uint16_t *p, ptrdiff_t n) { return n > 0 ? v_load_bf16(p) : 0.0f; }
static inline void v_store_bf16_n(uint16_t *p, vec a, ptrdiff_t n) {
    if (n > 0) v_store_bf16(p, a);
}
