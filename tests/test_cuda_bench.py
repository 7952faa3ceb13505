"""Measuring a GPU: its ceilings, every op beside them, training steps, the programs of bench/.  No times are judged.

Children find the simulated GPU as they would find NVIDIA's libraries, by LD_LIBRARY_PATH.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import cudnn_standin
import numpy as np
import on_device
import pytest
import simulation
from guard import OUTPUTS

from llmc import benchmark, cases, ops, profiling
from llmc.__main__ import main
from llmc._cuda import compiler, device, head
from llmc.benchmark import Configuration, Program, Settings
from llmc.costs import Cost
from llmc.errors import ConfigError
from llmc.gpt2 import preset

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
QUICK = {"init": "tiny", "batch_sizes": (2,), "sequence_lengths": (8,), "device": "cuda", "isas": ("cuda",),
         "repeats": 1, "seconds": 0.0, "warmup": 0}  # fmt: skip


@pytest.fixture
def gpu(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The CUDA backend, whose ceilings take little where each of its multiplications takes a millisecond."""
    from llmc._cuda import peak

    if on_device.mode()[0] == "simulation":
        monkeypatch.setattr(peak, "_side", lambda: 64)
        monkeypatch.setattr(peak, "cache_nbytes", lambda: 4096)
        monkeypatch.setattr(benchmark, "MOST_SETS", 2)
    return cuda


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a test's own see the GPU that it sees."""
    if on_device.require() == "simulation":
        libraries = os.environ["LLMC_CUDA_LIBRARIES"]
        monkeypatch.setenv("LD_LIBRARY_PATH", f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}")
        monkeypatch.setenv("LLMC_TEST_CUDA", "simulation")
        monkeypatch.setenv("SIMULATION_MULTIPROCESSORS", "1")
        monkeypatch.setenv("SIMULATION_MEMORY", str(1 << 30))


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(shlex.split(words))
    out, err = capsys.readouterr()
    return status, out, err


# ---- ceilings --------------------------------------------------------------------------------------


def test_sizes_of_the_ceilings(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 8192 rows on an H100, and copies far beyond its cache."""
    from llmc._cuda import device, peak

    monkeypatch.setattr(device, "multiprocessors", lambda: 132)
    monkeypatch.setattr(peak, "cache_nbytes", lambda: 50 << 20)
    for dtype, nbytes in (("fp32", 3 * 8192**2 * 4), ("bf16", max(3 * 8192**2 * 2, 400 << 20))):
        ops.load("cuda", dtype=dtype)
        assert peak._side() == 8192 and peak.peak_nbytes() == nbytes
    ops.load("cuda", dtype="fp32")


@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_ceilings(gpu: ModuleType, dtype: str) -> None:
    """The copy copies half of its memory to the other half, and the product is one."""
    from llmc._cuda import peak

    ops.load("cuda", dtype=dtype)
    memory = profiling.stream_memory(gpu)
    assert memory.nbytes == gpu.peak_nbytes() == profiling.memory_nbytes(gpu)
    half = memory.size // 512 * 256
    values = np.arange(half) % 251
    memory[:half][...] = values
    assert profiling.measure(gpu, profiling.COPY, memory, 0.0) > 0
    assert (np.asarray(memory[half : 2 * half]) == values).all()
    assert profiling.measure(gpu, profiling.PRODUCT, memory, 0.0) > 0
    n = peak._side()
    if n <= 64:
        a, b, out = (np.asarray(part) for part in np.split(np.asarray(memory[: 3 * n * n * _itemsize()]), 3))
        a, b, out = (part.view(_storage()).reshape(n, n).astype(np.float64) for part in (a, b, out))
        assert np.abs(a).max() > 0 and not (a == b).all()
        np.testing.assert_allclose(out, a @ b.T, rtol=2.0**-7, atol=1e-4)
    ops.load("cuda", dtype="fp32")


def _storage() -> Any:
    from llmc._cuda import device

    return device.storage


def _itemsize() -> int:
    return int(_storage().itemsize)


def test_rates(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of all calls between two events over the time between them, once that is long enough."""
    from llmc._cuda import device, peak

    calls = [0]

    def call() -> None:
        calls[0] += 1

    monkeypatch.setattr(device, "stamp", lambda: calls[0])
    monkeypatch.setattr(device, "elapsed", lambda begin, end: (end - begin) * 0.001)
    assert peak._rate(call, 5.0, 0.1) == pytest.approx(5000.0)
    assert calls[0] <= 1 + 1 + 2 * 100
    monkeypatch.setattr(device, "elapsed", lambda begin, end: 0.0)  # a clock too coarse ends, too
    assert peak._rate(call, 5.0, 0.1) > 0


def test_products(gpu: ModuleType, rng: np.random.Generator) -> None:
    """The three uses are those of a linear layer, at an awkward size; shapes are checked."""
    M, K, N = 19, 13, 23
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (N, K), (M, N)))

    def placed(values: np.ndarray[Any, Any]) -> Any:
        array = gpu.empty(values.shape, "float32")
        array[...] = values
        return array

    for use, a, b, expected in (("forward", x, w, x @ w.T), ("dx", dy, w, dy @ w), ("dw", dy, x, dy.T @ x)):
        out = gpu.empty(expected.shape, "float32")
        gpu.product(use, out, placed(a), placed(b))
        np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="out"):
            gpu.product(use, gpu.empty((2, 2), "float32"), placed(a), placed(b))
        with pytest.raises(ValueError, match="b"):
            gpu.product(use, out, placed(a), placed(b[:-1, :-1].copy()))
    with pytest.raises(ValueError, match="use"):
        gpu.product("up", placed(x), placed(x), placed(x))


