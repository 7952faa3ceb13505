"""Sources of models: presets, llm.c's files, Hugging Face folders in all their shapes; and saving.

Folders are made by the safetensors library or by transformers, never by llmc's own writer alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc import files, gpt2, hfconfig, hub, loading, tokenizer
from llmc.arena import Array
from llmc.errors import ConfigError, DownloadError, FileFormatError, LlmcError, MissingDependencyError
from llmc.gpt2 import GPT2, Config

numpy_files = pytest.importorskip("safetensors.numpy")

TINY = Config(max_seq_len=10, vocab_size=131, num_layers=2, num_heads=2, channels=32)


def random_model(config: Config = TINY, seed: int = 0) -> GPT2:
    """Every parameter random, biases too, so that no two tensors are alike."""
    model = GPT2(config, reference)
    rng = np.random.default_rng(seed)
    for _, array in model.params:
        array[...] = rng.standard_normal(array.shape) * 0.1
    model.params.wte[config.vocab_size :] = 0
    return model


def hf_config(config: Config = TINY, **changes: Any) -> dict[str, Any]:
    """config.json as the published GPT-2 has it."""
    values = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": config.max_seq_len,
        "n_embd": config.channels, "n_head": config.num_heads, "n_layer": config.num_layers,
        "n_positions": config.max_seq_len, "resid_pdrop": 0.1, "vocab_size": config.vocab_size,
    } | changes  # fmt: skip
    return {name: value for name, value in values.items() if value is not ...}


def hf_tensors(model: GPT2, prefix: str = "") -> dict[str, Array]:
    """The model's tensors under Hugging Face's names, matrices as Conv1D has them, written out by hand."""
    p, V = model.params, model.config.vocab_size
    tensors = {
        "wte.weight": p.wte[:V], "wpe.weight": p.wpe, "ln_f.weight": p.lnfw, "ln_f.bias": p.lnfb,
    }  # fmt: skip
    for i in range(model.config.num_layers):
        w = p.layer(i)
        tensors |= {
            f"h.{i}.ln_1.weight": w.ln1w, f"h.{i}.ln_1.bias": w.ln1b,
            f"h.{i}.attn.c_attn.weight": w.qkvw.T, f"h.{i}.attn.c_attn.bias": w.qkvb,
            f"h.{i}.attn.c_proj.weight": w.attprojw.T, f"h.{i}.attn.c_proj.bias": w.attprojb,
            f"h.{i}.ln_2.weight": w.ln2w, f"h.{i}.ln_2.bias": w.ln2b,
            f"h.{i}.mlp.c_fc.weight": w.fcw.T, f"h.{i}.mlp.c_fc.bias": w.fcb,
            f"h.{i}.mlp.c_proj.weight": w.fcprojw.T, f"h.{i}.mlp.c_proj.bias": w.fcprojb,
        }  # fmt: skip
    return {prefix + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def write_folder(folder: Path, tensors: dict[str, Array], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or hf_config()))
    numpy_files.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(source: str | Path, **options: Any) -> GPT2:
    return loading.load(source, ops=reference, **options)


def assert_same(model: GPT2, other: GPT2) -> None:
    assert model.config == other.config
    for row, array in model.params:
        np.testing.assert_array_equal(array, other.params[row.name], err_msg=row.name)


# ---- presets and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "stories", "d1"])
def test_presets_are_random(name: str) -> None:
    model = load(name, seed=3)
    assert model.config == gpt2.preset(name)
    again, other = load(name, seed=3), load(name, seed=4)
    assert_same(model, again)
    assert (model.params.wpe != other.params.wpe).any()


def test_preset_dimensions_can_be_replaced() -> None:
    model = load("tiny", vocab_size=99, max_seq_len=7)
    assert (model.config.vocab_size, model.config.max_seq_len) == (99, 7)
    assert model.tokenizer is None


def test_tokenizers_by_vocabulary() -> None:
    assert isinstance(load("tiny").tokenizer, tokenizer.ByteTokenizer)


def test_tokenizers_are_loaded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not before: reading GPT-2's vocabulary would be a good part of a short start."""
    loaded: list[str] = []
    monkeypatch.setattr(tokenizer, "load", lambda name, **_: loaded.append(name) or tokenizer.ByteTokenizer())
    loading.save_bin(load("tiny"), tmp_path / "model.bin")
    loading.save(load("tiny"), tmp_path / "folder", "gpt2")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "llmc_tokenizer": "bytes"}))
    loaded.clear()
    for source in ("tiny", tmp_path / "model.bin", tmp_path / "folder"):
        model = load(source)
        assert loaded == []
        assert model.tokenizer is model.tokenizer and model.tokenizer.name == "bytes"
        assert loaded == ["bytes"]
        loaded.clear()
    model = load("tiny")
    model.tokenizer = None
    assert model.tokenizer is None and loaded == [], "what is set replaces what was promised"


