"""What a run takes is known before it takes it: to the byte, from headers alone, and compared with the machine."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import reference

from llmc import checkpoint, gpt2, hub, loading, memory, profiling, safetensors_folder, sampling, training
from llmc.__main__ import main
from llmc.arena import Arena, table_nbytes
from llmc.data import Shards, write_shard
from llmc.errors import ConfigError, FileFormatError
from llmc.gpt2 import GPT2, Config
from llmc.memory import Machine, Part, Plan
from llmc.model import RECOMPUTE, Cache
from llmc.stories import Stories
from llmc.training import TrainConfig

GIB = 1 << 30


# ---- the plan is the run ---------------------------------------------------------------------------

# Every mapping of a run, live at its peak or made after the first step; in a process of its own, whose workspace no
# test has enlarged.
RECORD = """
import json, mmap, sys, weakref
from llmc import _cpu, training

real, live, peak, made = mmap.mmap, {}, {}, []

def recorded(fileno, length, **options):
    memory = real(fileno, length, **options)
    made.append(length)
    live[id(memory)] = length
    weakref.finalize(memory, live.pop, id(memory))
    if sum(live.values()) > sum(peak.values()):
        peak.clear()
        peak.update(live)
    return memory

mmap.mmap = recorded  # whoever takes memory by whichever name: this is where it comes from
_cpu.configure(threads=97)  # so that the run's scratch is a new one
config, profile = training.TrainConfig(**json.loads(sys.argv[1])), sys.argv[2] == "profile"
plan = training.memory_plan(config, profile)
told = [part.nbytes for part in plan.parts if part.name != "data"]
peak.clear()
events = []
for event in training.train(config, profile=profile):
    events.append(type(event).__name__)
    if events.count("Step") == 1 and events[-1] == "Step":
        made.clear()
assert {"Step", "Validation", *["Profile"] * profile} <= set(events), events
found = {"peak": sorted(peak.values()), "told": told, "samples": events.count("Sample"), "late": made}
print(json.dumps(found))
"""


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    ("options", "profile"),
    [
        ({"threads": 1, "sample_every": 0}, ""),
        ({"threads": 2, "sample_every": 0}, "profile"),
        ({"threads": 3, "sample_every": 2, "sample_length": 64}, "profile"),
        ({"threads": 2, "sample_every": 3, "sample_length": 5, "total_batch": 4 * 2 * 33}, ""),
    ],
)
def test_a_run_allocates_what_was_told(options: dict[str, Any], profile: str, recompute: str) -> None:
    """Three updates with validation: the arenas that are there at the peak are those of the plan, to the byte, and
    after the first update there are no new ones but a sample's."""
    chosen = {
        "init": "tiny", "batch_size": 2, "sequence_length": 33, "steps": 3, "val_every": 1, "val_batches": 2,
        "recompute": recompute, **options,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RECORD, json.dumps(chosen), profile], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == (1 if options["sample_every"] else 0)
    assert sum(found["peak"]) == sum(found["told"])
    assert bool(found["late"]) == bool(found["samples"])
    parameters, kept = found["told"][0], sum(found["told"][5:8])
    assert found["peak"].count(parameters) == 4 and kept in found["peak"]


def test_the_parts_of_a_plan() -> None:
    """GPT-2 124M at B=4, T=1024: the figures of llm.c, and the split of the activations."""
    config = Config()
    for recompute in RECOMPUTE:
        plan = memory.plan(config, reference, 4, 1024, recompute=recompute, data=10)
        parts = {part.name: part.nbytes for part in plan.parts}
        assert parts["parameters"] == parts["gradients"] == parts["AdamW m"] == parts["AdamW v"] == 497_903_616
        activations = [parts[name] for name in ("activations, kept", "activations, single", "backward scratch")]
        rows = config.activation_rows(4, 1024, recompute=recompute)
        assert sum(activations) == table_nbytes(rows) and activations[2] == 4 * 4 * 1024 * 768
        assert plan.total == 4 * 497_903_616 + sum(activations) + 10 + parts["scalars"]
    assert activations[0] == 12 * 4 * 4 * 1024 * 768  # "block": each layer's input


def test_a_sample_that_needs_a_fresh_window_stays_within_what_was_told(cpu: ModuleType) -> None:
    """Its scratch is as large as the window read in, which depends on what was written: at most what is told."""
    config = Config(max_seq_len=16, vocab_size=31, num_layers=1, num_heads=1, channels=8)
    longest = {}
    for count in (1, 16, 17, 60):
        model = GPT2(config, cpu)
        model.initialise(1)
        decode, read = model.decode, [0]

        def noted(cache: Cache, tokens: Any, positions: Any, decode: Any = decode, read: list[int] = read) -> Any:
            read.append(tokens.shape[1])
            return decode(cache, tokens, positions)

        model.decode = noted  # type: ignore[method-assign]
        sampling.generate(model, [], count)
        longest[count] = max(read)
        cache, scratch = sampling.nbytes(config, count)
        assert model.new_cache(1, min(16, 1 + count)).nbytes == cache
        assert scratch == table_nbytes(config.decode_rows(1, 1 if count <= 16 else 14))
    assert longest[1] == longest[16] == 1 < longest[17] <= longest[60] <= 14
    assert len(sampling._fresh_window([1, 0, *[1] * 14], eot=0)) == 15


