/* AArch64 Advanced SIMD: 4 floats, 32 registers, no masks.  With FEAT_BF16 also products of pairs. */
#include <arm_neon.h>

#ifdef LLMC_ISA_NEONBF16
#define ISA_NAME neonbf16
#else
#define ISA_NAME neon
#endif
#define LLMC_MR 8
enum { VL = 4, MR = LLMC_MR, NV = 3 };

typedef float32x4_t vec;
typedef float64x2_t vecd;
typedef uint32x4_t vecu;

static inline vec v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, vec a) { vst1q_f32(p, a); }
static inline vec v_load_n(const float *p, ptrdiff_t n) {
    vec a = vdupq_n_f32(0.0f);
    if (n > 0) a = vsetq_lane_f32(p[0], a, 0);
    if (n > 1) a = vsetq_lane_f32(p[1], a, 1);
    if (n > 2) a = vsetq_lane_f32(p[2], a, 2);
    return a;
}
static inline void v_store_n(float *p, vec a, ptrdiff_t n) {
    if (n > 0) p[0] = vgetq_lane_f32(a, 0);
    if (n > 1) p[1] = vgetq_lane_f32(a, 1);
    if (n > 2) p[2] = vgetq_lane_f32(a, 2);
}
static inline vec v_set(float a) { return vdupq_n_f32(a); }
static inline vec v_add(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec v_sub(vec a, vec b) { return vsubq_f32(a, b); }
static inline vec v_mul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec v_div(vec a, vec b) { return vdivq_f32(a, b); }
static inline vec v_sqrt(vec a) { return vsqrtq_f32(a); }
static inline vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
/* Compare and select, not vmaxq: x86's rule for NaN (see vec.h). */
static inline vec v_max(vec a, vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vec v_min(vec a, vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline vec v_round(vec a) { return vrndnq_f32(a); }
static inline vec v_exp2i(vec n) {
    int32x4_t e = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(e, 23));
}
static inline float v_sum(vec a) { return vaddvq_f32(a); }
static inline float v_hmax(vec a) { return vmaxvq_f32(a); }

static inline void v_transpose(vec *r) {
    float32x4x2_t lo = vtrnq_f32(r[0], r[1]), hi = vtrnq_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(lo.val[0]), vget_low_f32(hi.val[0]));
    r[1] = vcombine_f32(vget_low_f32(lo.val[1]), vget_low_f32(hi.val[1]));
    r[2] = vcombine_f32(vget_high_f32(lo.val[0]), vget_high_f32(hi.val[0]));
    r[3] = vcombine_f32(vget_high_f32(lo.val[1]), vget_high_f32(hi.val[1]));
}

static inline vecu vu_set(uint32_t a) { return vdupq_n_u32(a); }
static inline vecu vu_lanes(void) {
    static const uint32_t lanes[4] = {0, 1, 2, 3};
    return vld1q_u32(lanes);
}
static inline vecu vu_add(vecu a, vecu b) { return vaddq_u32(a, b); }
static inline vecu vu_xor(vecu a, vecu b) { return veorq_u32(a, b); }
static inline vecu vu_shr8(vecu a) { return vshrq_n_u32(a, 8); }
static inline vecu vu_mul(vecu a, vecu b, vecu *hi) {
    uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b)));
    uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(a, b));
    *hi = vuzp2q_u32(first, second);
    return vuzp1q_u32(first, second);
}
static inline vec v_from_u(vecu a) { return vcvtq_f32_u32(a); }
static inline vec v_frexp(vec x, vec *e) {
    int32x4_t bits = vreinterpretq_s32_f32(x), root = vdupq_n_s32(0x3f3504f3); /* the bits of sqrt(1/2) */
    int32x4_t n = vshrq_n_s32(vsubq_s32(bits, root), 23);
    *e = vcvtq_f32_s32(n);
    return vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(n, 23)));
}

static inline vecd vd_zero(void) { return vdupq_n_f64(0.0); }
static inline vecd vd_sqacc(vecd acc, vec x) {
    vecd lo = vcvt_f64_f32(vget_low_f32(x)), hi = vcvt_high_f64_f32(x);
    return vfmaq_f64(vfmaq_f64(acc, hi, hi), lo, lo);
}
static inline double vd_sum(vecd a) { return vaddvq_f64(a); }

static inline vec v_round_bf16(vec a) {
    uint32x4_t x = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    uint32x4_t r = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    r = vbslq_u32(vceqq_f32(a, a), r, vorrq_u32(x, vdupq_n_u32(0x400000)));
    return vreinterpretq_f32_u32(vandq_u32(r, vdupq_n_u32(0xFFFF0000)));
}

static inline vec v_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline void v_store_bf16(uint16_t *p, vec a) {
    vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(v_round_bf16(a)), 16));
}
static inline void v_load_bf16_pairs(const uint16_t *p, vec *even, vec *odd) {
    uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(p));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xFFFF0000)));
}
static inline vec v_load_bf16_n(const uint16_t *p, ptrdiff_t n) {
    uint16_t some[4] = {0};
    for (ptrdiff_t i = 0; i < n; i++) some[i] = p[i];
    return v_load_bf16(some);
}
static inline void v_store_bf16_n(uint16_t *p, vec a, ptrdiff_t n) {
    uint16_t all[4];
    v_store_bf16(all, a);
    for (ptrdiff_t i = 0; i < n; i++) p[i] = all[i];
}

#ifdef LLMC_ISA_NEONBF16
#define HAVE_DOT
static inline vec v_dot(vec acc, vec a, vec b) {
    return vbfdotq_f32(acc, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}
static inline vec v_pairs_along(vec first, vec second) {
    return vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first), second));
}
static inline vec v_pairs(vec even, vec odd) {
    uint32x4_t low = vshrq_n_u32(vreinterpretq_u32_f32(v_round_bf16(even)), 16);
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(v_round_bf16(odd)), low));
}
#endif
