"""The model, the trainer and the commands on a GPU, or its simulation, as a user has them: no adapter between.

Judged by the float64 reference.  In fp32 the limits are the CPU's.  tf32 rounds operands of products by up to 2^-11 of
themselves, bf16 every stored result by up to 2^-8; how that adds up over two layers has been measured on these models
(tf32: 3e-4 of the logits, 7e-4 of a gradient, bf16: ten to thirty times as much), and the limits leave three times that
for the order in which a tensor core sums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import reference

from llmc import gpt2, loading, memory, ops, sampling, training, verify
from llmc.__main__ import main
from llmc.adamw import AdamW
from llmc.arena import Array
from llmc.errors import ConfigError, DivergenceError
from llmc.torch_reference import perturb
from llmc.training import TrainConfig, train

CONFIG = gpt2.Config(max_seq_len=48, vocab_size=131, num_layers=2, num_heads=2, channels=32)
B, T = 2, 37
LIMITS = {  # logits, gradients, losses of six updates
    "fp32": (5e-6, 5e-6, {"raw": 2e-6, "perturbed": 5e-5}),
    "tf32": (1e-3, 2e-3, {"raw": 2e-4, "perturbed": 2e-3}),
    "bf16": (2e-2, 3e-2, {"raw": 2e-3, "perturbed": 2e-2}),
}
STORIES = {"init": "tiny", "batch_size": 2, "sequence_length": 16, "device": "cuda", "sample_every": 0, "val_every": 0}


@pytest.fixture
def backend(cuda: ModuleType) -> Iterator[Callable[..., ops.Ops]]:
    """`backend(dtype="bf16", ...)` is the GPU's, and set back afterwards."""
    before = {name: cuda.info()[name] for name in ("dtype", "gemm", "attention")}
    yield lambda **given: ops.load("cuda", **given)
    ops.load("cuda", **before)


def build(backend: ops.Ops, weights: str, dtype: str | None = None, masters: bool = True) -> gpt2.GPT2:
    """A model whose parameters are those of `weights`, the same numbers on every backend."""
    source = gpt2.GPT2(CONFIG, reference, "float32")  # type: ignore[arg-type]
    source.initialise(seed=7)
    if weights == "perturbed":
        perturb(source.params, seed=7)
    model = gpt2.GPT2(CONFIG, backend, dtype, masters=masters)
    for row, tensor in source.params:
        model.params[row.name][...] = tensor
    model.refresh()
    return model


def batch(seed: int = 11) -> tuple[Array, Array]:
    ids = np.random.default_rng(seed).integers(CONFIG.vocab_size, size=(2, B, T), dtype=np.int32)
    return ids[0], ids[1]


def optimizer_for(model: gpt2.GPT2, **options: Any) -> AdamW:
    assert model.grads is not None
    return AdamW(
        model.params.table, model.params, model.grads, model.ops, weights=model.weights, loss=model.total,
        weight_decay=0.1, **options,
    )  # fmt: skip


def updates(model: gpt2.GPT2, steps: int = 6) -> list[float]:
    x, y = batch()
    model.prepare(B, T)
    optimizer = optimizer_for(model)
    losses = []
    for _ in range(steps):
        losses.append(model.forward(x, y))
        model.backward()
        optimizer.step(1e-3)
    return losses


def gradients(model: gpt2.GPT2) -> dict[str, Array]:
    assert model.grads is not None
    V = CONFIG.vocab_size
    values = {row.name: model.ops.fetch(tensor)().copy() for row, tensor in model.grads}
    return {name: value[:V] if name == "wte" else value for name, value in values.items()}


def norm_ratio(a: Array, b: Array) -> float:
    return float(np.linalg.norm((a.astype(np.float64) - b).ravel()) / np.linalg.norm(b.ravel()))


