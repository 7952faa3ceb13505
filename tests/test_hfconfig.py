"""config.json: every field of transformers' classes, both styles, what is refused, and what is written."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmc import gemma, gpt2, hfconfig, llama
from llmc.errors import ConfigError, FileFormatError
from llmc.hfconfig import LONGEST
from llmc.model import Config
from llmc.rotary import Scaling

PRESETS = {name: config for module in (gpt2, llama, gemma) for name, config in module.PRESETS.items()}
CLASSES = {
    "gpt2": "GPT2Config", "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config",
    "gemma": "GemmaConfig", "gemma2": "Gemma2Config",
}  # fmt: skip
SMALL = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 22, "num_hidden_layers": 3, "num_attention_heads": 32,
    "max_position_embeddings": 40,
}  # fmt: skip
GPT2 = {"vocab_size": 131, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def fields(kind: str, **changes: Any) -> dict[str, Any]:
    """The shortest config.json of a kind, and changes; ... takes a field away."""
    values = {"model_type": kind} | (GPT2 if kind == "gpt2" else SMALL) | changes
    return {name: value for name, value in values.items() if value is not ...}


def read(folder: Path, values: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(values))
    return hfconfig.read(folder)[0]


def transformers_config(values: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(**values)


# ---- every field -----------------------------------------------------------------------------------


def known(kind: str) -> set[str]:
    return {*hfconfig.TAKEN[kind], *hfconfig.MATHEMATICS[kind], *hfconfig.NEUTRAL, *hfconfig.IDS, *hfconfig.FOREIGN}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_was_thought_of(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = {field.name for field in dataclasses.fields(getattr(transformers, CLASSES[kind]))}
    assert sorted(theirs - known(kind)) == [], "decide in hfconfig whether they change the mathematics"
    ours = {*hfconfig.TAKEN[kind], *hfconfig.MATHEMATICS[kind]}
    assert sorted(ours - theirs - {"head_dim"}) == []  # which their Qwen reads, too, and does not declare


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_that_their_models_read(kind: str) -> None:
    """Those with defaults outside of the class, too."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    source = inspect.getsource(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"))
    found = {name or again for name, again in re.findall(r'\bconfig\.([a-z_]+)|config, "([a-z_]+)"', source)}
    others = {
        "num_labels", "_attn_implementation",  # of other heads, of which kernel
        "hidden_dropout", "classifier_dropout", "summary_last_dropout",  # of GPT-2's other heads
        "sliding_window",  # Mistral's own field
    }  # fmt: skip
    aliases = set(hfconfig.GPT2_ALIASES) if kind == "gpt2" else set()
    assert len(found) > 10 and sorted(found - known(kind) - others - aliases) == []


@pytest.mark.parametrize("kind", CLASSES)
def test_a_missing_field_has_their_default(kind: str, tmp_path: Path) -> None:
    """Read with the numbers alone, and with every field as transformers fills it in."""
    short = fields(kind)
    config = transformers_config(short)
    config.save_pretrained(tmp_path)
    assert hfconfig.read(tmp_path)[0] == read(tmp_path, short)
    whole = json.loads(config.to_json_string(use_diff=False))
    for field, (_, *allowed) in hfconfig.MATHEMATICS[kind].items():
        assert whole[field] == hfconfig.MATHEMATICS[kind][field][0] or whole[field] in allowed, field


@pytest.mark.parametrize("kind", CLASSES)
def test_numbers_that_must_be_there(kind: str, tmp_path: Path) -> None:
    for field in GPT2 if kind == "gpt2" else SMALL:
        for value in (..., None, 0, -1, 2.0, "2", True, 10**400):
            with pytest.raises(FileFormatError, match=f"config.json: {field}: (is missing|must be)"):
                read(tmp_path, fields(kind, **{field: value}))


