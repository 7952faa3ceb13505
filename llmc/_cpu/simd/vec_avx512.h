/* AVX-512F + VL + DQ + BW: 16 floats, 32 registers, real masks.  With AVX512_BF16 also products of pairs,
 * and with AMX tiles of them (amx.h). */
#include <immintrin.h>

#if defined(LLMC_ISA_AMX)
#define ISA_NAME amx
#define HAVE_AMX
#elif defined(LLMC_ISA_AVX512BF16)
#define ISA_NAME avx512bf16
#else
#define ISA_NAME avx512
#endif
#define LLMC_MR 8
enum { VL = 16, MR = LLMC_MR, NV = 3 };

typedef __m512 vec;
typedef __m512d vecd;
typedef __m512i vecu;

static inline __mmask16 v_mask(ptrdiff_t n) { return (__mmask16)((1u << n) - 1u); }

static inline vec v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
static inline vec v_load_n(const float *p, ptrdiff_t n) { return _mm512_maskz_loadu_ps(v_mask(n), p); }
static inline void v_store_n(float *p, vec a, ptrdiff_t n) { _mm512_mask_storeu_ps(p, v_mask(n), a); }
static inline vec v_set(float a) { return _mm512_set1_ps(a); }
static inline vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec v_sqrt(vec a) { return _mm512_sqrt_ps(a); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec v_round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec v_exp2i(vec n) {
    __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
static inline float v_sum(vec a) { return _mm512_reduce_add_ps(a); }
static inline float v_hmax(vec a) { return _mm512_reduce_max_ps(a); }

/* Four rounds, each doubling the block that is transposed: 1, 2, then 4x4 blocks of lanes twice. */
static inline void v_transpose(vec *r) {
    vec t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

static inline vecu vu_set(uint32_t a) { return _mm512_set1_epi32((int32_t)a); }
static inline vecu vu_lanes(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
static inline vecu vu_add(vecu a, vecu b) { return _mm512_add_epi32(a, b); }
static inline vecu vu_xor(vecu a, vecu b) { return _mm512_xor_si512(a, b); }
static inline vecu vu_shr8(vecu a) { return _mm512_srli_epi32(a, 8); }
static inline vecu vu_mul(vecu a, vecu b, vecu *hi) {
    __m512i even = _mm512_mul_epu32(a, b);
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
    *hi = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
static inline vec v_from_u(vecu a) { return _mm512_cvtepu32_ps(a); }
static inline vec v_frexp(vec x, vec *e) {
    __m512i bits = _mm512_castps_si512(x), root = _mm512_set1_epi32(0x3f3504f3); /* the bits of sqrt(1/2) */
    __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, root), 23);
    *e = _mm512_cvtepi32_ps(n);
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23)));
}

static inline vecd vd_zero(void) { return _mm512_setzero_pd(); }
static inline vecd vd_sqacc(vecd acc, vec x) {
    vecd lo = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    vecd hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return _mm512_fmadd_pd(lo, lo, _mm512_fmadd_pd(hi, hi, acc));
}
static inline double vd_sum(vecd a) { return _mm512_reduce_add_pd(a); }

static inline vec v_round_bf16(vec a) {
    __m512i x = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), x, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32((int)0xFFFF0000)));
}

static inline vec v_from_bf16(__m256i a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
static inline __m256i v_to_bf16(vec a) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v_round_bf16(a)), 16));
}
static inline vec v_load_bf16(const uint16_t *p) { return v_from_bf16(_mm256_loadu_si256((const __m256i *)p)); }
static inline void v_store_bf16(uint16_t *p, vec a) { _mm256_storeu_si256((__m256i *)p, v_to_bf16(a)); }
static inline void v_load_bf16_pairs(const uint16_t *p, vec *even, vec *odd) {
    __m512i x = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xFFFF0000)));
}
static inline vec v_load_bf16_n(const uint16_t *p, ptrdiff_t n) {
    return v_from_bf16(_mm256_maskz_loadu_epi16(v_mask(n), p));
}
static inline void v_store_bf16_n(uint16_t *p, vec a, ptrdiff_t n) {
    _mm256_mask_storeu_epi16(p, v_mask(n), v_to_bf16(a));
}

#if defined(LLMC_ISA_AVX512BF16) || defined(LLMC_ISA_AMX)
#define HAVE_DOT
static inline vec v_dot(vec acc, vec a, vec b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
static inline vec v_pairs_along(vec first, vec second) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first));
}
static inline vec v_pairs(vec even, vec odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif
