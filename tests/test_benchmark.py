"""`llmc bench`: every op is in it, its arithmetic is right, and its formats can be read.  No times are judged."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import shlex
import shutil
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from guard import OUTPUTS

from llmc import benchmark, machine, results
from llmc.__main__ import main
from llmc.benchmark import Configuration, Program, Settings, Spread
from llmc.costs import Cost
from llmc.errors import ConfigError, LlmcError, MissingDependencyError
from llmc.gpt2 import preset

QUICK = "--init tiny --seconds 0 --repeats 1"
ROOT = Path(__file__).resolve().parent.parent


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(shlex.split(words))
    out, err = capsys.readouterr()
    return status, out, err


# ---- cases -----------------------------------------------------------------------------------------


def test_every_op_is_measured(cpu: ModuleType) -> None:
    found = list(benchmark.cases(cpu, preset("tiny"), 2, 8, "fp32"))
    products = {f"product_{use}" for use in ("forward", "dx", "dw")}
    assert {case.op for case in found} == set(OUTPUTS) | products
    for case in found:
        case.call()
        assert case.cost.amount > 0
    by_hand = {
        case.shape: case.cost.flops for case in found if case.op == "product_dw"
    }  # fmt: skip
    assert by_hand["qkv 32 -> 96, 2x8"] == 2 * 16 * 32 * 96
    assert by_hand["head 32 -> 257, 2x8"] == 2 * 16 * 32 * 257
    assert len(by_hand) == 5


def test_bf16(cpu: ModuleType) -> None:
    """What has no products is not measured a second time; on a table with the instruction, its peak is another."""
    settings = Settings(init="tiny", dtypes=("fp32", "bf16"), isas=cpu.isas()[-1:], repeats=1, seconds=0.0)
    rows = benchmark.kernels(settings)
    by_dtype = {dtype: {(row.op, row.shape) for row in rows if row.dtype == dtype} for dtype in ("fp32", "bf16")}
    products = {(row.op, row.shape) for row in rows if row.unit == "GFLOP/s"}
    assert by_dtype["bf16"] == products < by_dtype["fp32"]
    assert cpu.info()["dtype"] == "fp32", "set back"


def distinct(cpu: ModuleType) -> list[str]:
    """The instruction sets whose kernels for fp32 are their own; the others only multiply pairs of bf16."""
    return [isa for isa in cpu.isas() if isa not in ("avx512bf16", "amx", "neonbf16")]


def test_shared_kernels_are_measured_once(cpu: ModuleType) -> None:
    """What multiplies pairs of bf16 is measured doing that; and as a whole where it is asked for by name."""
    pairs = [isa for isa in cpu.isas() if isa not in distinct(cpu)]
    if not pairs:
        pytest.skip("no instruction set here multiplies pairs of bf16")
    quick = {"init": "tiny", "only": "ion", "dtypes": ("fp32", "bf16"), "repeats": 1, "seconds": 0.0}
    rows = benchmark.kernels(Settings(**quick))
    assert {row.op for row in rows} >= {"attention_forward", "attention_decode"}
    for row in rows:
        assert row.isa not in pairs or (row.dtype == "bf16" and row.unit == "GFLOP/s")
    assert {row.isa for row in rows if row.dtype == "bf16"} == set(cpu.isas())
    named = benchmark.kernels(Settings(**quick, isas=tuple(pairs[-1:])))
    assert {row.dtype for row in named} == {"fp32", "bf16"} and {row.isa for row in named} == set(pairs[-1:])


def test_only_a_few_arrays_at_a_time(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's four arrays as large as the embedding table are the most that there are of those; and once all is done,
    there are none."""
    live: dict[int, tuple[int, ...]] = {}
    most, number, real = [0], [0], cpu.empty
    config = preset("tiny")
    tables = {V * config.channels for V in (config.vocab_size, config.padded_vocab_size)}

    def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        array = real(shape, dtype)
        number[0] += 1
        live[number[0]] = shape
        weakref.finalize(array, live.pop, number[0])
        most[0] = max(most[0], sum(math.prod(shape) in tables for shape in live.values()))
        return array

    monkeypatch.setattr(cpu, "empty", empty)
    # With one token per batch no other array is as large.
    benchmark.kernels(Settings(
        init="tiny", batch_sizes=(1,), sequence_lengths=(1,), isas=cpu.isas()[:1], only="norm", repeats=1, seconds=0.0,
    ))  # fmt: skip
    assert number[0] > 50 and most[0] == 4 and live == {}


def test_products(each_isa: ModuleType, rng: np.random.Generator) -> None:
    """The three uses are those of a linear layer, at an awkward size."""
    M, K, N = 19, 13, 23
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (N, K), (M, N)))
    for use, a, b, expected in (("forward", x, w, x @ w.T), ("dx", dy, w, dy @ w), ("dw", dy, x, dy.T @ x)):
        out = np.full(expected.shape, np.nan, np.float32)
        each_isa.product(use, out, a, b)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="out"):
            each_isa.product(use, out[:-1].copy(), a, b)
        with pytest.raises(ValueError, match="b"):
            each_isa.product(use, out, a, b[:-1, :-1].copy())
    with pytest.raises(ValueError, match="use"):
        each_isa.product("up", x, x, x)


