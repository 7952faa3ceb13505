"""Safetensors of whole folders: what transformers saves is read to the bit, what is written transformers reads; shards,
types, and how files replace one another.

Damaged files, names and shapes of a GPT-2 folder are in test_loading.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference

from llmc import files, hfconfig, loading, safetensors_folder
from llmc.arena import Arena, Array, Row
from llmc.errors import ConfigError, FileFormatError
from llmc.model import Config
from llmc.safetensors_folder import INDEX_FILE, WEIGHTS_FILE

numpy_files = pytest.importorskip("safetensors.numpy")

V, C, L = 131, 24, 2
Q, KV, F = 24, 8, 20
LAYER = "model.layers.{layer}."

# A table by hand: every kind of row there is.
ROWS = [
    Row("wte", (256, C), decay=True, hf_name="model.embed_tokens.weight"),
    Row("ln1w", (C,), layers=L, hf_name=LAYER + "input_layernorm.weight"),
    Row(
        "qkvw", (Q + 2 * KV, C), layers=L,
        hf_name=tuple((f"{LAYER}self_attn.{n}_proj.weight", rows) for n, rows in (("q", Q), ("k", KV), ("v", KV))),
    ),
    Row(
        "qkvb", (Q + 2 * KV,), layers=L,
        hf_name=tuple((f"{LAYER}self_attn.{n}_proj.bias", rows) for n, rows in (("q", Q), ("k", KV), ("v", KV))),
    ),
    Row("attprojw", (C, Q), layers=L, hf_name=LAYER + "self_attn.o_proj.weight"),
    Row(
        "gateupw", (2 * F, C), layers=L, hf_name=tuple((f"{LAYER}mlp.{n}_proj.weight", F) for n in ("gate", "up"))
    ),
    Row("downw", (C, F), layers=L, hf_name=LAYER + "mlp.down_proj.weight", transpose=True),
    Row("lnfw", (C,), hf_name="model.norm.weight"),
    Row("head", (256, C), decay=True, hf_name="lm_head.weight"),
]  # fmt: skip
TIED = ROWS[:-1]


def arena_of(rows: list[Row] = ROWS, dtype: str = "float32", seed: int | None = None) -> Arena:
    """An arena of normals with padding in use, or of a number that nothing here is."""
    arena = Arena([row._replace(dtype=dtype) for row in rows], reference.empty)
    rng = np.random.default_rng(seed)
    for _, array in arena:
        array[...] = 77 if seed is None else rng.standard_normal(array.shape)
    return arena


def by_hand(arena: Arena) -> dict[str, Array]:
    """A file's tensors for an arena over ROWS, put together without hf_name."""
    tensors = {"model.embed_tokens.weight": arena.wte[:V], "model.norm.weight": arena.lnfw}
    for layer in range(L):
        w, name = arena.layer(layer), f"model.layers.{layer}."
        tensors |= {
            f"{name}input_layernorm.weight": w.ln1w,
            f"{name}self_attn.q_proj.weight": w.qkvw[:Q], f"{name}self_attn.q_proj.bias": w.qkvb[:Q],
            f"{name}self_attn.k_proj.weight": w.qkvw[Q : Q + KV], f"{name}self_attn.k_proj.bias": w.qkvb[Q : Q + KV],
            f"{name}self_attn.v_proj.weight": w.qkvw[Q + KV :], f"{name}self_attn.v_proj.bias": w.qkvb[Q + KV :],
            f"{name}self_attn.o_proj.weight": w.attprojw,
            f"{name}mlp.gate_proj.weight": w.gateupw[:F], f"{name}mlp.up_proj.weight": w.gateupw[F:],
            f"{name}mlp.down_proj.weight": w.downw.T,
        }  # fmt: skip
    if any(row.name == "head" for row in arena.table):
        tensors["lm_head.weight"] = arena.head[:V]
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def assert_same(found: Arena, expected: Arena, dtype: Any = None) -> None:
    """To the bit, `expected` rounded to `dtype` first; padding is 0."""
    for row, array in found:
        values = expected[row.name].copy()
        if row.name in ("wte", "head"):
            values[V:] = 0
        values = values if dtype is None else values.astype(dtype)
        assert array.tobytes() == values.astype(array.dtype).tobytes(), row.name