def refused() -> list[tuple[str, str, Any, str]]:
    """(kind, field, value, the field that is named) for what changes the mathematics."""
    other = {"activation_function": "relu", "hidden_act": "relu", "hidden_activation": "gelu"}
    found: list[tuple[str, str, Any, str]] = [("gpt2", "layer_norm_epsilon", 1e-6, "layer_norm_epsilon")]
    for kind, table in hfconfig.MATHEMATICS.items():
        for field, allowed in table.items():
            found.append((kind, field, other.get(field, allowed[0] is not True), field))
            found.append((kind, field, int(allowed[0]) if isinstance(allowed[0], bool) else 7, field))
        for field, value in (
            ("quantization_config", {"bits": 4}), ("per_layer_config", {"0": {"num_attention_heads": 2}}),
            ("num_local_experts", 8), ("is_encoder_decoder", True), ("partial_rotary_factor", 0.5),
            ("logit_scale", 0.1), ("use_qk_norm", True), ("qkv_bias", True),
        ):  # fmt: skip
            found.append((kind, field, value, field))
    for kind in ("llama", "mistral", "qwen2", "gemma", "gemma2"):
        found += [
            (kind, "rms_norm_eps", 0, "rms_norm_eps"), (kind, "rms_norm_eps", None, "rms_norm_eps"),
            (kind, "num_key_value_heads", 3, "num_attention_heads"), (kind, "head_dim", 3, "head_size"),
            (kind, "rope_theta", "10000", "rope_theta"), (kind, "rope_theta", -1.0, "rope_theta"),
            (kind, "rope_theta", 10**400, "rope_theta"), (kind, "rope_theta", float("nan"), "rope_theta"),
            (kind, "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
            (kind, "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling"),
            (kind, "rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_scaling"),
            (kind, "rope_scaling", [2.0], "rope_scaling"),
            (kind, "rope_scaling", {"factor": 2.0}, "rope_scaling.factor"),
            (kind, "rope_scaling", {"type": "default", "mrope_section": [1]}, "rope_scaling.mrope_section"),
            (kind, "rope_parameters", {"rope_type": "longrope"}, "rope_parameters"),
            (kind, "rope_parameters", {"rope_theta": 0}, "rope_parameters.rope_theta"),
            (kind, "rope_parameters", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
            (kind, "rope_parameters", {"full_attention": {"rope_theta": 1.0}}, "rope_parameters.full_attention"),
            (kind, "layer_types", ["full_attention", "sliding_attention", "linear_attention"], "layer_types"),
            (kind, "layer_types", ["full_attention"] * 2, "layer_types"),
            (kind, "layer_types", ["full_attention", "full_attention", "sliding_attention"], "layer_types"),
        ]  # fmt: skip
    for kind in ("llama", "mistral", "qwen2"):
        found += [
            (kind, "tie_word_embeddings", 1, "tie_word_embeddings"),
            (kind, "rope_scaling", {"rope_type": "llama3", **LLAMA3, "factor": ...}, "rope_scaling.factor"),
            (kind, "rope_scaling", {"rope_type": "llama3", **LLAMA3, "factor": "8"}, "rope_scaling.factor"),
            (kind, "rope_scaling", {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
            (kind, "rope_scaling", {"rope_type": "llama3", **LLAMA3, "beta_fast": 1}, "rope_scaling.beta_fast"),
            (kind, "rope_scaling", {"rope_type": "llama3", **LLAMA3, LONGEST: 0}, f"rope_scaling.{LONGEST}"),
        ]  # fmt: skip
    for kind in ("gemma", "gemma2"):
        found.append((kind, "rope_scaling", {"rope_type": "llama3", **LLAMA3}, "rope_scaling"))
    return [
        *found, ("gemma", "hidden_activation", "silu", "hidden_activation"),
        ("llama", "hidden_size", 65, "hidden_size"), ("gpt2", "n_embd", 33, "n_embd"),
        ("gpt2", "n_inner", 64, "n_inner"), ("gpt2", "hidden_size", 64, "hidden_size"),
        ("mistral", "sliding_window", -1, "sliding_window"),
        ("mistral", "layer_types", ["full_attention"] * 3, "layer_types"),
        ("llama", "layer_types", ["sliding_attention"] * 3, "layer_types"),
        ("qwen2", "layer_types", ["sliding_attention"] * 3, "sliding_window"),
        ("qwen2", "use_sliding_window", 1, "use_sliding_window"),
        ("qwen2", "max_window_layers", -1, "max_window_layers"),
        ("gemma2", "sliding_window", 0, "sliding_window"),
        ("gemma2", "layer_types", ["sliding_attention"] * 3, "layer_types"),
        ("gemma2", "layer_types", ["full_attention", "sliding_attention", "full_attention"], "layer_types"),
        ("gemma2", "query_pre_attn_scalar", 0, "query_pre_attn_scalar"),
        ("gemma2", "query_pre_attn_scalar", None, "query_pre_attn_scalar"),
        ("gemma2", "attn_logit_softcapping", 0, "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping", "30", "final_logit_softcapping"),
        ("llama", "eos_token_id", "2", "eos_token_id"), ("llama", "bos_token_id", [1, 2.0], "bos_token_id"),
        ("llama", "llmc_tokenizer", 7, "llmc_tokenizer"),
    ]  # fmt: skip


def test_what_is_refused(tmp_path: Path) -> None:
    """Each with the rest in order; the message names file and field in one line."""
    for kind, field, value, named in refused():
        if isinstance(value, dict):
            value = {name: one for name, one in value.items() if one is not ...}
        try:
            found = read(tmp_path, fields(kind, **{field: value}))
        except FileFormatError as error:
            assert (error.field, error.path) == (named, str(tmp_path / "config.json")), (kind, field, value, error)
            assert "\n" not in str(error)
        else:
            pytest.fail(f"{kind} with {field} = {value!r} was read as {found}")


def test_what_changes_nothing(tmp_path: Path) -> None:
    for kind in CLASSES:
        plain = read(tmp_path, fields(kind))
        others = {"something_new": 1, "dtype": "bfloat16", "rope_scaling": None}
        for field, harmless in (hfconfig.FOREIGN | others).items():
            for value in (harmless, None):
                assert read(tmp_path, fields(kind, **{field: value})) == plain, (kind, field)
        for field, allowed in hfconfig.MATHEMATICS[kind].items():
            for value in allowed:
                assert read(tmp_path, fields(kind, **{field: value})) == plain, (kind, field)
    assert read(tmp_path, fields("gpt2", n_embd=..., hidden_size=32, n_inner=128)) == read(tmp_path, fields("gpt2"))
    assert read(tmp_path, fields("gemma", hidden_act="gelu", hidden_activation=None)) == read(tmp_path, fields("gemma"))


@pytest.mark.parametrize("kind", ["gpt_neo", "qwen3", "mixtral", "gemma3_text", "", None, ["llama"], ...])
def test_other_architectures(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="model_type: is .*, llmc reads gpt2, llama, mistral, qwen2, gemma, "):
        read(tmp_path, fields("llama", model_type=kind))


# ---- styles ----------------------------------------------------------------------------------------

# As published, in what matters here.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257,
    },
    "tinyllama-1.1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {**LLAMA3, "factor": 32.0, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen-2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"], "attention_bias": False, "bos_token_id": 2, "eos_token_id": 1,
        "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "vocab_size": 256000,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "torch_dtype": "float32", "vocab_size": 256000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_the_presets(name: str, tmp_path: Path) -> None:
    """And still are when transformers 5 has written them in its style."""
    assert read(tmp_path, PUBLISHED[name]) == PRESETS[name]
    transformers_config(PUBLISHED[name]).save_pretrained(tmp_path)
    if name != "gpt2":
        assert {"rope_parameters", "dtype"} & set(json.loads((tmp_path / "config.json").read_text()))
    config, ids = hfconfig.read(tmp_path)
    assert config == PRESETS[name]
    assert ids["eos_token_id"] == PUBLISHED[name]["eos_token_id"]


ROPES: list[tuple[dict[str, Any], float, Scaling | None]] = [
    ({}, 10000.0, None),
    ({"rope_theta": 5}, 5.0, None),
    ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "rope_theta": 5.0}, 7.0, None),
    ({"rope_scaling": {"type": "default"}, "rope_theta": 5.0}, 5.0, None),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5.0}, 5.0, Scaling(8.0, 1.0, 4.0, 8192)),
    ({"rope_scaling": {"type": "llama3", **LLAMA3, "rope_theta": 6.0}}, 6.0, Scaling(8.0, 1.0, 4.0, 8192)),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 6.0, **LLAMA3}}, 6.0, Scaling(8.0, 1.0, 4.0, 8192)),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        10000.0, Scaling(8.0, 1.0, 4.0, 8192),
    ),
    (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if "max" not in k} | {"rope_type": "llama3"}},
        10000.0, Scaling(8.0, 1.0, 4.0, 40),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "theta", "scaling"), ROPES)
