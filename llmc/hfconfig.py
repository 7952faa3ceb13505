"""config.json of a Hugging Face folder to and from a configuration of llmc's.

Both styles are read: that of published folders (rope_theta, rope_scaling with `type` or `rope_type`, torch_dtype,
use_sliding_window) and that of transformers 5 (rope_parameters, layer_types, dtype).  The former is written, which
every version reads.  A field that is missing has the default of transformers' own class.

Every field of those classes is in one of the tables below: a number that `read` takes, MATHEMATICS with the values
that mean what llmc computes, or NEUTRAL.  Others, which those classes do not read, are passed over, unless they are
in FOREIGN: numbers of models that call themselves the same and compute something else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from llmc import gemma, gpt2, llama
from llmc.errors import ConfigError, FileFormatError
from llmc.files import PathLike, atomic_write, divisible, positive, read_json
from llmc.model import Config
from llmc.rotary import Scaling

CONFIG_FILE = "config.json"
TOKENIZER_FIELD = "llmc_tokenizer"  # a name or file that llmc's own tokenizers are known by
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}

# Their names for numbers that must be there, and ours.
GPT2_NUMBERS = {
    "n_positions": "max_seq_len",
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "channels",
}
GPT2_ALIASES = {
    "max_position_embeddings": "n_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}
NUMBERS = {
    "max_position_embeddings": "max_seq_len",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "channels",
    "intermediate_size": "hidden",
}
# Numbers that `read` takes with care of its own.  head_dim None or missing is C/H (Gemma's class has 256), missing
# num_key_value_heads what KV_HEADS says, None H.
TAKEN = {
    "gpt2": {*GPT2_NUMBERS, "n_inner"},
    "llama": {*NUMBERS, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"},
}
TAKEN["mistral"] = TAKEN["llama"] | {"sliding_window"}
TAKEN["qwen2"] = TAKEN["mistral"] | {"use_sliding_window", "max_window_layers", "layer_types"}
TAKEN["gemma"] = TAKEN["llama"] - {"tie_word_embeddings"}
TAKEN["gemma2"] = TAKEN["gemma"] | {
    "sliding_window", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
KV_HEADS = {"mistral": 8, "qwen2": 32, "gemma": 16, "gemma2": 4}
HEAD_SIZE = {"gemma": 256, "gemma2": 256}
ROPE_THETA = 10000.0
FACTORS, LONGEST = ("factor", "low_freq_factor", "high_freq_factor"), "original_max_position_embeddings"
EPS = 1e-6
WINDOW = 4096
WINDOW_LAYERS = 28
QUERY_SCALE, ATTN_SOFTCAP, FINAL_SOFTCAP = 256, 50.0, 30.0

# Fields that change the mathematics, with the values that mean what llmc computes; the first is what it writes, and
# what a missing one means.
TANH_GELU = ("gelu_pytorch_tanh", "gelu")  # transformers takes Gemma's old "gelu" for the other, too
MATHEMATICS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (gpt2.LAYERNORM_EPS,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "llama": {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    "mistral": {"hidden_act": ("silu", "swish")},
    "qwen2": {"hidden_act": ("silu", "swish")},
    "gemma": {
        "hidden_act": TANH_GELU,
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (None, False),
    },
    "gemma2": {
        "hidden_activation": TANH_GELU[:1],
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (None, False),
    },
}

# Fields of these classes that do not change what a language model computes: dropout, which does not act on inference
# and which llmc trains without; how new weights are drawn; what other heads and other programs do.
# reorder_and_upcast_attn moves a scaling, for half precision; pretraining_tp divides a sum.
NEUTRAL = {
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "initializer_range", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "pretraining_tp", "use_cache", "transformers_version", "architectures",
    "output_hidden_states", "return_dict", "dtype", "id2label", "label2id", "problem_type",
}  # fmt: skip

# Fields that no class here has, or all have, which mean another computation unless they are None or this: of quantised
# weights, mixtures of experts, and models that call themselves by one of these names with other norms, positions or
# scales.
FOREIGN: dict[str, Any] = {
    "quantization_config": {}, "compression_config": {}, "pruned_heads": {}, "per_layer_config": {},
    "is_encoder_decoder": False, "chunk_size_feed_forward": 0, "is_causal": True, "use_mrope": False,
    "partial_rotary_factor": 1.0, "rotary_pct": 1.0, "position_embedding_type": "absolute", "alibi": False,
    "no_rope_layers": [], "num_local_experts": 0, "num_experts": 0, "n_routed_experts": 0, "qkv_bias": False,
    "use_qk_norm": False, "qk_layernorm": False, "clip_qkv": 0, "attention_multiplier": 0, "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0, "logits_scaling": 1.0, "logit_scale": 1.0, "scale_emb": 1.0, "attention_chunk_size": 0,
    "parallel_attn": False, "use_parallel_residual": False,
}  # fmt: skip

Ids = dict[str, Any]


class _Reader:
    """The fields of one config.json, or of the object in one of them; every failure is a FileFormatError naming the
    field."""

    def __init__(self, path: str, fields: dict[str, Any], prefix: str = "") -> None:
        self.path, self.fields, self.prefix = path, fields, prefix

    def wrong(self, field: str, detail: str) -> FileFormatError:
        return FileFormatError(self.path, self.prefix + field, detail)

    def within(self, field: str) -> _Reader:
        """The fields of the object in a field; none where it is None or not there."""
        value = self.fields.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(field, f"must be an object, is {value!r}")
        return _Reader(self.path, value or {}, f"{self.prefix}{field}.")

    def integer(self, field: str, default: int | None = None) -> int:
        """A positive one; it must be there where there is no default, and None means the default."""
        value = self.fields.get(field)
        if value is None and default is not None:
            return default
        if field not in self.fields:
            raise self.wrong(field, "is missing")
        return positive(self.path, self.prefix + field, value)

    def number(self, field: str, default: float | None = None) -> float:
        """A positive finite one; it must be there where there is no default."""
        value = self.fields.get(field, default)
        if value is None and field not in self.fields:
            raise self.wrong(field, "is missing")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.wrong(field, f"must be a positive number, is {value!r}")
        return float(value)

    def softcap(self, field: str, default: float) -> float:
        """0 where it is None."""
        return 0.0 if field in self.fields and self.fields[field] is None else self.number(field, default)

    def flag(self, field: str, default: bool) -> bool:
        value = self.fields.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, f"must be true or false, is {value!r}")
        return value

    def window(self, field: str, default: int) -> int:
        """0 where it is None."""
        return 0 if field in self.fields and self.fields[field] is None else self.integer(field, default)

    def check_mathematics(self, kind: str) -> None:
        for field, allowed in MATHEMATICS[kind].items():
            if field in self.fields and not any(_same(self.fields[field], value) for value in allowed):
                known = " or ".join(repr(value) for value in allowed)
                raise self.wrong(field, f"is {self.fields[field]!r}, llmc computes {known} only")
        for field, harmless in FOREIGN.items():
            value = self.fields.get(field)
            if value is not None and not _same(value, harmless):
                raise self.wrong(field, f"is {value!r}, llmc does not compute such models")


def _same(value: Any, other: Any) -> bool:
    """Equal, and 1 is not True."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


