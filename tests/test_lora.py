"""Adapters: against PEFT, on both kinds of model; what they leave alone; merging; training; their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import judge
import numpy as np
import pytest
import reference
from guard import Array
from judge import norm_ratio

from llmc import convert, gpt2, llama, loading, lora, training
from llmc import ops as _ops
from llmc.adamw import AdamW
from llmc.errors import ConfigError, FileFormatError
from llmc.lora import LoRA
from llmc.model import Model

B, T = 2, 19
LLAMA = llama.Config(40, 131, 2, 4, 48, num_kv_heads=2, head_size=16, hidden=77)
GPT2 = gpt2.Config(40, 131, 2, 3, 48)
TARGETS = {"llama": ("q_proj", "v_proj", "gate_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj", "c_fc")}
CONFIGS: dict[str, Any] = {"llama": LLAMA, "gpt2": GPT2}


def theirs(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        return judge.make(transformers.GPT2Config(
            vocab_size=131, n_positions=40, n_embd=48, n_layer=2, n_head=3, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
        ))  # fmt: skip
    return judge.make(transformers.LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=77, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=40, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ))  # fmt: skip


def batch() -> tuple[Array, Array]:
    ids = np.random.default_rng(3).integers(131, size=(2, B, T), dtype=np.int32)
    return ids[0], ids[1]


def ours(kind: str, ops: ModuleType, dtype: str = "float32", **options: Any) -> Model:
    model = CONFIGS[kind].build(ops, dtype=dtype, **options)
    model.initialise(5)
    return model


def random(adapters: lora.Adapters) -> None:
    """Adapters as after some training: b is not 0."""
    draw = np.random.default_rng(8)
    for _, tensor in adapters.params:
        tensor[...] = (0.2 * draw.standard_normal(tensor.shape)).astype(np.float32)
    adapters.refresh()


def gradients(model: Model) -> dict[str, Array]:
    model.forward(*batch())
    model.backward()
    return {row.name: np.array(tensor) for row, tensor in model.adapters.grads}


@pytest.mark.parametrize("kind", CONFIGS)
def test_against_peft(cpu: ModuleType, kind: str) -> None:
    """Logits and every adapter's gradient; PEFT's names are ours."""
    peft, torch = pytest.importorskip("peft"), judge.torch
    wanted = LoRA(4, 6.0, TARGETS[kind])
    base = theirs(kind)
    model = judge.fill(ours(kind, cpu), base)
    adapters = lora.attach(model, wanted)
    random(adapters)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS[kind])))
    wrapped = wrapped.double().eval()
    parameters = dict(wrapped.named_parameters())
    used = set()

    def name(hf_name: str, layer: int) -> str:
        return hf_name.format(layer=layer).replace(".weight", ".default.weight")

    for row, tensor in adapters.params:
        for layer in range(row.layers):
            used.add(name(row.hf_name, layer))
            parameters[name(row.hf_name, layer)].data.copy_(torch.from_numpy(tensor[layer]))
    assert used == {key for key in parameters if "lora_" in key}
    x, y = batch()
    out = wrapped(torch.from_numpy(x).long(), use_cache=False).logits
    judged = out.detach().numpy()
    assert np.abs(model.logits(x) - judged).max() < 1e-5 * np.abs(judged).max()
    torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.from_numpy(y).long().flatten()).backward()
    model.prepare(B, T)
    found = gradients(model)
    for row in adapters.table:
        for layer in range(row.layers):
            right = parameters[name(row.hf_name, layer)].grad.numpy()
            assert norm_ratio(found[row.name][layer], right) < 1e-5, (row.name, layer)


@pytest.mark.parametrize("kind", CONFIGS)
def test_new_adapters_change_nothing(cpu: ModuleType, kind: str) -> None:
    model = ours(kind, cpu)
    x, _ = batch()
    before = model.logits(x)
    lora.attach(model, LoRA(3))
    np.testing.assert_array_equal(model.logits(x), before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging(cpu: ModuleType, kind: str) -> None:
    """The merged model computes what the adapted one did, and has gradients of its own again."""
    model = ours(kind, cpu)
    adapters = lora.attach(model, LoRA(4, 8.0, TARGETS[kind]))
    random(adapters)
    x, y = batch()
    adapted = model.logits(x)
    adapters.merge(model)
    assert model.adapters is None
    merged = model.logits(x)
    assert np.abs(merged - adapted).max() < 5e-6 * np.abs(adapted).max()
    assert np.abs(merged - ours(kind, cpu).logits(x)).max() > 0.1 * np.abs(adapted).max()
    model.forward(x, y)
    model.backward()
    assert model.grads is not None and np.abs(np.asarray(model.grads.wte)).max() > 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_changes_the_adapters_alone(cpu: ModuleType, kind: str) -> None:
    """Some updates lower the loss; no weight moves; nothing holds gradients of the weights."""
    model = ours(kind, cpu)
    adapters = lora.attach(model, LoRA(4))
    x, y = batch()
    model.prepare(B, T)
    before = model.params.buffer.tobytes()
    optimizer = AdamW(adapters.table, adapters.params, adapters.grads, model.ops)
    losses = []
    for _ in range(40):
        losses.append(model.forward(x, y))
        model.backward()
        optimizer.step(2e-2)
    assert losses[-1] < losses[0] - 0.3  # of log 131 = 4.88, with a head as small as it was drawn
    assert model.params.buffer.tobytes() == before and model.grads is None


@pytest.mark.parametrize("recompute", ["gelu", "gelu+norm", "block"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_recompute_gives_the_same_bits(cpu: ModuleType, kind: str, recompute: str) -> None:
    found = []
    for mode in ("none", recompute):
        model = ours(kind, cpu)
        random(lora.attach(model, LoRA(3, 5.0)))
        model.prepare(B, T, mode)
        found.append({name: value.tobytes() for name, value in gradients(model).items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_narrow_weights(cpu: ModuleType, kind: str) -> None:
    """Gradients on bfloat16 matrices are those on the same numbers in float32."""
    narrow = ours(kind, cpu, narrow=True)
    wide = ours(kind, reference, "float64")
    for row, tensor in wide.params:
        tensor[...] = narrow.params[row.name].astype(np.float64)
    for model in (narrow, wide):
        random(lora.attach(model, LoRA(4, 8.0, TARGETS[kind])))
        model.prepare(B, T)
    x, _ = batch()
    right = wide.logits(x)
    assert np.abs(narrow.logits(x) - right).max() < 5e-6 * np.abs(right).max()
    found, judged = gradients(narrow), gradients(wide)
    for name, gradient in found.items():
        assert norm_ratio(gradient, judged[name]) < 5e-6, name


def test_accumulation(cpu: ModuleType) -> None:
    """Two halves, added, are the whole."""
    whole, halves = (ours("llama", cpu) for _ in range(2))
    x, y = batch()
    for model in (whole, halves):
        random(lora.attach(model, LoRA(4)))
        model.prepare(B, T)
    right = gradients(whole)
    for i in range(2):
        halves.forward(x[i : i + 1].copy(), y[i : i + 1].copy(), scale=1 / x.size, accumulate=i > 0)
        halves.backward(accumulate=i > 0)
    for row, tensor in halves.adapters.grads:
        assert norm_ratio(np.asarray(tensor), right[row.name]) < 2e-6, row.name


def test_decoding_with_adapters(cpu: ModuleType) -> None:
    """A prompt longer than any batch before, then token by token: the adapted model's own logits."""
    model = ours("llama", cpu)
    random(lora.attach(model, LoRA(4, 4.0)))
    x, _ = batch()
    model.prepare(1, 4)
    whole, cache, position = model.logits(x), model.new_cache(B, T), 0
    for step in (11, 1, 1, 6):
        found = model.decode(cache, x[:, position : position + step].copy(), np.full(B, position, np.int32))
        position += step
        np.testing.assert_allclose(found, whole[:, position - 1], rtol=0, atol=5e-6 * np.abs(whole).max())


