"""The programs that bench/training.py compares, each a process of its own:

    python bench/programs.py '{"kind": "llmc", ...}'

It makes step 0 at once, as a training script does, so that whoever started it can take the time from there; then a
step for each number on its standard input, and at the end of that its memory.  Every answer is a line of JSON.
Nothing is imported that the program at hand does not need: imports are part of its start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from llmc.machine import memory

if TYPE_CHECKING:
    from torch import Tensor

HEADER_BYTES = 1024  # of the model file
LAYERNORM_EPS = 1e-5
STREAM_BYTES = 1 << 28  # what AdamW's stream goes through: more than any cache

# What a process is told: `kind`, a key of PROGRAMS, `threads`, and but for the peaks `weights` (a model file, for llmc
# also a preset), `seed`, `B`, `T` and `dtype`.  llmc may be told `recompute`, PyTorch `compiled`; PyTorch is told the
# model's `config`, `rows` ([name, shape, layers] of each tensor in the file) and `recipe`, llmc's own.
Settings = dict[str, Any]


class Program(Protocol):
    """Something that is asked again and again."""

    libraries: float  # MiB that its imports took

    def step(self, number: int) -> dict[str, Any]:
        """The answer to a step's number: of a training step its loss, and in seconds its `forward`, `backward` and
        `update`."""


def parts(loss: float, times: list[float]) -> dict[str, float]:
    """A training step's answer from the times at which it began and had done each part."""
    return {
        "loss": loss, "forward": times[1] - times[0], "backward": times[2] - times[1], "update": times[3] - times[2],
    }  # fmt: skip


# ---- llmc ------------------------------------------------------------------------------------------


class Llmc:
    def __init__(self, settings: Settings) -> None:
        from llmc import benchmark, ops

        ops.load("cpu", threads=settings["threads"])  # the kernels are a library too
        self.libraries = memory()["now"]
        self.program = benchmark.Program(
            benchmark.Configuration(
                settings["weights"], settings["B"], settings["T"], settings["dtype"], None, settings["threads"],
                settings["seed"], settings.get("recompute") or "none",
            )
        )  # fmt: skip

    def step(self, number: int) -> dict[str, Any]:
        return parts(*self.program.step(number))


class Peaks:
    """What the machine can do at this moment, by llmc's own kernels: FLOP/s and B/s."""

    SECONDS = 0.2  # of each, each time: they have one turn in a round of steps that take seconds

    def __init__(self, settings: Settings) -> None:
        from llmc import ops, profiling

        self.backend = ops.load("cpu", threads=settings["threads"])
        self.libraries = memory()["now"]
        self.measure, self.memory = profiling.measure, profiling.stream_memory(self.backend, STREAM_BYTES)
        # AdamW reads a gradient, and reads and writes a weight and two moments.
        self.ceilings = {"stream": ("stream", 1, 0, 3, STREAM_BYTES), **profiling.REGISTERS}

    def step(self, number: int) -> dict[str, Any]:
        return {
            name: self.measure(self.backend, what, self.memory, self.SECONDS) for name, what in self.ceilings.items()
        }


# ---- PyTorch ---------------------------------------------------------------------------------------


class PyTorch:
    """GPT-2 as one writes it in PyTorch: scaled_dot_product_attention, fused AdamW, autocast for bf16.

    Its parameters are leaves per layer, not slices of stacked tensors as in llmc/torch_reference.py:
    the gradient of a slice is a tensor of the whole stack's size, which would cost PyTorch time.
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        self.libraries = memory()["now"]
        torch.set_num_threads(settings["threads"])
        self.settings, self.config, recipe = settings, settings["config"], settings["recipe"]
        self.p = self._read(settings["weights"])
        matrices = [t for t in self.p.values() if t.dim() == 2]
        others = [t for t in self.p.values() if t.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe["lr"], betas=(recipe["beta1"], recipe["beta2"]), eps=recipe["eps"], fused=True,
        )  # fmt: skip
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings["dtype"] == "bf16")
        self.loss = torch.compile(self._loss) if settings.get("compiled") else self._loss

    def _read(self, path: str) -> dict[str, Tensor]:
        """Leaf tensors `name` or `name.layer` from llm.c's model file, the vocabulary without its padding."""
        import numpy as np
        import torch

        made = {}
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            for tensor, shape, layers in self.settings["rows"]:
                for layer in range(max(1, layers)):
                    values = np.fromfile(file, "<f4", int(np.prod(shape))).reshape(shape)
                    if tensor == "wte":
                        values = values[: self.config["vocab_size"]]
                    name = f"{tensor}.{layer}" if layers else tensor
                    made[name] = torch.from_numpy(values).requires_grad_()
        return made

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        from torch.nn import functional as F

        p, C, H = self.p, self.config["channels"], self.config["num_heads"]
        B, T = tokens.shape

        def norm(x: Tensor, name: str, layer: str = "") -> Tensor:
            return F.layer_norm(x, (C,), p[f"{name}w{layer}"], p[f"{name}b{layer}"], LAYERNORM_EPS)

        def linear(x: Tensor, name: str, layer: str) -> Tensor:
            return F.linear(x, p[f"{name}w{layer}"], p[f"{name}b{layer}"])

        x = F.embedding(tokens, p["wte"]) + p["wpe"][:T]
        for i in range(self.config["num_layers"]):
            at = f".{i}"
            q, k, v = linear(norm(x, "ln1", at), "qkv", at).split(C, dim=2)
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(mixed.transpose(1, 2).reshape(B, T, C), "attproj", at)
            hidden = F.gelu(linear(norm(x, "ln2", at), "fc", at), approximate="tanh")
            x = x + linear(hidden, "fcproj", at)
        logits = F.linear(norm(x, "lnf"), p["wte"])
        return F.cross_entropy(logits.view(B * T, -1), targets.view(-1))

    def step(self, number: int) -> dict[str, Any]:
        import numpy as np
        import torch

        from llmc.data import random_batch  # which is light, and knows no kernels: torch must not meet them

        s = self.settings
        batch = random_batch(self.config["vocab_size"], s["B"], s["T"], s["seed"], number)
        x, y = (torch.from_numpy(ids.astype(np.int64)) for ids in batch)
        times = [time.perf_counter()]
        with self.autocast:
            loss = self.loss(x, y)
        value = loss.item()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return parts(value, times)


PROGRAMS: dict[str, type[Program]] = {"llmc": Llmc, "torch": PyTorch, "peaks": Peaks}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    settings: Settings = json.loads(sys.argv[1])
    # What a library prints goes to standard error: standard output is for answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    program = PROGRAMS[settings["kind"]](settings)
    answer(program.step(0))
    for line in sys.stdin:
        answer(program.step(int(line)))
    answer({"libraries": program.libraries, "peak": memory()["peak"]})


if __name__ == "__main__":
    main()
