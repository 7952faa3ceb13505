"""`verify` against PyTorch: it must say yes to what is right, and no to every single thing that is wrong."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference

from llmc import checkpoint, data, loading, torch_reference, verify
from llmc.arena import Array
from llmc.errors import ConfigError, FileFormatError, MissingDependencyError
from llmc.gpt2 import GPT2, PRESETS, Config
from llmc.torch_reference import Written, perturb, run
from llmc.verify import Check, Recipe, Report, print_report

torch = pytest.importorskip("torch")

TENSORS = tuple(row.name for row in PRESETS["tiny"].parameter_rows())
SMALL: dict[str, Any] = {"B": 2, "T": 16, "ops": reference}
LIMIT = verify.LIMITS["fp32"].gradient
# With these, ten updates show what the usual recipe hides: decay and its rows, beta2, eps.
TELLING: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.5, "eps": 1e-4, "beta2": 0.95}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return run("tiny", tmp_path_factory.mktemp("made"), dtype="float64", **SMALL)


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return run("tiny", tmp_path_factory.mktemp("telling"), dtype="float64", **SMALL, **TELLING)


def copied(made: Written, folder: Path) -> Written:
    """The three files, free to be damaged."""
    paths = [Path(shutil.copy(path, folder)) for path in (made.model, made.debug_state, made.recipe)]
    return Written(*paths, losses=made.losses)


def check(made: Written, ops: Any = reference, **options: Any) -> Report:
    return verify.verify(made.model, made.debug_state, ops=ops, **options)


def failing(report: Report) -> list[str]:
    return [entry.name for entry in report.checks if not entry.ok]


def faulty(**ops: Any) -> SimpleNamespace:
    """The reference backend with some operations replaced."""
    return SimpleNamespace(**{**vars(reference), **ops})


# ---- yes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("version", [1, 3])
def test_right_is_right(tmp_path: Path, dtype: str, perturbed: bool, version: int) -> None:
    written = run("tiny", tmp_path, dtype=dtype, perturbed=perturbed, version=version, seed=3, **SMALL)
    report = check(written)
    assert report.okay, failing(report)
    names = ["logits", "loss", *(f"d {name}" for name in TENSORS), *(f"loss {i}" for i in range(10))]
    assert [entry.name for entry in report.checks] == names
    assert report.notes == []
    assert written.losses[-1] < written.losses[0]
    limits = {entry.limit for entry in report.checks if entry.name.startswith("loss")}
    assert limits == {5e-5 if perturbed else 2e-6}


def test_kernels(cpu: ModuleType, made: Written, telling: Written, tmp_path: Path) -> None:
    """The real backend: also on a perturbed model and with the telling recipe."""
    perturbed = run("tiny", tmp_path, dtype="float64", perturbed=True, **SMALL)
    for written in (made, telling, perturbed):
        report = check(written, ops=cpu)
        assert report.okay, failing(report)


@pytest.mark.parametrize("decay_on", ["2d", "all"])
def test_the_recipe_is_obeyed(tmp_path: Path, decay_on: str) -> None:
    report = check(run("tiny", tmp_path, dtype="float64", decay_on=decay_on, steps=4, **SMALL, **TELLING))
    assert report.okay, failing(report)
    assert [entry.name for entry in report.checks][-1] == "loss 3"


def test_other_shapes(tmp_path: Path) -> None:
    """An odd vocabulary, one layer, one head, one token."""
    model = GPT2(Config(max_seq_len=3, vocab_size=127, num_layers=1, num_heads=1, channels=24), reference)
    model.initialise(2)
    loading.save(model, tmp_path / "folder")
    for B, T in ((1, 1), (3, 1), (1, 3)):
        written = run(tmp_path / "folder", tmp_path / f"{B}{T}", B=B, T=T, ops=reference)
        report = check(written)
        assert report.okay, failing(report)
        assert verify.read_recipe(written.recipe).weights == "trained"


def test_a_folder_is_a_model_too(made: Written, tmp_path: Path) -> None:
    loading.save(loading.load(made.model, ops=reference), tmp_path / "folder")
    assert verify.verify(tmp_path / "folder", made.debug_state, ops=reference).okay


# ---- no --------------------------------------------------------------------------------------------


def damage(written: Written, tensor: str, change: Any) -> None:
    """Let `change` replace one gradient of the debug state."""
    rows = PRESETS["tiny"].parameter_rows()
    state = checkpoint.read_debug_state(written.debug_state, rows, 257)
    gradients = [(row, change(array) if row.name == tensor else array) for row, array in state.gradients()]
    checkpoint.write_debug_state(
        written.debug_state, state.version, state.x, state.y, state.logits, state.loss, gradients
    )


@pytest.mark.parametrize("name", TENSORS)
def test_every_gradient_counts(made: Written, tmp_path: Path, name: str) -> None:
    for index, change in enumerate((np.zeros_like, np.negative, lambda g: g * 1.00002, lambda g: g * np.nan)):
        folder = tmp_path / str(index)
        folder.mkdir()
        written = copied(made, folder)
        damage(written, name, change)
        assert failing(check(written)) == [f"d {name}"]


@pytest.mark.parametrize("name", TENSORS)
def test_a_gradient_that_stays_zero(made: Written, name: str) -> None:
    """Ours, not the reference's: the largest error of all, 1, under which a loose absolute limit is blind."""

    class Forgetful(GPT2):
        def backward(self, accumulate: bool = False) -> None:
            super().backward(accumulate)
            assert self.grads is not None
            self.grads[name][...] = 0

    model = loading.load(made.model, ops=reference)
    model.__class__ = Forgetful
    state = checkpoint.read_debug_state(made.debug_state, model.params.table, 257)
    model.forward(state.x, state.y)
    model.backward()
    bad = {entry.name: entry.error for entry in verify._compare_gradients(model, state, LIMIT) if not entry.ok}
    assert bad == {f"d {name}": 1.0}