def test_what_cannot_be(cpu: ModuleType) -> None:
    model = ours("llama", cpu)
    with pytest.raises(ConfigError, match=r"lora_targets: the model has no module 'c_attn'; choose from all, q_proj"):
        lora.attach(model, LoRA(4, 8.0, ("q_proj", "c_attn")))
    assert not model.frozen and model.adapters is None
    for options, field in (((0, 1.0), "lora_rank"), ((1, 0.0), "lora_alpha"), ((1, 1.0, ()), "lora_targets")):
        with pytest.raises(ConfigError, match=field):
            LoRA(*options)  # type: ignore[arg-type]
    lora.attach(model, LoRA(2))
    with pytest.raises(ConfigError, match="adapters already"):
        lora.attach(model, LoRA(2))
    narrow = ours("llama", cpu, narrow=True)
    adapters = lora.attach(narrow, LoRA(2))
    with pytest.raises(ConfigError, match="float32"):
        adapters.merge(narrow)


# ---- folders ---------------------------------------------------------------------------------------


def folder_of(kind: str, path: Path) -> Path:
    """A model in a Hugging Face folder, with a tokenizer of bytes in it."""
    config = CONFIGS[kind]
    model = replace(config, vocab_size=257).build(_ops.load("cpu"))
    model.initialise(4)
    loading.save(model, path, "bytes")
    return path