def save(folder: Path, tensors: dict[str, Array]) -> Path:
    folder.mkdir(exist_ok=True)
    numpy_files.save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def weights(folder: Path) -> dict[str, Array]:
    """All tensors, by the library's reader."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = numpy_files.load_file(path)
        assert not part.keys() & found.keys()
        found |= part
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("into", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_type_into_every_arena(tmp_path: Path, dtype: Any, into: str, prefix: str) -> None:
    expected, found = arena_of(seed=1), arena_of(dtype=into)
    tensors = {name.replace("model.", prefix, 1): t.astype(dtype) for name, t in by_hand(expected).items()}
    safetensors_folder.read(save(tmp_path / "folder", tensors), found, V)
    assert_same(found, expected, dtype)


def test_bfloat16_is_not_touched(tmp_path: Path) -> None:
    """NaNs with their payloads, subnormals, -0: every one of 65536 patterns."""
    row = Row("wte", (512, 128), "bfloat16", hf_name="model.embed_tokens.weight")
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(row.shape)
    save(tmp_path, {"embed_tokens.weight": values})
    arena = Arena([row], reference.empty)
    safetensors_folder.read(tmp_path, arena, len(values))
    assert arena.wte.tobytes() == values.tobytes()
    safetensors_folder.write(tmp_path, arena, len(values), dtype="bf16")
    assert weights(tmp_path)["model.embed_tokens.weight"].tobytes() == values.tobytes()


def test_buffers_are_passed_over(tmp_path: Path) -> None:
    expected, found = arena_of(seed=1), arena_of()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.rotary_emb.inv_freq": np.ones(4, np.float64),
    }
    safetensors_folder.read(save(tmp_path, by_hand(expected) | buffers), found, V)
    assert_same(found, expected)
    for name in ("norm.inv_freq", "model.x.rotary_emb.inv_freq", "rotary_emb.inv_freq.weight"):
        with pytest.raises(FileFormatError, match=f"{name}: is not a tensor"):
            safetensors_folder.check(save(tmp_path, by_hand(expected) | {name: np.ones(4)}), ROWS, V)


def test_a_head_beside_a_table_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as wte, of whatever type; else it is refused before anything is written."""
    monkeypatch.setattr(files, "CHUNK", 100)
    expected, found = arena_of(TIED, seed=1), arena_of(TIED)
    expected.wte[...] = expected.wte.astype(np.float16)
    wte = expected.wte[:V]
    for head in (wte.copy(), wte.astype(np.float16)):
        safetensors_folder.read(save(tmp_path, by_hand(expected) | {"lm_head.weight": head}), found, V)
        assert_same(found, expected)
    other = wte.copy()
    other[-1, -1] += 1e-3
    found = arena_of(TIED)
    with pytest.raises(FileFormatError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        safetensors_folder.read(save(tmp_path, by_hand(expected) | {"lm_head.weight": other}), found, V)
    with pytest.raises(FileFormatError, match=r"lm_head\.weight: has shape \(130, 24\), expected \(131, 24\)"):
        safetensors_folder.check(save(tmp_path, by_hand(expected) | {"lm_head.weight": other[1:]}), TIED, V)
    assert all((array == 77).all() for _, array in found)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.up_proj.weight"]
)
def test_parts_that_are_missing_or_misshapen(tmp_path: Path, name: str) -> None:
    tensors, found = by_hand(arena_of(seed=1)), arena_of()
    tensor = tensors.pop(name)
    with pytest.raises(FileFormatError, match=f"{name}: is missing"):
        safetensors_folder.read(save(tmp_path, tensors), found, V)
    for wrong in (tensor[:-1], tensor[..., None]):
        with pytest.raises(FileFormatError, match=f"{name}: has shape"):
            safetensors_folder.read(save(tmp_path, tensors | {name: np.ascontiguousarray(wrong)}), found, V)
    with pytest.raises(FileFormatError, match=r"model\.layers\.2\.x: is not a tensor of this model"):
        safetensors_folder.read(save(tmp_path, tensors | {name: tensor, "model.layers.2.x": tensor}), found, V)
    assert all((array == 77).all() for _, array in found), "nothing is written"


