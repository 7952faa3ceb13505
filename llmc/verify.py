"""Is this a correct GPT-2?  Logits, loss, gradients and ten updates against what another program computed.

Limits.  Reference and llmc both compute in fp32 and round differently, so their difference is at most the
sum of their distances from the exact values.  Those distances, measured on GPT-2 124M at B=4, T=64 for
PyTorch's fp32 and llmc's kernels against PyTorch's fp64, are up to 1.5e-6 of the largest |logit|, 1.3e-6 of
a gradient tensor's norm, and for ten losses 1.4e-6 (random weights and tokens) to 7.5e-6 (outlier channels
and large logits, as trained models have).

* logits, gradients: 5e-6; a dropped term, a wrong constant (GELU's erf form, LayerNorm's epsilon 1e-6) or a
  tensor left at zero moves some of them by 1e-5 to 1.
* losses: 2e-6 for random weights, 5e-5 for all others, whose updates can magnify rounding more.
* llm.c's published losses: 1e-4.  They have six decimals, and the library and hardware that gave them are
  unknown.

tf32 and bf16 round operands of products by up to 2^-11 and 2^-8 of themselves, and on a GPU bf16 rounds every result
that is stored.  On a small model (2 layers, 32 channels), raw and perturbed, the simulated GPU was off by up to

    tf32    3.2e-4 of the largest |logit|, 6.5e-4 of a gradient tensor's norm, 7e-5 in ten losses
    bf16    4.3e-3, 2.0e-2, 7e-4

and a CPU's bf16, which stores nothing so, by half of the last line; at 124M it is off by as much (gradients 9.6e-3), so
depth adds little.  The limits are 2.5 to 7 times these figures: a tensor core sums in an order and with a rounding of
its own.

What losses cannot show: at the usual learning rate of 1e-4, weight decay left out moves ten losses by 2e-6
alone.  A reference made with a larger rate and decay shows it (`llmc reference --lr --weight-decay`).
"""

from __future__ import annotations

import json as json_module
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from llmc import checkpoint, files, loading
from llmc.adamw import AdamW
from llmc.arena import Array, Row
from llmc.errors import ConfigError, FileFormatError
from llmc.files import PathLike
from llmc.gpt2 import PRESETS
from llmc.model import Model
from llmc.ops import Ops

LOSSES = {"random": 2e-6, "perturbed": 5e-5, "trained": 5e-5}


@dataclass(frozen=True)
class Limits:
    """The largest errors that pass; losses by what was trained."""

    logits: float
    gradient: float
    losses: dict[str, float]
    published: float


LIMITS = {
    "fp32": Limits(5e-6, 5e-6, LOSSES, 1e-4),
    "tf32": Limits(2e-3, 3e-3, dict.fromkeys(LOSSES, 5e-4), 5e-4),
    "bf16": Limits(2e-2, 5e-2, dict.fromkeys(LOSSES, 5e-3), 5e-3),
}
CHUNK = 1 << 22

DECAY_ON = ("2d", "all")


@dataclass(frozen=True)
class Recipe:
    """How a reference was trained on its one batch, and the loss before each update.

    AdamW with a constant `lr`; `decay_on` is "2d" (matrices and embeddings alone, GPT-2's habit) or "all".
    `weights` says what was trained, "random", "perturbed" or "trained"; `dtype` what the reference
    computed in.
    """

    losses: tuple[float, ...]
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_on: str = "2d"
    weights: str = "trained"
    dtype: str = "float32"


# llm.c's test program trains all of GPT-2 124M on its debug state's batch with these settings: decay on
# every tensor, biases and norms too (its update walks over all parameters as one array, as torch's AdamW
# does by default), and expects these losses.
LLMC_124M = Recipe(
    (5.270007, 4.059707, 3.375123, 2.800783, 2.315382, 1.849029, 1.394656, 0.999147, 0.624080, 0.376511),
    weight_decay=0.01,
    decay_on="all",
)


def write_recipe(path: PathLike, recipe: Recipe, **extra: Any) -> None:
    """Write `recipe` as JSON, and `extra` facts that `read_recipe` ignores."""
    with files.atomic_write(path) as file:
        file.write(json_module.dumps(asdict(recipe) | extra, indent=2).encode() + b"\n")


