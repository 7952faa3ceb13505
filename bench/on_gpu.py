"""Check llmc on a GPU, or measure it there, part by part and within a time: bench/on_gpu.sh calls this.

Every part is a process of its own with a limit: one that hangs, or leaves the GPU in a bad state, costs its own
results alone.  OUT/check.json (or bench.json) is written whole after each, so a run that is cut off still counts; what
the parts printed is in the .log beside it.

    LLMC_TEST_CUDA=device        on the GPU (the default here)
    LLMC_TEST_CUDA=simulation    on tests/simulation: what needs a GPU is reported as not run, with the reason
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import goals
from simulate import simulate, simulated

from llmc import ops

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SECONDS = {"check": 350, "bench": 530}  # of the 6 and 9 minutes, what writing and leaving takes off

SHOWN = 30  # failures in the table; the file has them all

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"
Facts = dict[str, Any]


class NotRun(Exception):
    """A part that cannot run here, and why."""


class Failed(Exception):
    """A part that ran and found something; `facts` is what it found."""

    def __init__(self, reason: str, facts: Facts | None = None) -> None:
        super().__init__(reason)
        self.facts = facts or {}


# ---- the run ---------------------------------------------------------------------------------------


class Run:
    """The parts so far, the time left, and the files."""

    def __init__(self, mode: str, out: Path, began: float, seconds: float, folder: Path) -> None:
        self.mode, self.out, self.folder = mode, out, folder
        self.began, self.until = began, began + seconds
        os.environ.setdefault("LLMC_TEST_CUDA", "device")
        self.parts: list[Facts] = []
        self.log = open(out / f"{mode}.log", "w", encoding="utf-8")

    def left(self) -> float:
        return self.until - time.time()

    def part(self, name: str, limit: float, act: Callable[..., Facts], *arguments: Any) -> Facts | None:
        """Do act(run, seconds that it has, *arguments): its facts, None where it did not succeed."""
        began, limit = time.time(), min(limit, self.left())
        entry: Facts = {"part": name, "status": NOT_RUN}
        facts = None
        try:
            if limit < 5:
                raise NotRun("no time was left")
            print(f"{name} ...", file=sys.stderr, flush=True)
            facts = act(self, limit, *arguments)
            entry |= {"status": OK, **facts}
        except NotRun as reason:
            entry["reason"] = str(reason)
        except Failed as error:
            entry |= {"status": FAILED, "reason": str(error), **error.facts}
        except Exception as error:  # a mistake here must not lose the parts to come
            self.log.write(traceback.format_exc())
            entry |= {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}
        self.parts.append(entry | {"seconds": round(time.time() - began, 1)})
        self.write()
        return facts

    def write(self) -> None:
        """The results so far, whole or not at all."""
        self.log.flush()
        target = self.out / f"{self.mode}.json"
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began))
        result = {"mode": self.mode, "simulated": simulated(), "began": began, "parts": self.parts}
        target.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".tmp").replace(target)

    def command(self, argv: Sequence[str | Path], limit: float, **environment: str) -> tuple[int | None, str]:
        """Run a program in the folder of tests, where `import llmc` does not find the checkout's bare sources: its
        exit status, None for one that was stopped after `limit` seconds, and what it printed."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                argv, stdout=output, stderr=subprocess.STDOUT, cwd=TESTS, env=os.environ | environment,
                start_new_session=True,
            )  # fmt: skip
            status: int | None
            try:
                status = process.wait(max(limit, 1.0))
            except subprocess.TimeoutExpired:
                status = None
            finally:  # and what it may have started
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            output.seek(0)
            text = output.read()
        end = "" if status == 0 else f"\n(status {status})\n"
        self.log.write(f"\n$ {' '.join(map(str, argv))}\n{text}{end}")
        self.log.flush()
        return status, text

    def work(self, name: str, arguments: Facts, limit: float) -> Facts:
        """One of WORKERS in a process of its own: what it returns."""
        with tempfile.NamedTemporaryFile("r", dir=self.folder, suffix=".json", encoding="utf-8") as answer:
            argv = [sys.executable, __file__, "--work", name, json.dumps(arguments), answer.name]
            status, text = self.command(argv, limit)
            if status is None:
                raise Failed(f"stopped after {limit:.0f} s")
            if status:
                raise Failed(last_line(text) or f"ended with status {status}")
            return dict(json.load(answer))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# ---- workers: each in a process of its own ---------------------------------------------------------


