"""The profile: it changes nothing, and its parts add up."""

from __future__ import annotations

import io
import time
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import reference
from guard import number

import llmc
from llmc import display, profiling
from llmc.__main__ import main
from llmc.ops import Ops
from llmc.profiling import PARTS, Profile, Profiled
from llmc.training import Step, TrainConfig, train

RUN = TrainConfig.recipe("stories", init="tiny", out="", batch_size=2, sequence_length=32, steps=4, val_every=2,
                         val_batches=1, sample_every=2, sample_length=4)  # fmt: skip


def test_bit_identical(cpu: ModuleType) -> None:
    """Losses, norms and weights; gradients added up over two micro batches too."""
    for total in (0, 128):
        config = TrainConfig(**{**vars(RUN), "total_batch": total})
        seen = []
        for profile in (False, True):
            model = llmc.load("tiny", seed=1)
            events = list(train(config, model, profile=profile))
            steps = [(e.loss, e.norm) for e in events if isinstance(e, Step)]
            seen.append((steps, model.params.flat.tobytes()))
            assert model.ops is cpu, "the backend is the model's own again"
        assert seen[0] == seen[1]


def test_totals(cpu: ModuleType) -> None:
    """Of the last steps, since the first is left out; validation and samples are in none."""
    events = list(train(RUN, llmc.load("tiny"), profile=True))
    profile = events[-1]
    assert isinstance(profile, Profile) and profile.steps == 3
    assert sum(isinstance(event, Profile) for event in events) == 1
    calls = {(row.op, row.size): row.calls for row in profile.rows}
    assert calls == {
        ("embedding_forward", ""): 1, ("embedding_backward", ""): 1, ("zero", ""): 1,
        ("layernorm_forward", ""): 1, ("layernorm_backward", ""): 5, ("residual_layernorm_forward", ""): 4,
        ("linear_forward", "32 -> 96"): 2, ("linear_forward", "32 -> 32"): 2, ("linear_forward", "128 -> 32"): 2,
        ("linear_backward", "32 -> 96"): 2, ("linear_backward", "32 -> 32"): 2, ("linear_backward", "32 -> 128"): 2,
        ("linear_gelu_forward", "32 -> 128"): 2, ("gelu_linear_backward", "128 -> 32"): 2,
        ("attention_forward", ""): 2, ("attention_backward", ""): 2, ("head_loss", ""): 1,
        ("sum_losses", ""): 1, ("global_norm", ""): 1, ("clip_scale", ""): 1, ("adamw_step", ""): 1,
    }  # fmt: skip
    assert sum(row.seconds for row in profile.rows) + profile.outside == pytest.approx(profile.seconds)
    assert sum(profile.parts.values()) + profile.outside == pytest.approx(profile.seconds)
    assert list(profile.parts) == list(PARTS) and min(profile.parts.values()) > 0 and profile.outside > 0
    parts = {row.op: row.part for row in profile.rows}
    assert parts["zero"] == parts["attention_backward"] == "backward"
    assert parts["adamw_step"] == parts["global_norm"] == parts["clip_scale"] == "update"
    assert parts["gelu_linear_backward"] == "backward" and parts["sum_losses"] == parts["head_loss"]
    assert parts["layernorm_forward"] == "forward" and parts["head_loss"].startswith("head")
    for row in profile.rows:
        assert row.rate > 0 and row.fraction is not None and row.fraction > 0
    assert profile.peaks["fma"] > 0