def test_a_profile_is_part_of_the_plan(
    cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its streams' memory, in a line of the dry run and in what a run needs; nothing where a backend has no streams."""
    nbytes = 4 * cpu.stream_floats(profiling.LARGEST)
    config = TrainConfig(init="tiny", threads=2)
    plain, profiled = (training.memory_plan(config, profile) for profile in (False, True))
    assert profiled.total == plain.total + nbytes > plain.total + (1 << 27)
    assert profiling.memory_nbytes(reference) == 0
    monkeypatch.setattr(memory, "machine", lambda: Machine(GIB, profiled.total - 1))
    for words, status in (([], 0), (["--profile"], 1)):
        assert main(["train", "--init", "tiny", "--threads", "2", "--dry-run", *words]) == status
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("profile "))
        assert line.split()[1].replace(",", "") == str(nbytes if words else 0)
    with pytest.raises(ConfigError, match="^memory: "):
        next(iter(training.train(config, profile=True)))


def test_one_scratch_at_a_time(cpu: ModuleType) -> None:
    """A fresh window needs another scratch; the old one is gone when it is made."""
    live: set[int] = set()
    most, made = [0], [0]

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        array = cpu.empty(shape, dtype)
        made[0] += 1
        live.add(made[0])
        weakref.finalize(array, live.discard, made[0])
        most[0] = max(most[0], len(live))
        return array

    ops: Any = SimpleNamespace(**{**vars(cpu), "empty": empty})
    model = GPT2(Config(max_seq_len=16, vocab_size=31, num_layers=1, num_heads=1, channels=8), ops)
    model.initialise(1)
    sampling.generate(model, [], 60)
    assert made[0] > 5 and most[0] == 4, "parameters, the loss, cache, scratch"


