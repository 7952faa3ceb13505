"""The contract between the models and the hardware.

A backend (`llmc._cpu`, `llmc._cuda`) is a module with the functions of `Ops`; `load(device)` gives it, importing it on
first use.  Models call nothing else, and know nothing of devices.

Conventions, said once:

* Letters: B sequences, T tokens each, C channels, H query heads of D channels each, G key-value heads (H is a multiple
  of G, and G of H/G neighbouring query heads share one), F channels of a gated MLP, V vocabulary entries, Vp >= V rows
  in a padded table, L layers.  Activations are `(B, T, C)`; matrices are `(out, in)`; token ids are int32.
* `positions` (B,) int32 holds the place of each sequence's first token.
* Arrays are NumPy's on the CPU.  A GPU's are its own, and share with NumPy's what models need: `shape`, `dtype`,
  `size`, `nbytes`, `x[i]` and slices, `reshape`, `view`, `x[...] = values` to write and `np.asarray(x)` to read.
* Activations, weights and their gradients are of one type, `info()["storage"]`: float32, or bfloat16 on a GPU with
  dtype "bf16".  Statistics (mean, rstd, lse, losses) and AdamW's moments are float32, scalars on the device float64.
* What is not trained has no gradient: `dw`, and with it `db`, may be None.  On a CPU matrices that are not trained may
  be bfloat16 (`w` of linear layers and of the head, `wte` and `wpe`): they are read once, where they lie, and each of
  their numbers counts as what it is; all else stays as said above.
* Arguments come in the order outputs, inputs, saved statistics, parameters, scalars.  `d<x>` is the
  gradient of the loss with respect to `x`.
* Every array is writable and C-contiguous.  Sizes come from the arrays.  A size may be 0.
* Parameter gradients are overwritten, or added to where `accumulate` is true; activation gradients are
  overwritten, except where a branch joins the residual stream (`layernorm_backward`, `rmsnorm_backward`), which adds.
* An output may share memory with an input only where the docstring says so.
* Shapes, dtypes and token ranges are checked before any work; a violation raises `ValueError` naming the
  argument (`TypeError` for something that is no array), and nothing has been written by then.
* Ops may return before their work is done; they take effect in the order of the calls.  Reading an array waits.
* Only `empty`, `reserve`, and `record` with its first replays allocate.  Whatever scratch an op needs lies in one
  workspace per backend, sized by `reserve` before the first call; one that is too small raises `RuntimeError`.
* The workspace is shared: a backend is called from one thread at a time (it uses as many as it is told to).
* With dtype "bf16" both operands of every matrix product (linear layers, attention, head) are bf16, and sums fp32.  On
  a CPU they are rounded to nearest, ties to even, as they are read (denormal numbers may count as zero; products of a
  row or a few, as in decoding, may leave them as they are), and all that lies in memory stays float32: the parameters
  are their own masters.  A GPU stores bfloat16, each result rounded to nearest once, and computes in fp32.
* With dtype "tf32", on a GPU, operands of matrix products may be rounded to tf32 (10 bits of fraction) as they are
  read.
* Results do not depend on the number of threads: every output has one owner, and long sums are taken over
  chunks of fixed size that are combined in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np

from llmc.arena import Array
from llmc.errors import ConfigError

DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "tf32", "bf16")  # of the operands of matrix products; the first is the default


class Ops(Protocol):
    """What every backend provides."""

    def info(self) -> dict[str, Any]:
        """What is in use, for people and reports: at least `device`, `dtype`, `storage`, and `ahead`, the number of
        steps that may be under way while the results of an earlier one are looked at; on a CPU also `isa` and
        `threads`."""

    # ---- memory ------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new zero-filled array, in huge pages where the system gives them.

        MemoryError, or on a GPU DeviceMemoryError, says what was asked for and what is free.
        """

    def zero(self, x: Array) -> None:
        """x = 0, for an array of any shape of float32 or the storage type."""

    def copy(self, out: Array, x: Array) -> None:
        """out = x, rounded to nearest where out's type is the narrower; any shape, float32 or bfloat16 (on a GPU the
        storage type)."""

    def reserve(
        self, channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int
    ) -> None:
        """Make the workspace large enough for a model.

        `channels` is the widest normalised row (C), `vocab_size` the head's Vp, `parameters` the number of elements
        `global_norm` will be given, `tokens` the most tokens (B T) of a call, `heads` H, `head_size` D.  Calling it
        again enlarges the workspace, never shrinks it.  ConfigError for a head size that no kernel takes.
        """

    def workspace_nbytes(
        self, channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int
    ) -> dict[str, int]:
        """Bytes of the workspace that `reserve` would make with the same arguments, by part; allocates nothing.

        "shared" is one buffer for all threads, "threads" what they have of their own, all together (on a GPU: what
        libraries are given).
        """

    def memory(self) -> tuple[int, int] | None:
        """Bytes of the device's own memory that are free, and all it has; None where it is the machine's."""

    # ---- in which order, and when ------------------------------------------------------------------

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """A callable that does what `function()` does: a sequence of ops, always on the same arrays with the same
        arguments.

        A GPU may record the ops' launches in one of the first calls, and replay them ever after without running
        `function`.  A recording holds on to its arrays; it is dropped with the callable.
        """

    def fetch(self, x: Array) -> Callable[[], np.ndarray[Any, Any]]:
        """The values that x has after the ops called so far: a callable that waits for them and gives a NumPy array,
        which is valid until x is written to or 16 more arrays have been fetched.  Storage types come as float32."""

    def stamp(self) -> Any:
        """A mark in the sequence of ops, for `elapsed`."""

    def elapsed(self, begin: Any, end: Any) -> float:
        """Seconds that the device took from one `stamp` to another; waits for the later one."""

    # ---- random numbers ----------------------------------------------------------------------------

    def normal(self, out: Array, seed: int, stream: int, std: float) -> None:
        """out = std * N(0, 1), for an array of any shape of float32 or the storage type, seen as one vector; `seed` and
        `stream` in [0, 2^64).

        Element i depends on (seed, stream, i) alone.  The integers are the same on every device.  With
        i = 64 g + 16 j + l (j < 4, l < 16), the four words w of Philox4x32-10 (Salmon et al. 2011) for the key
        (seed mod 2^32, seed div 2^32) and the counter (b mod 2^32, b div 2^32, stream mod 2^32,
        stream div 2^32), b = 16 g + l, make two pairs; words (w0, w1) give j = 0, 1, words (w2, w3) j = 2, 3:

            u = max(w0 rounded to float32, 1/2) / 2^32;  x = (w1 div 2^8) / 2^23 - 1   (both exact)
            r = sqrt(-2 log u);  std * r * cos(pi x),  std * r * sin(pi x)             (Box & Muller 1958)

        What follows u and x may be rounded as the device likes, within 18 units of 2^-24 of each value.
        """

    # ---- embedding ---------------------------------------------------------------------------------

    def embedding_forward(
        self, out: Array, tokens: Array, positions: Array, wte: Array, wpe: Array | None, V: int, scale: float
    ) -> None:
        """out[b,t] = scale * wte[tokens[b,t]] + wpe[positions[b] + t], or without the second term.

        out (B,T,C); tokens (B,T) in [0, V); positions (B,); wte (Vp,C) with Vp >= V; wpe None or (maxT,C) with
        positions[b] + T <= maxT.
        """

    def embedding_backward(
        self, dwte: Array, dwpe: Array | None, dout: Array, tokens: Array, scale: float, accumulate: bool
    ) -> None:
        """dwte[tokens[b,t]] += scale * dout[b,t];  dwpe[t] (+)= sum over b of dout[b,t]: positions count from 0.

        dwte always adds (a tied head has written it first); dwpe, if not None, obeys `accumulate`, and its rows
        from T on are zeroed when it is false.
        """

    # ---- norms -------------------------------------------------------------------------------------

    def layernorm_forward(
        self, out: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array, eps: float
    ) -> None:
        """out = (x - mean) * rstd * w + b along the last axis, rstd = 1 / sqrt(var + eps) (Ba et al. 2016).

        out, x (B,T,C); mean, rstd (B,T); w, b (C,).  The variance is the biased one.
        """

    def layernorm_backward(
        self, dx: Array, dw: Array | None, db: Array | None, dout: Array, x: Array, mean: Array, rstd: Array,
        w: Array, accumulate: bool,
    ) -> None:
        """Gradients of `layernorm_forward`.  dx ADDS: it is the residual stream's gradient.  dw and db are both arrays
        or both None."""

    def residual_layernorm_forward(
        self, total: Array, out: Array, mean: Array, rstd: Array, x: Array, branch: Array, w: Array, b: Array,
        eps: float,
    ) -> None:
        """total = x + branch, then `layernorm_forward` of total as it is stored.  total may be x or branch.

        Its gradient is `layernorm_backward` with dx = the gradient of total, which is that of x and of branch.
        """

    def rmsnorm_forward(self, out: Array, rstd: Array, x: Array, w: Array, eps: float, offset: float) -> None:
        """out = x * rstd * (offset + w) along the last axis, rstd = 1 / sqrt(mean of x^2 + eps).

        Zhang & Sennrich 2019.  out, x (B,T,C); rstd (B,T); w (C,).  Gemma's weights are meant with offset 1, Llama's
        with 0.
        """

    def rmsnorm_backward(
        self, dx: Array, dw: Array | None, dout: Array, x: Array, rstd: Array, w: Array, offset: float, accumulate: bool
    ) -> None:
        """Gradients of `rmsnorm_forward`.  dx ADDS."""

    def residual_rmsnorm_forward(
        self, total: Array, out: Array, rstd: Array, x: Array, branch: Array, w: Array, eps: float, offset: float
    ) -> None:
        """total = x + branch, then `rmsnorm_forward` of total as it is stored.  total may be x or branch."""

    # ---- rotary embedding --------------------------------------------------------------------------

    def rope_forward(self, qkv: Array, positions: Array, table: Array, heads: int) -> None:
        """Turn the first `heads` heads of each token by the angles of its position, in place (Su et al. 2021).

        qkv (B,T,N); positions (B,); table (maxT,D) float32 with positions[b] + T <= maxT and heads * D <= N: for each
        position D/2 cosines, then the sines of the same angles.  With c and s those of position positions[b] + t and
        channel i < D/2, a head's x[i], x[i + D/2] become x[i] c - x[i + D/2] s, x[i + D/2] c + x[i] s: halves are
        paired, as in Hugging Face's files.
        """

    def rope_backward(self, dqkv: Array, table: Array, heads: int) -> None:
        """The gradient of `rope_forward` from position 0 on, in place: turned back by the same angles."""

    # ---- linear ------------------------------------------------------------------------------------

    def linear_forward(self, out: Array, x: Array, w: Array, b: Array | None) -> None:
        """out = x @ w.T + b.  out (B,T,N); x (B,T,K); w (N,K); b (N,) or None."""

    def linear_backward(
        self, dx: Array, dw: Array | None, db: Array | None, dout: Array, x: Array, w: Array, accumulate: bool
    ) -> None:
        """dw (+)= dout.T @ x;  db (+)= sum of dout;  dx = dout @ w.

        dw and db are finished before dx is begun, so dx may be x itself.  With dw None db is None.
        """

    def lora_forward(
        self, out: Array, hidden: Array, x: Array, a: Array, b: Array, scale: float, column: int
    ) -> None:
        """hidden = scale * x @ a.T;  out[..., column : column + n] += hidden @ b.T (Hu et al. 2021).

        out (B,T,N) with column + n <= N; hidden (B,T,r); x (B,T,K); a (r,K); b (n,r).
        """

    def lora_backward(
        self, da: Array, db: Array, dhidden: Array, dout: Array, hidden: Array, x: Array, b: Array, scale: float,
        column: int, accumulate: bool,
    ) -> None:
        """db (+)= dout[..., column : column + n].T @ hidden;  dhidden = scale * dout[..., column : column + n] @ b;
        da (+)= dhidden.T @ x.  Shapes as in `lora_forward`; dhidden (B,T,r)."""

    def lora_backward_input(self, dx: Array, dhidden: Array, a: Array) -> None:
        """dx += dhidden @ a.  dx (B,T,K); dhidden (B,T,r); a (r,K)."""

    def linear_gelu_forward(self, out: Array, pre: Array, x: Array, w: Array, b: Array | None) -> None:
        """pre = x @ w.T + b;  out = gelu(pre).  Shapes as in `linear_forward`; both results are kept.

        A GPU may take gelu of the sum before it is rounded to the storage type.
        """

    def gelu_linear_backward(
        self, dpre: Array, dw: Array | None, db: Array | None, dout: Array, pre: Array, x: Array, w: Array,
        accumulate: bool,
    ) -> None:
        """`linear_backward` of a layer whose input was x = gelu(pre), and on through GELU:
        dpre = (dout @ w) * gelu'(pre).

        dpre, pre, x (B,T,K); dw (N,K); db (N,) or None; dout (B,T,N).  dw and db are finished before dpre is begun, so
        dpre may be x.  A GPU may round dout @ w to the storage type before it is multiplied.
        """

    # ---- activation, residual ----------------------------------------------------------------------

    def gelu_forward(self, out: Array, x: Array) -> None:
        """out = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the tanh form (Hendrycks & Gimpel 2016).

        Any shape; out may be x.
        """

    def gelu_backward(self, dx: Array, dout: Array, x: Array) -> None:
        """dx = dout * gelu'(x).  dx may be dout."""

    def residual_forward(self, out: Array, x: Array, branch: Array) -> None:
        """out = x + branch.  out may be either.  The gradient of both is dout itself: there is no backward."""

    def swiglu_forward(self, out: Array, x: Array) -> None:
        """out = silu(gate) * up, silu(x) = x / (1 + exp(-x)) (Shazeer 2020).

        out (B,T,F); x (B,T,2F): gate, then up.
        """

    def swiglu_backward(self, dx: Array, dout: Array, x: Array) -> None:
        """Gradient of `swiglu_forward`.  dx, x (B,T,2F); dout (B,T,F).  dx may be x."""

    def geglu_forward(self, out: Array, x: Array) -> None:
        """out = gelu(gate) * up, the tanh form of `gelu_forward` (Shazeer 2020).  Shapes as in `swiglu_forward`."""

    def geglu_backward(self, dx: Array, dout: Array, x: Array) -> None:
        """Gradient of `geglu_forward`.  Shapes as in `swiglu_backward`; dx may be x."""

    # ---- attention ---------------------------------------------------------------------------------

    def attention_forward(
        self, out: Array, lse: Array, qkv: Array, scale: float, window: int, softcap: float
    ) -> None:
        """Causal grouped-query self-attention (Ainslie et al. 2023); the T x T matrix is never stored.

        out (B,T,H D); lse (B,H,T), the log of each row's softmax denominator; qkv (B,T,(H + 2 G) D): queries, keys
        and values one after another, H, G and G heads of D channels each.  Scores are q . k times `scale`; with
        softcap > 0 then softcap * tanh(score / softcap) (Gemma 2).  With window > 0 a token sees itself and the
        window - 1 tokens before it (Mistral), else all before it.
        """

    def attention_backward(
        self, dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array, scale: float, window: int, softcap: float
    ) -> None:
        """Gradient of `attention_forward` with respect to qkv, probabilities rebuilt from lse (Dao et al. 2022)."""

    def attention_decode(
        self, out: Array, keys: Array, values: Array, qkv: Array, positions: Array, H: int, scale: float, window: int,
        softcap: float,
    ) -> None:
        """Append T tokens to a key-value cache and attend from them.

        keys, values (B,maxT,G D) hold positions[b] tokens of sequence b; those of qkv (B,T,(H + 2 G) D) are written
        after them; then out (B,T,H D) is the causal attention of the new tokens over all that went before.
        """

    # ---- head --------------------------------------------------------------------------------------

    def head_loss(
        self, losses: Array, dx: Array | None, dw: Array | None, x: Array, w: Array, targets: Array, V: int,
        scale: float, softcap: float, accumulate: bool,
    ) -> None:
        """losses[b,t] = -log softmax(logits[b,t])[targets[b,t]], logits as in `head_logits`, and with dx also the
        gradients of scale * sum(losses).

        Tokens are taken in chunks, so logits never exist for the whole batch and the head's GEMM is computed once.
        losses (B,T); x, dx (B,T,C); w, dw (Vp,C); targets (B,T) in [0, V).  Rows of w from V on take no part, but must
        be finite: a GPU multiplies them by 0.  dx may be x; rows of dw from V on are zeroed unless `accumulate`.
        Without dx there is no dw.
        """

    def head_logits(self, logits: Array, x: Array, w: Array, V: int, softcap: float) -> None:
        """logits = x @ w[:V].T, with softcap > 0 then softcap * tanh(logits / softcap).

        logits (B,T,V); x (B,T,C); w (Vp,C).
        """

    def sum_losses(self, total: Array, losses: Array, scale: float, accumulate: bool) -> None:
        """total (+)= scale * sum of losses, in double.  total float64 (1,); losses (B,T)."""

    # ---- optimizer ---------------------------------------------------------------------------------

    def global_norm(self, norm: Array, x: Array) -> None:
        """norm = the Euclidean norm of an array of any shape (float32 or the storage type), summed in double; inf or
        nan where x has one.  norm float64 (1,)."""

    def clip_scale(self, scale: Array, norm: Array, loss: Array, limit: float) -> None:
        """What gradients are multiplied by: limit / norm where 0 < limit < norm, else 1; nan where norm or loss is not
        finite.  All three float64 (1,)."""

    def adamw_step(
        self, w: Array, m: Array, v: Array, dw: Array, copy: Array | None, hyper: Array, scale: Array,
        spans: Sequence[tuple[int, int, float]], beta1: float, beta2: float, eps: float, seed: int,
    ) -> None:
        """One AdamW update in place (Loshchilov & Hutter 2019), with g = scale * dw:

        m = beta1 m + (1-beta1) g;  v = beta2 v + (1-beta2) g^2;
        w -= lr * (m / (1-beta1^t) / (sqrt(v / (1-beta2^t)) + eps) + weight_decay w).

        hyper float64 (2,) holds lr and t, which counts from 1; scale float64 (1,).  Where scale is not finite nothing
        is changed.  `spans` are (start, stop, weight_decay), in order and disjoint; other elements stay as they are.
        All arrays are vectors of one length.  m and v are float32; dw is of the storage type; w is float32, or of the
        storage type where there are no masters; `copy`, None where w is itself what the layers read, gets w rounded to
        nearest in the storage type.

        A w of bfloat16 is rounded stochastically: up with a probability of its distance from the lower neighbour.  The
        16 random bits that are added below its last place are, for element i = 8 g + 2 j + h (j < 4, h < 2), half h (0:
        the lower) of word j of Philox4x32-10 for the key (seed mod 2^32, seed div 2^32) and the counter
        (g mod 2^32, g div 2^32, t, 1).
        """