def test_rope(changes: dict[str, Any], theta: float, scaling: Scaling | None, tmp_path: Path) -> None:
    """What we make of it, and what transformers does."""
    values = fields("llama", **changes)
    config = read(tmp_path, values)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    theirs = transformers_config(json.loads(json.dumps(values))).rope_parameters
    assert theirs["rope_theta"] == theta
    assert theirs["rope_type"] == ("default" if scaling is None else "llama3")
    if scaling is not None:
        assert Scaling(*(theirs[field] for field in (*hfconfig.FACTORS, LONGEST))) == scaling


WINDOWS: list[tuple[dict[str, Any], int]] = [
    ({}, 0),
    ({"sliding_window": 9, "max_window_layers": 0}, 0),
    ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
    ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, 0),
    ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, 0),
    ({"use_sliding_window": True, "sliding_window": 9}, 0),
    ({"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"] * 3}, 9),
    ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 3}, 0),
]


@pytest.mark.parametrize(("changes", "window"), WINDOWS)
def test_qwen_windows(changes: dict[str, Any], window: int, tmp_path: Path) -> None:
    values = fields("qwen2", **changes)
    assert read(tmp_path, values).window == window
    theirs = transformers_config(values)
    kind = "sliding_attention" if window else "full_attention"
    assert theirs.layer_types == [kind] * 3 and (not window or theirs.sliding_window == window)


