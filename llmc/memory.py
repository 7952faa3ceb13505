"""What a training run will take of the machine's memory, known before any of it is taken.

Sizes come from the tables that the arenas are made of and from the backend's own account of its workspace, so
they are those of the run to the byte.  Beside them are only the interpreter with its libraries, and what is gone
before training begins or after it ends (a matrix that is transposed while files are read or written).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llmc import adamw, sampling
from llmc import lora as adapters
from llmc.arena import table_nbytes
from llmc.errors import ConfigError
from llmc.lora import LoRA
from llmc.model import RECOMPUTE, Config, narrowed
from llmc.ops import Ops

MIB = 1 << 20


class Part(NamedTuple):
    """One line of a plan; `note` says what the bytes are for."""

    name: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that a run allocates and keeps, `total` bytes."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        return sum(part.nbytes for part in self.parts)


def plan(
    config: Config, ops: Ops, B: int, T: int, *, dtype: str = "float32", masters: bool = True,
    recompute: str = "none", sample_length: int = 0, data: int = 0, profile: int = 0, lora: LoRA | None = None,
    narrow: bool = False,
) -> Plan:
    """The plan of training on batches of (B, T): arenas of `dtype`, parameters of float32 beside bfloat16 ones where
    there are `masters`, and activations as `recompute` says.

    `sample_length` is the number of tokens per sample, 0 for a run that takes none; `data` the bytes of batches
    and of their order, `profile` those of a profile.  With `lora` adapters are trained in place of the parameters,
    whose matrices are bfloat16 if `narrow`.  ConfigError as by `Config.activation_rows` and for adapters that the model
    cannot have.
    """
    weights = config.parameter_rows(dtype)
    frozen: list[Part] = []
    scratch_of_adapters, trained = 0, weights
    if lora is not None:
        parts = adapters.parts_of(weights, lora, dtype)
        trained = adapters.rows_of(parts)
        held = table_nbytes(narrowed(weights) if narrow else weights)
        frozen = [Part("frozen parameters", held, "in bf16" if narrow or dtype == "bfloat16" else "")]
        most = max(B * T, sampling.longest(config, sample_length) if sample_length else 1)
        scratch_of_adapters = table_nbytes(adapters.scratch_rows(weights, parts, most, dtype))
    parameters = table_nbytes(trained)
    full = table_nbytes(adamw.moment_rows(trained))
    kept_twice = masters and dtype == "bfloat16"
    rows = config.activation_rows(B, T, dtype, recompute)
    per_layer = sum(row.nbytes // row.layers for row in rows if row.layers)
    kept = per_layer * config.num_layers
    backward = table_nbytes(row for row in rows if row.name in config.BACKWARD)
    longest = sampling.longest(config, sample_length) if sample_length else 1
    workspace = ops.workspace_nbytes(**config.workspace(1, max(B * T, longest)))
    cache, scratch = sampling.nbytes(config, sample_length, dtype) if sample_length else (0, 0)
    return Plan(
        (
            *frozen,
            Part(
                "adapters" if lora else "parameters", full if kept_twice else parameters,
                "float32 masters" if kept_twice else "",
            ),
            *([Part("weights in bf16", parameters, "what the layers read")] if kept_twice else []),
            Part("gradients", parameters),
            Part("AdamW m", full),
            Part("AdamW v", full),
            Part("scalars", table_nbytes(adamw.STATE) + 8, "learning rate, norm, loss"),
            Part("activations, kept", kept, f"{config.num_layers} layers of {per_layer:,}"),
            Part("activations, single", table_nbytes(rows) - kept - backward, "one for all layers"),
            *([Part("adapters' activations", scratch_of_adapters)] if lora else []),
            Part("backward scratch", backward, "the rest of it overwrites activations"),
            Part("validation", 0, "in the activations"),
            Part("sampling cache", cache, "keys and values" if sample_length else "no samples"),
            Part("sampling scratch", scratch, "at most" if sample_length > config.max_seq_len else ""),
            Part("workspace, shared", workspace["shared"], "logits of a chunk, partial sums"),
            Part("workspace, threads", workspace["threads"], "packed panels, attention blocks")
            if ops.info()["device"] == "cpu"
            else Part("workspace, library", workspace["threads"], "libraries', and for what travels"),
            *([Part("data", data, "batches and their order")] if ops.memory() is None else []),
            Part("profile", profile, "streams that ops are compared with" if profile else "none"),
        )
    )


# ---- the machine -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Bytes of memory: all of it, what can be had now without swapping, and the least limit of a control group
    that this process is in (None: no limit below `total`).  `available` respects the limit too."""

    total: int
    available: int
    limit: int | None = None
    name: str = "machine"