def found() -> dict[str, str]:
    """For people: what a GPU takes, and what of it this machine has, or why not.  Needs none of it."""
    from llmc import _cuda

    return _cuda.found()


def load(
    device: str = "cpu", *, isa: str | None = None, threads: int | None = None, dtype: str | None = None,
    gemm: str | None = None, attention: str | None = None,
) -> Ops:
    """The backend for `device`, set up.

    A backend is one per process, and so are these settings: the last `load` decides for every model.

    `device` is "cpu", "cuda" or, of several GPUs, "cuda:1".  `dtype` is the precision of matrix products, "fp32" (the
    default), "bf16" or, on a GPU, "tf32".  For the CPU: `isa` names a kernel table ("scalar", "avx2", "avx512",
    "avx512bf16", "amx", "neon", "neonbf16"), else LLMC_ISA, else the best this CPU has ("amx" is never chosen unasked:
    nobody has run it yet); `threads` defaults to OMP_NUM_THREADS, else the physical cores this process may use.  For a
    GPU: `gemm` says who multiplies matrices, "cublaslt" (the default) or "own"; `attention` is "own" or "cudnn"
    (the default where it is installed).  Raises ConfigError for anything unknown or not available here, DeviceError
    where there is no GPU to be had.
    """
    name, colon, index = device.partition(":")
    if name not in DEVICES or (colon and (name == "cpu" or not index.isdecimal())):
        raise ConfigError("device", f"{device!r} is not available; choose from {', '.join(DEVICES)}, cuda:1 ...")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("dtype", f"{dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    other = {"gemm": gemm, "attention": attention} if name == "cpu" else {"isa": isa, "threads": threads}
    for field, value in other.items():
        if value is not None:
            raise ConfigError(field, f"{value!r} means nothing on the device {device!r}: leave it out")
    if name == "cpu":
        from llmc import _cpu

        _cpu.configure(isa=isa, threads=threads, dtype=dtype)
        return cast(Ops, _cpu)
    from llmc import _cuda

    _cuda.configure(index=int(index or 0), dtype=dtype, gemm=gemm, attention=attention)
    return cast(Ops, _cuda)
