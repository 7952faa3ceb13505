"""bench/training.py: its arithmetic, and a small run of the real thing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.gpt2 import Config, preset

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    return report


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import training

    return training


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "training.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_flops_are_those_of_every_product(report: Any) -> None:
    """Counted product by product: 2 M N K forward, twice that backward; of attention's scores half, as causal."""
    config, B, T = Config(max_seq_len=9, vocab_size=11, num_layers=3, num_heads=2, channels=4), 2, 5
    C, M = config.channels, B * T
    linear = [(M, 3 * C, C), (M, C, C), (M, 4 * C, C), (M, C, 4 * C)]
    layer = sum(2 * m * n * k for m, n, k in linear)
    heads = config.num_heads
    layer += B * heads * 2 * (2 * T * T * (C // heads)) / 2
    head = 2 * M * config.vocab_size * C
    assert report.ceiling(config, B, T, "fp32", [])["flops"] == 3 * (config.num_layers * layer + head)


def test_roofline_is_products_and_traffic(report: Any) -> None:
    config = preset("tiny")
    peaks = [{"fp32": 1e9, "bf16": 8e9, "stream": 1e9}, {"fp32": 2e9, "bf16": 4e9, "stream": 2e9}]
    found = report.ceiling(config, 2, 8, "bf16", [*peaks, {"fp32": 9e9, "bf16": 5e9, "stream": 4e9}])
    seconds = found["flops"] / 5e9 + 28 * config.num_parameters / 2e9
    assert found["roofline_ms"] == pytest.approx(1e3 * seconds, rel=1e-12)
    assert "roofline_ms" not in report.ceiling(config, 2, 8, "bf16", [])


def test_summary_compares_rounds_not_medians(report: Any) -> None:
    def answers(*seconds: float) -> list[dict[str, Any]]:
        return [{"losses": [1.0], "forward": s, "backward": 2 * s, "update": s} for s in seconds]

    # The first answer is for warming up.  Ratios of the rounds: 3, 1, 5; of the medians: 2.
    ours, theirs = answers(9.0, 0.1, 0.4, 0.2), answers(9.0, 0.3, 0.4, 1.0)
    memory = {"libraries": 10.0, "peak": 20.0}
    section = {"flops": 1.2e9, "peak": 1e9, "roofline_ms": 1200.0}
    row = report.summary(report.Measured("them", theirs, ours, memory, [3.0, 1.0, 2.0], 1), section, 24)
    assert row["step"] == pytest.approx(1600.0)
    assert (row["forward"], row["backward"], row["update"]) == pytest.approx((400.0, 800.0, 400.0))
    assert row["ratio"] == pytest.approx(3.0)
    assert row["mfu"] == pytest.approx(0.75)
    assert row["roofline"] == pytest.approx(0.75)
    assert row["tokens_per_second"] == pytest.approx(15.0)
    assert row["start"] == 2.0
    assert (row["peak_mib"], row["library_mib"]) == (20.0, 10.0)


# ---- on a GPU --------------------------------------------------------------------------------------


def test_data_sheets(report: Any) -> None:
    """Dense figures, by name; half of them in tf32, none for what is not made of tensor cores, or not known."""
    assert report.datasheet("NVIDIA H100 80GB HBM3") == report.datasheet("NVIDIA H200") == 989.4e12
    assert report.datasheet("NVIDIA H100 PCIe") == 756.5e12
    assert report.datasheet("NVIDIA A100-SXM4-80GB", "tf32") == pytest.approx(156e12, rel=1e-3)
    assert report.datasheet("NVIDIA A100-SXM4-80GB", "fp32") is None
    assert report.datasheet("Simulated GPU") is None


def gpu_section(report: Any, **changes: Any) -> dict[str, Any]:
    """What bench/training.py finds of llmc and a program that takes 1.2 times as long."""
    section = {
        "init": "d12", "B": 4, "T": 1024, "dtype": "bf16", "device": "cuda", "only_forward": False, "rounds": 3,
        "steps": 20, "warmup": 1, "difference": 0.001, "compared_with": "llmc's", "skipped": {}, "failures": [],
        "programs": [], "flops": 3e12, "peak": 6e14, "stream": 3e12, "roofline_ms": 6.0, "adamw_bytes": 1.0, **changes,
    }  # fmt: skip
    ours = [{"losses": [1.0], "step": step, "busy": 0.98} for step in (9.0, 0.010, 0.012, 0.011)]
    theirs = [{"losses": [1.0], "step": 1.2 * answer["step"], "busy": None} for answer in ours]
    for name, answers in (("llmc", ours), ("torch.compile", theirs)):
        measured = report.Measured(name, answers, ours, {"libraries": 1.0, "peak": 2.0}, [3.0], 1)
        section["programs"].append(report.summary(measured, section, 4096, "NVIDIA H100 80GB HBM3"))
    return section


def test_a_gpus_section(report: Any) -> None:
    """No parts of a step; both kinds of MFU, and the GPU's share."""
    section = gpu_section(report)
    ours, theirs = section["programs"]
    assert ours["step"] == pytest.approx(11.0) and theirs["ratio"] == pytest.approx(1.2)
    assert ours["mfu"] == pytest.approx(3e12 / 0.011 / 6e14)
    assert ours["mfu_datasheet"] == pytest.approx(3e12 / 0.011 / 989.4e12)
    assert (ours["busy"], theirs["busy"], ours["forward"]) == (0.98, None, None)
    result = {"machine": {"processor": "p", "GPU": "g", "threads": 1, "commit": "c"}, "configurations": [section]}
    text = report.markdown(result)
    assert "turns of 20 steps" in text and " 98.0 % |" in text and "| GPU MiB |" in text and "backward" not in text
    rows = list(csv.DictReader(report.as_csv(result).splitlines()))
    assert [row["mfu_datasheet"] != "" and row["GPU"] for row in rows] == ["g", "g"] and rows[0]["forward"] == ""


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_gpus_plot(tmp_path: Path, report: Any) -> None:
    facts = {"processor": "p", "threads": 1, "commit": "c"}
    report.plot({"machine": facts, "configurations": [gpu_section(report)]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_goals(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is judged on its own, beside what the goal names; what was not measured is said to be so."""
    import goals

    none = goals.rows([])
    assert len(none) == len(goals.GOALS) and {tuple(row[2:]) for row in none} == {(goals.MISSING, "")}

    def kernel(op: str, fraction: float, rate: float = 1.0, **changes: Any) -> dict[str, Any]:
        return {"op": op, "dtype": "bf16", "isa": "cuda", "fraction": fraction, "rate": rate, "shape": "s", **changes}

    forward = gpu_section(report, dtype="tf32", only_forward=True)
    exact = gpu_section(report, dtype="fp32", only_forward=True)
    rows = [
        kernel("layernorm_forward", 0.5), kernel("layernorm_forward", 0.9),
        kernel("layernorm_backward", 0.84, shape="64x1024x768"), kernel("layernorm_backward", 0.2),
        kernel("residual_layernorm_forward", 0.95), kernel("gelu_forward", 0.86), kernel("gelu_backward", 0.85),
        kernel("adamw_step", 0.99, dtype="fp32"), kernel("attention_forward", 0.3, 201e3),
        kernel("attention_forward", 0.3, 199e3), kernel("attention_backward", 0.3, 149e3),
        kernel("attention_backward", 0.3, 400e3, isa="cudnn"),
    ]  # fmt: skip
    def found(rows: list[dict[str, Any]], *configurations: dict[str, Any]) -> dict[str, list[list[str]]]:
        parts = [{"part": "gpu"}, {"results": {"rows": rows}}, {"results": {"configurations": configurations}}]
        made: dict[str, list[list[str]]] = {}
        for what, *row in goals.rows(parts):
            made.setdefault(what, []).append(row)
        return made

    texts = found(rows, gpu_section(report), forward)
    assert texts["layernorm, the slowest of three: of the copy"] == [
        [">= 85%", "84% (layernorm_backward, 64x1024x768)", "no"]
    ]
    assert texts["GELU, forward and backward: of the copy"] == [[">= 85%", "85% (gelu_backward, s)", "yes"]]
    assert [row[0][1] for row in (texts["AdamW: of the copy"], texts["classifier: of the copy"])] == [goals.MISSING] * 2
    assert texts["own attention, forward, TFLOP/s of the causal half"] == [
        [">= 200", "201 (s)", "yes"], [">= 200", "199 (s)", "no"],
    ]  # fmt: skip
    assert texts["own attention, backward, TFLOP/s of the causal half"] == [[">= 150", "149 (s)", "no"]]
    speed, mfu = (
        f"124M bf16 training, {{}}T=1024: {figure}"
        for figure in ("time of torch.compile / llmc's", "MFU of the data sheet's")
    )
    busy = "the part of a training step in which the GPU is busy, {}"
    missing = [goals.MISSING, ""]
    assert texts[speed.format("B=4 ")] == [[">= 1.15", "1.20", "yes"]]
    assert texts[mfu.format("B=4 ")] == [[">= 45.0%", "27.6%", "no"]]
    assert texts[busy.format("B=4")] == [[">= 97.0%", "98.0%", "yes"]]
    for what in (speed.format("largest B, "), mfu.format("largest B, "), busy.format("largest B")):
        assert texts[what][0][1:] == missing
    tf32, fp32 = (f"forward, {dtype}, B=4 T=1024: time of torch.compile in TF32 / llmc's" for dtype in ("TF32", "fp32"))
    assert texts[tf32] == [["> 1.00", "1.20", "yes"]] and texts[fp32][0][1:] == missing

    # fp32 beside torch.compile in fp32 alone is no figure; beside TF32's, which here is as fast, no faster one.
    assert found([], exact)[fp32][0][1:] == missing
    forward["programs"][1]["step"] = exact["programs"][0]["step"]
    forward["programs"][1]["ratio"] = 1.0
    texts = found([kernel("gelu_forward", 0.9)], exact, forward)
    assert texts[fp32] == texts[tf32] == [["> 1.00", "1.00", "no"]]
    assert texts["GELU, forward and backward: of the copy"][0][1:] == missing, "one of two"

    # A batch does not stand for another; llmc alone may have a larger one than the comparison.
    slow, alone = gpu_section(report, B=16, failures=["the losses differ"]), gpu_section(report, B=64)
    slow["programs"][1]["ratio"] = 1.1
    del alone["programs"][1]
    alone["programs"][0]["busy"] = 0.5
    texts = found([], gpu_section(report), slow, alone)
    assert texts[speed.format("B=4 ")] == [[">= 1.15", "1.20", "yes"]]
    assert texts[speed.format("largest B, ")] == [[">= 1.15", "1.10 (B=16)", "no, with failures"]]
    assert texts[busy.format("largest B")] == [[">= 97.0%", "50.0% (B=64)", "no"]]
    assert found([], {**slow, "programs": []})[speed.format("largest B, ")][0][1:] == [goals.MISSING, "with failures"]


@pytest.mark.parametrize("simulated", [False, True])
def test_what_on_gpu_measures(training: Any, monkeypatch: pytest.MonkeyPatch, simulated: bool) -> None:
    """Command lines that can be read, with a time and a file each; the goals' figures are among them."""
    import gpu
    import on_gpu

    found = list(on_gpu.measurements(simulated))
    assert sum(what.limit for what in found) < 1000 and len({what.name for what in found}) == len(found)
    trained = []
    for what in found:
        script, *words = (word.format(json="found.json", seconds=60) for word in what.arguments)
        monkeypatch.setattr(sys, "argv", [script, *words])
        args = {"bench/gpu.py": gpu, "bench/training.py": training}[script].arguments()
        assert args.device == "cuda" and args.seconds == 60
        assert (args.json_out if script == "bench/training.py" else args.json) == Path("found.json")
        if script == "bench/training.py":
            trained += [(c.init, c.B, c.T, dtype, args.only_forward) for c in args.configs for dtype in args.dtypes]
    if not simulated:
        assert trained[:3] == [
            ("d12", 4, 1024, "bf16", False), ("d12", 4, 1024, "tf32", True), ("d12", 4, 1024, "fp32", True),
        ]  # fmt: skip
        assert {init for init, *_ in trained} == {"d12", "d24", "d36"}


def settings_of(training: Any, folder: Path, program: str, **changes: Any) -> dict[str, Any]:
    args = SimpleNamespace(
        seed=0, device="cpu", only_forward=False, attention=None, turn=0, began=0.0, seconds=0.0
    )  # fmt: skip
    shared = training.Run(args, 1, folder)
    made: dict[str, Any] = shared.settings(program, training.Configuration("tiny", 2, 8, 1), "fp32")
    return {**made, **changes}


TURNS = """
import json, sys
sys.path.insert(0, sys.argv[2])
import programs
settings = json.loads(sys.argv[1])
PyTorch = programs.PROGRAMS["torch"]
single, several = PyTorch(settings), PyTorch(settings)
one_by_one = [single.turn(number)["losses"][0] for number in range(4)]
several.settings = {**settings, "steps": 3}
first, then = several._turn(0), several._turn(1)
several.settings["only_forward"] = True
still, again = several._turn(2), several._turn(2)
several._set_up_gpu()  # every name in it is PyTorch's
print(json.dumps([one_by_one, first["losses"] + then["losses"], still["losses"], again["losses"], then["step"]]))
"""


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.heavy
def test_pytorchs_turns(tmp_path: Path, training: Any) -> None:
    """As they are taken on a GPU: the losses of steps one by one, and none learns with the forward pass alone."""
    settings = settings_of(training, tmp_path, "eager")
    command = [sys.executable, "-c", TURNS, json.dumps(settings), str(BENCH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one_by_one, turns, still, again, step = json.loads(done.stdout)
    assert turns == pytest.approx(one_by_one, rel=1e-6) and step > 0
    assert len(still) == 3 and still == again


def test_a_program_says_why_it_failed(tmp_path: Path, training: Any) -> None:
    """In a line of its own, which the parent passes on; and one that takes too long is given up."""
    settings = settings_of(training, tmp_path, "llmc", T=99)
    with pytest.raises(training.ProgramFailed, match="llmc: sequence length"):
        training.Worker("llmc", settings, tmp_path)
    with pytest.raises(training.ProgramFailed, match="no time left"):
        training.Worker("llmc", settings_of(training, tmp_path, "llmc"), tmp_path, until=0.0)


def test_the_largest_batch(tmp_path: Path, training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest power of two with which llmc's plan takes its share of what is free, in the storage type."""
    from llmc import memory

    asked = []

    class Backend:
        def info(self) -> dict[str, Any]:
            return {"storage": "bfloat16"}

        def memory(self) -> tuple[int, int]:
            return 8000, 9000

    def plan(config: Any, ops: Any, B: int, T: int, dtype: str) -> Any:
        asked.append((B, T, dtype))
        return SimpleNamespace(total=100 * B)

    monkeypatch.setattr(training.ops, "load", lambda *args, **kwargs: Backend())
    monkeypatch.setattr(memory, "plan", plan)
    args = SimpleNamespace(
        seed=0, device="cuda", only_forward=False, attention=None, turn=0, began=0.0, seconds=0.0, programs=["llmc"]
    )
    run = training.Run(args, 1, tmp_path)
    parsed = training.Configuration.parse("tiny:maxx8=3", 9)
    assert (parsed.B, parsed.rounds) == (0, 3)
    assert run.fitting(parsed, "bf16").B == 64 and {dtype for _, _, dtype in asked} == {"bfloat16"}
    args.programs = ["llmc", "eager", "compile"]
    assert run.fitting(parsed, "bf16").B == 16
    assert run.fitting(training.Configuration("tiny", 3, 8, 1), "bf16").B == 3
    assert run.machine(training.Configuration("tiny", 3, 8, 1), "bf16")["steps"] == 100
    assert run.machine(training.Configuration("gpt2-large", 32, 1024, 1), "bf16")["steps"] == 1


def test_differences_of_losses(training: Any) -> None:
    def difference(losses: list[float], most: int | None = None) -> float:
        value: float = training.largest_difference({"llmc": [1.0, 2.0, 3.0], "them": losses}, [1.0, 2.0, 3.0], most)
        return value

    assert difference([1.0, 2.5, 3.0]) == 0.5
    assert difference([1.0, 2.0]) == 0.0
    assert np.isnan(difference([1.0, float("nan"), 3.0]))
    assert difference([1.0, 2.25, 9.0], 2) == 0.25
    assert np.isnan(difference([1.0, 2.0, float("nan")], 1))


def test_times_of_losses_that_differ(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are given, beside the failure; on a GPU only the first steps count."""

    def measured(device: str, theirs: list[float]) -> Any:
        def worker(name: str, losses: list[float]) -> Any:
            answers = [{"losses": [loss], "forward": 1.0, "backward": 1.0, "update": 1.0} for loss in losses]
            return SimpleNamespace(
                name=name, losses=losses, answers=answers, memory={"libraries": 1.0, "peak": 2.0}, start=1.0,
                settings={},
            )  # fmt: skip

        args = SimpleNamespace(
            device=device, attention=None, programs=["llmc", "eager"], programs_given=True, only_forward=False, turn=1,
            warmup=1, starts=1, seconds=np.inf, began=0.0,
        )  # fmt: skip
        ours = [1.0] * len(theirs)
        monkeypatch.setattr(training, "take_turns", lambda *_: [worker("llmc", ours), worker("eager", theirs)])
        monkeypatch.setattr(training, "repeat_starts", lambda *_: {})
        monkeypatch.setattr(training.machine, "installed", lambda name: "1.0")
        run = training.Run(args, 1, Path())
        return training.measure(run, training.Configuration("tiny", 2, 8, 2), "fp32", None)

    good, bad = measured("cpu", [1.0, 1.0]), measured("cpu", [1.0, 1.5])
    assert not good["failures"] and len(good["programs"]) == 2
    assert bad["failures"] == ["the losses differ by 5.0e-01 from llmc's, more than 1.0e-04"]
    assert bad["programs"] == good["programs"]
    late = [1.0] * training.COMPARED + [9.0]
    assert measured("cpu", late)["failures"] and not measured("cuda", late)["failures"]
    assert measured("cuda", late[1:])["failures"]


def test_configurations(training: Any) -> None:
    parsed = training.Configuration.parse("d2:3x16=5", 9)
    assert (parsed.init, parsed.B, parsed.T, parsed.rounds) == ("d2", 3, 16, 5)
    assert training.Configuration.parse("d2:3x16", 9).rounds == 9
    for texts in training.CONFIGURATIONS.values():
        assert all(training.Configuration.parse(text, 9).rounds > 0 for text in texts.split(","))
    for text in ("d2", "d2:3", "d2:0x4", "d2:1x1025", "gpt2:1x4", "d2:1x4=0", "d2:maxx0", "d2:max", "d2:max4"):
        with pytest.raises(ValueError):
            training.Configuration.parse(text, 9)


def test_llmc_alone_in_every_format(tmp_path: Path, report: Any) -> None:
    kept = tmp_path / "run.json"
    done = run(
        "--configs", "tiny:2x8=2,tiny:1x5", "--rounds", "1", "--programs", "llmc", "--dtypes", "fp32", "--starts", "2",
        "--threads", "1", "-o", "csv", "--json-out", str(kept),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [(row["init"], row["B"], row["T"], row["program"]) for row in rows] == [
        ("tiny", "2", "8", "llmc"), ("tiny", "1", "5", "llmc"),
    ]  # fmt: skip
    result = json.loads(kept.read_text())
    first, second = result["configurations"]
    assert (len(first["programs"][0]["steps_ms"]), len(second["programs"][0]["steps_ms"])) == (2, 1)
    assert len(first["starts"]["llmc"]) == len(first["starts"]["llmc random"]) == 2
    # A model of 257 bytes that knows nothing.
    assert abs(first["losses"]["llmc"][0] - np.log(257)) < 0.1
    text = report.markdown(result)
    assert "### tiny, B=2, T=8, fp32" in text
    assert text.count("| llmc ") == 2


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.heavy
def test_pytorch_sees_what_llmc_sees(tmp_path: Path) -> None:
    """The same losses from the same file and batches, in fp32 and, within its own limit, in bf16."""
    kept = tmp_path / "run.json"
    arguments = ("--configs", "tiny:2x8=2", "--programs", "llmc,eager", "--starts", "1", "--threads", "1")
    done = run(*arguments, "--json-out", str(kept), "-o", "json")
    assert done.returncode == 0, done.stderr
    fp32, bf16 = json.loads(done.stdout)["configurations"]
    assert json.loads(kept.read_text())["configurations"] == [fp32, bf16]
    assert [row["program"] for row in fp32["programs"]] == ["llmc", "PyTorch eager"]
    assert fp32["difference"] < 1e-5
    assert fp32["losses"]["eager"][0] != fp32["losses"]["eager"][1]
    assert 0.0 < bf16["difference"] < 1e-2
    assert fp32["programs"][1]["peak_mib"] > fp32["programs"][1]["library_mib"] > 0.0


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.heavy
def test_pytorch_meets_no_kernels(tmp_path: Path, training: Any) -> None:
    """Two OpenMP runtimes in one process would get in each other's way."""
    args = SimpleNamespace(seed=0, device="cpu", only_forward=False, attention=None, turn=0, began=0.0, seconds=0.0)
    shared = training.Run(args, 1, tmp_path)
    settings = shared.settings("eager", training.Configuration("tiny", 2, 8, 1), "fp32")
    program = (
        f"import json, sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "import programs\n"
        "made = programs.PROGRAMS['torch'](json.loads(sys.argv[1]))\n"
        "assert made.turn(0)['losses'][0] > 0 and made.optimizer.defaults['lr'] == 1e-4\n"
        "print([name for name in sys.modules if name.startswith('llmc._cpu')])\n"
    )
    command = [sys.executable, "-c", program, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot(tmp_path: Path, report: Any) -> None:
    program = {"program": "llmc", "forward": 1.0, "backward": 2.0, "update": 0.5, "ratio": 1.0}
    section = {"init": "tiny", "B": 1, "T": 2, "dtype": "fp32", "programs": [program], "roofline_ms": 1.0}
    result = {"machine": {"processor": "p", "threads": 1, "commit": "c"}, "configurations": [section] * 3}
    report.plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--programs", "eager"], "llmc must be among them"),
        (["--programs", "llmc,jax"], "'jax' is unknown"),
        (["--dtypes", "fp8"], "'fp8' is unknown"),
        (["--configs", "d2:4"], "INIT:BxT=ROUNDS is wanted"),
        (["--rounds", "0"], "--rounds: must be at least 1"),
        (["--only-forward"], "are for GPUs"),
        (["--device", "tpu"], "'tpu' is unknown"),
    ],
)
def test_options_are_checked(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