def test_flops_per_token() -> None:
    """124M: 6 times 123.5 million weights that multiply, and 6 L C T."""
    config = preset("d12")
    weights = 50257 * 768 + 12 * (3 + 1 + 4 + 4) * 768 * 768
    assert benchmark.flops_per_token(config, 1024) == 6 * weights + 6 * 12 * 768 * 1024


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(2.0, 3.0, 4.0)


def test_turns(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instruction sets take turns, each warmed up and beside its own ceiling."""
    seen: list[str] = []
    case = benchmark.Case("zero", "", "fp32", Cost(0.0, 0.0, 8e6), lambda: seen.append(cpu.info()["isa"]))
    monkeypatch.setattr(benchmark, "measure", lambda backend, *a: seen.append(f"peak {backend.info()['isa']}") or 1.0)
    monkeypatch.setattr(benchmark, "TURN_SECONDS", 0.0)
    isas = cpu.isas()
    rows = benchmark._take_turns(case, isas, Settings(init="tiny", repeats=3, warmup=2, seconds=9.0), None)
    assert [row.isa for row in rows] == list(isas) and all(row.turns == 3 for row in rows)
    assert seen == [word for isa in isas for word in (f"peak {isa}", isa, isa, isa, f"peak {isa}")] * 3


def test_figures(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fraction is the median of the turns' ratios, which no median of times over a median of peaks gives."""
    case = benchmark.Case("zero", "", "fp32", Cost(0.0, 0.0, 8e6), lambda: None)
    peaks, times = iter([7e9, 9e9, 3e9, 5e9, 1e9, 1e9]), iter([0.004, 0.002, 0.008])
    monkeypatch.setattr(benchmark, "measure", lambda *a: next(peaks))
    monkeypatch.setattr(benchmark, "_visit", lambda *a: (next(times), 0.1))
    (row,) = benchmark._take_turns(case, cpu.isas()[:1], Settings(init="tiny", repeats=3), None)
    assert row.ms == Spread(3.0, 4.0, 6.0) and row.unit == "GB/s"
    assert row.rate == pytest.approx(2.0) and row.peak == pytest.approx(4.0)
    assert row.fraction == pytest.approx(1.0)  # of 0.25, 1 and 1


def test_time_limit(cpu: ModuleType) -> None:
    rows = benchmark.kernels(Settings(init="tiny", only="zero", isas=cpu.isas()[:1], repeats=50, seconds=0.0))
    assert [row.turns for row in rows] == [1]


def test_the_backend_is_set_back(cpu: ModuleType) -> None:
    before = cpu.info()
    benchmark.kernels(Settings(init="tiny", only="zero", threads=1, repeats=1, seconds=0.0))
    with pytest.raises(ConfigError):
        benchmark.kernels(Settings(init="tiny", only="zero", isas=("scalar", "sse9"), repeats=1, seconds=0.0))
    assert cpu.info()["isa"] == before["isa"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--isas sse9", "isa: 'sse9'"), ("--init gpt2", "init: 'gpt2'"), ("-T 65", "sequence_length: "),
        ("-B 0", "batch_size: "), ("--repeats 0", "repeats: "), ("--warmup -1", "warmup: "),
        ("--seconds nan", "seconds: "), ("--seconds -1", "seconds: "), ("--dtype fp8", "dtype: 'fp8'"),
        ("--dtype fp32,tf32", "dtype: tf32 is for GPUs"),
        ("--dtype ,", "dtype: is empty"), ("--only nothing", "only: "), ("--threads 0", "threads: "),
    ],
)  # fmt: skip
def test_refusals(cpu: ModuleType, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(f"bench kernels {QUICK} {words}", capsys)
    assert (status, out) == (1, "") and err.startswith(f"llmc: error: {message}") and err.count("\n") == 1


# ---- formats ---------------------------------------------------------------------------------------


def test_markdown(cpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(f"bench kernels {QUICK} --only layernorm --isas scalar", capsys)
    lines = out.splitlines()
    assert status == 0 and lines[0].split("|")[1].strip() == "op" and "scalar" in lines[0] and "of peak" in lines[0]
    found = [line.split()[1] for line in lines[2:5]]
    assert found == ["layernorm_forward", "layernorm_backward", "residual_layernorm_forward"]
    assert len({line.count("|") for line in lines[:4]}) == 1 and lines[2].count("%") == 1
    assert "instruction set: scalar;" in lines[-1] and "commit: " in lines[-1] and "processor: " in lines[-1]


def test_csv(cpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(f"bench kernels {QUICK} -o csv", capsys)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and {row["isa"] for row in rows} == set(distinct(cpu))
    assert {row["op"] for row in rows} >= set(OUTPUTS)
    for row in rows:
        lower, median, upper, rate, peak, fraction = (
            float(row[name]) for name in ("ms_lower", "ms_median", "ms_upper", "rate", "peak", "fraction")
        )
        assert 0 < lower <= median <= upper and all(math.isfinite(x) and x > 0 for x in (rate, peak, fraction))
        assert row["commit"] == machine.commit() and row["processor"]


def test_json_and_picture(cpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "k.png"
    status, out, _ = run(f"bench kernels {QUICK} --only gelu -B 1,2 -T 8,16 -o json --plot {picture}", capsys)
    found = json.loads(out)
    assert status == 0 and found["machine"]["commit"] == machine.commit()
    assert len(found["rows"]) == 4 * 4 * len(distinct(cpu))  # two ops and two fused ones; four shapes
    assert set(found["rows"][0]["ms"]) == {"lower", "median", "upper"}
    assert_png(picture)


def assert_png(path: Path) -> None:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    assert all(side > 100 for side in struct.unpack(">II", head[16:24]))


def test_a_picture_that_cannot_be_written(
    cpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is measured."""
    for name, why in (("no/k.png", "there is no folder"), ("k.pdf", "a name in .png"), ("d.png", "is a folder")):
        (tmp_path / "d.png").mkdir(exist_ok=True)
        status, out, err = run(f"bench kernels {QUICK} --only zero --plot {tmp_path}/{name}", capsys)
        assert status == 1 and not out and err.startswith("llmc: error: plot: ") and why in err
    assert [path.name for path in tmp_path.iterdir()] == ["d.png"]


def test_training_of_what_does_not_fit(cpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("bench training --init d12 -b 40960 -t 1024", capsys)
    assert status == 1 and "would fit with" in err


def test_without_matplotlib(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(benchmark, "kernels", lambda *a: pytest.fail("it was measured"))
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        results.require_matplotlib()
    assert main(shlex.split(f"bench kernels {QUICK} --plot {tmp_path}/k.png")) == 1


# ---- training --------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_training(cpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture, isas = tmp_path / "t.png", cpu.isas()[-2:]
    words = f"bench training {QUICK} -T 16,32 --isas {','.join(isas)} --threads 1 -o csv --plot {picture}"
    status, out, _ = run(words, capsys)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and [(row["T"], row["isa"]) for row in rows] == [(T, isa) for T in ("16", "32") for isa in isas]
    for row in rows:
        step = float(row["ms_median"])
        parts = sum(float(row[f"{part}_ms"]) for part in ("forward", "backward", "update"))
        assert parts == pytest.approx(step) and row["steps"] == "1"
        assert float(row["tokens_per_second"]) == pytest.approx(4 * int(row["T"]) / step * 1e3)
        work = 4 * int(row["T"]) * benchmark.flops_per_token(preset("tiny"), int(row["T"]))
        assert float(row["mfu"]) == pytest.approx(work / (step * 1e6) / float(row["peak_gflops"]))
        assert float(row["peak_mib"]) > 10 and float(row["first_step_seconds"]) > step / 1e3
    assert_png(picture)
    status, out, _ = run(f"bench training {QUICK} --threads 1", capsys)
    assert status == 0 and out.splitlines()[2].startswith("| tiny ")


def test_program_trains(cpu: ModuleType) -> None:
    """A loss that falls on a batch seen before."""
    program = Program(Configuration("tiny", 2, 16, "fp32", None, 1, recompute="block"))
    assert program.model.recompute == "block"
    first, times = program.step(0)
    assert times == sorted(times) and len(times) == 4
    assert abs(first - math.log(257)) < 0.1
    for _ in range(3):
        again, _ = program.step(0)
    assert again < first


def test_a_process_that_fails_says_why(cpu: ModuleType) -> None:
    with pytest.raises(LlmcError, match=r"tiny B=1 T=99 fp32: sequence length"):
        benchmark._Process(Configuration("tiny", 1, 99, "fp32", None, 1))
    assert not [child for child in multiprocessing.active_children() if not child.daemon]


# ---- facts -----------------------------------------------------------------------------------------


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the package's own checkout, never of one that a site-packages folder happens to lie in."""
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        if done.returncode == 0:
            assert done.stdout.startswith(machine.commit().removesuffix("-dirty"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "other"]):
        if shutil.which("git"):
            subprocess.run([*git, *words], check=True, capture_output=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path / "site-packages")
    assert machine.commit() == "unknown"


def test_facts_leave_the_backend_alone(cpu: ModuleType) -> None:
    """They are read from what it says of itself, and how its threads wait is among them."""
    cpu.configure(isa=cpu.isas()[0], threads=1, dtype="bf16")
    facts = machine.facts(cpu.info())
    assert (facts["instruction set"], facts["threads"]) == (cpu.isas()[0], 1) and cpu.info()["dtype"] == "bf16"
    assert facts["waiting threads"] == cpu.info()["waiting"] != ""


def test_memory() -> None:
    held = machine.memory()
    assert 1 < held["now"] <= held["peak"]


def test_script() -> None:
    command = [sys.executable, str(ROOT / "bench/kernels.py"), *shlex.split(f"{QUICK} --only global_norm -o json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in json.loads(done.stdout)["rows"]} == {"global_norm"}