def test_preset_before_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "tiny", hf_tensors(random_model()))
    assert load("tiny").config == gpt2.PRESETS["tiny"]
    assert load("./tiny").config == TINY


@pytest.mark.parametrize("version", [1, 3, 5])
def test_bin(tmp_path: Path, version: int) -> None:
    model = random_model()
    loading.save_bin(model, tmp_path / "model.bin", version)
    again = load(tmp_path / "model.bin")
    if version == 5:
        for _, array in model.params:
            array[...] = array.astype(ml_dtypes.bfloat16)
    assert_same(again, model)


def test_wanted_dimensions_are_checked(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", hf_tensors(random_model()))
    load(folder, vocab_size=131, max_seq_len=5)
    with pytest.raises(ConfigError, match="vocab_size: 257"):
        load(folder, vocab_size=257)
    with pytest.raises(ConfigError, match="max_seq_len: 11"):
        load(folder, max_seq_len=11)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.bin", FileFormatError, "does not exist"),
        ("missing/model.bin", FileFormatError, "does not exist"),
        ("./missing", FileFormatError, "does not exist"),
        ("/missing/folder", FileFormatError, "does not exist"),
        ("storeis", ConfigError, "stories"),
        ("d13", ConfigError, "d24"),
        ("", ConfigError, "no known name"),
        (" ", ConfigError, "no known name"),
    ],
)
def test_no_such_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: type[LlmcError], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda name, **_: pytest.fail("asked the hub"))
    with pytest.raises(error, match=message):
        load(source)


def test_a_slip_in_a_path_does_not_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(hub, "fetch", lambda name, **_: pytest.fail("asked the hub"))
    with pytest.raises(FileFormatError, match="does not exist"):
        load("runs/missing")


def test_published_names_mean_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "cached", hf_tensors(random_model()))
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name, **_: asked.append(name) or folder)
    assert load("gpt2").config == TINY
    assert load("someone/model").config == TINY
    assert asked == ["openai-community/gpt2", "someone/model"]


@pytest.mark.parametrize("error", [DownloadError, MissingDependencyError])
def test_without_the_hub_the_twin_is_named(monkeypatch: pytest.MonkeyPatch, error: type[LlmcError]) -> None:
    def fail(name: str) -> Path:
        raise error(f"{name}: no network")

    monkeypatch.setattr(hub, "fetch", fail)
    for name, twin in loading.SAME_ARCHITECTURE.items():
        with pytest.raises(error, match=f"{name}: no network; '{twin}' is the same architecture"):
            load(name)
        assert gpt2.preset(twin) == gpt2.preset(name)


# ---- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_folder(tmp_path: Path, prefix: str) -> None:
    model = random_model()
    assert_same(load(write_folder(tmp_path / "folder", hf_tensors(model, prefix))), model)


def test_masks_and_tied_head_are_passed_over(tmp_path: Path) -> None:
    model = random_model()
    tensors = hf_tensors(model) | {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 10, 10), np.float32)),
        "h.1.attn.masked_bias": np.array(-1e4, np.float32),
        "h.1.attn.bias": np.tril(np.ones((1, 1, 10, 10), np.uint8)),
        "lm_head.weight": model.params.wte[: TINY.vocab_size],
    }
    assert_same(load(write_folder(tmp_path / "folder", tensors)), model)


