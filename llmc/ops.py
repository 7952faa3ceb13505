"""The contract between the models and the hardware.

A backend (`llmc._cpu`, later `llmc._cuda`) is a module with the functions of `Ops`; `load(device)` gives
it, importing it on first use.  Models call nothing else, and know nothing of devices.

Conventions, said once:

* Letters: B sequences, T tokens each, C channels, H heads, V vocabulary entries, Vp >= V rows in a padded
  table, L layers.  Activations are float32 `(B, T, C)`; matrices are `(out, in)`; token ids are int32.
* Arguments come in the order outputs, inputs, saved statistics, parameters, scalars.  `d<x>` is the
  gradient of the loss with respect to `x`.
* Every array is writable and C-contiguous.  Sizes come from the arrays.  A size may be 0.
* Parameter gradients are overwritten, or added to where `accumulate` is true; activation gradients are
  overwritten, except where a branch joins the residual stream (`layernorm_backward`), which adds.
* An output may share memory with an input only where the docstring says so.
* Shapes, dtypes and token ranges are checked before any work; a violation raises `ValueError` naming the
  argument (`TypeError` for something that is no array), and nothing has been written by then.
* Only `empty` and `reserve` allocate.  Whatever scratch an op needs lies in one workspace per backend,
  sized by `reserve` before the first call; a workspace that is too small raises `RuntimeError`.
* The workspace is shared: a backend is called from one thread at a time (it uses as many as it is told to).
* A backend that is loaded with dtype "bf16" rounds both operands of every matrix product (linear layers, attention,
  head) to bf16, to nearest, ties to even (denormal numbers may count as zero), and sums in fp32; products of a row or
  a few, as in decoding, may leave them as they are.  Everything else, and all that lies in memory, stays fp32: the
  parameters are their own masters.
* Results do not depend on the number of threads: every output has one owner, and long sums are taken over
  chunks of fixed size that are combined in order.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from llmc.arena import Array
from llmc.errors import ConfigError

DEVICES = ("cpu",)
DTYPES = ("fp32", "bf16")  # of the operands of matrix products; the first is the default


class Ops(Protocol):
    """What every backend provides."""

    def info(self) -> dict[str, Any]:
        """What is in use, for people and reports: at least `dtype`, and on a CPU `isa` and `threads`."""

    # ---- memory ------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new zero-filled array, in huge pages where the system gives them."""

    def zero(self, x: Array) -> None:
        """x = 0, for a float32 array of any shape."""

    def reserve(self, channels: int, vocab_size: int, parameters: int) -> None:
        """Make the workspace large enough for a model.

        `channels` is the widest normalised row (C), `vocab_size` V, `parameters` the number of elements
        `global_norm` will be given.  Calling it again enlarges the workspace, never shrinks it.
        """

    def workspace_nbytes(self, channels: int, vocab_size: int, parameters: int) -> dict[str, int]:
        """Bytes of the workspace that `reserve` would make with the same arguments, by part; allocates nothing.

        "shared" is one buffer for all threads, "threads" what they have of their own, all together.
        """

    # ---- random numbers ----------------------------------------------------------------------------

    def normal(self, out: Array, seed: int, stream: int, std: float) -> None:
        """out = std * N(0, 1), for a float32 array of any shape, seen as one vector; `seed` and `stream` in [0, 2^64).

        Element i depends on (seed, stream, i) alone.  The integers are the same on every device.  With
        i = 64 g + 16 j + l (j < 4, l < 16), the four words w of Philox4x32-10 (Salmon et al. 2011) for the key
        (seed mod 2^32, seed div 2^32) and the counter (b mod 2^32, b div 2^32, stream mod 2^32,
        stream div 2^32), b = 16 g + l, make two pairs; words (w0, w1) give j = 0, 1, words (w2, w3) j = 2, 3:

            u = max(w0 rounded to float32, 1/2) / 2^32;  x = (w1 div 2^8) / 2^23 - 1   (both exact)
            r = sqrt(-2 log u);  std * r * cos(pi x),  std * r * sin(pi x)             (Box & Muller 1958)

        What follows u and x may be rounded as the device likes, within 18 units of 2^-24 of each value.
        """

    # ---- embedding ---------------------------------------------------------------------------------

    def embedding_forward(self, out: Array, tokens: Array, wte: Array, wpe: Array, V: int, position: int) -> None:
        """out[b,t] = wte[tokens[b,t]] + wpe[position + t].

        out (B,T,C); tokens (B,T) in [0, V); wte (Vp,C) with Vp >= V; wpe (maxT,C) with
        position + T <= maxT.
        """

    def embedding_backward(self, dwte: Array, dwpe: Array, dout: Array, tokens: Array, accumulate: bool) -> None:
        """dwte[tokens[b,t]] += dout[b,t];  dwpe[t] (+)= sum over b of dout[b,t].

        dwte always adds (the tied head has written it first); dwpe obeys `accumulate`, and its rows
        from T on are zeroed when it is false.
        """

    # ---- layernorm ---------------------------------------------------------------------------------

    def layernorm_forward(
        self, out: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array, eps: float
    ) -> None:
        """out = (x - mean) * rstd * w + b along the last axis, rstd = 1 / sqrt(var + eps) (Ba et al. 2016).

        out, x (B,T,C); mean, rstd (B,T); w, b (C,).  The variance is the biased one.
        """

    def layernorm_backward(
        self, dx: Array, dw: Array, db: Array, dout: Array, x: Array, mean: Array, rstd: Array, w: Array,
        accumulate: bool,
    ) -> None:
        """Gradients of `layernorm_forward`.  dx ADDS: it is the residual stream's gradient."""

    # ---- linear ------------------------------------------------------------------------------------

    def linear_forward(self, out: Array, x: Array, w: Array, b: Array | None) -> None:
        """out = x @ w.T + b.  out (B,T,N); x (B,T,K); w (N,K); b (N,) or None."""

    def linear_backward(
        self, dx: Array, dw: Array, db: Array | None, dout: Array, x: Array, w: Array, accumulate: bool
    ) -> None:
        """dw (+)= dout.T @ x;  db (+)= sum of dout;  dx = dout @ w.

        dw and db are finished before dx is begun, so dx may be x itself.
        """

    def linear_gelu_forward(self, out: Array, pre: Array, x: Array, w: Array, b: Array | None) -> None:
        """pre = x @ w.T + b;  out = gelu(pre).  Shapes as in `linear_forward`; both results are kept."""

    def linear_gelu_backward(
        self, dx: Array, dw: Array, db: Array | None, dpre: Array, dout: Array, pre: Array, x: Array, w: Array,
        accumulate: bool,
    ) -> None:
        """dpre = dout * gelu'(pre), then `linear_backward` from dpre.  dpre may be dout; dx may be x."""

    # ---- activation, residual ----------------------------------------------------------------------

    def gelu_forward(self, out: Array, x: Array) -> None:
        """out = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the tanh form (Hendrycks & Gimpel 2016).

        Any shape; out may be x.
        """

    def gelu_backward(self, dx: Array, dout: Array, x: Array) -> None:
        """dx = dout * gelu'(x).  dx may be dout."""

    def residual_forward(self, out: Array, x: Array, branch: Array) -> None:
        """out = x + branch.  out may be either.  The gradient of both is dout itself: there is no backward."""

    # ---- attention ---------------------------------------------------------------------------------

    def attention_forward(self, out: Array, lse: Array, qkv: Array) -> None:
        """Causal multi-head self-attention; the T x T matrix is never stored.

        out (B,T,C); lse (B,H,T), the log of each row's softmax denominator; qkv (B,T,3C): queries, keys
        and values one after another, each H heads of C/H channels.  Scores are scaled by 1/sqrt(C/H).
        """

    def attention_backward(self, dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array) -> None:
        """Gradient of `attention_forward` with respect to qkv, probabilities rebuilt from lse (Dao et al. 2022)."""

    def attention_decode(self, out: Array, keys: Array, values: Array, qkv: Array, H: int, position: int) -> None:
        """Append T tokens to a key-value cache and attend from them.

        keys, values (B,maxT,C) hold `position` tokens; those of qkv (B,T,3C) are written after them; then
        out (B,T,C) is the causal attention of the new tokens over all that went before.
        """

    # ---- head --------------------------------------------------------------------------------------

    def head_loss(
        self, losses: Array, dx: Array | None, dw: Array | None, x: Array, w: Array, targets: Array, V: int,
        scale: float, accumulate: bool,
    ) -> None:
        """losses[b,t] = -log softmax(x[b,t] @ w[:V].T)[targets[b,t]], and with dx and dw also the gradients of
        scale * sum(losses).

        Tokens are taken in chunks, so logits never exist for the whole batch and the head's GEMM is
        computed once.  losses (B,T); x, dx (B,T,C); w, dw (Vp,C); targets (B,T) in [0, V).  dx may be x;
        rows of dw from V on are zeroed unless `accumulate`.  dx and dw are both arrays or both None.
        """

    def head_logits(self, logits: Array, x: Array, w: Array, V: int) -> None:
        """logits = x @ w[:V].T.  logits (B,T,V); x (B,T,C); w (Vp,C)."""

    # ---- optimizer ---------------------------------------------------------------------------------

    def global_norm(self, x: Array) -> float:
        """Euclidean norm of a float32 array of any shape, summed in double; inf or nan where x has one."""

    def adamw_step(
        self, w: Array, m: Array, v: Array, dw: Array, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, step: int, scale: float,
    ) -> None:
        """One AdamW update in place (Loshchilov & Hutter 2019), with g = scale * dw:

        m = beta1 m + (1-beta1) g;  v = beta2 v + (1-beta2) g^2;
        w -= lr * (m / (1-beta1^step) / (sqrt(v / (1-beta2^step)) + eps) + weight_decay w).

        `step` counts from 1.  All arrays have one shape.
        """


def load(
    device: str = "cpu", *, isa: str | None = None, threads: int | None = None, dtype: str | None = None
) -> Ops:
    """The backend for `device`, set up.

    A backend is one per process, and so are these settings: the last `load` decides for every model.

    `isa` names a kernel table ("scalar", "avx2", "avx512", "avx512bf16", "amx", "neon", "neonbf16"), else LLMC_ISA,
    else the best this CPU has ("amx" is never chosen unasked: nobody has run it yet); `threads` defaults to
    OMP_NUM_THREADS, else the physical cores this process may use; `dtype` is the precision of matrix products,
    "fp32" (the default) or "bf16".  Raises ConfigError for anything unknown or not available here.
    """
    if device not in DEVICES:
        raise ConfigError("device", f"{device!r} is not available; choose from {', '.join(DEVICES)}")
    from llmc import _cpu

    _cpu.configure(isa=isa, threads=threads, dtype=dtype)
    return cast(Ops, _cpu)