def test_gradients_in_the_padding_are_wrong(made: Written) -> None:
    model = loading.load(made.model, ops=reference)
    state = checkpoint.read_debug_state(made.debug_state, model.params.table, 257)
    model.forward(state.x, state.y)
    model.backward()
    assert model.grads is not None
    model.grads.wte[300, 0] = 1e-2
    assert [entry.name for entry in verify._compare_gradients(model, state, LIMIT) if not entry.ok] == ["d wte"]


def test_no_gradient_at_all_is_compared_exactly() -> None:
    assert verify._ratio(0.0, 0.0) == 0.0
    assert verify._ratio(1e-30, 0.0) == math.inf
    assert verify._ratio(3.0, 2.0) == 1.5


@pytest.mark.parametrize("value", [1e-4, 1.0, math.nan, math.inf, -math.inf])
def test_one_wrong_logit(made: Written, tmp_path: Path, value: float) -> None:
    written = copied(made, tmp_path)
    raw = bytearray(written.debug_state.read_bytes())
    logits = np.frombuffer(raw, "<f4", 2 * 16 * 257, 1024 + 2 * 2 * 16 * 4)
    logits[4000] += np.float32(value)
    written.debug_state.write_bytes(raw)
    assert failing(check(written)) == ["logits"]


def test_wrong_loss(made: Written, tmp_path: Path) -> None:
    written = copied(made, tmp_path)
    raw = bytearray(written.debug_state.read_bytes())
    loss = np.frombuffer(raw, "<f4", 1, 1024 + (2 * 2 * 16 + 2 * 16 * 257) * 4)
    assert loss[0] == np.float32(made.losses[0])
    loss[0] *= np.float32(1.00002)
    written.debug_state.write_bytes(raw)
    assert failing(check(written)) == ["loss"]