class Clockwork:
    """A backend of one op that takes the time it is told, and whose ceilings are known."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: 0.0

    def info(self) -> dict[str, Any]:
        return {"dtype": "fp32"}

    def stamp(self) -> float:
        return time.perf_counter()

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin

    def zero(self, x: Any) -> None:
        time.sleep(0.002)

    def measure_fma(self, seconds: float) -> float:
        return 1e9

    def measure_stream(
        self, memory: Any, reads: int, writes: int, nbytes: int, seconds: float, updates: int
    ) -> float:
        self.asked.append((reads, writes, updates, nbytes))
        return float(4e6 * len(self.asked))


def test_rates_and_fractions() -> None:
    """Work over time, and the time at the ceiling over the time: medians of several measurements."""
    clockwork = Clockwork()
    profiled = cast(Any, Profiled(cast(Ops, clockwork), steps=5))
    x = np.zeros(10_000, np.float32)
    for _ in range(6):
        profiled.zero(x)  # outside a step: not counted
        with profiled.step():
            profiled.zero(x)
            profiled.zero(x)
            time.sleep(0.004)
    profile = profiled.report()
    (row,) = profile.rows
    assert profile.steps == 5 and row.calls == 2 and row.seconds >= 0.004
    assert row.rate == pytest.approx(2 * 40_000 / row.seconds / 1e9)
    assert clockwork.asked == [(0, 1, 0, 40960)] * 6, "after every step of the five or so in which it is due"
    assert row.fraction == pytest.approx(2 * 40_000 / 14e6 / row.seconds), "by the median, 3.5 times 4 MB/s"
    assert profile.seconds >= 0.008 and profile.outside >= 0.004


def test_a_single_step_is_reported_as_it_is() -> None:
    profiled = cast(Any, Profiled(cast(Ops, Clockwork()), steps=100))
    with pytest.raises(RuntimeError, match="step"):
        profiled.report()
    with profiled.step():
        profiled.zero(np.zeros(4, np.float32))
    profile = profiled.report()
    assert profile.steps == 1 and profile.rows[0].calls == 1 and profile.rows[0].fraction is not None


class Ahead:
    """A backend whose ops take 3 s each, of which the host sees nothing: it may not ask in the middle of a step."""

    def __init__(self) -> None:
        self.now, self.on = 0.0, False

    def __getattr__(self, name: str) -> Any:
        if name == "measure_fma":  # what a backend is known by that measures its ceilings
            raise AttributeError(name)
        return lambda *args, **kwargs: pytest.fail(f"{name} was called")

    def info(self) -> dict[str, Any]:
        return {"dtype": "tf32"}

    def zero(self, x: Any) -> None:
        self.now += 3.0

    def record(self, function: Any) -> Any:
        return lambda: pytest.fail("a recording hides its ops")

    def stamp(self) -> float:
        return self.now

    def elapsed(self, begin: float, end: float) -> float:
        assert not self.on, "waits for the device"
        return end - begin


def test_seconds_are_the_devices() -> None:
    """What is recorded is seen op by op, and nothing waits before the step is given away."""
    ahead = Ahead()
    profiled = cast(Any, Profiled(cast(Ops, ahead), steps=3))
    x = np.zeros(4, np.float32)
    replay = profiled.record(lambda: profiled.zero(x))
    for _ in range(3):
        with profiled.step():
            ahead.on = True
            replay()
            ahead.now += 1.0
            replay()
            ahead.on = False
    profile = profiled.report()
    (row,) = profile.rows
    assert (profile.steps, row.calls, row.seconds, profile.seconds, profile.outside) == (2, 2, 6.0, 7.0, 1.0)
    assert row.fraction is None and profile.peaks == {}


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    ahead = Ahead()
    profiled = cast(Any, Profiled(cast(Ops, ahead), steps=3))
    with pytest.raises(ZeroDivisionError), profiled.step():
        profiled.zero(np.zeros(4, np.float32))
        raise ZeroDivisionError
    with profiled.step():
        profiled.zero(np.zeros(4, np.float32))
    assert [row.calls for row in profiled.report().rows] == [1] and profiled.report().seconds == 3.0


def test_calls_that_differ_in_cost_are_apart(cpu: ModuleType) -> None:
    """Spans of an update decide its cost; a list of them is taken like a tuple."""
    profiled = cast(Any, Profiled(cast(Ops, cpu), steps=1))
    w, m, v, dw = (np.zeros(64, np.float32) for _ in range(4))
    with profiled.step():
        for spans in ([(0, 64, 0.0)], ((0, 64, 0.0),), ((0, 16, 0.0), (48, 64, 0.1))):
            profiled.adamw_step(w, m, v, dw, None, number(0.1, 1.0), number(1.0), spans, 0.9, 0.9, 1e-8, 0)
    assert sorted(calls.count for calls in profiled._first.values()) == [1, 2]
    (row,) = profiled.report().rows
    assert row.calls == 3 and row.rate * row.seconds * 1e9 == pytest.approx(4 * 7 * (64 + 64 + 32) + 3 * 24)


def test_keyword_arguments(cpu: ModuleType) -> None:
    profiled = cast(Any, Profiled(cast(Ops, cpu), steps=1))
    x, w = np.ones((1, 2, 4), np.float32), np.ones((3, 4), np.float32)
    out = np.zeros((1, 2, 3), np.float32)
    with profiled.step():
        profiled.linear_forward(out, x, b=None, w=w)
    assert out.tolist() == [[[4.0] * 3] * 2] and profiled.report().rows[0].size == "4 -> 3"


def test_bf16(each_isa_bf16: ModuleType) -> None:
    """Products are compared with the peak of bf16 products."""
    config = TrainConfig(**{**vars(RUN), "dtype": "bf16", "steps": 2})
    model = llmc.load("tiny", ops=cast(Ops, each_isa_bf16))
    profile = list(train(config, model, profile=True))[-1]
    assert isinstance(profile, Profile) and set(profile.peaks) == {"dot"}
    assert "bf16 dot products" in display.profile_lines(profile)[-1]


def test_a_backend_without_ceilings() -> None:
    """Times and rates, and no fractions."""
    profile = list(train(RUN, llmc.load("tiny", ops=cast(Ops, reference)), profile=True))[-1]
    assert isinstance(profile, Profile) and profile.peaks == {}
    assert {row.fraction for row in profile.rows} == {None}
    text = "\n".join(display.profile_lines(profile))
    assert "of peak" in text and "NaN" not in text and "None" not in text


def test_nothing_to_report(cpu: ModuleType) -> None:
    config = TrainConfig(**{**vars(RUN), "steps": 0})
    assert not [event for event in train(config, llmc.load("tiny"), profile=True) if isinstance(event, Profile)]


def test_ceiling_is_that_of_the_op() -> None:
    cost = profiling.Cost
    assert profiling.ceiling(cost(1e9, 10, 10), "fp32") == ("fma", 0, 0, 0, 0)
    assert profiling.ceiling(cost(1e9, 10, 10), "bf16") == ("dot", 0, 0, 0, 0)
    assert profiling.ceiling(cost(0, 4e6, 3e6, (1, 0, 3), 4e6), "bf16") == ("stream", 1, 0, 3, 4194304)
    assert profiling.ceiling(cost(0, 9, 9, (1, 1, 0), 18), "fp32")[-1] == profiling.SMALLEST
    assert profiling.ceiling(cost(0, 9e9, 9e9, (1, 1, 0), 18e9), "fp32")[-1] == profiling.LARGEST


def test_command_line(cpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --init tiny -b 2 -t 16 -x 3 -v 0 -s 0 --profile"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert out.index("step 2: train loss") < out.index("mean of 2 steps") < out.index("3 updates in")
    for text in ("layernorm_backward ", "linear_forward             32 -> 96", "GFLOP/s", "GB/s", "outside ops",
                 "head (forward and backward)", "peaks, medians of this run: fp32 multiply-adds"):  # fmt: skip
        assert text in out
    assert main(words.removesuffix(" --profile").split()) == 0
    assert "outside ops" not in capsys.readouterr().out


def test_on_a_terminal(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live line is gone before the table is there."""
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with display.Display(RUN, stream) as shown:
        for event in train(RUN, llmc.load("tiny"), profile=True):
            shown.show(event)
    assert "outside ops" in stream.getvalue()
