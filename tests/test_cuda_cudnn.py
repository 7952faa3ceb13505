"""Attention by cuDNN: what its frontend is asked for, on the simulated GPU with a stand-in for the frontend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cudnn_standin
import ml_dtypes
import numpy as np
import on_device
import pytest
import reference
import simulation
from cudnn_standin import Made

from llmc import ops
from llmc._cuda import cudnn, device
from llmc.benchmark import Configuration, Program
from llmc.errors import DeviceError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Host = np.ndarray[Any, Any]


@pytest.fixture
def made() -> Iterator[Made]:
    """The graphs that the stand-in was asked for; the backend is set to bf16."""
    if on_device.require() == "device":
        pytest.skip("the stand-in computes on the simulated GPU")
    library = simulation.load()
    library.simulation_forgive()
    with cudnn_standin.installed(library) as made:
        ops.load("cuda", dtype="bf16")
        yield made
        device.synchronize()
        assert made.wrong == []
    ops.load("cuda", dtype="fp32")


def placed(values: Host) -> device.DeviceArray:
    x = device.empty(values.shape, values.dtype.name)
    x[...] = values
    return x


def arrays(B: int, T: int, H: int, D: int, G: int | None = None) -> tuple[device.DeviceArray, ...]:
    """out, lse and qkv (or dqkv), of zeros; G is H where it is not given."""
    width = (H + 2 * (H if G is None else G)) * D
    shapes = ((B, T, H * D), "bfloat16"), ((B, H, T), "float32"), ((B, T, width), "bfloat16")
    return tuple(device.empty(*what) for what in shapes)


def rounded(rng: np.random.Generator, *shape: int) -> Host:
    return rng.standard_normal(shape).astype(BFLOAT16)


def attended(qkv: Host, H: int, D: int, scale: float) -> tuple[Host, Host]:
    """out and lse in float64."""
    B, T = qkv.shape[:2]
    out, lse = np.empty((B, T, H * D)), np.empty((B, H, T))
    reference.attention_forward(out, lse, qkv, scale, 0, 0.0)
    return out, lse


def assert_rounded(found: Host, expected: Host, slack: float = 0.0) -> None:
    """Within half a unit of the last place of bfloat16, which has 8 bits, and `slack` of the largest."""
    limit = 2.0**-8 * np.abs(expected) + slack * np.abs(expected).max()
    assert (np.abs(found.astype(np.float64) - expected) <= limit).all()


SHAPES = [(2, 17, 3, 3, 16), (1, 33, 2, 2, 64), (3, 1, 1, 1, 8), (2, 17, 6, 2, 16), (1, 9, 4, 1, 24)]


@pytest.mark.parametrize(("B", "T", "H", "G", "D"), SHAPES)
def test_both_passes(made: Made, rng: np.random.Generator, B: int, T: int, H: int, G: int, D: int) -> None:
    qkv, dout = rounded(rng, B, T, (H + 2 * G) * D), rounded(rng, B, T, H * D)
    out, lse, dqkv = arrays(B, T, H, D, G)
    cudnn.forward(out, lse, placed(qkv), G, 0.3)
    expected, expected_lse = attended(qkv, H, D, 0.3)
    assert_rounded(np.asarray(out), expected)
    np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=1e-6, atol=1e-6)

    dqkv[...] = np.full(qkv.shape, np.nan)
    cudnn.backward(dqkv, placed(dout), placed(qkv), out, lse, G, 0.3)
    gradient = np.empty(qkv.shape)
    reference.attention_backward(gradient, dout, qkv, np.asarray(out), np.asarray(lse), 0.3, 0, 0.0)
    # of keys and values what each head of queries adds is rounded, too
    assert_rounded(np.asarray(dqkv), gradient, 1e-6 if G == H else 2.0**-8 * (H // G))
    assert_rounded(np.asarray(dqkv)[..., : H * D], gradient[..., : H * D], 1e-6)
    assert made[1].runs == 1


def test_what_is_asked(made: Made, rng: np.random.Generator) -> None:
    """Views of qkv, float32 for lse, the causal bound, the scale, the deterministic backward pass."""
    B, T, H, G, D = 2, 5, 6, 2, 16
    out, lse, dqkv = arrays(B, T, H, D, G)
    qkv = placed(rounded(rng, *dqkv.shape))
    cudnn.forward(out, lse, qkv, G, 0.07)
    cudnn.backward(dqkv, out, qkv, out, lse, G, 0.07)
    forward, backward = made
    C, N = H * D, (H + 2 * G) * D
    packed, plain = [T * N, D, N, 1], [T * C, D, C, 1]
    for graph in made:
        assert graph.types == ("bfloat16", "float", "float")
        node = graph.node
        assert node["attn_scale"] == 0.07
        assert (node["diagonal_alignment"], node["diagonal_band_right_bound"]) == ("top_left", 0)
        for name, heads in (("q", H), ("k", G), ("v", G)):
            assert (node[name].dim, node[name].stride) == ([B, heads, T, D], packed)
        assert graph.handle.stream == device.stream().handle
    o, stats = forward.outputs["o"], forward.outputs["stats"]
    assert forward.node["generate_stats"] and (o.dim, o.stride, o.virtual) == ([B, H, T, D], plain, False)
    assert (stats.dim, stats.stride, stats.data_type) == ([B, H, T, 1], [H * T, T, 1, 1], "float")
    assert backward.node["use_deterministic_algorithm"]
    assert backward.node["o"].stride == backward.node["dO"].stride == plain
    assert (backward.node["stats"].dim, backward.node["stats"].data_type) == ([B, H, T, 1], "float")
    assert all(gradient.stride == packed for gradient in backward.outputs.values())
    assert [gradient.dim[1] for gradient in backward.outputs.values()] == [H, G, G]
    assert len(made.handles) == 1


def test_plans_are_kept(made: Made, rng: np.random.Generator) -> None:
    """One for each pass, shape and scale, with its scratch; the values of a call are in none."""
    for T, scale in ((4, 1.0), (6, 1.0), (4, 1.0), (6, 1.0), (4, 0.5), (4, 0.5)):
        qkv = rounded(rng, 1, T, 3 * 16)
        out, lse, _ = arrays(1, T, 2, 8)
        x = placed(qkv)
        cudnn.forward(out, lse, x, 2, scale)
        cudnn.backward(x, out, placed(qkv), out, lse, 2, scale)
        assert_rounded(np.asarray(out), attended(qkv, 2, 8, scale)[0])
    assert [graph.kind for graph in made] == ["sdpa", "sdpa_backward"] * 3
    assert [graph.runs for graph in made] == [2] * 6


def test_in_a_recording(made: Made, rng: np.random.Generator) -> None:
    """Plans are made before the capture, and a replay attends to what lies there then."""
    B, T, H, D = 2, 9, 2, 16
    out, lse, qkv = arrays(B, T, H, D)
    dout, _, dqkv = arrays(B, T, H, D)

    def both() -> None:
        cudnn.forward(out, lse, qkv, H, 0.25)
        cudnn.backward(dqkv, dout, qkv, out, lse, H, 0.25)

    replay = ops.load("cuda", dtype="bf16").record(both)
    for _ in range(4):
        values, gradient = rounded(rng, B, T, 3 * H * D), rounded(rng, B, T, H * D)
        qkv[...], dout[...] = values, gradient
        replay()
        expected = np.empty(values.shape)
        assert_rounded(np.asarray(out), attended(values, H, D, 0.25)[0])
        reference.attention_backward(expected, gradient, values, np.asarray(out), np.asarray(lse), 0.25, 0, 0.0)
        assert_rounded(np.asarray(dqkv), expected, 1e-6)
    assert [graph.runs for graph in made] == [4, 4]


def test_no_plan_in_a_capture(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    out, lse, qkv = arrays(1, 2, 1, 8)
    monkeypatch.setattr(device.handle(), "capturing", True)
    with pytest.raises(DeviceError, match="recording"):
        cudnn.forward(out, lse, qkv, 1, 1.0)
    assert list(made) == []


def test_what_cudnn_does_not_support(made: Made) -> None:
    """Its own words, on one line, with the size and the way out."""
    for G, heads in ((2, "2 heads of 12"), (1, "2 heads of 12 on 1")):
        out, lse, qkv = arrays(1, 2, 2, 12, G)
        for _ in range(2):
            with pytest.raises(DeviceError) as caught:
                cudnn.forward(out, lse, qkv, G, 1.0)
            assert str(caught.value) == (
                f"cuDNN's attention, B=1 T=2, {heads}: hidden_dim 12 is not supported "
                "(--attention own does without it)"
            )
    with pytest.raises(TypeError, match="bfloat16"):
        cudnn.forward(out, lse, device.empty((1, 2, 48), "float32"), 1, 1.0)


@pytest.mark.parametrize(("B", "T", "H"), [(0, 3, 2), (2, 0, 2)])
def test_nothing_to_attend_to(made: Made, B: int, T: int, H: int) -> None:
    out, lse, qkv = arrays(B, T, H, 8)
    cudnn.forward(out, lse, qkv, H, 1.0)
    cudnn.backward(qkv, out, qkv, out, lse, H, 1.0)
    assert list(made) == []


def test_a_model_trains_with_it(made: Made) -> None:
    """In recorded steps: the losses of llmc's own kernels, within bfloat16, and one plan for each pass."""
    losses = {}
    for attention in ("own", "cudnn"):
        program = Program(Configuration("tiny", 2, 9, "bf16", None, None, device="cuda", attention=attention))
        losses[attention], _, _ = program.turn([0] * 5)
        assert program.held >= program.model.nbytes
        assert len(made) == (2 if attention == "cudnn" else 0)
    assert [graph.runs for graph in made] == [5 * 2, 5 * 2]  # steps and layers
    assert losses["cudnn"] == pytest.approx(losses["own"], abs=0.01)
    assert losses["cudnn"][-1] < losses["cudnn"][0]


