/* AVX2 + FMA: 8 floats, 16 registers, masks from a table. */
#include <immintrin.h>

#define ISA_NAME avx2
#define LLMC_MR 4
enum { VL = 8, MR = LLMC_MR, NV = 3 };

typedef __m256 vec;
typedef __m256d vecd;
typedef __m256i vecu;

static inline __m256i v_mask(ptrdiff_t n) {
    static const int32_t ones_then_zeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones_then_zeros + 8 - n));
}

static inline vec v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
static inline vec v_load_n(const float *p, ptrdiff_t n) { return _mm256_maskload_ps(p, v_mask(n)); }
static inline void v_store_n(float *p, vec a, ptrdiff_t n) { _mm256_maskstore_ps(p, v_mask(n), a); }
static inline vec v_set(float a) { return _mm256_set1_ps(a); }
static inline vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
static inline vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
static inline vec v_sqrt(vec a) { return _mm256_sqrt_ps(a); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec v_round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec v_exp2i(vec n) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
static inline float v_sum(vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float v_hmax(vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline void v_transpose(vec *r) {
    vec t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

static inline vecu vu_set(uint32_t a) { return _mm256_set1_epi32((int32_t)a); }
static inline vecu vu_lanes(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vecu vu_add(vecu a, vecu b) { return _mm256_add_epi32(a, b); }
static inline vecu vu_xor(vecu a, vecu b) { return _mm256_xor_si256(a, b); }
static inline vecu vu_shr8(vecu a) { return _mm256_srli_epi32(a, 8); }
static inline vecu vu_mul(vecu a, vecu b, vecu *hi) {
    __m256i even = _mm256_mul_epu32(a, b);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    *hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
static inline vec v_from_u(vecu a) { /* in two halves, both exact: the one rounding is the sum's */
    vec upper = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
    vec lower = _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)));
    return _mm256_fmadd_ps(upper, _mm256_set1_ps(65536.0f), lower);
}
static inline vec v_frexp(vec x, vec *e) {
    __m256i bits = _mm256_castps_si256(x), root = _mm256_set1_epi32(0x3f3504f3); /* the bits of sqrt(1/2) */
    __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, root), 23);
    *e = _mm256_cvtepi32_ps(n);
    return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)));
}

static inline vecd vd_zero(void) { return _mm256_setzero_pd(); }
static inline vecd vd_sqacc(vecd acc, vec x) {
    vecd lo = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    vecd hi = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    return _mm256_fmadd_pd(lo, lo, _mm256_fmadd_pd(hi, hi, acc));
}
static inline double vd_sum(vecd a) {
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

static inline vec v_round_bf16(vec a) {
    __m256i x = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
    r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    return _mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32((int)0xFFFF0000)));
}

static inline vec v_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void v_store_bf16(uint16_t *p, vec a) {
    __m256i x = _mm256_srli_epi32(_mm256_castps_si256(v_round_bf16(a)), 16);
    x = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0xD8);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(x));
}
static inline void v_load_bf16_pairs(const uint16_t *p, vec *even, vec *odd) {
    __m256i x = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xFFFF0000)));
}
static inline vec v_load_bf16_n(const uint16_t *p, ptrdiff_t n) {
    uint16_t some[8] = {0};
    for (ptrdiff_t i = 0; i < n; i++) some[i] = p[i];
    return v_load_bf16(some);
}
static inline void v_store_bf16_n(uint16_t *p, vec a, ptrdiff_t n) {
    uint16_t all[8];
    v_store_bf16(all, a);
    for (ptrdiff_t i = 0; i < n; i++) p[i] = all[i];
}