@pytest.mark.parametrize("step", range(10))
def test_every_step_counts(made: Written, tmp_path: Path, step: int) -> None:
    written = copied(made, tmp_path)
    values = json.loads(written.recipe.read_text())
    values["losses"][step] *= 1.00002
    written.recipe.write_text(json.dumps(values))
    assert failing(check(written)) == [f"loss {step}"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_decay", 0.0), ("decay_on", "all"), ("eps", 1e-3), ("beta2", 0.99), ("beta1", 0.95),
        ("lr", 3.1e-3),
    ],
)  # fmt: skip
def test_a_different_recipe(telling: Written, tmp_path: Path, field: str, value: object) -> None:
    """Decay off, decay on all tensors, eps x 10, another beta2: each shows, and in the later losses alone."""
    written = copied(telling, tmp_path)
    values = json.loads(written.recipe.read_text())
    assert values[field] != value
    written.recipe.write_text(json.dumps(values | {field: value}))
    bad = failing(check(written))
    assert bad and set(bad) <= {f"loss {step}" for step in range(1, 10)}
    assert "loss 9" in bad


def gelu_erf(out: Array, pre: Array, x: Array, w: Array, b: Array) -> None:
    reference.linear_gelu_forward(out, pre, x, w, b)
    exact = torch.nn.functional.gelu(torch.from_numpy(pre.astype(np.float64)))
    out[...] = exact.numpy()


def norm_eps(out: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array, eps: float) -> None:
    reference.layernorm_forward(out, mean, rstd, x, w, b, eps / 10)


