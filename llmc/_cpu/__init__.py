"""The CPU backend: every op of `llmc.ops.Ops`, in Cython over C kernels; and, outside that contract, what measuring
needs: the ceilings `measure_*` with the memory they take, and `product`, one matrix product alone.

`configure` chooses the kernel table and the number of threads (`ops.load` calls it); until then the best table runs on
one thread.
"""

from __future__ import annotations

from llmc._cpu.waiting import policy

with policy():  # OpenMP's library is loaded here, and reads how its threads shall wait
    from llmc._cpu.activation import (
        copy,
        geglu_backward,
        geglu_forward,
        gelu_backward,
        gelu_forward,
        residual_forward,
        swiglu_backward,
        swiglu_forward,
        zero,
    )
    from llmc._cpu.attention import attention_backward, attention_decode, attention_forward
    from llmc._cpu.embed import embedding_backward, embedding_forward
    from llmc._cpu.head import head_logits, head_loss, sum_losses
    from llmc._cpu.isa import activate, all_isas, info, isas, resolve_dtype, resolve_isa, resolve_threads
    from llmc._cpu.linear import (
        gelu_linear_backward,
        linear_backward,
        linear_forward,
        linear_gelu_forward,
        lora_backward,
        lora_backward_input,
        lora_forward,
        product,
    )
    from llmc._cpu.norm import (
        layernorm_backward,
        layernorm_forward,
        residual_layernorm_forward,
        residual_rmsnorm_forward,
        rmsnorm_backward,
        rmsnorm_forward,
    )
    from llmc._cpu.optimizer import adamw_step, clip_scale, global_norm
    from llmc._cpu.order import elapsed, fetch, record, stamp
    from llmc._cpu.peak import measure_dot, measure_fma, measure_stream, stream_floats
    from llmc._cpu.philox import normal
    from llmc._cpu.rope import rope_backward, rope_forward
    from llmc._cpu.workspace import empty, memory, reserve, resize_scratch, workspace_nbytes

__all__ = [
    "adamw_step", "all_isas", "attention_backward", "attention_decode", "attention_forward", "clip_scale", "configure",
    "copy", "elapsed", "embedding_backward", "embedding_forward", "empty", "fetch", "geglu_backward", "geglu_forward",
    "gelu_backward", "gelu_forward", "gelu_linear_backward", "global_norm", "head_logits", "head_loss", "info", "isas",
    "layernorm_backward", "layernorm_forward", "linear_backward", "linear_forward", "linear_gelu_forward",
    "lora_backward", "lora_backward_input", "lora_forward", "measure_dot", "measure_fma", "measure_stream", "memory",
    "normal", "product", "record", "reserve", "residual_forward", "residual_layernorm_forward",
    "residual_rmsnorm_forward", "rmsnorm_backward", "rmsnorm_forward", "rope_backward", "rope_forward", "stamp",
    "stream_floats", "sum_losses", "swiglu_backward", "swiglu_forward", "workspace_nbytes", "zero",
]  # fmt: skip


def configure(isa: str | None = None, threads: int | None = None, dtype: str | None = None) -> None:
    """Choose the kernel table, the thread count and the products' precision (None: the defaults of `ops.load`), for
    every model in this process.  ConfigError for a name or a number that cannot be had."""
    name, count, precision = resolve_isa(isa), resolve_threads(threads), resolve_dtype(dtype)
    resize_scratch(name, count)
    activate(name, count, precision)


configure(isas()[-1], 1)
