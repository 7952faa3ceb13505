"""Llama, Mistral, Qwen and Gemma: what must hold of every architecture, judged by transformers.

Taken at its word, transformers is good to about 2e-6: it casts norms and softmax to float32 even in a float64 model.
In double throughout (`architectures.in_double`) it says what the float64 reference says, to 1e-12.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import architectures
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, STEPS, V, backward, batch, build, furthest, optimizer_for, train, worst
from judge import names as hf_names
from judge import norm_ratio, torch

from llmc import lora
from llmc.arena import PADDED, Array
from llmc.model import RECOMPUTE

LIMIT = 1e-5  # of logits (of the largest), of a gradient (of its norm), of five losses: the project's goal
names = pytest.mark.parametrize("name", ARCHITECTURES)


# ---- against transformers --------------------------------------------------------------------------


@names
def test_reference_is_transformers(name: str) -> None:
    """The float64 reference run as a backend: the architecture is the one that transformers has, to the letter."""
    judge = architectures.verdict(name, exact=True)
    model = build(name, reference, dtype="float64")
    x, y = batch()
    assert furthest(model.logits(x), judge.logits) < 1e-12
    off = worst(backward(model, x, y), judge.gradients)
    assert max(off.values()) < 1e-12, off
    losses = train(build(name, reference, dtype="float64"), STEPS, x, y)
    np.testing.assert_allclose(losses, architectures.their_losses(name, exact=True), rtol=1e-12)


@names
def test_every_tensor_is_named_once(name: str) -> None:
    """Rows have the parameters of transformers, each in one place, of the same number of elements."""
    config = ARCHITECTURES[name].ours
    ours = [tensor for row in config.parameter_rows() for parts in hf_names(row) for tensor in parts]
    theirs = dict(architectures.theirs(name).named_parameters())
    assert sorted(ours) == sorted(theirs)
    assert config.num_parameters == sum(tensor.numel() for tensor in theirs.values())


@names
def test_against_transformers(each_isa: ModuleType, name: str) -> None:
    judge = architectures.verdict(name)
    model = build(name, each_isa)
    x, y = batch()
    assert furthest(model.logits(x), judge.logits) < LIMIT
    off = worst(backward(model, x, y), judge.gradients)
    assert max(off.values()) < LIMIT, off
    np.testing.assert_allclose(train(model, STEPS, x, y), architectures.their_losses(name), rtol=LIMIT)


@names
@pytest.mark.parametrize(("large", "limit"), [(False, 2e-2), (True, 6e-2)], ids=["new", "large"])
def test_bf16(each_isa_bf16: ModuleType, name: str, large: bool, limit: float) -> None:
    """Each gradient of a new model within 2e-2 of its norm, as GPT-2's, and within 6e-2 where scores and logits are
    large: PyTorch's autocast has up to 1.1e-2 and 8.5e-2 on these."""
    judge = architectures.verdict(name, exact=True, large=large)
    off = worst(backward(build(name, each_isa_bf16, large=large), *batch()), judge.gradients)
    assert max(off.values()) < limit, off
    assert max(off.values()) > 1e-4, "bf16 was not in use"


@names
def test_ragged_batches(cpu: ModuleType, name: str) -> None:
    """One token, odd lengths, the longest."""
    for shape in ((1, 1), (3, 7), (2, 80)):
        model, exact = build(name, cpu), build(name, reference, dtype="float64")
        x, y = batch(shape)
        off = worst(backward(model, x, y), backward(exact, x, y))
        if shape == (1, 1):  # softmax of one score: no gradient reaches queries and keys, of either
            off.pop("qkvw")
        assert max(off.values()) < LIMIT, (shape, off)
        assert furthest(model.losses, exact.losses) < LIMIT


# ---- decode ----------------------------------------------------------------------------------------


@names
def test_decode_is_forward(each_isa: ModuleType, name: str) -> None:
    """Two prompts of their own lengths, then token by token and several at once: the logits of the whole sequences."""
    model = build(name, each_isa)
    x, _ = batch((2, 45))
    whole = model.logits(x).copy()
    limit = 5e-6 * np.abs(whole).max()
    cache, positions = model.new_cache(2, 45), np.array([17, 5], np.int32)
    for b in range(2):
        prompt, start = x[b : b + 1, : positions[b]].copy(), np.zeros(1, np.int32)
        logits = model.decode(cache.sequence(b), prompt, start)
        np.testing.assert_allclose(logits[0], whole[b, positions[b] - 1], rtol=0, atol=limit)
    for step in (1, 1, 9, 1, 4, 1, 11):
        ids = np.stack([x[b, positions[b] : positions[b] + step] for b in range(2)])
        logits = model.decode(cache, ids, positions)
        positions += step
        np.testing.assert_allclose(logits, whole[[0, 1], positions - 1], rtol=0, atol=limit)
    assert positions[0] == 45