def attention_one_ahead(out: Array, lse: Array, qkv: Array, scale: float, window: int, softcap: float) -> None:
    """The causal mask off by one: each token sees the next one too."""
    B, T, C = out.shape
    H = lse.shape[1]
    q, k, v = (part.reshape(B, T, H, C // H).astype(np.float64) for part in np.split(qkv, 3, axis=2))
    scores = np.einsum("bthc,bshc->bhts", q, k) / math.sqrt(C // H)
    scores[..., np.triu(np.ones((T, T), bool), 2)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out[...] = np.einsum("bhts,bshc->bthc", weights, v).reshape(B, T, C)


def no_position(
    out: Array, tokens: Array, positions: Array, wte: Array, wpe: Array, V: int, scale: float
) -> None:
    out[...] = wte[tokens]


def padded_softmax(
    losses: Array, dx: Array, dw: Array, x: Array, w: Array, targets: Array, V: int, scale: float, softcap: float,
    accumulate: bool,
) -> None:
    reference.head_loss(losses, dx, dw, x, w, targets, w.shape[0], scale, softcap, accumulate)


def nothing(*_: object) -> None:
    pass


def sum_norm_eps(
    total: Array, out: Array, mean: Array, rstd: Array, x: Array, branch: Array, w: Array, b: Array, eps: float
) -> None:
    reference.residual_layernorm_forward(total, out, mean, rstd, x, branch, w, b, eps / 10)


NORM_EPS = {"layernorm_forward": norm_eps, "residual_layernorm_forward": sum_norm_eps}

# On which of the two models a fault must show, and where.
FAULTS = {
    "GELU in its erf form": ({"linear_gelu_forward": gelu_erf}, True, "d fcprojw"),
    "LayerNorm epsilon 1e-6": (NORM_EPS, False, "logits"),
    "LayerNorm epsilon 1e-6, perturbed": (NORM_EPS, True, "d ln1w"),
    "causal mask off by one": ({"attention_forward": attention_one_ahead}, False, "logits"),
    "causal mask off by one, perturbed": ({"attention_forward": attention_one_ahead}, True, "logits"),
    "no positions": ({"embedding_forward": no_position}, False, "logits"),
    "padding in the softmax": ({"head_loss": padded_softmax}, False, "loss"),
    "padding in the softmax, perturbed": ({"head_loss": padded_softmax}, True, "loss"),
    "no gradient behind GELU": ({"gelu_linear_backward": nothing}, False, "d fcw"),
    "no update": ({"adamw_step": nothing}, False, "loss 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_mathematics(tmp_path: Path, fault: str) -> None:
    ops, perturbed, shows = FAULTS[fault]
    written = run("tiny", tmp_path, dtype="float64", perturbed=perturbed, steps=3, **SMALL)
    assert check(written).okay
    assert shows in failing(check(written, ops=faulty(**ops)))


def test_other_weights(made: Written, tmp_path: Path) -> None:
    model = loading.load("tiny", seed=1, ops=reference)
    loading.save_bin(model, tmp_path / "other.bin")
    bad = failing(verify.verify(tmp_path / "other.bin", made.debug_state, ops=reference))
    assert {"logits", "loss", "d wte", "loss 0"} <= set(bad)


def test_a_model_that_is_not_a_number(made: Written, tmp_path: Path) -> None:
    model = loading.load(made.model, ops=reference)
    model.params.lnfb[0] = np.nan
    loading.save_bin(model, tmp_path / "nan.bin")
    report = verify.verify(tmp_path / "nan.bin", made.debug_state, ops=reference)
    assert not report.okay and {"logits", "loss", "d wte", "loss 9"} <= set(failing(report))


def test_bf16_weights_are_remarked_on(made: Written, tmp_path: Path) -> None:
    loading.save_bin(loading.load(made.model, ops=reference), tmp_path / "v5.bin", 5)
    report = verify.verify(tmp_path / "v5.bin", made.debug_state, ops=reference)
    assert not report.okay and "bf16" in report.notes[0]


# ---- losses from elsewhere, or from nowhere --------------------------------------------------------


def test_without_the_recipe_the_rest_is_checked(made: Written, tmp_path: Path) -> None:
    written = copied(made, tmp_path)
    written.recipe.unlink()
    report = check(written)
    assert report.okay and len(report.checks) == 18
    assert report.notes == ["No tiny_debug_state.json: the optimizer was not compared."]
    assert check(written, json=made.recipe).okay
    damage(written, "lnfb", np.zeros_like)
    assert not check(written).okay


def test_the_published_losses(made: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real GPT-2 124M is known by its shape and first loss; a small model takes its part here."""
    stand_in = run("tiny", tmp_path, **SMALL, weight_decay=0.01, decay_on="all")
    stand_in.recipe.unlink()
    published = Recipe(tuple(round(loss, 6) for loss in stand_in.losses), weight_decay=0.01, decay_on="all")
    assert (verify.LLMC_124M.weight_decay, verify.LLMC_124M.decay_on) == (0.01, "all")
    assert len(verify.LLMC_124M.losses) == 10 and verify.LLMC_124M.losses[0] == 5.270007
    assert "published" not in " ".join(check(stand_in).notes)

    monkeypatch.setattr(verify, "LLMC_124M", published)
    assert "published" not in " ".join(check(stand_in).notes)  # the shape is another's
    monkeypatch.setattr(verify, "PRESETS", {"gpt2": PRESETS["tiny"]})
    report = check(stand_in)
    assert report.okay and "llm.c's published losses" in report.notes[0]
    assert [entry.limit for entry in report.checks][-10:] == [1e-4] * 10
    wrong = Recipe((*published.losses[:9], published.losses[9] * 1.001), weight_decay=0.01, decay_on="all")
    monkeypatch.setattr(verify, "LLMC_124M", wrong)
    assert failing(check(stand_in)) == ["loss 9"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("losses", []), ("losses", [1, None]), ("losses", 3), ("losses", [math.nan]),
        ("lr", -1), ("lr", "1e-4"),
        ("beta1", 1.0), ("beta2", True), ("eps", math.inf), ("weight_decay", None), ("decay_on", "3d"),
        ("decay_on", ["2d"]), ("weights", "heavy"), ("lr", ...), ("losses", ...), ("decay_on", ...),
    ],
)  # fmt: skip
def test_recipe_fields(made: Written, tmp_path: Path, field: str, value: Any) -> None:
    written = copied(made, tmp_path)
    values = json.loads(written.recipe.read_text()) | {field: value}
    written.recipe.write_text(json.dumps({name: entry for name, entry in values.items() if entry is not ...}))
    with pytest.raises(FileFormatError) as caught:
        check(written)
    assert caught.value.field == field


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_recipe_that_is_no_json(made: Written, tmp_path: Path, text: bytes) -> None:
    written = copied(made, tmp_path)
    written.recipe.write_bytes(text)
    with pytest.raises(FileFormatError, match="JSON"):
        check(written)


def test_a_recipe_that_was_asked_for_must_be_there(made: Written, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="missing.json: file"):
        check(made, json=tmp_path / "missing.json")


# ---- files that cannot be compared -----------------------------------------------------------------


def test_wrong_files(made: Written, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="magic.*a model"):
        verify.verify(made.debug_state, made.model, ops=reference)
    with pytest.raises(FileFormatError, match="does not exist"):
        verify.verify(tmp_path / "missing.bin", made.debug_state, ops=reference)
    with pytest.raises(FileFormatError, match="cannot be opened"):
        verify.verify(made.model, tmp_path / "missing.bin", ops=reference)
    model = GPT2(Config(64, 257, 1, 2, 32), reference)
    model.initialise(0)
    loading.save_bin(model, tmp_path / "small.bin")
    with pytest.raises(FileFormatError, match="file size"):
        verify.verify(tmp_path / "small.bin", made.debug_state, ops=reference)


def test_sequence_longer_than_the_model(tmp_path: Path) -> None:
    model = GPT2(Config(8, 130, 1, 1, 8), reference)
    loading.save_bin(model, tmp_path / "model.bin")
    ids = np.zeros((1, 9), np.int32)
    gradients = ((row, np.zeros(row.full_shape, np.float32)) for row in model.params.table)
    checkpoint.write_debug_state(tmp_path / "debug.bin", 2, ids, ids, np.zeros((1, 9, 130)), 0.0, gradients)
    with pytest.raises(FileFormatError, match="T: 9 exceeds the model's 8"):
        verify.verify(tmp_path / "model.bin", tmp_path / "debug.bin", ops=reference)
    with pytest.raises(ConfigError, match="sequence length: 9"):
        run(tmp_path / "model.bin", tmp_path / "out", B=1, T=9, ops=reference)
    assert not (tmp_path / "out").exists()


# ---- the report ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "okay"), [(1e-7, 1), (1e-6, 1), (2e-6, 0), (math.nan, 0), (math.inf, 0)])
def test_print_report(error: float, okay: int) -> None:
    checks = [Check("loss", 0.0, 1e-6, "relative", 5.27, 5.27), Check("d wte", error, 1e-6, "norm")]
    report = Report(checks, ["A [note]."])
    out = io.StringIO()
    print_report(report, out)
    lines = out.getvalue().splitlines()
    assert lines[-1] == f"overall okay: {okay}"
    assert "A [note]." in lines
    line = next(line for line in lines if line.startswith("d wte"))
    assert line.rstrip().endswith("ok" if okay else "NOT OK") and ("NOT OK" in line) == (not okay)
    assert any("5.270000" in line for line in lines)


def test_nothing_compared_is_not_okay() -> None:
    assert not Report().okay


# ---- the reference itself --------------------------------------------------------------------------


def test_pytorch_reference_is_gpt2(tmp_path: Path) -> None:
    """Against an implementation that is not ours: transformers, in float64, on a perturbed model."""
    transformers = pytest.importorskip("transformers")
    model = loading.load("tiny", ops=reference)
    perturb(model.params, 1)
    loading.save(model, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval().double()
    rng = np.random.default_rng(0)
    x, y = (rng.integers(257, size=(2, 16)).astype(np.int32) for _ in range(2))
    result = torch_reference.overfit(model.params, model.config, x, y, steps=1, dtype="float64")
    tokens, targets = (torch.from_numpy(ids.astype(np.int64)) for ids in (x, y))
    logits = theirs(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    np.testing.assert_allclose(result.logits, logits.detach().numpy(), atol=1e-10)
    named = dict(theirs.named_parameters())
    for row in model.params.table:
        for layer in range(max(1, row.layers)):
            expected = named[row.hf_name.format(layer=layer)].grad.numpy()
            ours = result.gradients[row.name][layer] if row.layers else result.gradients[row.name]
            expected = expected.T if row.transpose else expected
            size = np.linalg.norm(expected)
            assert np.linalg.norm(ours - expected) < 1e-10 * size, row.name
            assert size > 0


def test_files_and_recipe(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    written = run("tiny", out, steps=2, **SMALL, lr=0.01, beta1=0.8, eps=1e-6, name="named")
    assert sorted(path.name for path in out.iterdir()) == [
        "named.bin", "named_debug_state.bin", "named_debug_state.json"
    ]  # fmt: skip
    values = json.loads(written.recipe.read_text())
    assert values["losses"] == list(written.losses) and len(written.losses) == 2
    expected = {"lr": 0.01, "beta1": 0.8, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0, "decay_on": "2d"}
    assert values.items() >= expected.items()
    assert (values["weights"], values["dtype"], values["batch_size"]) == ("random", "float32", 2)


def test_tokens_come_from_a_file(tmp_path: Path) -> None:
    ids = np.arange(100) % 257
    data.write_shard(tmp_path / "tokens.bin", ids, vocab_size=257)
    written = run("tiny", tmp_path, steps=1, tokens=tmp_path / "tokens.bin", **SMALL)
    state = checkpoint.read_debug_state(written.debug_state, PRESETS["tiny"].parameter_rows(), 257)
    np.testing.assert_array_equal(state.x.reshape(-1), ids[:32])
    np.testing.assert_array_equal(state.y.reshape(-1), ids[1:33])


def test_seed_and_steps(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    written = run("tiny", tmp_path / "a", seed=1, steps=3, **SMALL, on_step=lambda *step: seen.append(step))
    assert seen == list(enumerate(written.losses))
    again = run("tiny", tmp_path / "b", seed=1, steps=1, **SMALL)
    assert again.losses == written.losses[:1]
    assert written.debug_state.read_bytes() == again.debug_state.read_bytes()
    assert run("tiny", tmp_path / "c", seed=2, steps=1, **SMALL).losses != again.losses


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("version", 5, "version"), ("dtype", "float16", "dtype"), ("decay_on", "3d", "decay_on"),
        ("steps", 0, "steps"), ("B", 0, "batch size"), ("T", 0, "sequence length"),
    ],
)  # fmt: skip
def test_options_of_the_reference(tmp_path: Path, option: str, value: object, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run("tiny", tmp_path / "out", **SMALL | {option: value})
    assert caught.value.field == field
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_overwritten(made: Written, tmp_path: Path) -> None:
    written = copied(made, tmp_path)
    before = written.model.read_bytes()
    with pytest.raises(ConfigError, match="the source itself"):
        run(written.model, tmp_path, perturbed=True, **SMALL)
    assert written.model.read_bytes() == before


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match="pip install torch"):
        run("tiny", tmp_path / "out", **SMALL)
    perturb(loading.load("tiny", ops=reference).params)  # needs none


# ---- the harder model ------------------------------------------------------------------------------


def test_perturbed_is_hard() -> None:
    model = loading.load("stories", ops=reference)
    gentle = {row.name: array.copy() for row, array in model.params}
    perturb(model.params, 0)
    p = model.params
    for name in ("ln1b", "qkvb", "attprojb", "ln2b", "fcb", "fcprojb", "lnfb"):
        assert (p[name] != 0).all(), name
    for row, array in p:
        assert np.isfinite(array).all()
        assert (array != gentle[row.name]).any() or row.name in ("wpe", "qkvw", "attprojw", "fcw", "fcprojw")
    assert not p.wte[257:].any()
    x = np.random.default_rng(0).integers(257, size=(2, 64)).astype(np.int32)
    assert 50 < np.abs(model.logits(x)).max() < 200
    assert model.acts is not None
    channels = np.abs(model.acts.residual[-1]).mean(axis=(0, 1))
    outliers = np.sort(channels)[::-1]
    assert outliers[2] > 5 * np.median(channels) and outliers[3] < 5 * np.median(channels)


def test_perturbation_is_repeatable() -> None:
    models = [loading.load("tiny", ops=reference) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        perturb(model.params, seed)
    for row, array in models[0].params:
        np.testing.assert_array_equal(array, models[1].params[row.name])
    assert (models[0].params.qkvb != models[2].params.qkvb).any()