def work_facts() -> Facts:
    """What is there: the versions, the backend, the machine."""
    from llmc import machine

    simulate()
    packages = ("numpy", "ml_dtypes", "torch", "triton", "pycuda", "nvidia-cudnn-frontend", "cython", "cmake", "pytest")
    return {
        "cuda": ops.load("cuda", dtype="bf16").info(),  # the type that may attend by cuDNN
        "cpu": ops.load("cpu").info(),
        "Python": sys.version.split()[0],
        "packages": {name: machine.installed(name) for name in packages},
        "commit": machine.commit(),
        "processor": machine.processor(),
        "logical CPUs": os.cpu_count(),
    }


def work_reference(init: str, folder: str, B: int, T: int, dtype: str, perturbed: bool) -> Facts:
    """PyTorch's logits, gradients and ten losses, on the CPU."""
    from llmc import torch_reference

    written = torch_reference.run(init, folder, B=B, T=T, dtype=dtype, perturbed=perturbed)
    return {"model": str(written.model), "state": str(written.debug_state), "losses": written.losses}


def work_verify(model: str, state: str, dtype: str) -> Facts:
    """llmc's distance from such a reference."""
    from dataclasses import asdict

    from llmc import verify

    simulate()
    from llmc._cuda import linear  # which loads CUDA, so not before it is simulated

    report = verify.verify(model, state, device="cuda", dtype=dtype)
    verify.print_report(report, sys.stdout)
    checks = [asdict(check) | {"ok": check.ok} for check in report.checks]
    declined = linear.declined()
    print("\n".join(f"cuBLASLt declined {product}" for product in declined))
    return {"okay": report.okay, "notes": report.notes, "checks": checks, "declined": declined}


WORKERS: Mapping[str, Callable[..., Facts]] = {
    "facts": work_facts, "reference": work_reference, "verify": work_verify,
}  # fmt: skip

# ---- check -----------------------------------------------------------------------------------------

GPU_FACTS = (
    "name,driver_version,compute_cap,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,"
    "temperature.gpu,persistence_mode,compute_mode,mig.mode.current"
)


def gpu(run: Run, limit: float) -> Facts:
    """What nvidia-smi says."""
    if simulated():
        raise NotRun("simulated")
    if shutil.which("nvidia-smi") is None:
        raise Failed("nvidia-smi is not on the PATH: no NVIDIA driver?")
    names = GPU_FACTS.split(",")
    status, text = run.command(["nvidia-smi", f"--query-gpu={GPU_FACTS}", "--format=csv,noheader"], limit)
    if status != 0:
        raise Failed(last_line(text) or "nvidia-smi failed")
    first = text.splitlines()[0].split(",")
    facts = dict(zip(names, (value.strip() for value in first), strict=True))
    if shutil.which("nvcc"):
        facts["nvcc"] = last_line(run.command(["nvcc", "--version"], limit)[1])
    return facts | {"summary": f"{facts['name']}, driver {facts['driver_version']}, {facts['memory.total']}"}


PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "cuda or cublaslt or on_device")


# These compare the GPU's free memory before and after, of which a neighbour's context alone takes half a gigabyte.
ALONE = ("test_cuda_device.py", "test_cuda_kernels.py")


