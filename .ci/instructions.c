/* Each main kernel once on fixed sizes, for `.ci/instructions`: callgrind counts what runs between the two toggles of
 * RUN and dumps it under the kernel's name.  Values do not matter, sizes do: whole tiles, and ragged ones. */
#include "kernels.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <valgrind/callgrind.h>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern const Kernels JOIN(kernels_, LLMC_TABLE);
static const Kernels *const k = &JOIN(kernels_, LLMC_TABLE);

enum { LENGTH = 1 << 18 }; /* floats of each array */
static float *x, *y, *z, *w, *scratch;

/* The call comes twice: the first time is for whatever happens only once. */
#define RUN(NAME, ...)                                                                                                 \
    do {                                                                                                               \
        fill();                                                                                                        \
        __VA_ARGS__;                                                                                                   \
        fill();                                                                                                        \
        CALLGRIND_ZERO_STATS;                                                                                          \
        CALLGRIND_TOGGLE_COLLECT;                                                                                      \
        __VA_ARGS__;                                                                                                   \
        CALLGRIND_TOGGLE_COLLECT;                                                                                      \
        CALLGRIND_DUMP_STATS_AT(NAME);                                                                                 \
    } while (0)

static float *array(size_t floats) {
    float *made = aligned_alloc(4096, (floats * sizeof(float) + 4095) / 4096 * 4096);
    if (!made) {
        fputs("no memory\n", stderr);
        exit(1);
    }
    return made;
}

/* Small numbers of both signs; 12345 and 1103515245 are those of the C standard's example of rand(). */
static void fill(void) {
    float *const arrays[4] = {x, y, z, w};
    uint32_t state = 1;
    for (int a = 0; a < 4; a++)
        for (ptrdiff_t i = 0; i < LENGTH; i++) {
            state = state * 1103515245u + 12345u;
            arrays[a][i] = (float)(int32_t)state * 0x1p-31f;
        }
}

/* The one place that knows gemm's arguments: z (M x N) = A (M x K) B (K x N), A from x and B from y, each with its rows
 * or, transposed, its columns contiguous. */
static void product(Gemm *gemm, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int a_transposed, int b_transposed, int add,
                    const float *bias) {
    gemm(z, N, x, a_transposed ? 1 : K, a_transposed ? M : 1, y, b_transposed ? 1 : N, b_transposed ? K : 1, M, N, K,
         add, bias, scratch);
}

static void forward(Gemm *gemm, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K) { product(gemm, M, N, K, 0, 1, 0, w); }
static void input_gradient(Gemm *gemm, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K) { product(gemm, M, N, K, 0, 0, 0, NULL); }
static void weight_gradient(Gemm *gemm, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K) {
    product(gemm, M, N, K, 1, 0, 1, NULL);
}
/* z (M x n) = x (M x K) y (n x K)^T + bias; y of floats, or read as bf16. */
static void dot_rows(DotRows *kernel, ptrdiff_t M, ptrdiff_t n, ptrdiff_t K) {
    kernel(z, n, x, K, M, y, K, K, n, w, scratch);
}

