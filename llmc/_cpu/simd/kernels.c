/* One kernel table.  Compiled once per instruction set, with -DLLMC_ISA_<NAME> and that set's flags. */
#include "kernels.h"

#include "gemm.h"
#include "map.h"
#include "peak.h"
#include "philox.h"
#include "row.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

const Kernels JOIN(kernels_, ISA_NAME) = {
    .name = TEXT(ISA_NAME),
    .tile_rows = MR,
    .tile_rows_bf16 = MR_PAIRS,
    .tile_columns = NR,
    .gemm_scratch = GEMM_SCRATCH,
#ifdef HAVE_DOT
    .has_dot = 1,
#endif
    .gemm = gemm,
    .gemm_bf16 = gemm_bf16,
    .dot_rows = dot_rows,
    .dot_rows_bf16 = dot_rows_bf16,
    .mix_rows = mix_rows,
    .layernorm_row = layernorm_row,
    .layernorm_backward_row = layernorm_backward_row,
    .rmsnorm_row = rmsnorm_row,
    .rmsnorm_backward_row = rmsnorm_backward_row,
    .rope_row = rope_row,
    .softmax_block = softmax_block,
    .softmax_backward_block = softmax_backward_block,
    .crossentropy_row = crossentropy_row,
    .capped_crossentropy_row = capped_crossentropy_row,
    .gelu_forward_span = gelu_forward_span,
    .gelu_backward_span = gelu_backward_span,
    .swiglu_forward_span = swiglu_forward_span,
    .swiglu_backward_span = swiglu_backward_span,
    .geglu_forward_span = geglu_forward_span,
    .geglu_backward_span = geglu_backward_span,
    .add_span = add_span,
    .scale_span = scale_span,
    .axpy_span = axpy_span,
    .axpy_bf16_span = axpy_bf16_span,
    .widen_span = widen_span,
    .round_span = round_span,
    .softcap_span = softcap_span,
    .sumsq_span = sumsq_span,
    .dot_span = dot_span,
    .adamw_span = adamw_span,
    .column_sum = column_sum,
    .fma_loop = fma_loop,
    .dot_loop = dot_loop,
    .stream_span = stream_span,
    .normal_span = normal_span,
};