def test_untied_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    head = model.params.wte[: TINY.vocab_size].copy()
    head[-1, -1] += 1e-6  # the very last value: every chunk is compared
    monkeypatch.setattr(files, "CHUNK", 1000)
    tied = model.params.wte[: TINY.vocab_size]
    load(write_folder(tmp_path / "tied", hf_tensors(model) | {"lm_head.weight": tied}))
    folder = write_folder(tmp_path / "folder", hf_tensors(model) | {"lm_head.weight": head})
    with pytest.raises(FileFormatError, match="lm_head.weight: differs"):
        load(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(tmp_path: Path, dtype: Any) -> None:
    model = random_model()
    tensors = {name: tensor.astype(dtype) for name, tensor in hf_tensors(model).items()}
    for _, array in model.params:
        array[...] = array.astype(dtype).astype(np.float32)
    assert_same(load(write_folder(tmp_path / "folder", tensors)), model)


def test_shards(tmp_path: Path) -> None:
    model = random_model()
    folder = tmp_path / "folder"
    tensors = hf_tensors(model, "transformer.")
    write_folder(folder, tensors)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        numpy_files.save_file(part, folder / place)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert_same(load(folder), model)

    for change, message in [
        ({"transformer.wte.weight": "../other.safetensors"}, "plain name"),
        ({"transformer.wte.weight": "pytorch_model.bin"}, "plain name"),
        ({"transformer.wte.weight": "missing.safetensors"}, "cannot be opened"),
        ({"transformer.wte.weight": places["transformer.wpe.weight"]}, "is not in"),
        ({"transformer.wte.weight": 3}, "file names"),
        ({"extra": next(iter(places.values()))}, "is not in"),
    ]:
        index.write_text(json.dumps({"weight_map": places | change}))
        with pytest.raises(FileFormatError, match=message):
            load(folder)
    index.write_text(json.dumps({"weight_map": {name: places[name] for name in list(places)[:-1]}}))
    with pytest.raises(FileFormatError, match="the index does not say so"):
        load(folder)


@pytest.mark.parametrize("name", ["wte.weight", "ln_f.bias", "h.1.attn.c_attn.weight", "h.0.mlp.c_proj.bias"])
def test_tensor_missing_or_misshapen(tmp_path: Path, name: str) -> None:
    tensors = hf_tensors(random_model())
    tensor = tensors.pop(name)
    with pytest.raises(FileFormatError, match=f"{name}: is missing"):
        load(write_folder(tmp_path / "folder", tensors))
    for wrong in (tensor[..., :-1], tensor[None], np.concatenate([tensor, tensor])):
        with pytest.raises(FileFormatError, match=f"{name}: has shape"):
            load(write_folder(tmp_path / "folder", tensors | {name: np.ascontiguousarray(wrong)}))
    with pytest.raises(FileFormatError, match=f"{name}: has dtype I32"):
        load(write_folder(tmp_path / "folder", tensors | {name: tensor.astype(np.int32)}))


def test_matrix_that_is_not_transposed(tmp_path: Path) -> None:
    model = random_model()
    tensors = hf_tensors(model) | {"h.0.mlp.c_fc.weight": model.params.layer(0).fcw}
    with pytest.raises(FileFormatError, match="h.0.mlp.c_fc.weight: has shape"):
        load(write_folder(tmp_path / "folder", tensors))


def test_unknown_and_double_tensors(tmp_path: Path) -> None:
    tensors = hf_tensors(random_model())
    for name in ("h.2.ln_1.weight", "score.weight", "h.0.crossattention.c_attn.weight"):
        with pytest.raises(FileFormatError, match=f"{name}: is not a tensor of this model"):
            load(write_folder(tmp_path / "folder", tensors | {name: tensors["ln_f.bias"]}))
    with pytest.raises(FileFormatError, match="is there twice"):
        load(write_folder(tmp_path / "folder", tensors | {"transformer.wpe.weight": tensors["wpe.weight"]}))


def test_nothing_is_allocated_for_a_wrong_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", hf_tensors(random_model()), hf_config(n_layer=10**9))
    with pytest.raises(FileFormatError, match="h.2.ln_1.weight: is missing"):
        load(folder)
    folder = write_folder(tmp_path / "folder", hf_tensors(random_model()), hf_config(n_embd=2 * 10**9))
    with pytest.raises(FileFormatError, match="has shape"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", None])
def test_pickles_are_not_read(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    if name:
        (tmp_path / name).write_bytes(b"\x80\x04not read")
    with pytest.raises(FileFormatError, match="model.safetensors: is missing") as caught:
        load(tmp_path)
    assert ("llmc reads no pickles" in str(caught.value)) == bool(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "gelu"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True), ("n_inner", 64), ("tie_word_embeddings", False),
        ("model_type", "gpt_neo"), ("model_type", ...),
        ("quantization_config", {"bits": 4}), ("pruned_heads", {"0": [1]}), ("llmc_tokenizer", 7),
        ("n_embd", 0), ("n_embd", "32"), ("n_embd", 32.0), ("n_embd", ...), ("n_embd", 33), ("n_head", 3),
        ("n_layer", -1), ("n_layer", True), ("n_positions", None), ("vocab_size", ...),
        ("llmc_tokenizer", "../../etc/passwd"), ("llmc_tokenizer", "cl100k"), ("llmc_tokenizer", "bytes"),
    ],
)  # fmt: skip
def test_config_fields(tmp_path: Path, field: str, value: Any) -> None:
    folder = write_folder(tmp_path / "folder", hf_tensors(random_model()), hf_config(**{field: value}))
    with pytest.raises(FileFormatError) as caught:
        load(folder)
    named = "n_embd" if field == "n_head" else field  # it is the pair that does not fit
    assert caught.value.field == named and "config.json" in caught.value.path


@pytest.mark.parametrize(
    "same",
    [
        {"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 128}, {"n_inner": None},
        {"scale_attn_weights": True}, {"reorder_and_upcast_attn": True}, {"attn_pdrop": 0.0},
        {"tie_word_embeddings": True}, {"activation_function": ...}, {"something_new": 1},
    ],
)  # fmt: skip
def test_config_fields_that_change_nothing(tmp_path: Path, same: dict[str, Any]) -> None:
    model = random_model()
    assert_same(load(write_folder(tmp_path / "folder", hf_tensors(model), hf_config(**same))), model)


def test_the_accepted_mathematics_is_the_models() -> None:
    assert hfconfig.MATHEMATICS["gpt2"]["layer_norm_epsilon"] == (gpt2.LAYERNORM_EPS,)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model_type": "gpt2"'])
def test_config_that_is_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(FileFormatError, match="config.json: JSON"):
        load(tmp_path)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="config.json: file: cannot be opened"):
        load(tmp_path)


# ---- damaged safetensors ---------------------------------------------------------------------------


def rewrite(path: Path, change: Any) -> None:
    """Let `change` edit the header's JSON (dict) of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "F64", "has dtype F64"), ("dtype", 4, "malformed"), ("dtype", "F16", "has 128 bytes"),
        ("shape", [31], "has shape"), ("shape", [-32], "malformed"), ("shape", 32, "malformed"),
        ("shape", [32.0], "malformed"), ("data_offsets", [0], "malformed"),
        ("data_offsets", None, "malformed"), ("data_offsets", [0, 128], "begins at byte"),
        ("data_offsets", [128, 0], "malformed"),
        ("data_offsets", [10**15, 10**15 + 128], "begins at byte"), ("shape", ..., "malformed"),
    ],
)  # fmt: skip
def test_malformed_header_entries(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = write_folder(tmp_path / "folder", hf_tensors(random_model()))

    def change(entries: dict[str, Any]) -> None:
        if value is ...:
            del entries["ln_f.weight"][key]
        else:
            entries["ln_f.weight"][key] = value

    rewrite(folder / "model.safetensors", change)
    with pytest.raises(FileFormatError, match=message):
        load(folder)


def test_truncated_and_oversized_safetensors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", hf_tensors(random_model()))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for size in (0, 7, 8, 9, 8 + length - 1, 8 + length, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(FileFormatError, match="header length|file size"):
            load(folder)
    path.write_bytes(data + b"\0")
    with pytest.raises(FileFormatError, match="too long"):
        load(folder)
    path.write_bytes((2**63).to_bytes(8, "little") + data[8:])
    with pytest.raises(FileFormatError, match="header length"):
        load(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_damage_is_refused_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    folder = write_folder(tmp_path / "folder", hf_tensors(random_model()))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for place, byte in changes:
        data[place % (8 + length)] = byte
    path.write_bytes(data)
    try:
        load(folder)
    except FileFormatError:
        pass


# ---- saving ----------------------------------------------------------------------------------------


def test_saved_folder_is_read_by_the_library_and_again(tmp_path: Path) -> None:
    model = random_model()
    folder = tmp_path / "new" / "folder"
    loading.save(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    found = numpy_files.load_file(folder / "model.safetensors")
    expected = hf_tensors(model, "transformer.")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    with pytest.importorskip("safetensors").safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same(load(folder), model)
    data = (folder / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0, "tensors begin on a multiple of 8 bytes"
    model.params.lnfb[...] += 1
    loading.save(model, folder)  # a later checkpoint in the same place
    assert_same(load(folder), model)


def test_tokenizer_goes_with_the_folder(tmp_path: Path) -> None:
    model = load("tiny")
    loading.save(model, tmp_path / "own")
    loading.save(model, tmp_path / "named", "bytes")
    for name in ("own", "named"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["llmc_tokenizer"] == "bytes" and config["eos_token_id"] == 256
        assert isinstance(load(tmp_path / name).tokenizer, tokenizer.ByteTokenizer)
    other = random_model()
    loading.save(other, tmp_path / "none")
    assert "llmc_tokenizer" not in json.loads((tmp_path / "none" / "config.json").read_text())
    assert load(tmp_path / "none").tokenizer is None


def test_tokenizer_file_goes_with_the_folder(tmp_path: Path) -> None:
    tokens = [bytes([i]) for i in range(1, 101)]
    tokenizer.write_tokenizer_file(tmp_path / "my.bin", tokens, 99)
    model = random_model()
    model.tokenizer = tokenizer.load(tmp_path / "my.bin")
    loading.save(model, tmp_path / "folder")
    (tmp_path / "my.bin").unlink()
    again = load(tmp_path / "folder")
    assert again.tokenizer.decode([64, 65]) == "AB" and again.tokenizer.eot == 99
    loading.save(again, tmp_path / "folder")  # over itself
    assert load(tmp_path / "folder").tokenizer.decode([64]) == "A"


def test_a_tokenizer_file_lies_in_the_folder(tmp_path: Path) -> None:
    """A downloaded config.json does not get to name files elsewhere."""
    tokenizer.write_tokenizer_file(tmp_path / "my.bin", [b"a", b"b"], 1)
    for name in ("../my.bin", str(tmp_path / "my.bin")):
        config = hf_config(llmc_tokenizer=name)
        with pytest.raises(FileFormatError, match="llmc_tokenizer"):
            load(write_folder(tmp_path / "folder", hf_tensors(random_model()), config))


def test_save_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write"):
        loading.save(random_model(), tmp_path / "file" / "folder")
    with pytest.raises(ConfigError, match="cannot write"):
        loading.save(random_model(), tmp_path / "file")


def test_a_tokenizer_that_cannot_be_fetched_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: object) -> None:
        raise DownloadError("no network")

    monkeypatch.setattr(tokenizer, "load", fail)
    model = load("tiny", vocab_size=50257)
    assert model.tokenizer is None
    with pytest.raises(DownloadError, match="no network"):
        loading.require_tokenizer(model)
    with pytest.raises(ConfigError, match="vocabulary of 131"):
        loading.require_tokenizer(random_model())


# ---- transformers ----------------------------------------------------------------------------------


def test_transformers_reads_what_llmc_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = random_model()
    loading.save(model, tmp_path)
    theirs, notes = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(found) for name, found in notes.items() if found} == {}
    tokens = np.random.default_rng(0).integers(TINY.vocab_size, size=(2, 10)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.eval().double()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours = model.logits(tokens)
    np.testing.assert_allclose(ours, expected, atol=2e-6 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", [True, False])
def test_llmc_reads_what_transformers_saves(tmp_path: Path, shard: bool, dtype: str, head: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=131, n_positions=10, n_embd=32, n_layer=2, n_head=2)
    theirs = (transformers.GPT2LMHeadModel if head else transformers.GPT2Model)(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="40KB" if shard else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shard
    model = load(tmp_path)
    tokens = np.random.default_rng(0).integers(131, size=(2, 10)).astype(np.int32)
    with torch.no_grad():
        states = theirs.eval().double()(torch.from_numpy(tokens.astype(np.int64)))[0]
        expected = states.numpy() if head else (states @ theirs.wte.weight.T).numpy()
    np.testing.assert_allclose(model.logits(tokens), expected, atol=2e-6 * np.abs(expected).max())
