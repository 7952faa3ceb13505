/* The bf16 tile on AMX (Sapphire Rapids and later): 16 rows by NV vectors, 16 words of k at a time.
 *
 *     C_j (16 x 16 floats) += A (16 rows x 16 words) B_j (16 words x 16 columns),   j = 0 ... NV-1
 *
 * A tile register holds 16 rows of 64 bytes; words are pairs of bf16, as in the other tables' panels, and both operands
 * are padded with zeros to whole steps of k.  Rows of A past the last are read from scratch and their sums are dropped.
 *
 * UNTESTED on hardware: nobody has run this on a processor with AMX.  With -DLLMC_AMX_EMULATED the four instructions
 * become the C below, and tests/test_amx.py holds the result against float64. */
enum { AMX_ROWS = 16, AMX_DEPTH = 16 };

#ifdef LLMC_AMX_EMULATED
static _Thread_local float amx_tile[8][16][16];
static void emulated_load(int t, const void *p, ptrdiff_t stride) {
    for (int r = 0; r < 16; r++) memcpy(amx_tile[t][r], (const char *)p + r * stride, 64);
}
static void emulated_store(int t, void *p, ptrdiff_t stride) {
    for (int r = 0; r < 16; r++) memcpy((char *)p + r * stride, amx_tile[t][r], 64);
}
static void emulated_dot(int c, int a, int b) {
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 16; j++) {
                uint32_t x, y;
                memcpy(&x, &amx_tile[a][r][k], 4);
                memcpy(&y, &amx_tile[b][k][j], 4);
                for (int half = 0; half < 2; half++) {
                    uint32_t u = half ? x & 0xFFFF0000u : x << 16, v = half ? y & 0xFFFF0000u : y << 16;
                    float f, g;
                    memcpy(&f, &u, 4);
                    memcpy(&g, &v, 4);
                    amx_tile[c][r][j] += f * g;
                }
            }
}
#define TILE_LOAD emulated_load
#define TILE_STORE emulated_store
#define TILE_DOT emulated_dot
#define TILE_ZERO(T) memset(amx_tile[T], 0, sizeof amx_tile[T])
static void amx_begin(void) {}
static void amx_end(void) {}
#else
#define TILE_LOAD _tile_loadd
#define TILE_STORE _tile_stored
#define TILE_DOT _tile_dpbf16ps
#define TILE_ZERO _tile_zero
/* Tile state belongs to the thread; other libraries may set it between our calls, so each product sets its own. */
static void amx_begin(void) {
    /* Constant: a compiler that does not know what the instruction reads has no stores here to drop. */
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
}
static void amx_end(void) { _tile_release(); }
#endif

/* Tiles 0 to 2 are C, 3 is A, 4 to 6 are B: the instructions name their tiles in the opcode. */
static void tile_amx(int m, int nv, const float *a, ptrdiff_t a_i, const float *b, ptrdiff_t kc, float *c,
                     ptrdiff_t ldc, ptrdiff_t tail, int add, const float *bias) {
    float sums[NV][AMX_ROWS * VL];
    const ptrdiff_t a_stride = a_i * (ptrdiff_t)sizeof(float), b_stride = NV * VL * (ptrdiff_t)sizeof(float);
    __asm__ volatile("" ::: "memory"); /* what was packed is in memory: GCC's tile loads do not say that they read it */
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    for (ptrdiff_t k = 0; k < kc; k += AMX_DEPTH) {
        const float *bk = b + k * NV * VL;
        TILE_LOAD(3, a + k, a_stride);
        TILE_LOAD(4, bk, b_stride);
        TILE_DOT(0, 3, 4);
        if (nv > 1) {
            TILE_LOAD(5, bk + VL, b_stride);
            TILE_DOT(1, 3, 5);
        }
        if (nv > 2) {
            TILE_LOAD(6, bk + 2 * VL, b_stride);
            TILE_DOT(2, 3, 6);
        }
    }
    TILE_STORE(0, sums[0], VL * sizeof(float));
    TILE_STORE(1, sums[1], VL * sizeof(float));
    TILE_STORE(2, sums[2], VL * sizeof(float));
    for (int j = 0; j < nv; j++) {
        ptrdiff_t lanes = j == nv - 1 ? tail : VL;
        vec bj = bias ? load_upto(bias + j * VL, lanes) : v_set(0.0f);
        for (int i = 0; i < m; i++) {
            float *p = c + i * ldc + j * VL;
            vec sum = v_load(sums[j] + i * VL);
            store_upto(p, add ? v_add(load_upto(p, lanes), sum) : bias ? v_add(bj, sum) : sum, lanes);
        }
    }
}