# ---- against float64 -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["raw", "perturbed"])
@pytest.mark.parametrize(
    "options",
    [{"dtype": "fp32"}, {"dtype": "fp32", "gemm": "own"}, {"dtype": "tf32"}, {"dtype": "bf16"},
     {"dtype": "bf16", "gemm": "own"}],
    ids=lambda given: "-".join(given.values()),
)  # fmt: skip
def test_against_float64(backend: Callable[..., ops.Ops], options: dict[str, str], weights: str) -> None:
    model = build(backend(**options), weights)
    judge = build(reference, weights, "float64")  # type: ignore[arg-type]
    x, y = batch()
    logits, gradient, losses = LIMITS[options["dtype"]]
    right = judge.logits(x)
    assert np.abs(model.logits(x) - right).max() < logits * np.abs(right).max()
    for each in (model, judge):
        each.forward(x, y)
        each.backward()
    exact = gradients(judge)
    worst = {name: norm_ratio(found, exact[name]) for name, found in gradients(model).items()}
    assert max(worst.values()) < gradient, worst
    if options["dtype"] == "bf16":
        assert max(worst.values()) > 1e-4, "bf16 was not in use"
    np.testing.assert_allclose(updates(model), updates(judge), rtol=losses[weights])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replayed_is_run(
    backend: Callable[..., ops.Ops], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Losses and weights of six updates whose later ones are replayed: the same bits as with every op called anew."""
    results = []
    for check in ("1", "0"):  # LLMC_CUDA_CHECK=1 never records
        monkeypatch.setenv("LLMC_CUDA_CHECK", check)
        model = build(backend(dtype=dtype), "perturbed")
        results.append((updates(model), np.asarray(model.params.flat).tobytes()))
    assert results[0] == results[1]


def test_another_setting_is_recorded_anew(backend: Callable[..., ops.Ops]) -> None:
    """What was recorded in fp32 is not replayed once the process computes in tf32, and the other way round."""
    model = build(backend(dtype="fp32"), "perturbed")
    found = {"fp32": set(), "tf32": set()}
    for dtype in ("fp32", "fp32", "fp32", "tf32", "tf32", "tf32", "fp32", "fp32"):
        backend(dtype=dtype)
        found[dtype].add(model.loss(*batch()))
    assert len(found["fp32"]) == len(found["tf32"]) == 1
    assert found["fp32"] != found["tf32"]


@pytest.mark.parametrize(
    ("mode", "dtype"), [("gelu", "fp32"), ("gelu+norm", "fp32"), ("block", "fp32"), ("block", "bf16")]
)
def test_recompute_gives_the_same_bits(backend: Callable[..., ops.Ops], mode: str, dtype: str) -> None:
    """In bf16 `gelu` does not: what is recomputed comes from the stored sum, what is kept came from the exact one."""
    seen = []
    for recompute in ("none", mode):
        model = build(backend(dtype=dtype), "perturbed")
        model.prepare(B, T, recompute)
        for micro in range(2):
            model.gradients(*batch(), accumulate=micro > 0)
        assert model.grads is not None
        seen.append((np.asarray(model.total).tobytes(), np.asarray(model.grads.flat).tobytes()))
    assert seen[0] == seen[1]


def test_copies_follow_their_masters(backend: Callable[..., ops.Ops]) -> None:
    """What the layers read is the masters rounded to nearest, after loading and after every update."""
    model = build(backend(dtype="bf16"), "raw")
    assert (model.params.table[0].dtype, model.weights.table[0].dtype) == ("float32", "bfloat16")
    model.prepare(B, T)
    optimizer = optimizer_for(model)
    for _ in range(3):
        masters, copies = np.asarray(model.params.flat), np.asarray(model.weights.flat)
        np.testing.assert_array_equal(masters.astype(copies.dtype), copies)
        model.gradients(*batch())
        optimizer.step(1e-2)
    assert (masters != np.asarray(model.params.flat)).any()


def test_without_masters(backend: Callable[..., ops.Ops]) -> None:
    """Weights of bf16 alone learn by stochastic rounding: from updates far below their last place, too; one seed, one
    run."""

    def run(seed: int) -> tuple[list[float], bytes]:
        model = build(backend(dtype="bf16"), "raw", masters=False)
        assert model.weights is model.params and model.params.table[0].dtype == "bfloat16"
        model.prepare(B, T)
        optimizer = optimizer_for(model, seed=seed)
        losses = []
        for _ in range(40):
            losses.append(model.forward(*batch()))
            model.backward()
            optimizer.step(1e-5)  # weights of 0.02 have a last place of 1e-4
        return losses, np.asarray(model.params.flat).tobytes()

    losses, weights = run(1)
    assert np.mean(losses[-5:]) < losses[0] - 0.01
    assert (losses, weights) == run(1)
    assert weights != run(2)[1]


# ---- Llama, Mistral, Gemma -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama-3", "mistral", "qwen", "gemma-2"])
def test_architectures(backend: Callable[..., ops.Ops], name: str, dtype: str) -> None:
    """Against transformers in double: logits, gradients and, in fp32, five losses; and recomputing all but each layer's
    input gives the same gradients.  In bf16 the weights are a new model's."""
    architectures = pytest.importorskip("architectures")
    large = dtype == "fp32"
    right = architectures.verdict(name, exact=True, large=large)
    logits, gradient = (1e-5, 1e-5) if large else LIMITS["bf16"][:2]
    x, y = architectures.batch()
    model = architectures.build(name, backend(dtype=dtype), large=large)
    assert architectures.furthest(model.logits(x), right.logits) < logits
    found = architectures.backward(model, x, y)
    worst = architectures.worst(found, right.gradients)
    assert max(worst.values()) < gradient, worst
    if dtype == "bf16":
        assert max(worst.values()) > 1e-3, "bf16 was not in use"
    model.prepare(*x.shape, recompute="block")
    for row, value in architectures.backward(model, x, y).items():
        np.testing.assert_array_equal(value, found[row])
    if large:
        losses = architectures.train(architectures.build(name, model.ops), architectures.STEPS, x, y)
        np.testing.assert_allclose(losses, architectures.their_losses(name, exact=True), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 5e-6), ("bf16", 5e-2)])