def likeliest(text: Array, logits: Array) -> Array:
    """`text` (1,T) with the likeliest token that is not in it yet: without that bar a random model with a tied head
    soon repeats itself."""
    logits = logits.copy()
    logits[0, text[0]] = -np.inf
    return np.append(text, logits.argmax(axis=1, keepdims=True), axis=1).astype(np.int32)


@names
def test_greedy_generation(cpu: ModuleType, name: str) -> None:
    """64 tokens, each the likeliest: the same with the cache, without it, and by transformers."""
    model = build(name, cpu)
    prompt = np.random.default_rng(5).permutation(V)[None, :9].astype(np.int32)
    cached, whole, cache = prompt, prompt, model.new_cache(1)
    logits = model.decode(cache, prompt, np.array([0], np.int32))
    for position in range(9, 73):
        cached = likeliest(cached, logits)
        logits = model.decode(cache, cached[:, -1:].copy(), np.array([position], np.int32))
        whole = likeliest(whole, model.logits(whole)[:, -1])
    np.testing.assert_array_equal(cached, whole)
    with torch.no_grad():
        said = architectures.theirs(name)(torch.from_numpy(whole).long(), use_cache=False).logits.numpy()
    for position in range(9, 73):
        text = whole[:, : position + 1]
        np.testing.assert_array_equal(text, likeliest(text[:, :-1], said[:, position - 1]))


# ---- training --------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("mode", RECOMPUTE[1:])
def test_recompute_gives_the_same_bits(cpu: ModuleType, name: str, mode: str) -> None:
    """Losses, gradients and, after two accumulated updates, weights: those of "none"."""
    results = []
    for recompute in ("none", mode):
        model = build(name, cpu)
        x, y = batch((2, 33))
        model.prepare(*x.shape, recompute=recompute)
        optimizer = optimizer_for(model)
        assert model.grads is not None
        seen: list[object] = []
        for _ in range(2):
            for micro in range(2):
                seen.append(model.forward(x, y, accumulate=micro > 0))
                model.backward(accumulate=micro > 0)
                seen.append(model.grads.buffer.tobytes())
            optimizer.step(1e-3)
            seen += [model.loss(y, x), model.params.buffer.tobytes()]
        results.append(seen)
    assert results[0] == results[1]


@names
def test_what_is_recomputed_costs_its_time_and_no_more(cpu: ModuleType, name: str) -> None:
    """Calls of each op beyond those of "none": the last layer is still there, a block's output is not needed."""

    class Counting:
        def __init__(self) -> None:
            self.calls: Counter[str] = Counter()

        def __getattr__(self, op: str) -> Any:
            self.calls[op] += 1
            return getattr(cpu, op)

    counts = {}
    config = ARCHITECTURES[name].ours
    for mode in RECOMPUTE:
        counting = Counting()
        model = config.build(counting)
        x, y = batch()
        model.prepare(*x.shape, recompute=mode)
        counting.calls.clear()
        model.forward(x, y)
        model.backward()
        counts[mode] = counting.calls
    again = config.num_layers - 1
    gate = "geglu_forward" if name.startswith("gemma") else "swiglu_forward"
    branches = name == "gemma-2"  # what enters a branch's norm is needed by its backward
    assert counts["gelu"] - counts["none"] == {gate: again}
    assert counts["gelu+norm"] - counts["none"] == {gate: again, "rmsnorm_forward": 2 * again}
    assert counts["block"] - counts["none"] == {
        "rmsnorm_forward": (2 if branches else 1) * again, "linear_forward": (4 if branches else 3) * again,
        "rope_forward": again, "attention_forward": again, "residual_rmsnorm_forward": again, gate: again,
    }  # fmt: skip


@names
def test_backward_overwrites_what_an_earlier_batch_left(cpu: ModuleType, name: str) -> None:
    fresh, used = build(name, cpu), build(name, cpu)
    x, y = batch()
    backward(used, y, x)
    for model in (fresh, used):
        backward(model, x, y)
    assert fresh.grads is not None and used.grads is not None
    np.testing.assert_array_equal(fresh.grads.buffer, used.grads.buffer)