def test_memory_plans_know_of_it(made: Made) -> None:
    """What libraries take has room for dq in float32."""
    size = {
        "channels": 64, "vocab_size": 384, "parameters": 1000, "tokens": 1 << 16, "heads": 4, "head_size": 16,
    }  # fmt: skip
    found = [
        ops.load("cuda", dtype="bf16", attention=attention).workspace_nbytes(**size)["threads"]
        for attention in ("own", "cudnn")
    ]
    assert found[1] - found[0] >= 4 * 64 * (1 << 16)


# ---- is it there -----------------------------------------------------------------------------------


def test_the_default(made: Made) -> None:
    """cuDNN's in bf16 where it is to be had."""
    for dtype, attention, found in (
        ("bf16", None, "cudnn"), ("bf16", "own", "own"), ("fp32", None, "own"), ("tf32", None, "own"),
    ):  # fmt: skip
        assert ops.load("cuda", dtype=dtype, attention=attention).info()["attention"] == found


def test_available() -> None:
    library = None
    for number, said in ((91300, "9.13.0, frontend "), (90105, "9.1.5, frontend "), (80907, None), (0, None)):
        with cudnn_standin.installed(library, number):
            found = cudnn.available()
            assert found is None if said is None else found is not None and found.startswith(said)
    for frontend, usable in (("1.12.1", False), ("1.13.0", True), ("2.0", True), ("1.9.0", False), ("unknown", False)):
        with cudnn_standin.installed(library):
            sys.modules["cudnn"].__version__ = frontend  # type: ignore[attr-defined]
            assert cudnn.available() == (f"9.13.0, frontend {frontend}" if usable else None)


