"""What every language model here has: arenas, recorded passes, batches, a key-value cache.

A model's own file (`gpt2.py`, `llama.py`, `gemma.py`) has its numbers and tables, a subclass of `Config`, and three
pages, a subclass of `Model`: forward, backward, decode.  Both know nothing of files, optimisers or devices.  Shapes
follow `ops.py`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np

from llmc.arena import PADDED, Arena, Array, Row, table_nbytes
from llmc.errors import ConfigError
from llmc.ops import Ops

INIT_STD = 0.02

# What the backward pass makes again, the less memory the later in this list: the MLP's activation, also the outputs of
# the norms, all but each layer's input.
RECOMPUTE = ("none", "gelu", "gelu+norm", "block")


def check_recompute(mode: str) -> None:
    """ConfigError unless `mode` is one of RECOMPUTE."""
    if mode not in RECOMPUTE:
        raise ConfigError("recompute", f"{mode!r} is unknown; choose from {', '.join(RECOMPUTE)}")


def statistics(dtype: str) -> str:
    """The type of means, logarithms and losses beside activations of `dtype`."""
    return "float32" if dtype == "bfloat16" else dtype


def narrowed(rows: list[Row]) -> list[Row]:
    """The same table with its matrices in bfloat16."""
    return [row._replace(dtype="bfloat16") if len(row.shape) == 2 else row for row in rows]


class Config:
    """The numbers that define a model, and what follows from them: a frozen dataclass.

    A subclass has at least these fields.  Every table is made anew when asked for.
    """

    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    tied: bool = True  # whether the head is wte
    final_softcap: float = 0.0  # of the logits; 0: none
    BACKWARD: ClassVar[tuple[str, ...]] = ("dresidual",)  # rows of activations that the backward pass alone needs

    def _positive(self, *names: str) -> None:
        """ConfigError for one of these fields that is less than 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")

    @property
    def padded_vocab_size(self) -> int:
        """Vp: the vocabulary rounded up to a multiple of 128, as llm.c's files hold it."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_size(self) -> int:
        """D."""
        return self.channels // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Padded rows not counted."""
        rows = self.parameter_rows()
        padding = (self.padded_vocab_size - self.vocab_size) * self.channels
        return sum(row.size - (padding if row.name in PADDED else 0) for row in rows)

    def build(self, ops: Ops, **options: Any) -> Model:
        """A model of this configuration; `options` as those of `Model`."""
        raise NotImplementedError

    def parameter_rows(self, dtype: str = "float32") -> list[Row]:
        """The parameter tensors, in a fixed order."""
        raise NotImplementedError

    def activation_rows(self, B: int, T: int, dtype: str = "float32", recompute: str = "none") -> list[Row]:
        """What the forward pass reads and keeps, and what the backward pass adds.  ConfigError for a mode that is none
        of RECOMPUTE, or if T exceeds `max_seq_len`."""
        raise NotImplementedError

    def cache_rows(self, B: int, T: int, dtype: str = "float32") -> list[Row]:
        """The key-value cache of `decode` for B sequences of up to T tokens."""
        raise NotImplementedError

    def decode_rows(self, B: int, T: int, dtype: str = "float32") -> list[Row]:
        """Scratch of `decode` for T new tokens; one layer's worth, since nothing is kept for a backward pass."""
        raise NotImplementedError

    def layer_window(self, layer: int) -> int:
        """Tokens that a token of this layer sees, itself included; 0: all before it."""
        return 0

    def initial(self, row: Row) -> float:
        """What a new model's tensor holds: a vector this value, a matrix N(0, this)."""
        raise NotImplementedError

    def workspace(self, B: int, T: int) -> dict[str, int]:
        """The arguments of `ops.reserve` for batches of (B, T)."""
        parameters = table_nbytes(self.parameter_rows()) // np.dtype("float32").itemsize
        return {
            "channels": self.channels, "vocab_size": self.padded_vocab_size, "parameters": parameters,
            "tokens": B * T, "heads": self.num_heads, "head_size": self.head_size,
        }  # fmt: skip

    def _check_activations(self, T: int, recompute: str) -> None:
        check_recompute(recompute)
        self.check_length(T)

    def check_length(self, T: int) -> None:
        """ConfigError if T exceeds `max_seq_len`."""
        if T > self.max_seq_len:
            raise ConfigError("sequence length", f"{T} exceeds the model's {self.max_seq_len}")