@names
def test_accumulation_is_the_larger_batch(cpu: ModuleType, name: str) -> None:
    whole, halves = build(name, cpu), build(name, cpu)
    x, y = batch((4, 21))
    exact = backward(whole, x, y)
    for i, part in enumerate((slice(0, 2), slice(2, 4))):
        halves.forward(x[part].copy(), y[part].copy(), scale=1.0 / x.size, accumulate=i > 0)
        halves.backward(accumulate=i > 0)
    off = worst(architectures.gradients(halves), exact)
    assert max(off.values()) < 5e-6, off


@names
def test_padding_stays_zero(cpu: ModuleType, name: str) -> None:
    model = ARCHITECTURES[name].ours.build(cpu)
    model.initialise(seed=3)
    x, y = batch()
    assert abs(model.loss(x, y) - np.log(V)) < 0.1, "a new model guesses"
    before = model.loss(x, y)
    assert train(model, 3, x, y)[-1] < before
    assert model.grads is not None
    for arena in (model.params, model.grads):
        for row, tensor in arena:
            assert tensor.any(), row.name
            assert row.name not in PADDED or not tensor[V:].any(), row.name


@pytest.mark.parametrize("name", ["mistral", "gemma-2"])
@pytest.mark.heavy
def test_bit_identical_for_any_number_of_threads(each_isa: ModuleType, name: str) -> None:
    """Losses, and every parameter after three updates; one op or another is in both."""
    x, y = batch((3, 71))
    isa, results = each_isa.info()["isa"], []
    for threads in (1, 2, 3):
        each_isa.configure(isa, threads)
        model = build(name, each_isa)
        results.append((train(model, 3, x, y, grad_clip=1.0), model.params.buffer.tobytes()))
    assert results[0] == results[1] == results[2]


# ---- frozen ----------------------------------------------------------------------------------------


@names
def test_matrices_of_bf16_count_as_what_they_are(each_isa: ModuleType, name: str) -> None:
    """Logits, losses and decode of a frozen model: those of the same numbers in float32."""
    frozen, wide = build(name, each_isa, narrow=True), build(name, each_isa)
    rounded = False
    for row, tensor in frozen.params:
        value = tensor.astype(np.float32)
        rounded |= bool((wide.params[row.name] != value).any())
        wide.params[row.name][...] = value
    assert rounded and frozen.params.qkvw.dtype == "bfloat16" and frozen.params.lnfw.dtype == "float32"
    x, y = batch()
    assert furthest(frozen.logits(x), wide.logits(x)) < 5e-6
    assert abs(frozen.forward(x, y) / wide.forward(x, y) - 1) < 1e-6
    frozen.backward()
    assert frozen.grads is None
    start = np.zeros(2, np.int32)
    for model in (frozen, wide):
        model.decode(model.new_cache(2), x, start)
    for ids in (x[:, :1].copy(), x[:, :5].copy()):
        ours, same = (model.decode(model.new_cache(2), ids, start).copy() for model in (frozen, wide))
        assert furthest(ours, same) < 5e-6


@names
@pytest.mark.parametrize("mode", ["none", "block"])
def test_adapters(name: str, mode: str) -> None:
    """In float64: the loss of a frozen model with adapters on all matrices is that of w + scale B A, and their
    gradients are scale B^T dW and scale dW A^T."""
    model, merged = (build(name, reference, dtype="float64") for _ in range(2))
    adapters = lora.attach(model, lora.LoRA(rank=3))
    random, scale = np.random.default_rng(2), adapters.lora.scale
    a, b = ([adapters.params[getattr(part, which).name] for part in adapters.parts] for which in "ab")
    for part, part_a, part_b in zip(adapters.parts, a, b, strict=True):
        for tensor in (part_a, part_b):
            tensor[...] = 0.1 * random.standard_normal(tensor.shape)
        merged.params[part.row][:, part.column : part.column + part.width] += scale * part_b @ part_a
    x, y = batch()
    model.prepare(*x.shape, recompute=mode)
    np.testing.assert_allclose(model.forward(x, y), merged.forward(x, y), rtol=1e-12)
    model.backward()
    merged.backward()
    assert adapters.grads is not None and merged.grads is not None and len(adapters.parts) == 7
    for part, part_a, part_b in zip(adapters.parts, a, b, strict=True):
        dw = scale * merged.grads[part.row][:, part.column : part.column + part.width]
        assert norm_ratio(adapters.grads[part.a.name], part_b.swapaxes(1, 2) @ dw) < 1e-12, part
        assert norm_ratio(adapters.grads[part.b.name], dw @ part_a.swapaxes(1, 2)) < 1e-12, part
