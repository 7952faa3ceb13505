"""The CUDA backend: every op of `llmc.ops.Ops`, each a check of its arguments and launches of kernels.

Importing it needs no GPU and no PyCUDA; `configure` does (`ops.load` calls it).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc._cuda import (
    activation,
    attention,
    compiler,
    cublaslt,
    cudnn,
    device,
    embed,
    gpu,
    head,
    linear,
    norm,
    optimizer,
    peak,
    philox,
    rope,
)
from llmc._cuda.device import elapsed, empty, fetch, memory, op, stamp
from llmc._cuda.found import found
from llmc._cuda.graphs import record
from llmc.errors import ConfigError, DeviceError

__all__ = [
    "adamw_step", "attention_backward", "attention_decode", "attention_forward", "cache_nbytes", "classifier",
    "clip_scale", "configure", "copy", "elapsed", "embedding_backward", "embedding_forward", "empty", "fetch", "found",
    "geglu_backward", "geglu_forward", "gelu_backward", "gelu_forward", "gelu_linear_backward", "global_norm",
    "head_logits", "head_loss", "hold", "info", "layernorm_backward", "layernorm_forward", "linear_backward",
    "linear_forward", "linear_gelu_forward", "lora_backward", "lora_backward_input", "lora_forward", "measure_copy",
    "measure_product", "memory", "normal", "peak_nbytes", "product", "record", "reserve", "residual_forward",
    "residual_layernorm_forward", "residual_rmsnorm_forward", "rmsnorm_backward", "rmsnorm_forward", "rope_backward",
    "rope_forward", "stamp", "sum_losses", "swiglu_backward", "swiglu_forward", "workspace_nbytes", "zero",
]  # fmt: skip

GEMMS = ("cublaslt", "own")
ATTENTIONS = ("own", "cudnn")
STORAGE = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}  # by the dtype of matrix products
TENSOR_CORES = (8, 0)  # compute capability: the first whose matrix units take bf16 and tf32
SCRATCH = (attention, embed, head, linear, norm, optimizer)  # the modules whose ops use the workspace

# What one module calls of another is not wrapped: an error names the op that the model called.
zero, copy = op(activation.zero), op(activation.copy)
gelu_forward, gelu_backward = op(activation.gelu_forward), op(activation.gelu_backward)
residual_forward = op(activation.residual_forward)
swiglu_forward, swiglu_backward = op(activation.swiglu_forward), op(activation.swiglu_backward)
geglu_forward, geglu_backward = op(activation.geglu_forward), op(activation.geglu_backward)
attention_forward, attention_backward = op(attention.attention_forward), op(attention.attention_backward)
attention_decode = op(attention.attention_decode)
embedding_forward, embedding_backward = op(embed.embedding_forward), op(embed.embedding_backward)
head_loss, head_logits, sum_losses = op(head.head_loss), op(head.head_logits), op(head.sum_losses)
linear_forward, linear_backward = op(linear.linear_forward), op(linear.linear_backward)
linear_gelu_forward, gelu_linear_backward = op(linear.linear_gelu_forward), op(linear.gelu_linear_backward)
lora_forward, lora_backward = op(linear.lora_forward), op(linear.lora_backward)
lora_backward_input = op(linear.lora_backward_input)
layernorm_forward, layernorm_backward = op(norm.layernorm_forward), op(norm.layernorm_backward)
residual_layernorm_forward = op(norm.residual_layernorm_forward)
rmsnorm_forward, rmsnorm_backward = op(norm.rmsnorm_forward), op(norm.rmsnorm_backward)
residual_rmsnorm_forward = op(norm.residual_rmsnorm_forward)
rope_forward, rope_backward = op(rope.rope_forward), op(rope.rope_backward)
global_norm, clip_scale, adamw_step = op(optimizer.global_norm), op(optimizer.clip_scale), op(optimizer.adamw_step)
normal = op(philox.normal)
cache_nbytes, peak_nbytes = op(peak.cache_nbytes), op(peak.peak_nbytes)
measure_copy, measure_product = op(peak.measure_copy), op(peak.measure_product)
classifier, hold, product = op(peak.classifier), op(peak.hold), op(peak.product)


def configure(
    index: int = 0, dtype: str | None = None, gemm: str | None = None, attention: str | None = None
) -> None:
    """Take GPU `index` into use and choose the products' precision, who multiplies and who attends (None: the defaults
    of `ops.load`), for every model in this process.

    ConfigError for a name that is unknown or means nothing here, DeviceError where the GPU, its driver or a library is
    missing or does not suffice, MissingDependencyError without PyCUDA.
    """
    precision = _known("dtype", dtype, tuple(STORAGE))
    multiplies = _known("gemm", gemm, GEMMS)
    if precision == "tf32" and multiplies == "own":
        raise ConfigError("gemm", "'own' multiplies in fp32 or bf16, not in tf32: leave it out, or take dtype fp32")
    if attention is not None:
        _known("attention", attention, ATTENTIONS)
    attends = _attention(attention, precision)
    if not device.is_open():
        device.open_gpu(index)
        try:
            _check(index, precision, multiplies)
        except BaseException:
            device.close()
            raise
    else:
        device.open_gpu(index)
        _check(index, precision, multiplies)
    device.storage, device.dtype = np.dtype(STORAGE[precision]), precision
    device.gemm, device.attention, device.attention_asked = multiplies, attends, attention is not None


def _known(field: str, name: str | None, names: tuple[str, ...]) -> str:
    if name is None:
        return names[0]
    if name not in names:
        raise ConfigError(field, f"{name!r} is unknown here; choose from {', '.join(names)}")
    return name


def _attention(name: str | None, precision: str) -> str:
    """"cudnn" where it was asked for or, unasked, where it can be had; ConfigError where it was and cannot."""
    if name == "own" or (name is None and precision != "bf16"):
        return "own"
    if precision == "bf16" and cudnn.available():
        return "cudnn"
    if name is None:
        return "own"
    if precision != "bf16":
        raise ConfigError("attention", f"'cudnn' attends in bf16 alone, and dtype is {precision!r}")
    packages = "nvidia-cudnn-frontend nvidia-cudnn-cu13"
    raise ConfigError("attention", f"'cudnn' needs cuDNN 9 and its frontend: pip install {packages}")


def _check(index: int, precision: str, multiplies: str) -> None:
    """What the GPU that is open must have for these settings."""
    opened = device.handle()
    if precision != "fp32" and opened.capability < TENSOR_CORES:
        major, minor = opened.capability
        raise ConfigError(
            "dtype", f"{precision!r} needs a GPU of compute capability 8.0, and cuda:{index} ({opened.name}) is of "
            f"{major}.{minor}: take fp32"
        )
    compiler.architecture(opened.capability)
    if multiplies == "cublaslt":
        try:
            cublaslt.library()
        except DeviceError as error:
            raise DeviceError(f"{error}; or multiply without it: --gemm own") from error


def info() -> dict[str, Any]:
    """What is in use: the GPU, its compute capability, the driver, the types, who multiplies and attends, what
    compiled the kernels."""
    opened = device.handle()
    return {
        "device": "cuda",
        "name": opened.name,
        "capability": ".".join(map(str, opened.capability)),
        "driver": gpu.driver_name(opened.driver_version),
        "dtype": device.dtype,
        "storage": device.storage.name,
        "ahead": 1,
        "gemm": device.gemm,
        "attention": device.attention,
        "flash_heads": tuple(attention.FLASH) if device.storage.name == "bfloat16" else (),
        "compiler": compiler.find().name,
    }


def workspace_nbytes(
    channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int
) -> dict[str, int]:
    """Bytes of the workspace that `reserve` would make, and of what libraries and copies have of their own; ConfigError
    for heads that are too wide."""
    attention.check_heads(head_size)
    sizes = (module.scratch_nbytes(channels, vocab_size, parameters, tokens, heads, head_size) for module in SCRATCH)
    libraries = device.libraries_nbytes()
    if device.attention == "cudnn":
        libraries += cudnn.scratch_nbytes(tokens, heads, head_size)
    return {"shared": max(sizes), "threads": libraries}


@op
def reserve(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> None:
    """Make the workspace large enough for a model; `ops.reserve`."""
    device.enlarge(workspace_nbytes(channels, vocab_size, parameters, tokens, heads, head_size)["shared"])