int main(void) {
    x = array(LENGTH), y = array(LENGTH), z = array(LENGTH), w = array(LENGTH);
    scratch = array((size_t)k->gemm_scratch);
    const AdamW update = {1e-3f, 0.9f, 0.1f, 2.0f, 0.999f, 0.001f, 3.0f, 1e-8f, 0.1f, 1.0f};
    float a, b;

    RUN("gemm forward 256x384x320", forward(k->gemm, 256, 384, 320));
    RUN("gemm forward 61x101x67", forward(k->gemm, 61, 101, 67));
    RUN("gemm forward 5x384x320", forward(k->gemm, 5, 384, 320));
    RUN("gemm input gradient 256x320x384", input_gradient(k->gemm, 256, 320, 384));
    RUN("gemm input gradient 61x67x101", input_gradient(k->gemm, 61, 67, 101));
    RUN("gemm weight gradient 384x320x256", weight_gradient(k->gemm, 384, 320, 256));
    RUN("gemm weight gradient 101x67x61", weight_gradient(k->gemm, 101, 67, 61));
    RUN("gemm bf16 forward 61x101x67", forward(k->gemm_bf16, 61, 101, 67));
    RUN("gemm bf16 input gradient 61x67x101", input_gradient(k->gemm_bf16, 61, 67, 101));
    RUN("gemm bf16 weight gradient 101x67x61", weight_gradient(k->gemm_bf16, 101, 67, 61));
    RUN("dot_rows 384x320", dot_rows(k->dot_rows, 1, 384, 320));
    RUN("dot_rows 101x67", dot_rows(k->dot_rows, 1, 101, 67));
    RUN("dot_rows 4 of 384x320", dot_rows(k->dot_rows, 4, 384, 320));
    RUN("dot_rows bf16 384x320", dot_rows(k->dot_rows_bf16, 1, 384, 320));
    RUN("dot_rows bf16 101x67", dot_rows(k->dot_rows_bf16, 1, 101, 67));
    RUN("dot_rows bf16 4 of 384x320", dot_rows(k->dot_rows_bf16, 4, 384, 320));
    RUN("mix_rows 256x128", k->mix_rows(z, y, x, 128, 256, 128));
    RUN("mix_rows 61x67", k->mix_rows(z, y, x, 67, 61, 67));

    RUN("layernorm forward 768", k->layernorm_row(z, &a, &b, x, y, w, 768, 1e-5f));
    RUN("layernorm forward 101", k->layernorm_row(z, &a, &b, x, y, w, 101, 1e-5f));
    RUN("layernorm backward 768", k->layernorm_backward_row(z, w, w + 4096, x, x + 4096, y, 0.1f, 1.5f, 768));
    RUN("layernorm backward 101", k->layernorm_backward_row(z, w, w + 4096, x, x + 4096, y, 0.1f, 1.5f, 101));

    RUN("layernorm backward without gradients 768",
        k->layernorm_backward_row(z, NULL, NULL, x, x + 4096, y, 0.1f, 1.5f, 768));
    RUN("rmsnorm forward 768", k->rmsnorm_row(z, &a, x, y, 768, 1e-5f, 1.0f));
    RUN("rmsnorm forward 101", k->rmsnorm_row(z, &a, x, y, 101, 1e-5f, 1.0f));
    RUN("rmsnorm backward 768", k->rmsnorm_backward_row(z, w, x, x + 4096, y, 1.5f, 768, 1.0f));
    RUN("rmsnorm backward 101", k->rmsnorm_backward_row(z, w, x, x + 4096, y, 1.5f, 101, 1.0f));
    RUN("rope 12 heads of 64", k->rope_row(x, y, 12, 64, 1.0f));
    RUN("rope 3 heads of 38", k->rope_row(x, y, 3, 38, -1.0f));

    RUN("softmax forward 256 of 256", a = 0.5f, b = 1.0f, k->softmax_block(x, 256, 256, 0.125f, &a, &b));
    RUN("softmax forward 101 of 256", a = 0.5f, b = 1.0f, k->softmax_block(x, 101, 256, 0.125f, &a, &b));
    RUN("softmax backward 256 of 256", k->softmax_backward_block(x, y, 256, 256, 0.125f, 0.0f, 1.0f, 0.1f));
    RUN("softmax backward 101 of 256", k->softmax_backward_block(x, y, 101, 256, 0.125f, 0.0f, 1.0f, 0.1f));
    RUN("softmax backward capped 256 of 256", k->softmax_backward_block(x, y, 256, 256, 0.125f, 50.0f, 1.0f, 0.1f));
    RUN("cross-entropy training 50257", k->crossentropy_row(x, 50257, 11, 0.01f, 1));
    RUN("cross-entropy 50257", k->crossentropy_row(x, 50257, 11, 0.01f, 0));
    RUN("cross-entropy capped training 50257", k->capped_crossentropy_row(x, 50257, 11, 0.01f, 30.0f, 1));

    RUN("gelu forward 8192", k->gelu_forward_span(z, x, 8192));
    RUN("gelu forward 101", k->gelu_forward_span(z, x, 101));
    RUN("gelu backward 8192", k->gelu_backward_span(z, y, x, 8192));
    RUN("gelu backward 101", k->gelu_backward_span(z, y, x, 101));
    RUN("swiglu forward 8192", k->swiglu_forward_span(z, x, y, 8192));
    RUN("swiglu forward 101", k->swiglu_forward_span(z, x, y, 101));
    RUN("swiglu backward 8192", k->swiglu_backward_span(z, w, y, x, x + 8192, 8192));
    RUN("geglu forward 8192", k->geglu_forward_span(z, x, y, 8192));
    RUN("geglu backward 8192", k->geglu_backward_span(z, w, y, x, x + 8192, 8192));
    RUN("add 8192", k->add_span(z, x, y, 8192));
    RUN("scale 8192", k->scale_span(x, 0.5f, 8192));
    RUN("axpy 8192", k->axpy_span(y, 0.5f, x, 8192));
    RUN("axpy bf16 8192", k->axpy_bf16_span(y, 0.5f, (const uint16_t *)(const void *)x, 8192));
    RUN("widen 8192", k->widen_span(z, (const uint16_t *)(const void *)x, 8192));
    RUN("round 8192", k->round_span((uint16_t *)(void *)z, x, 8192));
    RUN("softcap 8192", k->softcap_span(x, 8192, 1.0f, 30.0f));
    RUN("dot 8192", k->dot_span(x, y, 8192));
    RUN("sum of squares 16384", k->sumsq_span(x, 16384));
    RUN("adamw 16384", k->adamw_span(z, w, y, x, 16384, &update));
    RUN("adamw 101", k->adamw_span(z, w, y, x, 101, &update));
    RUN("normal 4096", k->normal_span(x, 4096, 1, 2, 3, 0.02f));
    RUN("column sum 256x64", k->column_sum(z, x, 768, 256, 64));
    RUN("column sum 61x19", k->column_sum(z, x, 101, 61, 19));
    return 0;
}