def device(ops: Ops) -> Machine:
    """Where the arenas of `ops` lie: a GPU's own memory, or this machine's."""
    found = ops.memory()
    if found is None:
        return machine()
    available, total = found
    return Machine(total, available, name="GPU")


def machine(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Machine:
    """This machine.  Without /proc/meminfo (macOS) all memory counts as available."""
    facts: dict[str, int] = {}
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts[name] = int(value.split()[0]) * 1024
    except OSError:
        facts["MemTotal"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = facts["MemTotal"]
    available, limit = facts.get("MemAvailable", total), None
    for most, used in _limits(proc, cgroups):
        if most < total:
            limit = most if limit is None else min(limit, most)
            available = min(available, max(0, most - used))
    return Machine(total, available, limit)


def _limits(proc: Path, cgroups: Path) -> list[tuple[int, int]]:
    """Limit and use of each control group that this process is in, up to the root; file pages that can be
    dropped are not counted as used.  Versions 2 (no controller named) and 1 (`memory`)."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, names, prefix = cgroups, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            root, names, prefix = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        # In a container the path may be the host's, which is not there; the root is then the container's own.
        folder = root / place.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                most, used = ((group / name).read_text().strip() for name in names)
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                if most != "max":
                    files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                    found.append((int(most), int(used) - files))
            except (OSError, ValueError):
                pass  # not there, or no group: the root of version 2 has no limit
            if group == root:
                break
    return found


# ---- does it fit -----------------------------------------------------------------------------------


def mib(nbytes: int) -> str:
    """1048576 -> 1.0 MiB."""
    return f"{nbytes / MIB:,.1f} MiB"


def require(
    make: Callable[[int, str], Plan], B: int, recompute: str, have: Machine, *, sequences: int = 0, held: int = 0
) -> None:
    """ConfigError unless `make(B, recompute)`, less `held` bytes that exist already, fits into what `have` has
    available.  The error says what would fit.

    `make` gives the plan for a batch size and a mode of recomputation; `sequences`, if not 0, is the number of
    sequences per update, which a smaller batch size has to divide.
    """

    def fits(B: int, recompute: str) -> bool:
        return make(B, recompute).total - held <= have.available

    def largest(recompute: str) -> int:
        """The largest batch size below B that fits; 0: none."""
        low, high = 0, B
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, recompute) else (low, middle)
        while low and sequences % low:
            low -= 1
        return low

    if fits(B, recompute):
        return
    stronger = RECOMPUTE[RECOMPUTE.index(recompute) + 1 :]
    advice = [f"recompute {mode}" for mode in stronger if fits(B, mode)][:1]
    if size := largest(recompute):
        advice.append(f"batch_size {size}")
    if not advice and stronger and (size := largest(stronger[-1])):
        advice.append(f"batch_size {size} and recompute {stronger[-1]}")
    least = make(1, RECOMPUTE[-1]).total - held
    what = f"it would fit with {' or '.join(advice)}" if advice else f"the least it can do with is {mib(least)}"
    raise ConfigError(
        "memory",
        f"the run needs {mib(make(B, recompute).total - held)} and {mib(have.available)} are available "
        f"(--dry-run lists them); {what}",
    )