def read_recipe(path: PathLike) -> Recipe:
    """Read what `write_recipe` wrote; FileFormatError names the field that is missing or wrong."""
    try:
        values = json_module.loads(Path(path).read_bytes())
    except OSError as error:
        raise FileFormatError(path, "file", f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, "JSON", f"cannot be parsed: {error}") from error
    if not isinstance(values, dict):
        raise FileFormatError(path, "JSON", "is not an object")
    for name in (entry.name for entry in fields(Recipe)):
        if name not in values:
            raise FileFormatError(path, name, "is missing")
    losses = values["losses"]
    if not isinstance(losses, list) or not losses or not all(map(_number, losses)):
        raise FileFormatError(path, "losses", "is not a list of numbers")
    for name in ("lr", "beta1", "beta2", "eps", "weight_decay"):
        if not _number(values[name]) or values[name] < 0 or (name.startswith("beta") and values[name] >= 1):
            raise FileFormatError(path, name, f"{values[name]!r} is out of range")
    for name, known in (("decay_on", DECAY_ON), ("weights", tuple(LOSSES))):
        if values[name] not in known:
            raise FileFormatError(path, name, f"is {values[name]!r}, not one of {', '.join(known)}")
    chosen = {entry.name: values[entry.name] for entry in fields(Recipe)}
    return Recipe(**chosen | {"losses": tuple(float(loss) for loss in losses)})


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def decaying(rows: tuple[Row, ...], decay_on: str) -> list[Row]:
    """The rows, with `decay` as a recipe wants it."""
    return [row._replace(decay=True) if decay_on == "all" else row for row in rows]


# ---- the report ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One comparison: an error and its limit.  What is not a number is not within any limit."""

    name: str
    error: float
    limit: float
    measure: str
    ours: float | None = None
    reference: float | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass
class Report:
    """What `verify` found.  `notes` say what could not be compared, or not as usual."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def okay(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)


def print_report(report: Report, file: TextIO | None = None) -> None:
    """A table of the checks, the notes, and last `overall okay: 1` or `overall okay: 0`."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("check", "llmc", "reference", "error", "limit", ""):
        table.add_column(title, justify="left" if title in ("check", "") else "right", no_wrap=True)
    for check in report.checks:
        ours, reference = (
            "" if value is None else f"{value:.6f}" for value in (check.ours, check.reference)
        )
        verdict = "ok" if check.ok else "[red]NOT OK[/red]"
        table.add_row(check.name, ours, reference, f"{check.error:.1e}", f"{check.limit:.0e}", verdict)
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"overall okay: {int(report.okay)}")


# ---- the comparison --------------------------------------------------------------------------------


def verify(
    model_bin: PathLike, debug_bin: PathLike, *, json: PathLike | None = None, device: str = "cpu",
    isa: str | None = None, threads: int | None = None, dtype: str | None = None, gemm: str | None = None,
    attention: str | None = None, ops: Ops | None = None,
) -> Report:
    """Compare llmc with the reference whose weights and results are in two files.

    `model_bin` is llm.c's model file (or any other source of weights that `loading.load` takes),
    `debug_bin` a debug state of it.  Compared are the logits, the largest difference relative to the
    largest |logit|; the loss, relative; every gradient tensor, ||g - g_ref|| / ||g_ref||; and the loss
    before each of ten AdamW updates, relative.  The updates follow `json`, by default the file beside the
    debug state with the suffix .json; where there is none and the model is the real GPT-2 124M, llm.c's
    published losses; else they are left out, and a note says so.  The limits are those of `dtype`.

    The key bias has no gradient but rounding, so tensors are compared whole.  Raises FileFormatError and
    ConfigError for files that cannot be used.
    """
    path = Path(json) if json is not None else Path(debug_bin).with_suffix(".json")
    recipe = read_recipe(path) if json is not None or path.exists() else None
    model = loading.load(
        model_bin, device=device, isa=isa, threads=threads, dtype=dtype, gemm=gemm, attention=attention, ops=ops
    )  # fmt: skip
    config, report, limits = model.config, Report(), LIMITS[model.ops.info()["dtype"]]
    if os.path.isfile(model_bin):
        version, _ = checkpoint.read_model_header(model_bin, loading.rows_for)
        if version == 5:
            report.notes.append("The weights are bf16; the limits hold only if the reference used them so.")
    state = checkpoint.read_debug_state(debug_bin, model.params.table, config.vocab_size)
    B, T = state.x.shape
    if T > config.max_seq_len:
        raise FileFormatError(debug_bin, "T", f"{T} exceeds the model's {config.max_seq_len} positions")
    model.prepare(B, T)

    report.checks.append(_compare_logits(model.logits(state.x), state.logits, limits.logits))
    loss = model.forward(state.x, state.y)
    model.backward()
    limit = limits.losses[recipe.weights if recipe else "trained"]
    report.checks.append(_compare_losses("loss", loss, state.loss, limit))
    report.checks += _compare_gradients(model, state, limits.gradient)

    if recipe is None and config == PRESETS["gpt2"] and abs(state.loss - LLMC_124M.losses[0]) < 1e-4:
        recipe, limit = LLMC_124M, limits.published
        report.notes.append(f"No {path.name}: this is GPT-2 124M, compared with llm.c's published losses.")
    if recipe is None:
        report.notes.append(f"No {path.name}: the optimizer was not compared.")
        return report
    trained = _train(model, state, recipe, loss)
    for step, (ours, reference) in enumerate(zip(trained, recipe.losses, strict=True)):
        report.checks.append(_compare_losses(f"loss {step}", ours, reference, limit))
    return report