def run(path: Path, base: Path, **options: Any) -> list[float]:
    settings = {
        "init": str(base), "out": str(path), "steps": 30, "batch_size": 2, "sequence_length": 16, "lr": 1e-2,
        "val_every": 0, "sample_every": 0, "lora_rank": 3, **options,
    }  # fmt: skip
    events = training.train(training.TrainConfig(**settings))
    return [event.loss for event in events if isinstance(event, training.Step)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_leaves_a_folder_that_peft_reads(cpu: ModuleType, tmp_path: Path, kind: str, dtype: str) -> None:
    """And that llmc goes on from, samples from, and merges; the model it belongs to stays as it was."""
    peft, torch = pytest.importorskip("peft"), judge.torch
    base, out, merged = folder_of(kind, tmp_path / "base"), tmp_path / "adapters", tmp_path / "merged"
    before = (base / "model.safetensors").read_bytes()
    losses = run(out, base, dtype=dtype)
    assert losses[-1] < losses[0]
    assert (base / "model.safetensors").read_bytes() == before
    assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()
    model = loading.load(out, dtype="fp32")
    x, _ = batch()
    right = model.logits(x)
    wrapped = peft.AutoPeftModelForCausalLM.from_pretrained(str(out)).double().eval()
    with torch.no_grad():
        theirs = wrapped(torch.from_numpy(x).long(), use_cache=False).logits.numpy()
    assert np.abs(right - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert model.tokenizer.name == "bytes" and loading.read_config(out) == model.config
    again = run(tmp_path / "more", out, lora_rank=0, dtype=dtype)
    assert again[0] < losses[0]
    convert.convert(out, merged)
    whole = loading.load(merged)
    assert whole.adapters is None and whole.tokenizer.name == "bytes"
    assert np.abs(whole.logits(x) - right).max() < 1e-5 * np.abs(right).max()


def test_folders_that_are_refused(cpu: ModuleType, tmp_path: Path) -> None:
    """By the name of the file and the field."""
    base, out = folder_of("llama", tmp_path / "base"), tmp_path / "adapters"
    run(out, base, steps=1)
    good = json.loads((out / "adapter_config.json").read_text())
    for field, value in (
        ("peft_type", "IA3"), ("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("modules_to_save", ["lm_head"]),
        ("r", 0), ("lora_alpha", None), ("target_modules", ".*q_proj"), ("base_model_name_or_path", None),
    ):  # fmt: skip
        (out / "adapter_config.json").write_text(json.dumps({**good, field: value}))
        with pytest.raises(FileFormatError, match=rf"adapter_config.json: {field}"):
            loading.load(out)
    (out / "adapter_config.json").write_text(json.dumps({**good, "target_modules": ["q_proj"]}))
    with pytest.raises(FileFormatError, match="adapter_model.safetensors: .* is not a tensor of this model"):
        loading.load(out)
    (out / "adapter_config.json").write_text(json.dumps({**good, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(FileFormatError, match="base_model_name_or_path: .*gone does not exist"):
        loading.load(out)
    with pytest.raises(ConfigError, match="lora_targets: means nothing without adapters"):
        training.TrainConfig(lora_targets="q_proj")
    (out / "adapter_config.json").write_text(json.dumps(good))
    with pytest.raises(ConfigError, match=r"lora_rank: .*adapters already"):
        run(tmp_path / "other", out, lora_rank=5)
    with pytest.raises(ConfigError, match=r"lora_rank: .*random"):
        run(tmp_path / "other", Path("llama-tiny"))


def test_a_run_with_adapters_allocates_what_was_told(cpu: ModuleType, tmp_path: Path) -> None:
    """What the plan says of parameters, adapters and their moments is what there is."""
    base = folder_of("llama", tmp_path / "base")
    for dtype in ("fp32", "bf16"):
        config = training.TrainConfig(
            init=str(base), lora_rank=3, batch_size=2, sequence_length=16, dtype=dtype, sample_every=0
        )
        parts = {part.name: part.nbytes for part in training.memory_plan(config).parts}
        model = loading.load(base, dtype=dtype, narrow=dtype == "bf16")
        adapters = lora.attach(model, LoRA(3))
        model.prepare(2, 16)
        assert adapters.grads is not None and model.acts is not None
        assert parts["frozen parameters"] == model.params.nbytes
        assert parts["adapters"] == parts["gradients"] == parts["AdamW m"] == adapters.params.nbytes
        own = sum(parts[name] for name in ("adapters", "gradients", "adapters' activations"))
        assert own == adapters.nbytes
    loading.load(base, dtype="fp32")


def test_a_model_and_adapters_do_not_hide_each_other(cpu: ModuleType, tmp_path: Path) -> None:
    """Adapters are not written where a model lies; a model that is written where adapters lay replaces them."""
    base, out = folder_of("llama", tmp_path / "base"), tmp_path / "adapters"
    with pytest.raises(ConfigError, match=r"out: .*base holds a model: adapters need a folder of their own"):
        run(base, base, steps=1)
    assert loading.load(base).adapters is None
    run(out, base, steps=1)
    with pytest.raises(ConfigError, match="adapter_config.json exists"):
        convert.convert(out, out)
    convert.convert(out, out, force=True)
    assert loading.load(out).adapters is None and not (out / "adapter_model.safetensors").exists()
    good = tmp_path / "good"
    run(good, base, steps=1)
    fields = json.loads((good / "adapter_config.json").read_text())
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(good)}))
    for use in (loading.load, loading.read_config, loading.text_folder):
        with pytest.raises(FileFormatError, match="base_model_name_or_path: .*good holds adapters, not a model"):
            use(nested)


def test_what_could_not_be_saved_is_told_before_the_first_update(cpu: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 1, "sequence_length": 8, "steps": 2, "val_every": 0, "sample_every": 0}

    def first(model: Model, **options: Any) -> None:
        next(training.train(training.TrainConfig(**settings, **options), model))

    with pytest.raises(ConfigError, match=r"lora_rank: .*random"):
        first(loading.load("llama-tiny"), lora_rank=2, out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"lora_rank: .*bfloat16"):
        first(loading.load("llama-tiny", narrow=True))
    base, out = folder_of("llama", tmp_path / "base"), tmp_path / "adapters"
    run(out, base, steps=1)
    merged = loading.load(out)
    merged.adapters.merge(merged)
    with pytest.raises(ConfigError, match=r"lora_rank: .*random"):  # the base's name is not its name any more
        first(merged, lora_rank=2, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "llmc_tokenizer": None}))
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"tokenizer\.json"):
        next(training.train(training.TrainConfig(**settings, init=str(base), out=str(tmp_path / "out"))))
    assert not (tmp_path / "out").exists()