@pytest.mark.parametrize("name", ["llama-3", "gemma-2"])
def test_architectures_decode(backend: Callable[..., ops.Ops], name: str, dtype: str, limit: float) -> None:
    """Two prompts of their own lengths, then token by token and several at once: the logits of the whole sequences."""
    architectures = pytest.importorskip("architectures")
    model = architectures.build(name, backend(dtype=dtype))
    x, _ = architectures.batch((2, 33))
    whole = model.logits(x).copy()
    cache, positions = model.new_cache(2, 33), np.array([17, 5], np.int32)
    for b in range(2):
        model.decode(cache.sequence(b), x[b : b + 1, : positions[b]].copy(), np.zeros(1, np.int32))
    for step in (1, 1, 9, 1, 4):
        ids = np.stack([x[b, positions[b] : positions[b] + step] for b in range(2)])
        logits = model.ops.fetch(model.decode(cache, ids, positions))()
        positions += step
        assert np.abs(logits - whole[[0, 1], positions - 1]).max() < limit * np.abs(whole).max()
    assert positions[0] == 33


# ---- train -----------------------------------------------------------------------------------------


def test_train_learns_and_saves(backend: Callable[..., ops.Ops], tmp_path: Path) -> None:
    """Events in the CPU's order, a loss that falls, a folder that loads on either device with the same numbers."""
    out = str(tmp_path / "out")
    config = TrainConfig(
        **{**STORIES, "dtype": "bf16", "steps": 12, "lr": 3e-3, "out": out, "val_every": 6, "val_batches": 1}
    )
    events = list(train(config))
    steps = [event for event in events if isinstance(event, training.Step)]
    names = [type(event).__name__ for event in events]
    expected = ["Started", "Validation", *["Step"] * 6, "Validation", *["Step"] * 6, "Validation", "Saved"]
    assert names == expected and [event.step for event in steps] == list(range(12))
    assert steps[-1].loss < steps[0].loss - 0.2
    assert all(event.tokens_per_second > 0 for event in steps)
    here, there = loading.load(out), loading.load(out, device="cuda", dtype="fp32")
    np.testing.assert_array_equal(here.params.flat, np.asarray(there.params.flat))


def test_train_is_the_cpu_s(backend: Callable[..., ops.Ops]) -> None:
    """The same losses and norms as on the CPU in fp32, accumulation and clipping included."""
    given = {**STORIES, "steps": 5, "total_batch": 64, "grad_clip": 0.5, "lr": 1e-3}
    ours, theirs = (
        [event for event in train(TrainConfig(**{**given, "device": device})) if isinstance(event, training.Step)]
        for device in ("cuda", "cpu")
    )
    assert len(ours) == 5
    np.testing.assert_allclose([e.loss for e in ours], [e.loss for e in theirs], rtol=2e-5)
    np.testing.assert_allclose([e.norm for e in ours], [e.norm for e in theirs], rtol=2e-4)


def test_divergence_is_not_applied(backend: Callable[..., ops.Ops], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    config = TrainConfig(**{**STORIES, "steps": 3, "out": out})
    list(train(config))
    saved = (tmp_path / "out" / "model.safetensors").read_bytes()
    model = loading.load(out, ops=backend(dtype="fp32"))
    model.params.lnfb[:1] = math.nan
    before = np.asarray(model.params.flat)
    with pytest.raises(DivergenceError, match="step 0: the loss is nan; the update was not applied"):
        list(train(config, model))
    np.testing.assert_array_equal(np.asarray(model.params.flat), before)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == saved


# ---- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "masters"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_the_plan_is_what_is_taken(
    backend: Callable[..., ops.Ops], monkeypatch: pytest.MonkeyPatch, dtype: str, masters: bool
) -> None:
    """To the byte: every array of a run, by the sizes that `empty` was asked for."""
    config = TrainConfig(**{**STORIES, "steps": 3, "dtype": dtype, "masters": masters, "val_every": 1})
    plan = training.memory_plan(config)
    device = backend(dtype=dtype)
    taken: list[int] = []
    real = device.empty

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        made = real(shape, dtype)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(device, "empty", empty)
    list(train(config))
    told = {part.name: part.nbytes for part in plan.parts}
    assert sum(taken) == plan.total - told["workspace, shared"] - told["workspace, library"]
    assert told["sampling cache"] == told["profile"] == 0
    assert ("weights in bf16" in told) == (dtype == "bf16" and masters)
    assert told["parameters"] == told["gradients"] * (2 if dtype == "bf16" and masters else 1)