def _train(model: Model, state: checkpoint.DebugState, recipe: Recipe, loss: float) -> Iterator[float]:
    """The loss before each update; `loss` and the model's gradients are those of the first."""
    if model.grads is None:
        raise RuntimeError("the model has no gradients yet")
    rows = decaying(model.params.table, recipe.decay_on)
    optimizer = AdamW(
        rows, model.params, model.grads, model.ops, weights=model.weights, beta1=recipe.beta1, beta2=recipe.beta2,
        eps=recipe.eps, weight_decay=recipe.weight_decay,
    )  # fmt: skip
    yield loss
    for _ in recipe.losses[1:]:
        optimizer.step(recipe.lr)
        loss = model.forward(state.x, state.y)
        model.backward()
        yield loss


def _compare_losses(name: str, ours: float, reference: float, limit: float) -> Check:
    difference = abs(ours - reference)
    error = difference / abs(reference) if reference else math.inf if difference else 0.0
    return Check(name, error, limit, "relative", ours, reference)


def _compare_logits(ours: Array, reference: Array, limit: float) -> Check:
    largest = difference = 0.0
    for a, b in _chunks(ours, reference):
        # np.maximum, unlike max, keeps a NaN.
        largest = float(np.maximum(largest, np.abs(b).max()))
        with np.errstate(invalid="ignore"):  # inf - inf is a NaN, which fails
            difference = float(np.maximum(difference, np.abs(a - b).max()))
    return Check("logits", _ratio(difference, largest), limit, "largest difference / largest |logit|")


def _compare_gradients(model: Model, state: checkpoint.DebugState, limit: float) -> Iterator[Check]:
    if model.grads is None:
        raise RuntimeError("the model has no gradients yet")
    for row, reference in state.gradients():
        difference = norm = 0.0
        for a, b in _chunks(model.ops.fetch(model.grads[row.name])(), reference):
            with np.errstate(invalid="ignore"):
                difference += float(np.square(a - b).sum())
            norm += float(np.square(b).sum())
        error = _ratio(math.sqrt(difference), math.sqrt(norm))
        yield Check(f"d {row.name}", error, limit, "norm of the difference / norm")


def _ratio(difference: float, size: float) -> float:
    """difference / size; where the reference is zero throughout, ours must be exactly zero too."""
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def _chunks(ours: Array, reference: Array) -> Iterator[tuple[Array, Array]]:
    """Both arrays in float64, a piece at a time."""
    a, b = ours.reshape(-1), reference.reshape(-1)
    if a.size != b.size:
        raise ConfigError("reference", f"has {b.size} values where the model has {a.size}")
    for start in range(0, a.size, CHUNK):
        part = slice(start, start + CHUNK)
        yield a[part].astype(np.float64), b[part].astype(np.float64)