# ---- reading ---------------------------------------------------------------------------------------


def read(folder: PathLike) -> tuple[Config, Ids]:
    """The configuration in a folder's config.json, and what it says that is no mathematics: the ids of IDS as they
    are (int, list or None), `model_type`, and the tokenizer that llmc has noted there (TOKENIZER_FIELD), each where
    it is there.

    FileFormatError naming the field for another architecture, a number that is missing or does not fit, and every
    field whose value would make the model compute something else than llmc's.
    """
    path = os.path.join(folder, CONFIG_FILE)
    r = _Reader(path, read_json(path))
    kind = r.fields.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise r.wrong("model_type", f"is {kind!r}, llmc reads {', '.join(ARCHITECTURES)}")
    r.check_mathematics(kind)
    try:
        config = READERS[kind](r)
    except ConfigError as error:  # a number alone was right, together they are not
        theirs = {ours: name for name, ours in (GPT2_NUMBERS if kind == "gpt2" else NUMBERS).items()}
        raise r.wrong(theirs.get(error.field, error.field), str(error).split(": ", 1)[1]) from error
    if "layer_types" not in TAKEN[kind] and r.fields.get("layer_types") is not None:
        if any(slides != (getattr(config, "window", 0) > 0) for slides in _layer_types(r, config.num_layers)):
            raise r.wrong("layer_types", "must be the same for all layers, and what sliding_window says")
    return config, _ids(r)


