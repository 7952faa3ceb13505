"""The programs that bench/training.py compares, each a process of its own:

    python bench/programs.py '{"kind": "llmc", ...}'

It makes its first step at once, as a training script does, so that whoever started it can take the time from there;
then a turn for each number on its standard input, and at the end of that its memory.  Every answer is a line of JSON.
Nothing is imported that the program at hand does not need: imports are part of its start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from simulate import simulate

from llmc.machine import memory

if TYPE_CHECKING:
    from torch import Tensor

HEADER_BYTES = 1024  # of the model file
LAYERNORM_EPS = 1e-5
STREAM_BYTES = 1 << 28  # what AdamW's stream goes through: more than any cache

# What a process is told: `kind`, a key of PROGRAMS, `device`, `threads` and `dtype`, and but for the peaks `weights` (a
# model file, for llmc also a preset), `seed`, `B`, `T`, `only_forward` (losses and nothing else) and `steps`: how many
# there are in a turn, on a CPU one, on a GPU several, since what makes it fast is that they follow without a gap.  llmc
# may be told `recompute` and `attention`, PyTorch `compiled`; PyTorch is told the model's `config`, `rows` ([name,
# shape, layers] of each tensor in the file) and `recipe`, llmc's own.
Settings = dict[str, Any]


class Program(Protocol):
    """Something that is asked again and again."""

    libraries: float  # MiB that its imports took

    def turn(self, number: int) -> dict[str, Any]:
        """The answer to a turn's number (0: the first step alone): its `losses`, and in seconds per step `forward`,
        `backward` and `update`; or, on a GPU, `step`, and `busy`, the part of it in which the GPU had work."""

    def peak(self) -> float:
        """MiB: the most that it ever held; on a GPU, of the GPU's memory."""


def numbers(turn: int, steps: int) -> range:
    """The steps of a turn: 0 is the first alone, and the others follow."""
    return range(1) if turn == 0 else range(1 + (turn - 1) * steps, 1 + turn * steps)


def parts(loss: float, times: list[float]) -> dict[str, Any]:
    """A training step's answer from the times at which it began and had done each part."""
    return {
        "losses": [loss], "forward": times[1] - times[0], "backward": times[2] - times[1],
        "update": times[3] - times[2],
    }  # fmt: skip


# ---- llmc ------------------------------------------------------------------------------------------


def backend(settings: Settings) -> Any:
    from llmc import ops

    if settings["device"] == "cpu":
        return ops.load("cpu", threads=settings["threads"], dtype=settings["dtype"])
    return ops.load(settings["device"], dtype=settings["dtype"], attention=settings["attention"])


class Llmc:
    def __init__(self, settings: Settings) -> None:
        from llmc import benchmark

        self.settings = settings
        backend(settings)  # the kernels are a library too
        self.libraries = memory()["now"]
        self.program = benchmark.Program(
            benchmark.Configuration(
                settings["weights"], settings["B"], settings["T"], settings["dtype"], None, settings["threads"],
                settings["seed"], settings.get("recompute") or "none", settings["device"], settings["attention"],
            )
        )  # fmt: skip

    def turn(self, number: int) -> dict[str, Any]:
        if self.settings["device"] == "cpu":
            return parts(*self.program.step(number))
        steps = numbers(number, self.settings["steps"])
        losses, step, busy = self.program.turn(steps, self.settings["only_forward"])
        return {"losses": losses, "step": step, "busy": busy}

    def peak(self) -> float:
        return memory()["peak"] if self.settings["device"] == "cpu" else self.program.held / 2**20


