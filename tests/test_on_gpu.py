"""bench/on_gpu.py without a GPU: whatever a part does, the parts before it and after it count, and time is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[Any]:
    sys.path.insert(0, str(BENCH))
    import on_gpu

    yield on_gpu
    sys.path.remove(str(BENCH))


@pytest.fixture
def run(on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LLMC_TEST_CUDA", "device")
    return on_gpu.Run("check", tmp_path, time.time(), 60.0, tmp_path)


def written(run: Any) -> list[dict[str, Any]]:
    return list(json.loads((run.out / "check.json").read_text())["parts"])


def test_every_end_of_a_part_is_written_at_once(on_gpu: Any, run: Any) -> None:
    def raising(run: Any, limit: float, error: Exception) -> dict[str, Any]:
        raise error

    assert run.part("good", 9, lambda run, limit, a: {"limit": limit, "a": a}, 5) == {"limit": 9, "a": 5}
    assert written(run)[-1] | {"seconds": 0} == {"part": "good", "status": "ok", "limit": 9, "a": 5, "seconds": 0}
    assert run.part("absent", 9, raising, on_gpu.NotRun("no such tool")) is None
    assert run.part("bad", 9, raising, on_gpu.Failed("wrong", {"found": 3})) is None
    assert run.part("broken", 9, raising, ZeroDivisionError("by 0")) is None
    states = [(part["part"], part["status"], part.get("reason"), part.get("found")) for part in written(run)]
    assert states[1:] == [
        ("absent", "not run", "no such tool", None),
        ("bad", "FAILED", "wrong", 3),
        ("broken", "FAILED", "ZeroDivisionError: by 0", None),
    ]
    assert [line.split()[1] for line in on_gpu.table(run.parts)] == ["ok", "not", "FAILED", "FAILED"]


def test_no_part_begins_when_time_is_up(run: Any) -> None:
    run.until = time.time() + 3
    assert run.part("late", 9, lambda run, limit: {"began": True}) is None
    assert written(run)[-1]["reason"] == "no time was left"


def test_a_part_has_no_more_than_what_is_left(run: Any) -> None:
    facts = run.part("last", 1000, lambda run, limit: {"limit": limit})
    assert 50 < facts["limit"] < 60


def test_a_program_that_hangs_is_stopped_with_its_children(run: Any, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(alive)!r}).touch()"
    program = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True)\n"
        "import time; time.sleep(60)"
    )
    began = time.monotonic()
    status, text = run.command([sys.executable, "-c", program], 2)
    assert (status, text.strip()) == (None, "begun")
    assert time.monotonic() - began < 30
    time.sleep(4)
    assert not alive.exists()
    assert "begun" in (run.out / "check.log").read_text()


def test_a_worker_says_why_it_failed(on_gpu: Any, run: Any) -> None:
    with pytest.raises(on_gpu.Failed, match="KeyError: 'nothing'"):
        run.work("nothing", {}, 30)


def test_tests_are_counted_and_failures_named(on_gpu: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = run.folder / "given"
    tests.mkdir()
    (tests / "test_a.py").write_text(
        "import pytest\n"
        "def test_cuda_good(): pass\n"
        "def test_cuda_wrong(): assert 1 == 2, 'unequal'\n"
        "def test_cuda_absent(): pytest.skip('no such thing')\n"
        "def test_other(): raise AssertionError('not asked for')\n"
    )
    (tests / "test_b.py").write_text("import os\ndef test_cuda_dies(): os._exit(7)\n")
    monkeypatch.setattr(on_gpu, "TESTS", tests)
    with pytest.raises(on_gpu.Failed) as failed:
        on_gpu.op_tests(run, 50, [], 2)
    files = failed.value.facts["files"]
    assert str(failed.value).startswith("1 passed, 1 skipped, 2 failed; first: test_a::test_cuda_wrong: Assertion")
    assert files["test_a.py"]["skipped"] == {"no such thing": 1}
    assert files["test_b.py"]["failures"][0].startswith("test_b.py: ended with status 7")


def test_files_that_measure_memory_run_alone(on_gpu: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no neighbour: seen from the times at which tests were running."""
    tests = run.folder / "given"
    tests.mkdir()
    files = ["test_a.py", *on_gpu.ALONE, "test_b.py"]
    for file in files:
        (tests / file).write_text(
            "import time, pathlib\n"
            "def test_cuda():\n"
            "    began = time.time()\n"
            "    time.sleep(0.5)\n"
            f"    pathlib.Path({file!r} + '.times').write_text(f'{{began}} {{time.time()}}')\n"
        )
    monkeypatch.setattr(on_gpu, "TESTS", tests)
    assert on_gpu.op_tests(run, 50, files, 4)["passed"] == len(files)
    times = {file: [float(t) for t in (tests / f"{file}.times").read_text().split()] for file in files}
    for file in on_gpu.ALONE:
        for other in set(files) - {file}:
            assert times[file][1] <= times[other][0] or times[other][1] <= times[file][0], (file, other)


def test_sanitizer_findings(on_gpu: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's own words, its exit status, and that it is asked to watch every op."""
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def says(text: str, status: int) -> None:
        tool.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        tool.chmod(0o755)

    says("300 calls\n========= ERROR SUMMARY: 0 errors", 0)
    assert on_gpu.sanitizer(run, 20, "memcheck") == {"summary": "ERROR SUMMARY: 0 errors"}
    assert "--tool memcheck" in (tmp_path / "asked").read_text()
    assert (tmp_path / "asked").read_text().rstrip().endswith("every_op.py --gemm own")
    on_gpu.sanitizer(run, 20, "memcheck", "cublaslt")
    assert (tmp_path / "asked").read_text().rstrip().endswith("every_op.py --gemm cublaslt")
    says("========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 2 errors", 9)
    with pytest.raises(on_gpu.Failed, match="ERROR SUMMARY: 2 errors: Invalid __global__ read of size 4"):
        on_gpu.sanitizer(run, 20, "memcheck")
    says("nothing at all", 0)
    with pytest.raises(on_gpu.Failed):
        on_gpu.sanitizer(run, 20, "racecheck")


def test_usage() -> None:
    done = subprocess.run(["bash", BENCH / "on_gpu.sh", "what"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bench/on_gpu.sh check" in done.stderr