def _ids(r: _Reader) -> Ids:
    ids: Ids = {"model_type": r.fields["model_type"]}
    for field in IDS:
        if field in r.fields:
            value = r.fields[field]
            several = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(one) is int for one in several):
                raise r.wrong(field, f"must be an id, a list of ids or null, is {value!r}")
            ids[field] = value
    tokenizer = r.fields.get(TOKENIZER_FIELD)
    if tokenizer is not None:
        if not isinstance(tokenizer, str):
            raise r.wrong(TOKENIZER_FIELD, f"must be a string, is {tokenizer!r}")
        ids[TOKENIZER_FIELD] = tokenizer
    return ids


def _gpt2(r: _Reader) -> Config:
    for alias, field in GPT2_ALIASES.items():  # which transformers prefers
        if alias in r.fields and r.fields.setdefault(field, r.fields[alias]) != r.fields[alias]:
            raise r.wrong(alias, f"is {r.fields[alias]!r}, but {field} is {r.fields[field]!r}")
    values = {ours: r.integer(theirs) for theirs, ours in GPT2_NUMBERS.items()}
    divisible(r.path, "n_embd", values["channels"], values["num_heads"])
    inner = r.fields.get("n_inner")
    if inner is not None and inner != 4 * values["channels"]:
        raise r.wrong("n_inner", f"is {inner!r}, llmc computes 4 n_embd only")
    return gpt2.Config(**values)


def _sizes(r: _Reader, kind: str) -> dict[str, Any]:
    """What all but GPT-2 have, by our names."""
    values: dict[str, Any] = {ours: r.integer(theirs) for theirs, ours in NUMBERS.items()}
    heads = values["num_heads"]
    default = heads if "num_key_value_heads" in r.fields else KV_HEADS.get(kind, heads)
    values["num_kv_heads"] = r.integer("num_key_value_heads", default)
    size = HEAD_SIZE.get(kind)
    if size is None and r.fields.get("head_dim") is None:
        divisible(r.path, "hidden_size", values["channels"], heads)
        size = values["channels"] // heads
    values["head_size"] = r.integer("head_dim", size)
    values["eps"] = r.number("rms_norm_eps", EPS)
    return values


def _rope(r: _Reader, scaled: bool, max_seq_len: int) -> tuple[float, Scaling | None]:
    """theta and the scaling, from either style, with the precedence that transformers gives them."""
    name = "rope_scaling" if r.fields.get("rope_scaling") else "rope_parameters"
    given = r.within(name)
    theta = given.number("rope_theta", r.number("rope_theta", ROPE_THETA))
    kind = given.fields.get("rope_type", given.fields.get("type", "default"))
    known = ("default", "llama3") if scaled else ("default",)
    if kind not in known:
        raise r.wrong(name, f"has rope_type {kind!r}, llmc computes {' or '.join(known)} only")
    expected = {"rope_type", "type", "rope_theta", *((*FACTORS, LONGEST) if kind == "llama3" else ())}
    for field, value in given.fields.items():
        whole = field == "partial_rotary_factor" and _same(value, 1.0)
        if field not in expected and value is not None and not whole:
            raise given.wrong(field, f"is {value!r}, llmc does not compute that beside rope_type {kind!r}")
    if kind == "default":
        return theta, None
    factors = {field: given.number(field) for field in FACTORS}
    longest = given.integer(LONGEST, max_seq_len)
    if r.fields.get(LONGEST, longest) != longest:  # which transformers passes over here, and heeds elsewhere
        raise r.wrong(LONGEST, f"is {r.fields[LONGEST]!r}, but the scaling of {name} is from {longest}")
    return theta, Scaling(**factors, original_max_len=longest)