def test_the_library_is_loaded_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From among pip's packages, since the frontend looks for it in its own interpreter's folder alone."""
    folder = tmp_path / "nvidia/cudnn/lib"
    folder.mkdir(parents=True)
    (folder / "libcudnn.so.9").touch()
    loaded: list[str] = []
    monkeypatch.setattr(cudnn.driver, "wheel_roots", lambda: [tmp_path / "nvidia"])
    monkeypatch.setattr(cudnn.ctypes, "CDLL", lambda path: loaded.append(path))
    with cudnn_standin.installed(None):
        assert cudnn.available() is not None
    assert loaded == [str(folder / "libcudnn.so.9")]


def test_an_import_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes out of it."""
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise SystemError("no")

    broken = Broken("cudnn")
    broken.__spec__ = object()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "cudnn", broken)
    cudnn.available.cache_clear()
    assert cudnn.available() is None
    monkeypatch.setitem(sys.modules, "cudnn", None)
    cudnn.available.cache_clear()
    assert cudnn.available() is None
    cudnn.available.cache_clear()


def test_graphs_of_the_real_frontend() -> None:
    """It takes what it is asked for, as far as it can tell without cuDNN."""
    frontend = pytest.importorskip("cudnn")
    for heads in ((3, 3), (6, 2), (4, 1)):
        shape = cudnn._Shape(2, *heads, 17, 64, 0.2)
        for build in (cudnn._build_forward, cudnn._build_backward):
            try:
                graph = build(None, shape)
            except RuntimeError as error:  # older ones need the library for that
                pytest.skip(f"frontend {frontend.__version__}: {error}")
            graph.validate()