# ---- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", np.float32), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)]
)
def test_written_types(tmp_path: Path, dtype: str, kind: Any, held: str) -> None:
    arena = arena_of(dtype=held, seed=2)
    safetensors_folder.write(tmp_path, arena, V, dtype=dtype)
    found, expected = weights(tmp_path), by_hand(arena)
    assert names(tmp_path) == {WEIGHTS_FILE} and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == kind
        assert found[name].tobytes() == tensor.astype(kind).tobytes(), name
    again = arena_of(dtype=held)
    safetensors_folder.read(tmp_path, again, V)
    assert_same(again, arena, kind)


@pytest.mark.parametrize("value", [65520.0, -1e5, 3e38])
def test_what_fp16_cannot_hold(tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 7)
    arena = arena_of(seed=2)
    safetensors_folder.write(tmp_path, arena, V)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    arena.layer(1).gateupw[-1, -1] = value
    with pytest.raises(ConfigError, match=r"fp16 cannot hold model\.layers\.1\.mlp\.up_proj\.weight"):
        safetensors_folder.write(tmp_path, arena, V, dtype="fp16")
    assert names(tmp_path) == {WEIGHTS_FILE} and (tmp_path / WEIGHTS_FILE).read_bytes() == before
    arena.layer(1).gateupw[-1, -1] = 65519  # rounds to the largest, 65504
    arena.layer(0).ln1w[:2] = np.inf, np.nan  # are what they are
    arena.wte[V:] = 1e9  # is not written
    safetensors_folder.write(tmp_path, arena, V, dtype="fp16")
    assert weights(tmp_path)["model.layers.1.mlp.up_proj.weight"][-1, -1] == 65504