class Peaks:
    """What the machine can do at this moment, by llmc's own measure: FLOP/s and B/s."""

    SECONDS = 0.2  # of each, each time: they have one turn in a round of steps that take seconds

    def __init__(self, settings: Settings) -> None:
        from llmc import profiling

        self.backend = backend(settings)
        self.libraries = memory()["now"]
        self.measure, self.memory = profiling.measure, profiling.stream_memory(self.backend, STREAM_BYTES)
        # AdamW reads a gradient, and reads and writes a weight and two moments.
        gpu = profiling.is_gpu(self.backend)
        self.ceilings = {"stream": profiling.COPY if gpu else ("stream", 1, 0, 3, STREAM_BYTES)}
        self.ceilings[settings["dtype"]] = profiling.products(settings["dtype"], gpu)

    def turn(self, number: int) -> dict[str, Any]:
        return {
            name: self.measure(self.backend, what, self.memory, self.SECONDS) for name, what in self.ceilings.items()
        }

    def peak(self) -> float:
        return memory()["peak"]


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
        self.device = torch.device(settings["device"])
        if self.gpu:
            self._set_up_gpu()
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
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=settings["dtype"] == "bf16")
        self.loss = torch.compile(self._loss) if settings.get("compiled") else self._loss

    @property
    def gpu(self) -> bool:
        return self.device.type != "cpu"

    def _set_up_gpu(self) -> None:
        """TF32 where it is asked for (and where autocast leaves fp32); in bf16 flash attention and no other."""
        import torch

        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("highest" if self.settings["dtype"] == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = self.settings["dtype"] != "fp32"
        if self.settings["dtype"] == "bf16":
            torch.backends.cuda.enable_flash_sdp(True)
            for other in ("cudnn", "mem_efficient", "math"):
                getattr(torch.backends.cuda, f"enable_{other}_sdp")(False)

    def _read(self, path: str) -> dict[str, Tensor]:
        """Leaf tensors `name` or `name.layer` from llm.c's model file.  On a CPU without the padding of the vocabulary;
        on a GPU with it, as is usual there: the rows are zero, and their logits take part in the softmax."""
        import numpy as np
        import torch

        made = {}
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            for tensor, shape, layers in self.settings["rows"]:
                for layer in range(max(1, layers)):
                    values = np.fromfile(file, "<f4", int(np.prod(shape))).reshape(shape)
                    if tensor == "wte" and not self.gpu:
                        values = values[: self.config["vocab_size"]]
                    name = f"{tensor}.{layer}" if layers else tensor
                    made[name] = torch.from_numpy(values).to(self.device).requires_grad_()
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

    def turn(self, number: int) -> dict[str, Any]:
        return self._turn(number) if self.gpu else self._step(number)

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        import numpy as np
        import torch

        from llmc.data import random_batch  # which is light, and knows no kernels: torch must not meet them

        s = self.settings
        x, y = random_batch(self.config["vocab_size"], s["B"], s["T"], s["seed"], number)
        return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))

    def _forward(self, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast:
            return self.loss(x, y)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, number: int) -> dict[str, Any]:
        x, y = self._batch(number)
        times = [time.perf_counter()]
        loss = self._forward(x, y)
        value = loss.item()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self._update()
        times.append(time.perf_counter())
        return parts(value, times)

    def _turn(self, number: int) -> dict[str, Any]:
        """Losses are fetched at the end, so that no step waits for one."""
        import torch

        steps, only_forward = numbers(number, self.settings["steps"]), self.settings["only_forward"]
        batches = [[ids.pin_memory() if self.gpu else ids for ids in self._batch(step)] for step in steps]
        losses = []
        with torch.set_grad_enabled(not only_forward):
            self._wait()
            began = time.perf_counter()
            for batch in batches:
                loss = self._forward(*(ids.to(self.device, non_blocking=True) for ids in batch))
                if not only_forward:
                    loss.backward()
                    self._update()
                losses.append(loss.detach())
            values = torch.stack(losses).tolist()
            self._wait()
        return {"losses": values, "step": (time.perf_counter() - began) / len(steps), "busy": None}

    def _wait(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def peak(self) -> float:
        import torch

        return torch.cuda.max_memory_reserved() / 2**20 if self.gpu else memory()["peak"]


PROGRAMS: dict[str, type[Program]] = {"llmc": Llmc, "torch": PyTorch, "peaks": Peaks}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    settings: Settings = json.loads(sys.argv[1])
    if settings["device"] != "cpu" and settings["kind"] != "torch":
        simulate()
    # What a library prints goes to standard error: standard output is for answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    try:
        program = PROGRAMS[settings["kind"]](settings)
        answer(program.turn(0))
        for line in sys.stdin:
            answer(program.turn(int(line)))
        answer({"libraries": program.libraries, "peak": program.peak()})
    except Exception as error:
        answer({"failed": (str(error).strip().splitlines() or [type(error).__name__])[0]})
        raise


if __name__ == "__main__":
    main()