def test_batches_and_their_order(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_shard(path, [3] * 1000, vocab_size=10)
    for shuffle in (False, True):
        shards = Shards(path, 2, 8, shuffle_seed=1 if shuffle else None)
        batch, order = Shards.nbytes(path, 2, 8, shuffle=shuffle)
        assert shards.next()[0].base.nbytes == batch  # type: ignore[union-attr]
        assert order == (0 if shards._windows is None else shards._windows.nbytes)
    stories = Stories(2, 8)
    assert Stories.nbytes(2, 8) == (sum(array.nbytes for array in stories.next()), 0)


def test_bytes_that_a_model_holds(cpu: ModuleType) -> None:
    model = GPT2(gpt2.preset("tiny"), cpu)
    assert model.nbytes == model.params.nbytes
    model.prepare(2, 8)
    assert model.grads is not None and model.acts is not None
    assert model.nbytes == 2 * model.params.nbytes + model.acts.nbytes


def test_the_backend_tells_its_workspace() -> None:
    """`reserve` makes what `workspace_nbytes` says, whichever of the arguments decides."""
    program = (
        "import sys; from llmc import _cpu; from llmc._cpu import workspace\n"
        "made = []; real = workspace.empty\n"
        "workspace.empty = lambda shape, dtype: (made.append(shape[0]), real(shape, dtype))[1]\n"
        "for sizes in ((9, 3, 5, 7, 2, 8), (4096, 3, 5, 7, 2, 8), (9, 3, 1 << 36, 7, 2, 8), (9, 10000, 5, 7, 2, 8)):\n"
        "    told = _cpu.workspace_nbytes(*sizes); _cpu.reserve(*sizes)\n"
        "    assert made.pop() == told['shared'], (sizes, told)\n"
        "for threads in (3, 1):\n"
        "    _cpu.configure(threads=threads); assert made.pop() == _cpu.workspace_nbytes(1, 1, 1, 1, 1, 1)['threads']\n"
        "assert not made; _cpu.reserve(9, 3, 5, 7, 2, 8); assert not made\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- without reading weights -----------------------------------------------------------------------


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail("weights were read, or an arena was made")

    monkeypatch.setattr(checkpoint, "read_model", fail)
    for name in ("read", "check"):
        monkeypatch.setattr(safetensors_folder, name, fail)
    monkeypatch.setattr("llmc.model.Arena", fail)


SHAPE = Config(max_seq_len=32, vocab_size=300, num_layers=2, num_heads=2, channels=16)


@pytest.fixture
def sources(tmp_path: Path, cpu: ModuleType) -> Iterator[dict[str, str]]:
    """One model as each kind of source; of the folder's weights nothing but a config.json is left."""
    model = GPT2(SHAPE, cpu)
    loading.save_bin(model, tmp_path / "model.bin")
    loading.save(model, tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    yield {"bin": str(tmp_path / "model.bin"), "folder": str(tmp_path / "folder"), "hub": "someone/model"}


@pytest.mark.parametrize("kind", ["bin", "folder", "hub"])
def test_a_header_is_enough(
    sources: dict[str, str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str, *, weights: bool) -> Path:
        assert (name, weights) == ("someone/model", False)
        return Path(sources["folder"])

    write_shard(tmp_path / "tokens.bin", [1] * 500, vocab_size=300)
    monkeypatch.setattr(hub, "fetch", fetch)
    no_weights(monkeypatch)
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(init=sources[kind], train_data="tokens.bin", batch_size=2, sequence_length=16)
    parts = {part.name: part.nbytes for part in training.memory_plan(config).parts}
    assert parts["parameters"] == table_nbytes(SHAPE.parameter_rows())
    assert parts["data"] == 2 * 4 * (2 * 16 + 1)


def test_names_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published sizes are known without a network; a folder of that name goes first, as for `load`."""
    monkeypatch.setattr(hub, "fetch", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    for name in ("d12", "stories", "gpt2", "gpt2-xl"):
        assert loading.read_config(name) == gpt2.preset(name)
    Path("gpt2").mkdir()
    with pytest.raises(FileFormatError, match="config.json"):
        loading.read_config("gpt2")
    with pytest.raises(FileFormatError, match="give the folder that holds it"):
        Path("x.safetensors").touch()
        loading.read_config("x.safetensors")
    with pytest.raises(ConfigError, match="^init: 'nothing' is no file"):
        loading.read_config("nothing")


# ---- the machine -----------------------------------------------------------------------------------


def pretend(folder: Path, cgroup: str, **groups: tuple[str, dict[str, str]]) -> Machine:
    """A machine of 8 GiB, 6 of them available, with the given /proc/self/cgroup and files of groups."""
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {8 * GIB // 1024} kB\nMemAvailable: {6 * GIB // 1024} kB\nHugePages: 0\n")
    (proc / "self/cgroup").write_text(cgroup)
    for place, files in groups.values():
        (folder / "cgroup" / place).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / "cgroup" / place / name).write_text(text)
    return memory.machine(proc, folder / "cgroup")


def v2(most: object, used: int, files: int = 0) -> dict[str, str]:
    stat = f"anon 1\nactive_file {files}\ninactive_file {files}\n"
    return {"memory.max": f"{most}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def v1(most: int, used: int, files: int = 0) -> dict[str, str]:
    stat = f"active_file 7\ntotal_active_file {files}\ntotal_inactive_file {files}\n"
    return {"memory.limit_in_bytes": f"{most}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


def test_no_group(tmp_path: Path) -> None:
    assert pretend(tmp_path, "0::/\n") == Machine(8 * GIB, 6 * GIB)


def test_a_group_with_a_limit(tmp_path: Path) -> None:
    """Pages of files do not count as used."""
    found = pretend(tmp_path, "0::/a/b\n", b=("a/b", v2(3 * GIB, 2 * GIB, GIB // 4)))
    assert found == Machine(8 * GIB, 3 * GIB - 2 * GIB + GIB // 2, 3 * GIB)


def test_the_tightest_of_nested_groups(tmp_path: Path) -> None:
    found = pretend(tmp_path, "0::/a/b\n", b=("a/b", v2("max", GIB)), a=("a", v2(4 * GIB, GIB)))
    assert found == Machine(8 * GIB, 3 * GIB, 4 * GIB)


def test_a_limit_above_the_memory_is_none(tmp_path: Path) -> None:
    assert pretend(tmp_path, "0::/a\n", a=("a", v2(9 * GIB, 8 * GIB))) == Machine(8 * GIB, 6 * GIB)


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    found = pretend(tmp_path, "0::/host/path\n", root=("", v2(2 * GIB, GIB)))
    assert found == Machine(8 * GIB, GIB, 2 * GIB)


def test_a_full_group(tmp_path: Path) -> None:
    assert pretend(tmp_path, "0::/a\n", a=("a", v2(GIB, 2 * GIB))).available == 0


def test_version_1(tmp_path: Path) -> None:
    lines = "12:cpu:/x\n4:hugetlb,memory:/a\n0::/\n"
    found = pretend(tmp_path, lines, a=("memory/a", v1(2 * GIB, GIB, GIB // 8)), x=("memory/x", v1(GIB, 0)))
    assert found == Machine(8 * GIB, GIB + GIB // 4, 2 * GIB)


def test_this_machine() -> None:
    found = memory.machine()
    assert 0 < found.available <= found.total and found.total > 1 << 26


def test_without_proc(tmp_path: Path) -> None:
    found = memory.machine(tmp_path, tmp_path)
    assert found.available == found.total == memory.machine().total or sys.platform != "linux"


# ---- does it fit -----------------------------------------------------------------------------------


def linear(B: int, recompute: str) -> Plan:
    """100 bytes and, per sequence, 40, 30, 20 or 10."""
    return Plan((Part("all", 100 + B * (40 - 10 * list(RECOMPUTE).index(recompute))),))


@pytest.mark.parametrize(
    ("B", "recompute", "available", "options", "advice"),
    [
        (8, "none", 420, {}, None),
        (8, "none", 419, {}, "it would fit with recompute gelu or batch_size 7"),
        (8, "none", 339, {}, "recompute gelu\\+norm or batch_size 5"),
        (8, "none", 339, {"sequences": 24}, "recompute gelu\\+norm or batch_size 4"),
        (8, "none", 179, {}, "it would fit with batch_size 1"),
        (8, "none", 139, {}, "it would fit with batch_size 3 and recompute block"),
        (8, "block", 179, {}, "it would fit with batch_size 7"),
        (1, "none", 139, {}, "it would fit with recompute gelu"),
        (8, "none", 100, {}, "the least it can do with is 0.0 MiB"),
        (8, "none", 320, {"held": 100}, None),
        (8, "none", 319, {"held": 100}, "recompute gelu or batch_size 7"),
    ],
)
def test_what_would_fit(B: int, recompute: str, available: int, options: dict[str, int], advice: str | None) -> None:
    machine = Machine(1000, available)
    if advice is None:
        memory.require(linear, B, recompute, machine, **options)
        return
    with pytest.raises(ConfigError, match=rf"^memory: the run needs .* and .* are available .*; .*{advice}$"):
        memory.require(linear, B, recompute, machine, **options)


def test_a_run_that_does_not_fit_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what its error says would fit, does."""
    monkeypatch.setattr("llmc.model.Arena", lambda *a: pytest.fail("an arena was made"))
    config = TrainConfig(init="tiny", batch_size=6, sequence_length=64, total_batch=6 * 64, out=str(tmp_path / "out"))
    fits = replace(config, recompute="gelu+norm")
    available = training.memory_plan(fits).total
    monkeypatch.setattr(memory, "machine", lambda: Machine(GIB, available))
    message = r"^memory: the run needs .* it would fit with recompute gelu\+norm or batch_size 3$"
    with pytest.raises(ConfigError, match=message):
        next(iter(training.train(config)))
    assert not (tmp_path / "out").exists()
    training.require_memory(fits)
    training.require_memory(replace(config, batch_size=3))
    with pytest.raises(ConfigError):
        training.require_memory(replace(config, recompute="gelu"))


def test_what_a_given_model_holds_is_there_already(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2(gpt2.preset("tiny"), cpu)
    config = TrainConfig(init="tiny", sample_every=0)
    plan = training.memory_plan(config)
    workspace = sum(part.nbytes for part in plan.parts if part.name.startswith("workspace"))
    missing = plan.total - model.params.nbytes - workspace
    for available, enough in ((missing, True), (missing - 1, False)):
        monkeypatch.setattr(memory, "machine", lambda available=available: Machine(GIB, available))
        if enough:
            training.require_memory(config, model)
        else:
            with pytest.raises(ConfigError, match="^memory: "):
                training.require_memory(config, model)


def test_samples_count_only_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, sampled in (
        ({"sample_every": 0}, False),
        ({"sample_every": 5, "steps": 4}, False),
        ({"sample_every": 5, "steps": 5}, True),
        ({"sample_every": 5, "steps": -1}, True),
    ):
        plan = training.memory_plan(TrainConfig(init="tiny", **options))
        assert [part.nbytes > 0 for part in plan.parts if part.name.startswith("sampling")] == [sampled] * 2


def test_the_trained_mode_is_the_one_asked_for(cpu: ModuleType) -> None:
    model = loading.load("tiny", ops=cpu)
    config = TrainConfig(init="tiny", steps=1, sequence_length=8, recompute="block", val_every=0)
    list(training.train(config, model))
    assert model.recompute == "block" and isinstance(model.acts, Arena)
    assert model.acts.table == tuple(model.config.activation_rows(4, 8, recompute="block"))


def test_recompute_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"^recompute: 'all' is unknown; choose from none, gelu, gelu\+norm, block"):
        TrainConfig(recompute="all")