def test_options(tmp_path: Path) -> None:
    for options in ({"dtype": "fp8"}, {"max_shard_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            safetensors_folder.write(tmp_path, arena_of(seed=1), V, **options)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("limit", [1, 4 * C * 30, 4 * C * V, 30_000])
def test_shards(tmp_path: Path, limit: int) -> None:
    """No more than `limit` bytes of data in any, but for one tensor alone; as few as that order allows."""
    arena = arena_of(seed=3)
    safetensors_folder.write(tmp_path, arena, V, max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    parts = [numpy_files.load_file(path) for path in shards]
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert all(part and (size <= limit or len(part) == 1) for size, part in zip(sizes, parts, strict=True))
    expected = by_hand(arena)
    assert sum(len(part) for part in parts) == len(expected) and len(shards) > 1
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in expected.values())}
    for path, part in zip(shards, parts, strict=True):
        for name, tensor in part.items():
            assert index["weight_map"].pop(name) == path.name
            assert tensor.tobytes() == expected[name].tobytes()
    assert index["weight_map"] == {}
    found = arena_of()
    safetensors_folder.read(tmp_path, found, V)
    assert_same(found, arena)


LIMITS = {"one": 1 << 30, "few": 20_000, "more": 10_000}


@pytest.mark.parametrize("before", LIMITS)
@pytest.mark.parametrize("after", LIMITS)
def test_a_save_over_another(tmp_path: Path, before: str, after: str) -> None:
    """Files of the earlier layout go, and no others."""
    kept = {"pytorch_model.bin", "model.fp16.safetensors", "other-00001-of-00002.safetensors", "notes-model.txt"}
    for name in kept:
        (tmp_path / name).write_bytes(b"x")
    safetensors_folder.write(tmp_path, arena_of(seed=4), V, max_shard_bytes=LIMITS[before])
    safetensors_folder.write(tmp_path, arena_of(seed=5), V, max_shard_bytes=LIMITS[after])
    (fresh := tmp_path / "fresh").mkdir()
    safetensors_folder.write(fresh, arena_of(seed=5), V, max_shard_bytes=LIMITS[after])
    assert names(tmp_path) == kept | names(fresh) | {"fresh"}
    for name in names(fresh):
        assert (tmp_path / name).read_bytes() == (fresh / name).read_bytes()


class Stop(Exception):
    pass


def interruptions(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The process ends at the `at`th rename or removal, before it takes place."""
    left = iter(range(at, -1, -1))

    def stopping(function: Any) -> Any:
        def stop(path: Any, *more: Any, **options: Any) -> Any:
            if ".tmp" in str(path) and not more:
                return function(path, *more, **options)  # what is done for tidiness after it
            if next(left, 0) == 0:
                raise Stop
            return function(path, *more, **options)

        return stop

    monkeypatch.setattr(os, "replace", stopping(os.replace))
    monkeypatch.setattr(Path, "unlink", stopping(Path.unlink))


@pytest.mark.parametrize("after", LIMITS)
@pytest.mark.parametrize("before", LIMITS)
def test_a_save_that_is_cut_off(tmp_path: Path, before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is: a reader finds the old model or the new, or, over shards of the same names, none."""
    old, new = arena_of(seed=4), arena_of(seed=5)
    outcomes = []
    for at in range(40):
        folder = tmp_path / str(at)
        folder.mkdir()
        safetensors_folder.write(folder, old, V, max_shard_bytes=LIMITS[before])
        with monkeypatch.context() as patch:
            interruptions(patch, at)
            try:
                safetensors_folder.write(folder, new, V, max_shard_bytes=LIMITS[after])
                done = True
            except Stop:
                done = False
        found = arena_of()
        try:
            safetensors_folder.read(folder, found, V)
        except FileFormatError as error:
            assert "model.safetensors: is missing" in str(error) and before == after != "one"
            outcomes.append("none")
        else:
            outcomes.append("new" if found.wte[0, 0] == new.wte[0, 0] else "old")
            assert_same(found, new if outcomes[-1] == "new" else old)
        assert not any(".tmp" in name for name in names(folder))
        if (folder / INDEX_FILE).exists():
            index = json.loads((folder / INDEX_FILE).read_text())
            assert set(index["weight_map"].values()) <= names(folder)
        if done:
            break
    assert done and outcomes[-1] == "new" and outcomes[0] == "old"
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)


def test_a_write_that_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last shard: the others, complete, vanish too."""
    safetensors_folder.write(tmp_path, arena_of(seed=4), V)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    left = iter(range(len(by_hand(arena_of())) - 2, -1, -1))

    def emit(file: Any, values: Array, dtype: Any) -> None:
        if next(left) == 0:
            raise OSError(28, "No space left on device")
        file.write(values.astype(dtype).tobytes())

    monkeypatch.setattr(safetensors_folder, "emit", emit)
    with pytest.raises(ConfigError, match="cannot write .*No space left"):
        safetensors_folder.write(tmp_path, arena_of(seed=5), V, max_shard_bytes=LIMITS["few"])
    assert names(tmp_path) == {WEIGHTS_FILE} and (tmp_path / WEIGHTS_FILE).read_bytes() == before


# ---- text files ------------------------------------------------------------------------------------


def test_text_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    text = {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    assert safetensors_folder.copy_text_files(source, target) == []
    for name in text | {"config.json", "model.safetensors", "README.md", "pytorch_model.bin"}:
        (source / name).write_bytes(name.encode())
    (source / "merges.txt").rename(source / "blob")
    (source / "merges.txt").symlink_to("blob")  # as in the hub's cache
    (target / "vocab.json").write_bytes(b"old")
    assert set(safetensors_folder.copy_text_files(source, target)) == text
    assert names(target) == text
    assert all((target / name).read_bytes() == name.encode() for name in text - {"merges.txt"})
    assert (target / "merges.txt").read_bytes() == b"merges.txt" and not (target / "merges.txt").is_symlink()
    before = {name: (source / name).stat().st_ino for name in text}
    assert set(safetensors_folder.copy_text_files(source, source)) == text, "over itself"
    assert {name: (source / name).stat().st_ino for name in text} == before
    (source / "vocab.json").unlink()
    (source / "vocab.json").mkdir()
    safetensors_folder.copy_text_files(source, target)
    assert (target / "vocab.json").read_bytes() == b"vocab.json"
    with pytest.raises(ConfigError, match="cannot write"):
        safetensors_folder.copy_text_files(source, tmp_path / "missing")


# ---- transformers ----------------------------------------------------------------------------------


SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 60, "intermediate_size": 22, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 10, "max_position_embeddings": 40,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "llama": ("LlamaConfig", SIZES | {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", SIZES | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 5, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2Config", SIZES | {"tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", SIZES),
    "gemma2": ("Gemma2Config", SIZES | {"sliding_window": 5, "query_pre_attn_scalar": 17}),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@pytest.fixture(params=MODELS)
def theirs(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A random model of transformers, norms and biases too."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    kind, options = MODELS[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(pad_token_id=None, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    yield model.eval()


def load(folder: Path, dtype: str = "float32") -> tuple[Config, Arena]:
    config, _ = hfconfig.read(folder)
    arena = Arena(config.parameter_rows(dtype), reference.empty)
    safetensors_folder.read(folder, arena, config.vocab_size)
    return config, arena


@pytest.mark.parametrize(("dtype", "shard"), [("fp32", "20KB"), ("bf16", "1GB"), ("fp16", "20KB")])
def test_there_and_back(theirs: Any, dtype: str, shard: str, tmp_path: Path) -> None:
    """transformers saves, llmc reads and writes, transformers reads: all is as it was, to the bit, logits too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = theirs.to(getattr(torch, DTYPES[dtype]))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / INDEX_FILE).exists() == (shard != "1GB")
    config, arena = load(tmp_path / "theirs", "bfloat16" if dtype == "bf16" else "float32")

    (ours := tmp_path / "ours").mkdir()
    limit = 20_000 if shard == "1GB" else 1 << 30  # the other way round
    safetensors_folder.write(ours, arena, config.vocab_size, dtype=dtype, max_shard_bytes=limit)
    hfconfig.write(ours, config, dtype=dtype)
    assert (ours / INDEX_FILE).exists() == (shard == "1GB")
    read = transformers.AutoModelForCausalLM.from_pretrained
    again, notes = read(ours, output_loading_info=True, attn_implementation="eager")
    assert {name: list(found) for name, found in notes.items() if found} == {}
    assert type(again) is type(theirs) and again.dtype == theirs.dtype
    state, expected = again.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
    tokens = torch.arange(2 * 30).reshape(2, 30) * 7 % V
    with torch.no_grad():
        first = read(tmp_path / "theirs", attn_implementation="eager")(tokens).logits
        assert torch.equal(again(tokens).logits, first)
    assert load(ours)[0] == config


def test_the_whole_way(theirs: Any, tmp_path: Path) -> None:
    """A model that is loaded from transformers' folder computes what transformers does, and so does what it saves."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs.save_pretrained(tmp_path / "theirs")
    model = loading.load(tmp_path / "theirs", ops=reference)
    tokens = np.random.default_rng(0).integers(V, size=(2, 19), dtype=np.int32)
    loading.save(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        expected = again.double()(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(model.logits(tokens) - expected).max() < 1e-5 * np.abs(expected).max()
    assert all(torch.equal(again.state_dict()[name], tensor.double()) for name, tensor in theirs.state_dict().items())