def test_the_plan_for_a_given_model_is_that_of_its_adapters(cpu: ModuleType, tmp_path: Path) -> None:
    base, out = folder_of("llama", tmp_path / "base"), tmp_path / "adapters"
    run(out, base, steps=1)
    settings: dict[str, Any] = {"batch_size": 1, "sequence_length": 8, "steps": 1, "sample_every": 0}
    for init, model in ((str(out), None), ("stories", loading.load(out))):
        config = training.TrainConfig(init=init, **settings)
        shape = loading.read_config(out)
        plan = training._plan(config, shape, _ops.load("cpu"), "float32", False, model)
        assert [part.name for part in plan.parts[:2]] == ["frozen parameters", "adapters"]
    whole = training._plan(
        training.TrainConfig(init=str(out), **settings), shape, _ops.load("cpu"), "float32", False, loading.load(base)
    )
    assert whole.parts[0].name == "parameters"


def test_adapters_grow_and_what_was_recorded_is_forgotten(cpu: ModuleType) -> None:
    """A long prompt between two batches takes larger scratch: both go on with it."""
    model = ours("llama", cpu)
    random(lora.attach(model, LoRA(4, 4.0)))
    model.prepare(1, 4)
    x, y = (ids[:1, :4].copy() for ids in batch())
    before = model.forward(x, y)
    assert model._replays
    cache = model.new_cache(1, T)
    model.decode(cache, batch()[0][:1, :17].copy(), np.zeros(1, np.int32))
    assert not model._replays
    assert model.forward(x, y) == before


def test_a_gpt2_of_another_tokenizer_keeps_it(cpu: ModuleType, tmp_path: Path) -> None:
    """The size of its vocabulary does not make it GPT-2's, or bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    base = folder_of("gpt2", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "llmc_tokenizer": None}))
    assert loading.load(base).tokenizer.name == "bytes"
    vocabulary = {chr(97 + i): i for i in range(26)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(base / "tokenizer.json"))
    assert loading.load(base).tokenizer.encode("abz") == [0, 1, 25]