def test_files(run: Run, limit: float) -> list[str]:
    """The files that have tests of CUDA to run here.  Those of what the compiler makes for other GPUs need none."""
    status, text = run.command([*PYTEST, "--collect-only", "-q", "."], limit)
    found = re.findall(r"^(?:tests/)?(test_\w+\.py)::", text, re.MULTILINE)
    files = sorted(set(found) - {"test_cuda_compile.py"})
    if not files:
        raise Failed(f"pytest found no tests of CUDA (status {status}): {last_line(text)}")
    return files


def read_junit(path: Path) -> Facts:
    """Counts, and the failures with the first line of their message."""
    cases = list(xml.parse(path).getroot().iter("testcase"))
    failures: list[str] = []
    skipped: dict[str, int] = {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind in ("failure", "error"):
            for element in case.iter(kind):
                message = (element.get("message") or "").strip().splitlines()
                failures.append(f"{name}: {message[0] if message else kind}")
        for element in case.iter("skipped"):
            skipped[element.get("message") or ""] = skipped.get(element.get("message") or "", 0) + 1
    passed = len(cases) - len(failures) - sum(skipped.values())
    return {"passed": passed, "failures": failures, "skipped": skipped}


def op_tests(run: Run, limit: float, files: Sequence[str], processes: int) -> Facts:
    """The tests of the ops, the model and the trainer on CUDA, against float64 and PyTorch."""
    until = time.time() + limit
    files = list(files) or test_files(run, limit)

    def one(file: str) -> Facts:
        report = run.folder / f"{file}.xml"
        argv = [*PYTEST, "-q", f"--junitxml={report}", file]
        if until - time.time() < 2:
            return {"passed": 0, "failures": [f"{file}: no time was left"], "skipped": {}}
        status, text = run.command(argv, until - time.time())
        if not report.exists():  # it was stopped, or died
            what = "was stopped, out of time" if status is None else f"ended with status {status}: {last_line(text)}"
            return {"passed": 0, "failures": [f"{file}: {what}"], "skipped": {}}
        return read_junit(report)

    results = {file: one(file) for file in files if file in ALONE}
    others = [file for file in files if file not in ALONE]
    with ThreadPoolExecutor(processes) as pool:
        results |= zip(others, pool.map(one, others), strict=True)
    total = {"passed": sum(result["passed"] for result in results.values()), "files": results}
    failures = [failure for result in results.values() for failure in result["failures"]]
    skipped = sum(count for result in results.values() for count in result["skipped"].values())
    summary = f"{total['passed']} passed, {skipped} skipped, {len(failures)} failed"
    if failures or not total["passed"]:
        raise Failed(f"{summary}; first: {failures[0] if failures else 'nothing ran'}", total)
    return {"summary": summary, **total}


def model_check(run: Run, limit: float, reference: Facts | None, dtype: str) -> Facts:
    """Logits, gradients and ten losses of one model in one precision."""
    if reference is None:
        raise NotRun("its reference is missing")
    facts = run.work("verify", {"model": reference["model"], "state": reference["state"], "dtype": dtype}, limit)
    worst = max(facts["checks"], key=lambda check: check["error"] / check["limit"])
    facts["summary"] = f"nearest its limit: {worst['name']} {worst['error']:.1e} of {worst['limit']:.0e}"
    if facts["declined"]:
        facts["summary"] += f"; cuBLASLt declined {len(facts['declined'])} products"
    if not facts["okay"]:
        wrong = [check["name"] for check in facts["checks"] if not check["ok"]]
        raise Failed(f"{len(wrong)} of {len(facts['checks'])} beyond their limits: {', '.join(wrong[:4])}", facts)
    return facts


# An error of an API that is reported is one more than the program handles; those that it does handle, as where PyCUDA
# asks for what a GPU lacks, are no finding.
TOOLS = {
    "memcheck": ("--padding", "256", "--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
    "synccheck": (),
}


def sanitizer(run: Run, limit: float, tool: str, gemm: str = "own") -> Facts:
    """Every op once, on small shapes, under compute-sanitizer.  With our own products alone, unless `gemm` says
    "cublaslt": the library has very many kernels to instrument, and about its own there is nothing to be done."""
    if simulated():
        raise NotRun("compute-sanitizer needs a GPU")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise NotRun("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    every_op = [sys.executable, str(TESTS / "every_op.py"), "--gemm", gemm]
    status, text = run.command([program, "--tool", tool, "--error-exitcode", "9", *TOOLS[tool], *every_op], limit)
    summaries = re.findall(r"^========= (\w+ SUMMARY: .*)$", text, re.MULTILINE)
    if status is None:
        raise Failed(f"stopped after {limit:.0f} s")
    if status or not summaries:
        first = next((line for line in text.splitlines() if line.startswith("========= ")), last_line(text))
        raise Failed(f"{summaries[-1] if summaries else f'status {status}'}: {first.removeprefix('========= ')}")
    return {"summary": summaries[-1]}


def reference(run: Run, limit: float, init: str, B: int, T: int, dtype: str, perturbed: bool) -> Facts:
    """What PyTorch makes of one batch."""
    arguments = {"init": init, "folder": str(run.folder), "B": B, "T": T, "dtype": dtype, "perturbed": perturbed}
    return run.work("reference", arguments, limit)


def not_run(run: Run, limit: float, reason: str) -> Facts:
    raise NotRun(reason)


def facts(run: Run, limit: float) -> Facts:
    """Versions, and what llmc makes of the GPU."""
    found = run.work("facts", {}, limit)
    names = ("torch", "pycuda", "cython")
    return found | {"summary": ", ".join(f"{name} {found['packages'][name]}" for name in names)}


def check(run: Run, args: argparse.Namespace) -> None:
    slow = 20 if simulated() else 1  # the simulation's time is nobody's concern
    run.part("gpu", 20, gpu)
    run.part("packages", 40 * slow, facts)
    small, T = ("tiny", 33) if simulated() else ("d2", 129)
    made = run.part(f"{small}: PyTorch float64", 60, reference, small, 2, T, "float64", True)
    for dtype in ops.DTYPES:
        run.part(f"{small} {dtype}", 30 * slow, model_check, made, dtype)
    run.part("tests", 120 * slow, op_tests, args.files, 1 if simulated() else 4)
    for tool in ("memcheck", "racecheck"):
        run.part(tool, 45, sanitizer, tool)
    if simulated():
        run.part("d12", 60, not_run, "GPT-2 124M is too large for the simulation")
    else:
        made = run.part("d12: PyTorch float32", 90, reference, "d12", 2, 256, "float32", False)
        for dtype in ops.DTYPES:
            run.part(f"d12 {dtype}", 40, model_check, made, dtype)
    run.part("memcheck, cuBLASLt", 60, sanitizer, "memcheck", "cublaslt")
    for tool in ("synccheck", "initcheck"):
        run.part(tool, 45, sanitizer, tool)


# ---- bench -----------------------------------------------------------------------------------------


class Measurement(NamedTuple):
    """A program that measures: "{json}" in its arguments is the file it writes its results to, again whenever it has
    more of them; "{seconds}" the time it has.  What it wrote counts, also where it was stopped."""

    name: str
    limit: float
    arguments: tuple[str, ...]


def measurements(small_ones: bool) -> Iterator[Measurement]:
    """The figures of the goals first (bench/goals.py), larger models as far as there is time; where a GPU is only
    simulated, small ones of each kind."""
    result = ("--json", "{json}", "--seconds", "{seconds}")
    small = ("--init", "tiny", "--batch-size", "1", "--sequence-length", "8", "--turn-seconds", "0")
    shapes = small if small_ones else ()
    yield Measurement("peaks", 40, ("bench/gpu.py", "peaks", *result))
    yield Measurement("kernels", 110, ("bench/gpu.py", "kernels", *result, *shapes))
    training = (
        "bench/training.py", "--device", "cuda", "--starts", "1", "--json-out", "{json}", "--seconds", "{seconds}",
        *(("--turn", "2", "--rounds", "1", "--warmup", "1", "--programs", "llmc") if small_ones else ("--rounds", "7")),
        "--configs",
    )  # fmt: skip
    if small_ones:
        yield Measurement("tiny", 60, (*training, "tiny:2x8"))
        yield Measurement("tiny, forward", 60, (*training, "tiny:2x8", "--dtypes", "tf32", "--only-forward"))
        return
    compared = ("--programs", "llmc,compile")
    yield Measurement("124M", 150, (*training, "d12:4x1024"))
    for dtype in ("tf32", "fp32"):
        options = (*compared, "--dtypes", dtype, "--only-forward")
        yield Measurement(f"124M, forward {dtype}", 80, (*training, "d12:4x1024", *options))
    yield Measurement("124M, large batch", 110, (*training, "d12:maxx1024", *compared))
    yield Measurement("124M, largest batch", 40, (*training, "d12:maxx1024", "--programs", "llmc"))
    yield Measurement("350M", 110, (*training, "d24:8x1024", *compared))
    yield Measurement("774M", 120, (*training, "d36:4x1024", *compared))


def measure(run: Run, limit: float, what: Measurement) -> Facts:
    results = run.folder / f"{what.name.replace(' ', '-')}.json"
    given = [text.format(json=results, seconds=int(limit)) for text in what.arguments]
    status, text = run.command([sys.executable, ROOT / given[0], *given[1:]], limit)
    facts = {"results": json.loads(results.read_text(encoding="utf-8"))} if results.exists() else {}
    if status:
        raise Failed(last_line(text) or f"ended with status {status}", facts)
    if status is None and not facts:
        raise Failed(f"stopped after {limit:.0f} s without a result")
    return facts | {"summary": "done" if status == 0 else "stopped, out of time", "printed": text[-20000:]}


def bench(run: Run, args: argparse.Namespace) -> None:
    run.part("gpu", 20, gpu)
    run.part("packages", 40, facts)
    for what in measurements(simulated()):
        run.part(what.name, what.limit, measure, what)


# ---- the end ---------------------------------------------------------------------------------------


def table(parts: Sequence[Facts]) -> Iterator[str]:
    """A line for each part; then the tests that failed."""
    width = max(len(part["part"]) for part in parts)
    for part in parts:
        about = part.get("summary") or part.get("reason") or ""
        yield f"{part['part']:{width}}  {part['status']:7}  {part['seconds']:6.1f} s  {about}"[:160]
    failures = [text for part in parts for file in part.get("files", {}).values() for text in file["failures"]]
    yield from (f"  {failure}"[:160] for failure in failures[:SHOWN])
    if len(failures) > SHOWN:
        yield f"  and {len(failures) - SHOWN} more"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=("check", "bench"))
    parser.add_argument("--seconds", type=float, metavar="N", help="in all, set-up included (350; bench: 530)")
    parser.add_argument("--files", nargs="*", default=[], metavar="FILE", help="test files (all that test CUDA)")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / ".gpu/out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.mode, out, args.began, args.seconds or SECONDS[args.mode], Path(folder))
        (check if args.mode == "check" else bench)(run, args)
    print("\n".join(["", *table(run.parts)]), flush=True)
    if args.mode == "bench":
        print(f"\n{goals.markdown(run.parts)}\n")
    print(f"results: {out / args.mode}.json")
    return int(any(part["status"] == FAILED for part in run.parts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        done = WORKERS[sys.argv[2]](**json.loads(sys.argv[3]))
        Path(sys.argv[4]).write_text(json.dumps(done, default=str), encoding="utf-8")
        sys.exit()
    sys.exit(main())