@pytest.mark.parametrize("room", [1, 2])
@pytest.mark.parametrize(("V", "rows"), [(37, 40), (37, 41), (9001, 9008), (16384, 16384)])
def test_classifier(
    gpu: ModuleType, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, V: int, rows: int, room: int
) -> None:
    """It is what `head_loss` does between its products; where two rows fit into a multiprocessor's shared memory, and
    where one does."""
    M, scale = 6, 0.5
    launched: list[str] = []
    launch = compiler.Kernel.__call__
    monkeypatch.setattr(
        compiler.Kernel, "__call__",
        lambda self, *args, **how: (launched.append(self.name), launch(self, *args, **how))[1],
    )  # fmt: skip
    monkeypatch.setattr(device, "shared_limit", lambda: room * (-(-V // 4) * 16 + head.BESIDE))
    values, chosen = rng.standard_normal((M, rows)).astype(np.float32), rng.integers(V, size=(2, 3))
    logits, losses, targets = gpu.empty((M, rows), "float32"), gpu.empty((2, 3), "float32"), gpu.empty((2, 3), "int32")
    logits[...], targets[...] = values, chosen
    launched.clear()
    gpu.classifier(logits, losses, targets, V, scale)
    exact = values[:, :V].astype(np.float64)
    lse = np.log(np.exp(exact).sum(1, keepdims=True))
    expected = np.zeros((M, rows))
    expected[:, :V] = np.exp(exact - lse)
    expected[np.arange(M), chosen.ravel()] -= 1
    np.testing.assert_allclose(np.asarray(losses).ravel(), (lse[:, 0] - exact[np.arange(M), chosen.ravel()]), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(logits), scale * expected, rtol=1e-5, atol=1e-7)
    assert launched == ["classifier_any" if rows % 4 else "classifier" if room == 1 else "classifier_held"]


def test_ceiling_of_an_op() -> None:
    assert profiling.ceiling(Cost(1e9, 10, 10), "bf16", gpu=True) == profiling.PRODUCT
    assert profiling.ceiling(Cost(0, 4e6, 3e6, (1, 0, 3), 4e6), "bf16", gpu=True) == profiling.COPY
    assert profiling.products("tf32", gpu=True) == profiling.PRODUCT


class Slow:
    """A GPU's backend whose host takes 20 ms to call an op."""

    def __init__(self) -> None:
        self.held: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def info(self) -> dict[str, Any]:
        return {"device": "cuda", "dtype": "bf16"}

    def hold(self, memory: Any, seconds: float) -> None:
        self.held.append(seconds)

    def peak_nbytes(self) -> int:
        return 1

    stamp = staticmethod(time.perf_counter)

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin

    def zero(self, x: Any) -> None:
        time.sleep(0.02)

    def measure_product(self, memory: Any, seconds: float) -> float:
        return 1e9

    measure_copy = measure_product


def test_profiled_ops_follow_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is kept busy for as long as it took to call a step's ops, within reason."""
    slow = Slow()
    profiled: Any = profiling.Profiled(slow, steps=3)  # type: ignore[arg-type]
    for limit in (9.0, 9.0, 0.001):
        monkeypatch.setattr(profiling, "HEAD_START", limit)
        with profiled.step():
            profiled.zero(np.zeros(4, np.float32))
    first, second, third = slow.held
    assert first == 0.0 and second >= 1.25 * 0.02 and third == 0.001
    assert set(profiled.report().peaks) == {"product", "copy"}


def test_hold(gpu: ModuleType) -> None:
    """Copies, which nothing has to wait for; none where there is nothing to hold."""
    memory = profiling.stream_memory(gpu)
    half = memory.size // 512 * 256
    for seconds, copied in ((0.0, False), (0.001, True)):
        memory[:half][...] = np.arange(half) % 251
        memory[half:][...] = 255
        gpu.hold(memory, seconds)
        found = np.asarray(memory)
        assert (found[half : 2 * half] == (found[:half] if copied else 255)).all()


def test_profile(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """`llmc train --profile` on a GPU: each op, the parts, what is outside of them, and both ceilings."""
    words = "train --init tiny --device cuda --dtype bf16 -b 2 -t 8 -x 2 -v 0 -s 0 --profile"
    status, out, err = run(words, capsys)
    assert status == 0, err
    assert "mean of 1 step" in out and "outside ops" in out and "head (forward and backward)" in out
    assert "a large product" in out and "a copy" in out and "a stream with" not in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    for op in ("adamw_step", "residual_layernorm_forward", "attention_backward", "embedding_backward", "head_loss"):
        assert rows[op].rstrip().endswith("%"), rows[op]
    ops.load("cuda", dtype="fp32")


# ---- kernels ---------------------------------------------------------------------------------------


def test_copies_of_arguments(gpu: ModuleType) -> None:
    """Memory of their own, the same values, and what was one array is one again; ids stay known."""
    for case in cases.cases(gpu, preset("tiny"), 1, 4, "fp32"):
        first, second = case.copies(gpu, 2)
        assert first is case.args and len(second) == len(first)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            if not hasattr(a, "nbytes"):
                assert a is b
                continue
            assert a.ptr != b.ptr and (np.asarray(a) == np.asarray(b)).all() and a.dtype == b.dtype
            assert a.dtype != np.int32 or b.bounds == a.bounds is not None
            assert all((a is first[j]) == (b is second[j]) for j in range(i) if hasattr(first[j], "nbytes"))
        del case, first, second, a, b


def test_every_op_is_measured(gpu: ModuleType) -> None:
    """In each type; what has no products once for those that store the same."""
    rows = list(benchmark.gpu_kernels(Settings(**QUICK, dtypes=("fp32", "tf32", "bf16"))))
    own = {f"product_{use}" for use in ("forward", "dx", "dw")} | {"classifier"}
    assert {row.op for row in rows} == set(OUTPUTS) | own
    for row in rows:
        assert row.isa == "cuda" and row.rate > 0 and row.peak > 0 and row.fraction > 0 and row.turns == 1
    both = list(benchmark.gpu_kernels(Settings(**QUICK, dtypes=("fp32", "tf32"), only="layernorm,product_dx")))
    assert [(row.op, row.dtype) for row in both if "layernorm" in row.op] == [
        ("layernorm_forward", "fp32"), ("layernorm_backward", "fp32"), ("residual_layernorm_forward", "fp32"),
    ]  # fmt: skip
    assert {row.dtype for row in both if row.op == "product_dx"} == {"fp32", "tf32"}
    ops.load("cuda", dtype="fp32")


def test_attention_by_cudnn_has_rows_of_its_own(gpu: ModuleType) -> None:
    if on_device.mode()[0] == "device":
        pytest.skip("the stand-in computes on the simulated GPU")
    settings = Settings(**QUICK, dtypes=("bf16",), only="attention,zero")
    with cudnn_standin.installed(simulation.load()) as made:
        rows = list(benchmark.gpu_kernels(settings))
        assert {graph.kind for graph in made} == {"sdpa", "sdpa_backward"}
    assert [(row.op, row.isa) for row in rows] == [
        ("attention_forward", "cuda"), ("attention_forward", "cudnn"), ("attention_backward", "cuda"),
        ("attention_backward", "cudnn"), ("attention_forward", "cuda"), ("attention_backward", "cuda"),
        ("attention_decode", "cuda"), ("attention_decode", "cuda"), ("zero", "cuda"),
    ]  # fmt: skip
    assert benchmark.kernels_attention([row.isa for row in rows]) == "own, cudnn"
    assert benchmark.kernels_attention(["cuda"]) == "own"
    ops.load("cuda", dtype="fp32")


def test_attention_is_that_of_the_types_measured(gpu: ModuleType) -> None:
    """cuDNN's is in bf16 alone, whatever else is measured first."""
    if on_device.mode()[0] == "device":
        pytest.skip("the stand-in computes on the simulated GPU")
    with cudnn_standin.installed(simulation.load()):
        told = [benchmark.gpu_facts("cuda", dtypes)["attention"] for dtypes in (("fp32",), ("bf16",), ops.DTYPES)]
        assert told[:2] == ["own", "cudnn"] and set(told[2].split(", ")) == {"own in fp32 and tf32", "cudnn in bf16"}
        assert benchmark.gpu_facts("cuda", ("bf16",), "own")["attention"] == "own"
    ops.load("cuda", dtype="fp32")


class Clockwork:
    """A GPU of one op, which takes a millisecond, and a cache of 1000 bytes."""

    def __init__(self) -> None:
        self.now, self.calls, self.replays = 0, [], []

    def info(self) -> dict[str, Any]:
        return {"device": "cuda", "storage": "bfloat16"}

    def cache_nbytes(self) -> int:
        return 1000

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.zeros(shape, dtype)

    def record(self, function: Any) -> Any:
        def replay() -> None:
            self.replays.append(self.now)
            function()

        return replay

    def stamp(self) -> int:
        return self.now

    def elapsed(self, begin: int, end: int) -> float:
        return (end - begin) * 1e-3

    def op(self, x: np.ndarray[Any, Any]) -> None:
        self.now += 1
        self.calls.append(id(x))


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time per call; turns long enough; sets of arguments that take three caches, one after another."""
    clockwork, peaks = Clockwork(), iter([1e9, 3e9] * 4)
    monkeypatch.setattr(benchmark, "measure", lambda *args: next(peaks))
    x = np.zeros(125, np.float32)  # 500 bytes
    case = benchmark.Case("zero", "125", "bf16", Cost(0.0, 0.0, 1e6, (0, 1, 0), 500.0), clockwork.op, (x,))
    settings = Settings(**{**QUICK, "repeats": 4, "seconds": 9.0})
    row = benchmark._gpu_row(clockwork, case, settings, x, "cuda")
    assert (row.op, row.dtype, row.isa, row.turns) == ("zero", "bf16", "cuda", 4)
    assert row.ms.median == pytest.approx(1.0) and row.rate == pytest.approx(1.0)  # 10^6 bytes a millisecond
    assert row.peak == pytest.approx(2.0) and row.fraction == pytest.approx(0.5)
    assert len(set(clockwork.calls)) == 6 and clockwork.calls[:12] == clockwork.calls[:6] * 2
    assert np.diff(clockwork.replays).min() == 18  # whole rounds, of at least LEAST_CALLS
    assert clockwork.now * 1e-3 >= 4 * benchmark.TURN_SECONDS


def test_settings() -> None:
    """Which part of a bench is the CPU's."""
    both = Settings(device="cuda", dtypes=("fp32", "tf32"), isas=("scalar", "cuda"))
    assert both.cpu == Settings(dtypes=("fp32",), isas=("scalar",)) and both.gpu
    assert Settings(device="cuda", isas=("cuda",)).cpu is None
    assert Settings(device="cuda", dtypes=("tf32",)).cpu is None
    assert Settings(device="cuda").cpu == Settings()
    with pytest.raises(ConfigError, match="--device cuda"):
        Settings(isas=("cuda",))


def test_one_table(gpu: ModuleType, cpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Scalar, SIMD and CUDA side by side."""
    isas = f"scalar,{cpu.isas()[-1]}"
    words = f"bench kernels --init tiny --device cuda --isas {isas},cuda -B 2 -T 8 --seconds 0 --repeats 1"
    status, out, err = run(f"{words} --only gelu_forward", capsys)
    assert status == 0, err
    lines = out.splitlines()
    names = [name.strip() for name in lines[0].split("|")]
    assert [names[i] for i in (5, 7, 9)] == [*isas.split(","), "cuda"]
    (row,) = [line for line in lines if line.startswith("| gelu_forward")]
    assert row.count("%") == 3
    assert "GPU: " in lines[-1] and "instruction set: scalar" in lines[-1]


# ---- training --------------------------------------------------------------------------------------


def test_turns_are_training(cpu: ModuleType) -> None:
    """A turn's losses are those of its steps one by one; with the forward pass alone nothing is learnt."""
    one, other = (Program(Configuration("tiny", 2, 8, "fp32", None, 1)) for _ in range(2))
    losses, seconds, busy = one.turn(range(3))
    assert losses == pytest.approx([other.step(number)[0] for number in range(3)], rel=1e-7)
    assert seconds > 0 and 0 < busy <= 1
    still, _, _ = one.turn([7, 7], only_forward=True)
    assert still[0] == still[1]
    assert still[0] == pytest.approx(other.model.loss(*other._batch(7)), rel=1e-7)


def test_a_gpus_turns(gpu: ModuleType) -> None:
    """The same losses as the CPU's, within fp32; and what it holds of the GPU's memory."""
    program = Program(Configuration("tiny", 2, 8, "fp32", None, None, device="cuda"))
    losses, seconds, busy = program.turn(range(4))
    expected, _, _ = Program(Configuration("tiny", 2, 8, "fp32", None, 1)).turn(range(4))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert seconds > 0 and 0 < busy <= 1.001
    assert program.held >= program.model.nbytes
    loss, times = program.step(4)
    assert loss > 0 and times[0] == 0 and times == sorted(times)
    still, _, _ = program.turn([7, 7], only_forward=True)
    assert still[0] == still[1]


@pytest.mark.parametrize(
    "words, field", [("--isas avx2", "isas"), ("--isas cuda,avx2", "isas"), ("--threads 1", "threads")]
)
def test_training_on_a_gpu_takes_nothing_of_the_cpus(
    gpu: ModuleType, words: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(f"bench training --init tiny --device cuda -B 2 -T 8 {words}", capsys)
    assert (status, out) == (1, "") and err.startswith(f"llmc: error: {field}: ") and err.count("\n") == 1
    assert "means nothing to training on 'cuda'" in err


@pytest.mark.heavy
def test_bench_training(children: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench training --init tiny --device cuda --dtype bf16 -B 2 -T 8 --seconds 0 --repeats 1 --warmup 0 -o csv"
    status, out, err = run(words, capsys)
    assert status == 0, err
    (row,) = csv.DictReader(out.splitlines())
    assert (row["isa"], row["dtype"], row["steps"]) == ("cuda", "bf16", "1")
    assert 0 < float(row["busy"]) <= 1.001 and float(row["peak_mib"]) > 0 and float(row["mfu"]) > 0


# ---- the programs of bench/ ------------------------------------------------------------------------


def bench(*arguments: str, limit: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit)


@pytest.mark.heavy
def test_training_on_a_gpu(children: None, tmp_path: Path) -> None:
    """llmc's own program, training and with the forward pass alone; at the largest batch that fits, where it stops
    when its time is over."""
    kept = tmp_path / "run.json"
    common = ("training.py", "--device", "cuda", "--programs", "llmc", "--turn", "2", "--warmup", "1", "--starts", "1",
              "--threads", "1", "--json-out", str(kept))  # fmt: skip
    done = bench(*common, "--configs", "tiny:2x8=2", "--dtypes", "fp32,bf16")
    assert done.returncode == 0, done.stderr
    fp32, bf16 = json.loads(kept.read_text())["configurations"]
    assert 0.0 < bf16["difference"] < 1e-2 and fp32["steps"] == 2 and len(fp32["losses"]["llmc"]) == 1 + 2 * 2
    (row,) = bf16["programs"]
    assert 0 < row["busy"] <= 1.001 and row["peak_mib"] > 0 and row["forward"] is None and bf16["peak"] > 0
    assert "| GPU busy |" in done.stdout and "turns of 2 steps" in done.stdout

    done = bench(*common, "--configs", "tiny:2x8=1", "--dtypes", "tf32", "--only-forward")
    assert done.returncode == 0, done.stderr
    (section,) = json.loads(kept.read_text())["configurations"]
    assert section["only_forward"] and section["flops"] == pytest.approx(fp32["flops"] / 3)
    assert "forward alone" in done.stdout


@pytest.mark.heavy
def test_gpu_parts(children: None, tmp_path: Path) -> None:
    """What bench/on_gpu.sh begins with, and that it is written as it comes."""
    if on_device.mode()[0] == "device":
        pytest.skip("on a GPU this is bench/on_gpu.sh's to run")
    kept = tmp_path / "found.json"
    done = bench("gpu.py", "peaks", "--json", str(kept), "--turn-seconds", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads(kept.read_text())
    assert found["copy"] > 0 and set(found["product"]) == set(ops.DTYPES) and "product, tf32" in done.stdout
    done = bench(
        "gpu.py", "kernels", "--json", str(kept), "--init", "tiny", "--batch-size", "1", "--sequence-length", "8",
        "--only", "gelu_backward,zero", "--turn-seconds", "0", "--repeats", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(kept.read_text())["rows"]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in ("gelu_backward", "zero") for dtype in ("fp32", "bf16")
    }
    assert len(rows) == 4 and "| gelu_backward |" in done.stdout


# ---- what llmc info says ---------------------------------------------------------------------------


def test_info(cuda: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run("info --device cuda --dtype tf32", capsys)
    assert status == 0, err
    rows = {line[:16].strip(): line[17:] for line in out.splitlines()}
    assert re.search(r"\S, compute capability \d+\.\d, .* GiB free, driver for CUDA \d+\.\d$", rows["GPU"])
    assert rows["in use"] == "cuda, tf32; products: cublaslt; attention: own"
    assert rows["kernel compiler"] and rows["cuBLASLt"][0].isdigit() and rows["attention"] and rows["PyCUDA"]
    ops.load("cuda", dtype="fp32")


def test_info_without_a_gpu() -> None:
    """One clear line, and everything else all the same; asked for the GPU, an error after it."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": ""}
    command = [sys.executable, "-m", "llmc", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    assert line.split()[1] == "none:" and len(line) > 30
    for what in ("PyCUDA", "kernel compiler", "cuBLASLt", "attention", "numpy"):
        assert f"\n{what} " in done.stdout
    done = subprocess.run([*command, "--device", "cuda"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1 and "\nPyCUDA " in done.stdout and done.stderr.count("\n") == 1