def test_a_model_without_masters_is_planned_without(
    backend: Callable[..., ops.Ops], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the configuration says: a run that fits to the byte is not refused."""
    model = build(backend(dtype="bf16"), "raw", masters=False)
    config = TrainConfig(**{**STORIES, "dtype": "bf16", "sequence_length": 37})
    needed: list[int] = []
    monkeypatch.setattr(memory, "require", lambda make, B, mode, have, *, sequences, held: needed.append(
        make(B, mode).total - held))  # fmt: skip
    training.require_memory(config, model)
    model.prepare(B, T)
    training.require_memory(config, model)
    moments = 2 * 2 * model.params.nbytes
    assert needed[0] - needed[1] == model.nbytes - model.params.nbytes
    assert moments <= needed[1] < moments + (1 << 20)


def test_heads_that_are_too_wide_are_told_first(
    backend: Callable[..., ops.Ops], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, and by --dry-run."""
    monkeypatch.setitem(loading.PRESETS, "tiny", gpt2.Config(64, 257, 1, 1, 320))
    out = tmp_path / "out"
    config = TrainConfig(**{**STORIES, "out": str(out)})
    for attempt in (lambda: training.memory_plan(config), lambda: list(train(config))):
        with pytest.raises(ConfigError, match="head_size: heads of 320 channels; .* takes at most 256"):
            attempt()
    assert not out.exists()


def test_too_large_says_what_would_fit(backend: Callable[..., ops.Ops]) -> None:
    have = memory.device(backend(dtype="fp32"))
    config = TrainConfig(**{**STORIES, "init": "d12", "batch_size": 1 << 14, "sequence_length": 64, "train_data": ""})
    with pytest.raises(ConfigError, match=r"memory: the run needs .* it would fit with .*batch_size \d+"):
        training.require_memory(config)
    assert have.total >= have.available > 0


def test_dry_run(cuda: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --dry-run --init tiny --batch-size 2 --sequence-length 16 --device cuda --dtype bf16"
    assert main(words.split()) == 0
    text = capsys.readouterr().out
    assert "weights in bf16" in text and "workspace, library" in text and "available now" in text


# ---- commands --------------------------------------------------------------------------------------


def test_decode_is_forward(backend: Callable[..., ops.Ops]) -> None:
    """A prompt at once, then token by token, then several at once: the logits of the whole sequence."""
    for dtype, limit in (("fp32", 5e-6), ("bf16", 2e-2)):
        model = build(backend(dtype=dtype), "perturbed")
        x, _ = batch()
        whole = model.logits(x).copy()
        cache, position = model.new_cache(B), 0
        for step in (17, 1, 1, 7, 1, 10):
            places = np.full(B, position, np.int32)
            logits = model.ops.fetch(model.decode(cache, x[:, position : position + step].copy(), places))()
            position += step
            assert np.abs(logits - whole[:, position - 1]).max() < limit * np.abs(whole).max()
        assert position == T


def test_sample(backend: Callable[..., ops.Ops], capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy text is the CPU's in fp32."""
    texts = []
    for device in ("cuda", "cpu"):
        words = f"sample --model tiny --prompt ab -n 40 --temperature 0 --device {device}"
        assert main(words.split()) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    model = loading.load("tiny", device="cuda", dtype="bf16", masters=False)
    assert len(sampling.generate(model, [1, 2, 3], 70)) == 70  # past the window of 64


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_verify(backend: Callable[..., ops.Ops], tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("torch")
    words = f"reference --init tiny --out {tmp_path} --batch-size 2 --sequence-length 33 --perturbed --lr 1e-3"
    assert main([*words.split(), "--weight-decay", "0.1"]) == 0
    files = [str(tmp_path / name) for name in ("tiny.bin", "tiny_debug_state.bin")]
    assert main(["verify", *files, "--device", "cuda", "--dtype", dtype]) == 0
    report = verify.verify(*files, device="cuda", dtype=dtype)
    errors = {check.name: check.error for check in report.checks}
    assert len(errors) == 2 + 16 + 10
    if dtype == "bf16":
        assert errors["logits"] > 1e-4
        assert not all(check.error <= 5e-6 for check in report.checks)


def test_profile(cuda: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = "train --steps 3 --init tiny --batch-size 2 --sequence-length 16 --device cuda --profile --sample-every 0"
    assert main([*words.split(), "--val-every", "0", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "attention_backward" in text and "adamw_step" in text
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