def test_qwen_windows_of_some_layers(tmp_path: Path) -> None:
    for changes, field in (
        ({"max_window_layers": 1}, "max_window_layers"),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 2]}, "layer_types"),
    ):
        values = fields("qwen2", use_sliding_window=True, sliding_window=9, **changes)
        with pytest.raises(FileFormatError, match=f"{field}: gives some layers a window"):
            read(tmp_path, values)


def test_gemma_2_in_other_numbers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = read(tmp_path, fields("gemma2", sliding_window=9, layer_types=kinds, attn_logit_softcapping=None))
    assert (config.version, config.window, config.attn_softcap, config.final_softcap) == (2, 9, 0.0, 30.0)
    assert [config.layer_window(layer) for layer in range(3)] == [9, 0, 9]
    config = read(tmp_path, fields("gemma2", layer_types=["full_attention"] * 3, final_logit_softcapping=None))
    assert (config.window, config.attn_softcap, config.final_softcap) == (0, 50.0, 0.0)


# ---- writing ---------------------------------------------------------------------------------------


def same_mathematics(config: Any, theirs: Any) -> None:
    """A configuration of ours and one of transformers', number by number."""
    if isinstance(config, gpt2.Config):
        assert (theirs.n_embd, theirs.n_head, theirs.n_layer) == (config.channels, config.num_heads, config.num_layers)
        assert (theirs.vocab_size, theirs.n_positions) == (config.vocab_size, config.max_seq_len)
        return
    for their, our in hfconfig.NUMBERS.items():
        assert getattr(theirs, their) == getattr(config, our), their
    assert (theirs.num_key_value_heads, theirs.head_dim) == (config.num_kv_heads, config.head_size)
    assert (theirs.rms_norm_eps, theirs.tie_word_embeddings) == (config.eps, config.tied)
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    scaling = getattr(config, "rope_scaling", None)
    assert (rope["rope_type"] == "llama3") == (scaling is not None)
    if scaling is not None:
        assert Scaling(*(rope[field] for field in (*hfconfig.FACTORS, LONGEST))) == scaling
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * config.num_layers
    for layer in range(config.num_layers):
        window = getattr(theirs, "sliding_window", None) if kinds[layer] == "sliding_attention" else None
        assert (window or 0) == config.layer_window(layer)
    if theirs.model_type == "gemma2":
        assert (theirs.attn_logit_softcapping or 0, theirs.final_logit_softcapping or 0) == (
            config.attn_softcap, config.final_softcap
        )  # fmt: skip
        assert theirs.query_pre_attn_scalar == config.query_scale