class _Frozen(SimpleNamespace):
    """In place of gradients where nothing is trained: None for every tensor of every layer."""

    def layer(self, index: int) -> _Frozen:
        return self

    def __getattr__(self, name: str) -> None:
        return None


class Cache:
    """The keys and values that `decode` has seen of B sequences, and room for more: up to `length` tokens each.

    `layer(i)` has them as `keys` and `values` (B, length, G D), beside what the layers share.
    """

    def __init__(self, layers: list[SimpleNamespace], nbytes: int) -> None:
        self._layers, self.nbytes = layers, nbytes
        self._first: Cache | None = None
        self.batch, self.length = layers[0].keys.shape[:2]

    def layer(self, index: int) -> SimpleNamespace:
        return self._layers[index]

    def sequence(self, b: int) -> Cache:
        """The part of sequence b alone, in the same memory."""
        return self._rows(b, b + 1)

    def first(self, n: int) -> Cache:
        """The part of sequences 0 to n - 1, in the same memory."""
        if n == self.batch:
            return self
        if self._first is None or self._first.batch != n:
            self._first = self._rows(0, n)  # kept: a step of decoding is recorded on its arrays
        return self._first

    def _rows(self, start: int, stop: int) -> Cache:
        rows = slice(start, stop)
        layers = [
            SimpleNamespace(**{**vars(layer), "keys": layer.keys[rows], "values": layer.values[rows]})
            for layer in self._layers
        ]
        return Cache(layers, self.nbytes // self.batch * (stop - start))

    def move(self, ops: Ops, source: int, target: int, tokens: int) -> None:
        """The first `tokens` of sequence `source` become those of `target`."""
        for layer in self._layers:
            for x in (layer.keys, layer.values):
                ops.copy(x[target][:tokens], x[source][:tokens])


class _Calls:
    """In place of a backend: notes the ops that are called on it, and calls none."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.noted: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        op = getattr(self._ops, name)
        return lambda *args: self.noted.append(partial(op, *args))


def _step_of_decoding(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


class _Step(NamedTuple):
    """A step of decoding, recorded on the arrays of a cache and of the scratch that there is."""

    cache: weakref.ref[Cache]
    run: Callable[[], None]


class Model:
    """Parameters (zero until `initialise` or a checkpoint fills them) and, after `prepare`, what training needs.

    `dtype` is the type of weights, gradients and activations, by default what the backend stores.  Where that is
    bfloat16, `params` are float32 masters, unless `masters` is false: what is trained, read from files and saved.
    `weights` are what the layers read: `params` themselves, or their copies rounded to nearest, which `refresh` makes
    after others have written to `params`.  With `narrow`, on a CPU, matrices are kept in bfloat16, and are not trained.

    `frozen` models, which `narrow` ones are, have no gradients of their own: `backward` is there for what `ops` adds to
    the layers, which are its `adapters` (lora.py).  `recompute` is the mode that `prepare` was given.  `tokenizer` is
    the caller's to set, or to promise with `tokenizer_later`; so are `source`, what the weights were loaded by ("":
    random), and, where they came from one, their `folder` and the `ids` in its config.json.  The model ignores them.
    """

    def __init__(
        self, config: Config, ops: Ops, dtype: str | None = None, masters: bool = True, narrow: bool = False
    ) -> None:
        self.config = config
        self.dtype: str = ops.info()["storage"] if dtype is None else dtype
        self.recompute = "none"
        self.frozen = narrow
        self.tokenizer = None
        self.adapters: Any = None
        self.source = self.folder = ""
        self.ids: dict[str, Any] = {}
        self._replays: dict[tuple[Any, ...], Callable[[], None]] = {}
        self.ops = ops
        rows = config.parameter_rows(self.dtype)
        copies = masters and self.dtype == "bfloat16"
        if narrow:
            rows = narrowed(rows)
        self.params = Arena(config.parameter_rows() if copies else rows, ops.empty)
        self.weights = Arena(rows, ops.empty) if copies else self.params
        self.grads: Arena | None = None
        self.acts: Arena | None = None
        self.total = ops.empty((1,), "float64")
        self._scratch: Arena | None = None
        self._step: _Step | None = None
        ops.reserve(**config.workspace(1, 1))

    @property
    def ops(self) -> Ops:
        """The backend that the model calls.  Another one must take the same arrays; what was recorded is forgotten."""
        return self._ops

    @ops.setter
    def ops(self, ops: Ops) -> None:
        self._ops, self._step = ops, None
        self._replays.clear()

    @property
    def tokenizer(self) -> Any:
        """What turns text into this model's tokens and back, or None."""
        if self._promised is not None:
            self.tokenizer = self._promised()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._promised: Callable[[], Any] | None = None

    def tokenizer_later(self, load: Callable[[], Any]) -> None:
        """`load()` gives the tokenizer, when it is first asked for: a vocabulary takes longer to read than all else
        before the first step, and most runs of the weights alone need none."""
        self._promised = load

    def initialise(self, seed: int) -> None:
        """Random weights, as the configuration's `initial` says; padded rows are 0.

        Every tensor has its own stream of `Ops.normal`, so `seed` alone decides the values.  ConfigError for a
        negative seed or one of more than 64 bits.
        """
        if not 0 <= seed < 1 << 64:
            raise ConfigError("seed", f"must be from 0 to 2^64 - 1, got {seed}")
        V = self.config.vocab_size
        for stream, (row, tensor) in enumerate(self.params):
            value = self.config.initial(row)
            if len(row.shape) == 1:
                tensor[...] = value
                continue
            target = tensor[:V] if row.name in PADDED else tensor
            if target.dtype.name in ("float32", self.dtype):
                self.ops.normal(target, seed, stream, value)
            else:  # narrow: rounded from what a model in float32 would have
                drawn = self.ops.empty(target.shape, "float32")
                self.ops.normal(drawn, seed, stream, value)
                self.ops.copy(target, drawn)
            if row.name in PADDED:
                tensor[V:] = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Make `weights` from `params` anew, where they are not the same."""
        if self.weights is not self.params:
            self.ops.copy(self.weights.flat, self.params.flat)

    def prepare(self, B: int, T: int, recompute: str = "none") -> None:
        """Allocate what training on batches of (B, T) needs, so that the first step allocates nothing.

        `recompute`, one of RECOMPUTE, trades time for memory from now on: what it names is not kept per layer
        but made again in the backward pass, by the same ops from the same inputs, so gradients are the same
        bits; but for "gelu" and "gelu+norm" in bfloat16, where a fused GELU is that of a sum that was rounded when it
        was stored.  ConfigError for another mode, or if T exceeds the model's longest sequence.
        """
        check_recompute(recompute)
        if recompute != self.recompute:
            self.recompute = recompute
            self._forget()
        self._activations(B, T)
        self._gradients()
        if self.adapters is not None:
            self.adapters.prepare(B * T)

    def _activations(self, B: int, T: int) -> Arena:
        if self.acts is None or self.acts.losses.shape != (B, T):
            rows = self.config.activation_rows(B, T, self.dtype, self.recompute)
            self._forget()  # freed before its successor is made
            self.ops.reserve(**self.config.workspace(B, T))
            self.acts = Arena(rows, self.ops.empty)
            self._constants(self.acts)
            self._grow_adapters(B * T)
        return self.acts

    def _grow_adapters(self, tokens: int) -> None:
        """Room for a call of so many tokens; recordings hold on to what was there before."""
        if self.adapters is not None and self.adapters.grow(tokens):
            self._replays.clear()
            self._step = None

    def _constants(self, arena: Arena) -> None:
        """Fill what never changes of activations or of a cache."""

    def _forget(self) -> None:
        self._replays.clear()
        self.acts = None

    def _gradients(self) -> Any:
        if self.frozen:
            return _Frozen()
        if self.grads is None:
            self.grads = Arena(self.config.parameter_rows(self.dtype), self.ops.empty)
        return self.grads

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas that exist now; the backend's workspace and key-value caches are not counted."""
        copies = None if self.weights is self.params else self.weights
        arenas = (self.params, copies, self.grads, self.acts, self._scratch)
        own = sum(arena.nbytes for arena in arenas if arena is not None)
        return own + (0 if self.adapters is None else self.adapters.nbytes)

    @property
    def losses(self) -> Array:
        """(B, T): the loss of each token in the last `forward` or `loss`.  RuntimeError before either."""
        if self.acts is None:
            raise RuntimeError("losses exist only after forward() or loss()")
        return self.acts.losses

    def _replay(self, function: Callable[..., None], *args: Any) -> None:
        """function(self, *args), which the backend may record.

        Recordings hold the model weakly: it and its arenas go when the last who holds it lets go.
        """
        key = (function, *args)
        if key not in self._replays:
            self._replays[key] = self.ops.record(partial(function, weakref.proxy(self), *args))
        self._replays[key]()

    def _begin(self, tokens: Array, targets: Array | None) -> None:
        """Bring a batch to the device; ValueError for an id outside the vocabulary."""
        a, V = self._activations(*tokens.shape), self.config.vocab_size
        for name, ids in (("tokens", tokens), ("targets", targets)):
            if ids is None:
                continue
            if ids.shape != tokens.shape:
                raise ValueError(f"{name}: expected shape {tokens.shape}, got {ids.shape}")
            check_ids(name, ids, V)
            a[name][...] = ids

    # ---- what a subclass writes --------------------------------------------------------------------

    def _body(self) -> None:
        """Everything before the head: acts.lnf from acts.tokens."""
        raise NotImplementedError

    def _backward_pass(self, accumulate: bool) -> None:
        """Everything after the head's backward, which has left acts.lnf as its own gradient."""
        raise NotImplementedError

    def _decode_pass(self, s: Arena, cache: Cache) -> None:
        """s.residual, the stream after the last layer, from s.tokens and s.positions."""
        raise NotImplementedError

    def _last_norm(self, out: Array, x: Array, s: Arena) -> None:
        """The norm before the head, of one token, out and x (1, 1, C); it may use the statistics of s."""
        raise NotImplementedError

    # ---- forward -----------------------------------------------------------------------------------

    @property
    def _head(self) -> Array:
        return self.weights.wte if self.config.tied else self.weights.head

    def forward(self, tokens: Array, targets: Array, *, scale: float | None = None, accumulate: bool = False) -> float:
        """Mean loss over tokens, targets (B, T) int32, and the head's backward with it.

        `scale` multiplies every token's loss in the gradient (default 1/(B T), the mean); `accumulate`
        adds to the gradients instead of overwriting them.  Follow with `backward`.
        """
        self._forward(tokens, targets, scale, accumulate)
        return self._mean_loss()

    def gradients(
        self, tokens: Array, targets: Array, *, scale: float | None = None, accumulate: bool = False
    ) -> None:
        """`forward` and `backward` without waiting for either.  `total` (1,) becomes `scale` times the sum of the
        losses, or with `accumulate` is added to."""
        self._forward(tokens, targets, scale, accumulate)
        self.backward(accumulate)

    def _forward(self, tokens: Array, targets: Array, scale: float | None, accumulate: bool) -> None:
        self._begin(tokens, targets)
        self._gradients()
        self._replay(type(self)._forward_pass, 1.0 / max(1, tokens.size) if scale is None else scale, accumulate)

    def _forward_pass(self, scale: float, accumulate: bool) -> None:
        self._body()
        a, grads, c = self._acts, self._gradients(), self.config
        dhead = grads.wte if c.tied else grads.head
        self.ops.head_loss(
            a.losses, a.lnf, dhead, a.lnf, self._head, a.targets, c.vocab_size, scale, c.final_softcap, accumulate
        )
        self.ops.sum_losses(self.total, a.losses, scale, accumulate)

    def loss(self, tokens: Array, targets: Array) -> float:
        """Mean loss over tokens, targets (B, T); no gradients."""
        self._begin(tokens, targets)
        self._replay(type(self)._loss_pass)
        return self._mean_loss()

    def begin_loss(self, tokens: Array, targets: Array) -> None:
        """`loss` without waiting for it: `total` (1,) becomes the mean."""
        self._begin(tokens, targets)
        self._replay(type(self)._loss_pass)
        self.ops.sum_losses(self.total, self._acts.losses, 1.0 / max(1, tokens.size), False)

    def _loss_pass(self) -> None:
        self._body()
        a, c = self._acts, self.config
        self.ops.head_loss(
            a.losses, None, None, a.lnf, self._head, a.targets, c.vocab_size, 1.0, c.final_softcap, False
        )

    def _mean_loss(self) -> float:
        return float(np.mean(self.ops.fetch(self._acts.losses)(), dtype=np.float64))

    def logits(self, tokens: Array) -> Array:
        """Logits (B, T, V) for tokens (B, T): a new NumPy array of B T V floats, for tests and `verify`."""
        self._begin(tokens, None)
        self._replay(type(self)._body)
        out = self.ops.empty((*tokens.shape, self.config.vocab_size), self.dtype)
        self.ops.head_logits(out, self._acts.lnf, self._head, self.config.vocab_size, self.config.final_softcap)
        return self.ops.fetch(out)()

    @property
    def _acts(self) -> Arena:
        if self.acts is None:
            raise RuntimeError("there are no activations before a forward pass")
        return self.acts

    # ---- backward ----------------------------------------------------------------------------------

    def backward(self, accumulate: bool = False) -> None:
        """The rest of the backward pass after `forward`; gradients are left in `grads`.

        Works in place: each gradient overwrites the activation that was its partner and is dead by then.
        """
        if self.acts is None or (self.grads is None and not self.frozen):
            raise RuntimeError("backward() needs a forward() before it")
        self._replay(type(self)._backward_pass, accumulate)

    # ---- decode ------------------------------------------------------------------------------------

    def new_cache(self, B: int = 1, T: int | None = None) -> Cache:
        """An empty key-value cache for B sequences of up to T tokens (None: `max_seq_len`, which is the most)."""
        T = self.config.max_seq_len if T is None else T
        self.config.check_length(T)
        arena = Arena(self.config.cache_rows(B, T, self.dtype), self.ops.empty)
        self._constants(arena)
        return Cache([arena.layer(i) for i in range(self.config.num_layers)], arena.nbytes)

    def decode(self, cache: Cache, tokens: Array, positions: Array) -> Array:
        """Logits (B, V) of the token after `tokens` (B, T); sequence b has `positions[b]` tokens in the cache, and
        these follow.

        Prefill passes the whole prompt, then one token at a time.  The result is a view that the next
        call overwrites.  ValueError for an id outside the vocabulary, or past the cache's length.
        """
        B, T = tokens.shape
        check_ids("tokens", tokens, self.config.vocab_size)
        if positions.shape != (B,):
            raise ValueError(f"positions: expected shape {(B,)}, got {positions.shape}")
        if B and not 0 <= positions.min() <= positions.max() <= cache.length - T:
            raise ValueError(f"positions: {T} tokens from {positions.max()} exceed the cache's {cache.length}")
        if self._scratch is None or self._scratch.tokens.shape != (B, T):
            self._scratch = self._step = None  # freed before its successor is made
            self.ops.reserve(**self.config.workspace(B, T))
            self._scratch = Arena(self.config.decode_rows(B, T, self.dtype), self.ops.empty)
            self._grow_adapters(B * T)
        s = self._scratch
        s.tokens[...] = tokens
        s.positions[...] = positions
        if T == 1:
            self._recorded(s, cache)()
        else:
            self._decode_all(s, cache)
        return s.logits[:, 0]

    def _decode_all(self, s: Arena, cache: Cache) -> None:
        self._decode_pass(s, cache)
        for last, x in self._last_tokens(s):
            self._last_norm(last, x, s)
        self.ops.head_logits(s.logits, s.last, self._head, self.config.vocab_size, self.config.final_softcap)

    def _recorded(self, s: Arena, cache: Cache) -> Callable[[], None]:
        """`_decode_all`, as it is called for every token: looking up a hundred ops and their arrays takes 4 % of a step
        of GPT-2 124M on two threads, and launching them one by one most of one on a GPU.

        What was recorded holds the cache's arrays, and goes with the cache.
        """
        if self._step is not None and self._step.cache() is cache:
            return self._step.run
        real, calls = self._ops, _Calls(self._ops)
        self._ops = cast(Ops, calls)
        try:
            self._decode_all(s, cache)
        finally:
            self._ops = real
        this = weakref.ref(self)

        def forget(dead: weakref.ref[Cache]) -> None:
            model = this()
            if model is not None and model._step is not None and model._step.cache is dead:
                model._step = None

        self._step = _Step(weakref.ref(cache, forget), real.record(partial(_step_of_decoding, calls.noted)))
        return self._step.run

    def decode_nbytes(self, positions: Array) -> int:
        """Bytes that `decode` reads at least, for one token of each sequence at `positions` (B,): every weight once,
        of the tables before the first layer one row a token, and of the cache what a token sees."""
        weights, row, windows = self._decode_reads
        adapters = 0 if self.adapters is None else self.adapters.weights.nbytes
        seen = sum(int(np.minimum(positions + 1, window).sum()) * nbytes for window, nbytes in windows.items())
        return weights + adapters + row * len(positions) + seen

    @functools.cached_property
    def _decode_reads(self) -> tuple[int, int, dict[int, int]]:
        """Bytes of the weights, of a token's rows of the tables, and, by how far a layer looks back, of a token in the
        cache of all layers that look back so far."""
        c, weights, rows = self.config, 0, 0
        for row, tensor in self.weights:
            nbytes = tensor.nbytes // len(tensor)
            if row.name in ("wte", "wpe") and not (c.tied and row.name == "wte"):
                rows += nbytes
            else:
                weights += nbytes * (c.vocab_size if row.name in PADDED else len(tensor))
        channels = sum(row.shape[-1] for row in c.cache_rows(1, 1) if row.name in ("keys", "values"))
        windows: dict[int, int] = {}
        for layer in range(c.num_layers):
            window = c.layer_window(layer) or c.max_seq_len
            windows[window] = windows.get(window, 0) + channels * np.dtype(self.dtype).itemsize
        return weights, rows, windows

    @staticmethod
    def _last_tokens(s: Arena) -> Iterator[tuple[Array, Array]]:
        """Each sequence's last token alone: its slices are contiguous, those of all sequences are not."""
        for b in range(s.last.shape[0]):
            one = slice(b, b + 1)
            yield s.last[one], s.residual[one, -1:]


def check_ids(name: str, ids: Array, V: int) -> None:
    """ValueError unless all of `ids` (B, T) lie in [0, V)."""
    if ids.size and not 0 <= ids.min() <= ids.max() < V:
        b, t = np.argwhere((ids < 0) | (ids >= V))[0]
        raise ValueError(f"{name}: id {ids[b, t]} at [{b}, {t}] is outside [0, {V})")


def scaled_std(num_layers: int) -> float:
    """The spread of matrices that write into the residual stream, whose 2 L branches add up (Radford et al. 2019)."""
    return INIT_STD / math.sqrt(2 * num_layers)