def _llama(r: _Reader, kind: str = "llama", window: int = 0) -> Config:
    sizes = _sizes(r, kind)
    theta, scaling = _rope(r, True, sizes["max_seq_len"])
    return llama.Config(
        **sizes, rope_theta=theta, rope_scaling=scaling, window=window, tied=r.flag("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
    )  # fmt: skip


def _mistral(r: _Reader) -> Config:
    return _llama(r, "mistral", r.window("sliding_window", WINDOW))


def _qwen2(r: _Reader) -> Config:
    layers = r.integer("num_hidden_layers")
    window = r.window("sliding_window", WINDOW) if r.flag("use_sliding_window", False) else 0
    field = "max_window_layers"
    first = r.fields.get(field, WINDOW_LAYERS)
    if type(first) is not int or first < 0:
        raise r.wrong(field, f"must be a number of layers, is {first!r}")
    some, all_of_them = window > 0 and first < layers, window > 0 and first == 0
    if r.fields.get("layer_types") is not None:
        field, sliding = "layer_types", _layer_types(r, layers)
        some, all_of_them = any(sliding), all(sliding)
    if some != all_of_them:
        raise r.wrong(field, "gives some layers a window and others none; llmc computes the same in all")
    if some and not window:
        raise r.wrong("sliding_window", "is not in use, but layer_types has sliding_attention")
    return _llama(r, "qwen2", window if some else 0)


def _layer_types(r: _Reader, layers: int) -> list[bool]:
    """Which layers slide."""
    kinds = r.fields["layer_types"]
    known = {"sliding_attention": True, "full_attention": False}
    if not isinstance(kinds, list) or len(kinds) != layers or not all(str(kind) in known for kind in kinds):
        raise r.wrong("layer_types", f"must be {' or '.join(known)} for each of {layers} layers")
    return [known[kind] for kind in kinds]


def _gemma(r: _Reader) -> Config:
    if r.fields.get("hidden_activation") not in (None, *TANH_GELU):
        raise r.wrong("hidden_activation", f"is {r.fields['hidden_activation']!r}, llmc computes {TANH_GELU[0]!r} only")
    sizes = _sizes(r, "gemma")
    theta, _ = _rope(r, False, sizes["max_seq_len"])
    return gemma.Config(**sizes, rope_theta=theta, query_scale=sizes["head_size"])


def _gemma2(r: _Reader) -> Config:
    sizes = _sizes(r, "gemma2")
    theta, _ = _rope(r, False, sizes["max_seq_len"])
    layers, window = sizes["num_layers"], r.window("sliding_window", WINDOW)
    if r.fields.get("layer_types") is not None:
        sliding = _layer_types(r, layers)
        if not any(sliding):
            window = 0
        elif sliding != [layer % 2 == 0 for layer in range(layers)]:
            raise r.wrong("layer_types", "must begin with sliding_attention and alternate, as in Gemma 2")
        elif not window:
            raise r.wrong("sliding_window", "is null, but layer_types has sliding_attention")
    return gemma.Config(
        **sizes, rope_theta=theta, version=2, window=window,
        attn_softcap=r.softcap("attn_logit_softcapping", ATTN_SOFTCAP),
        final_softcap=r.softcap("final_logit_softcapping", FINAL_SOFTCAP),
        query_scale=r.number("query_pre_attn_scalar", QUERY_SCALE),
    )  # fmt: skip


READERS: dict[str, Callable[[_Reader], Config]] = {
    "gpt2": _gpt2, "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "gemma": _gemma, "gemma2": _gemma2,
}  # fmt: skip


# ---- writing ---------------------------------------------------------------------------------------


def model_type(config: Config, wanted: str | None = None) -> str:
    """transformers' name for what `config` describes; `wanted` where that is one of several."""
    if isinstance(config, gpt2.Config):
        return "gpt2"
    if isinstance(config, gemma.Config):
        return "gemma" if config.version == 1 else "gemma2"
    if not isinstance(config, llama.Config):
        raise ConfigError("model", f"{type(config).__module__} has no name in transformers")
    if config.qkv_bias:
        return "qwen2"
    # transformers' Llama has no window, and insists that its channels are a multiple of the heads.
    if wanted == "mistral" or config.window or config.channels % config.num_heads:
        return "mistral"
    return "llama"


def write(folder: PathLike, config: Config, ids: Mapping[str, Any] | None = None, *, dtype: str = "fp32") -> None:
    """Write config.json as transformers reads it.

    `ids` is what `read` gave, or any part of it: IDS, `model_type` (Mistral without a window is a Llama) and
    TOKENIZER_FIELD.  `dtype` is that of the weights beside it.  ConfigError where it cannot be written.
    """
    ids = dict(ids or {})
    kind = model_type(config, ids.get("model_type"))
    fields: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    fields |= {field: values[0] for field, values in MATHEMATICS[kind].items()}
    fields |= _gpt2_fields(config) if isinstance(config, gpt2.Config) else _fields(cast(Any, config), kind)
    fields |= {field: ids.get(field) for field in IDS} | {"torch_dtype": DTYPES[dtype]}
    if ids.get(TOKENIZER_FIELD) is not None:
        fields[TOKENIZER_FIELD] = ids[TOKENIZER_FIELD]
    with atomic_write(os.path.join(folder, CONFIG_FILE)) as file:
        file.write(json.dumps(fields, indent=2).encode() + b"\n")


def _gpt2_fields(config: gpt2.Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in GPT2_NUMBERS.items()} | {"n_inner": None}


def _fields(config: llama.Config | gemma.Config, kind: str) -> dict[str, Any]:
    fields: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in NUMBERS.items()}
    fields |= {
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_size, "rms_norm_eps": float(config.eps),
        "rope_theta": float(config.rope_theta), "tie_word_embeddings": config.tied,
    }  # fmt: skip
    if isinstance(config, gemma.Config):
        return fields | (_gemma2_fields(config) if kind == "gemma2" else {})
    scaling = config.rope_scaling
    fields["rope_scaling"] = scaling and {
        "rope_type": "llama3", LONGEST: scaling.original_max_len,
        **{field: float(getattr(scaling, field)) for field in FACTORS},
    }  # fmt: skip
    if kind == "mistral":
        fields["sliding_window"] = config.window or None
    if kind == "qwen2":
        windows = {"use_sliding_window": config.window > 0, "sliding_window": config.window or None}
        fields |= windows | {"max_window_layers": 0 if config.window else config.num_layers}
    return fields


def _gemma2_fields(config: gemma.Config) -> dict[str, Any]:
    kinds = [
        "sliding_attention" if config.layer_window(layer) else "full_attention" for layer in range(config.num_layers)
    ]
    scale = config.query_scale
    return {
        # Without a window the longest text fits in, for versions that do not read layer_types.
        "sliding_window": config.window or config.max_seq_len, "layer_types": kinds,
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "attn_logit_softcapping": config.attn_softcap or None, "final_logit_softcapping": config.final_softcap or None,
    }  # fmt: skip