ODD: dict[str, Config] = {
    "qwen-window": replace(llama.PRESETS["qwen-2.5-0.5b"], window=100, rope_scaling=llama.LLAMA3),
    "mistral-tied": replace(llama.PRESETS["mistral-7b"], tied=True, rope_scaling=llama.LLAMA32),
    "heads-that-do-not-divide": llama.Config(40, 131, 2, 3, 32, num_kv_heads=3, head_size=10, hidden=7),
    "gemma-2-full": replace(gemma.PRESETS["gemma-2-2b"], window=0, final_softcap=0.0, query_scale=224.0),
}


@pytest.mark.parametrize("name", [*PRESETS, *ODD])
def test_written_and_read_again(name: str, tmp_path: Path) -> None:
    """By us it is the same, and by transformers number for number."""
    config: Any = (PRESETS | ODD)[name]
    hfconfig.write(tmp_path, config, {"eos_token_id": [5, 6], "bos_token_id": 1}, dtype="bf16")
    found, ids = hfconfig.read(tmp_path)
    assert found == config and type(found) is type(config)
    assert ids.pop("model_type") == hfconfig.model_type(config)
    assert ids == {"eos_token_id": [5, 6], "bos_token_id": 1, "pad_token_id": None}
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == ([5, 6], 1, None)
    assert theirs.dtype is torch.bfloat16
    assert theirs.architectures == [hfconfig.ARCHITECTURES[theirs.model_type]]
    same_mathematics(config, theirs)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    assert type(model).__name__ == theirs.architectures[0]
    assert model.num_parameters() == config.num_parameters
    theirs.save_pretrained(tmp_path)
    assert hfconfig.read(tmp_path)[0] == config


def test_what_is_no_mathematics_is_kept(tmp_path: Path) -> None:
    """Mistral without a window stays one, ids stay what they are."""
    extra = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "llmc_tokenizer": "bytes"}
    read(tmp_path, fields("mistral", sliding_window=None, **extra))
    config, ids = hfconfig.read(tmp_path)
    assert ids == extra | {"model_type": "mistral"}
    hfconfig.write(tmp_path, config, ids)
    assert hfconfig.read(tmp_path) == (config, ids)
    hfconfig.write(tmp_path, config)
    assert hfconfig.read(tmp_path)[1] == dict.fromkeys(hfconfig.IDS) | {"model_type": "llama"}
    read(tmp_path, fields("llama"))
    assert hfconfig.read(tmp_path)[1] == {"model_type": "llama"}


def test_a_model_of_no_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no name in transformers"):
        hfconfig.write(tmp_path, Config())
    assert list(tmp_path.iterdir()) == []


def test_two_original_lengths(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", **LLAMA3}
    read(tmp_path, fields("llama", rope_scaling=scaling, original_max_position_embeddings=8192))
    with pytest.raises(FileFormatError, match="original_max_position_embeddings: is 16, but the scaling of"):
        read(tmp_path, fields("llama", rope_scaling=scaling, original_max_position_embeddings=16))
