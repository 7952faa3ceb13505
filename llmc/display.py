"""What `llmc train` and `llmc sample` show: plain lines, and on a terminal one live status line below them.

Whatever a model writes may hold any byte; on a terminal its control characters are shown and not obeyed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from llmc.errors import LlmcError

if TYPE_CHECKING:
    from rich.progress import Progress

    from llmc.memory import Machine, Plan
    from llmc.profiling import Profile
    from llmc.sampling import Piece, Speed
    from llmc.training import Event, Sample, Saved, Started, Step, TrainConfig, Validation

STEP_LINES = 50  # about as many steps as this get a line of their own
QUIET_SECONDS = 10.0  # but after so long a silence the next one does anyway
IMPORTED = time.monotonic()
REFRESH_SECONDS = 0.1  # between two drawings of the status line: steps of a small model are shorter
# C0 but for tab and newline, DEL, C1, and the marks that reorder or hide text on the screen.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def printable(text: str) -> str:
    """`text` with control characters written as \\x1b or \\u202e."""
    return UNSAFE.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def write_stream(stream: TextIO, pieces: Iterable[str]) -> None:
    """Write pieces of text as they come, and a newline at the end."""
    terminal = stream.isatty()
    for piece in pieces:
        stream.write(printable(piece) if terminal else piece)
        stream.flush()
    stream.write("\n")
    stream.flush()


def in_order(prompts: Sequence[str], pieces: Iterable[Piece]) -> Iterator[str]:
    """Texts that are written at the same time, one after another, each after its prompt and, if there are several,
    under a heading: the first that is not at its end as it comes, and what the others have got to until then."""
    texts, ended, current = list(prompts), [False] * len(prompts), 0

    def heading(i: int) -> str:
        return f"--- {i + 1} of {len(texts)} ---\n" if len(texts) > 1 else ""

    yield heading(0) + texts[0]
    for piece in pieces:
        if piece.sequence == current:
            yield piece.text
        else:
            texts[piece.sequence] += piece.text
        ended[piece.sequence] |= piece.token is None
        while ended[current] and current + 1 < len(texts):
            current += 1
            yield f"\n\n{heading(current)}{texts[current]}"


def speed_line(speed: Speed, bandwidth: float | None) -> str:
    """What a run took, for people; `bandwidth` is the B/s that the device was measured to read with."""

    def tokens(n: int) -> str:
        return f"{n:,} token{'' if n == 1 else 's'}"

    text = f"prompt {tokens(speed.prompt_tokens)} in {speed.prompt_seconds:.2f} s; {tokens(speed.tokens)}"
    if speed.decoded:
        text += f", {speed.tokens_per_second:.1f} tokens/s, {speed.bandwidth / 1e9:.1f} GB/s"
        if bandwidth is not None:
            text += f" of {bandwidth / 1e9:.1f} ({speed.bandwidth / bandwidth:.0%})".replace("%", " %")
    return text


def duration(seconds: float) -> str:
    """4 -> 0:04, 3725 -> 1:02:05."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def count(number: float) -> str:
    """1234 -> 1.2k: for the status line."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def process_age() -> float:
    """Seconds since this process was started, the interpreter's own start-up included; where the system does not tell
    (it is not Linux), since this module was imported."""
    try:
        with open("/proc/self/stat", "rb") as file:
            # The name in brackets may hold anything; after it, the twentieth field is the start, in ticks since boot.
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return time.monotonic() - IMPORTED


class Display:
    """Shows the events of one run.  Use as a context manager, so that the status line goes away at the end."""

    def __init__(self, config: TrainConfig, stream: TextIO) -> None:
        self.config = config
        self.stream = stream
        self.steps = 0
        self.done = 0  # updates so far
        self._terminal = stream.isatty()
        self._progress: Progress | None = None
        self._began = self._last_line = time.monotonic()
        self._seconds = 0.0  # of a step, smoothed
        self._refreshed = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, event: Event) -> None:
        """Print one event."""
        getattr(self, f"_{type(event).__name__.lower()}")(event)

    def line(self, text: str = "") -> None:
        """One line, above the status line where there is one."""
        self._last_line = time.monotonic()
        if self._terminal:
            text = printable(text)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    # ---- events --------------------------------------------------------------------------------------

    def _started(self, event: Started) -> None:
        config, B, T = self.config, self.config.batch_size, self.config.sequence_length
        self.steps = event.steps
        rows: dict[str, object] = {"model": config.init, **vars(event.model)}
        rows["num_parameters"] = f"{event.parameters:,}"
        if config.lora_rank:
            rows["trained"] = f"{event.trained:,} in adapters of rank {config.lora_rank}; the parameters stay"
        rows["num_activations"] = f"{event.activations:,} ({event.activation_bytes / 2**20:.1f} MiB)"
        rows["batch"] = f"{B} x {T} tokens; {event.tokens_per_update:,} tokens per update"
        rows["train batches"] = "unlimited" if event.train_batches is None else f"{event.train_batches:,}"
        if event.val_batches == 0:
            rows["val batches"] = "none: no val_data was given"
        else:
            rows["val batches"] = "unlimited" if event.val_batches is None else f"{event.val_batches:,}"
        rows["updates"] = f"{event.steps:,}, {config.schedule} learning rate {config.lr:g}"
        backend = event.backend
        rows["device"] = f"{config.device}, {_computing(backend, event.model.head_size)}"
        for name, value in rows.items():
            self.line(f"{name:<16} {value}")
        self.line()
        if self._terminal:
            self._progress = self._status_line(event.steps)

    def _validation(self, event: Validation) -> None:
        if event.floor is None:
            self.line(f"val loss {event.loss:.6f}")
        else:
            self.line(
                f"val loss {event.loss:.4f} nats per byte; a perfect model would get {event.floor:.4f}; "
                f"gap {event.loss - event.floor:.4f}"
            )

    def _sample(self, event: Sample) -> None:
        text = event.text or " ".join(map(str, event.tokens))
        self.line("generated text:\n---")
        self.line(text)
        self.line("---")

    def _step(self, event: Step) -> None:
        self.done = event.step + 1
        # The first step touches new memory and the rest do not, so it soon stops counting.
        self._seconds = event.seconds if event.step < 2 else 0.9 * self._seconds + 0.1 * event.seconds
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=self.done, loss=f"{event.loss:.4f}",
                speed=count(event.tokens_per_second), eta=duration(self._seconds * (self.steps - self.done)),
            )  # fmt: skip
            now = time.monotonic()
            if now - self._refreshed >= REFRESH_SECONDS or self.done == self.steps:
                self._refreshed = now
                self._progress.refresh()
        every = -(-self.steps // STEP_LINES)
        due = event.step % every == 0 or self.done == self.steps
        if due or time.monotonic() - self._last_line >= QUIET_SECONDS:
            self.line(f"step {event.step}: train loss {event.loss:.6f} (took {event.seconds * 1000:.1f} ms)")
        if event.step == 0:
            self.line(f"first step done {process_age():.2f} s after the process started")

    def _profile(self, event: Profile) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for text in profile_lines(event):
            self.line(text)
        self.line()

    def _saved(self, event: Saved) -> None:
        self.line(f"model, run.toml and metrics.jsonl saved in {event.folder}")

    # ---- the status line -----------------------------------------------------------------------------

    def _status_line(self, steps: int) -> Progress | None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        console = Console(file=self.stream)
        if console.is_dumb_terminal:
            return None
        progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            TaskProgressColumn(),
            BarColumn(bar_width=20),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            auto_refresh=False,  # a refreshing thread would take time from the kernels'
            transient=True,
            redirect_stderr=False,
            redirect_stdout=False,
        )
        progress.add_task("", total=steps, loss="-", speed="-", eta="-")
        progress.start()
        return progress

    def elapsed(self) -> str:
        """Time since this display was made."""
        return duration(time.monotonic() - self._began)


def profile_lines(profile: Profile) -> list[str]:
    """The table of `llmc train --profile`: an op and its size, longest first, then the parts of a step."""
    lines = [
        f"mean of {profile.steps} {'step' if profile.steps == 1 else 'steps'}, {1e3 * profile.seconds:.2f} ms each",
        f"{'op':<26} {'size':<12} {'calls':>6} {'ms':>9} {'%':>6} {'rate':>17} {'of peak':>8}",
    ]

    def share(seconds: float) -> str:
        return f"{1e3 * seconds:>9.3f} {100 * seconds / profile.seconds:>6.1f}"

    for row in profile.rows:
        fraction = "" if row.fraction is None else f"{100 * row.fraction:.0f} %"
        lines.append(
            f"{row.op:<26} {row.size:<12} {row.calls:>6.5g} {share(row.seconds)} {row.rate:>9.1f} {row.unit:<7} "
            f"{fraction:>8}"
        )
    for part, seconds in (*profile.parts.items(), ("outside ops", profile.outside)):
        lines.append(f"{part:<46} {share(seconds)}")
    names = {
        "fma": "fp32 multiply-adds", "dot": "bf16 dot products", "product": "a large product", "copy": "a copy",
    }  # fmt: skip
    peaks = ", ".join(
        f"{names[name]} {value / 1e9:.1f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, value in profile.peaks.items()
    )
    if peaks:
        stream = "" if "copy" in profile.peaks else "; for GB/s, a stream with the op's own traffic"
        lines.append(f"peaks, medians of this run: {peaks}{stream}")
    return lines


def _computing(backend: Mapping[str, Any], head_size: int) -> str:
    """What a model with heads of so many channels is computed with."""
    if backend["device"] != "cuda":
        return f"{backend['isa']}, {backend['dtype']}, threads: {backend['threads']}"
    own = "own flash kernels" if head_size in backend["flash_heads"] else "own simple kernels"
    attention = own if backend["attention"] == "own" else backend["attention"]
    return f"{backend['name']}, {backend['dtype']}; products: {backend['gemm']}; attention: {attention}"


class Transfer:
    """Shows how far a download or the tokenising of a text has come: a bar on a terminal, else a line per phase."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        self._shown = 0.0

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def stage(self, text: str) -> None:
        """A phase begins."""
        self.__exit__()
        self._progress = None
        print(printable(text) if self._stream.isatty() else text, file=self._stream, flush=True)

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` bytes (0: unknown)."""
        if not self._stream.isatty():
            return
        now = time.monotonic()
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

            console = Console(file=self._stream)
            self._progress = Progress(
                BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, auto_refresh=False,
                transient=True,
            )  # fmt: skip
            self._progress.add_task("", total=total or None)
            self._progress.start()
        elif now - self._shown < 0.1 and done != total:
            return
        self._shown = now
        self._progress.update(self._progress.task_ids[0], completed=done, total=total or None, refresh=True)


# ---- llmc train --dry-run --------------------------------------------------------------------------


def print_memory(stream: TextIO, plan: Plan, machine: Machine) -> None:
    """A plan's parts and total in bytes and MiB, and what the machine has."""

    def line(name: str, nbytes: int, note: str = "") -> None:
        end = f"  {note}" if note else ""
        print(f"{name:<20}{nbytes:>20,}{nbytes / 2**20:>12,.1f} MiB{end}", file=stream)

    for part in plan.parts:
        line(*part)
    line("total", plan.total)
    print(file=stream)
    line(machine.name, machine.total)
    if machine.limit is not None:
        line("control group", machine.limit, "the most that this process may have")
    line("available now", machine.available, "without swapping" if machine.name == "machine" else "")


# ---- llmc info -------------------------------------------------------------------------------------

# What each package beyond NumPy is for; only tiktoken comes with llmc.
OPTIONAL = {
    "huggingface_hub": "models from the hub by name",
    "torch": "llmc reference, tests",
    "transformers": "tests",
    "tiktoken": "the gpt2 tokenizer",
    "tokenizers": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
    "jinja2": "chat templates",
    "pyarrow": "parquet files",
    "datasets": "datasets of the hub",
    "matplotlib": "llmc bench --plot",
}


def print_info(stream: TextIO, device: str = "cpu", **settings: Any) -> None:
    """Version, processor, what of it is in use, the GPU and what it takes, and which optional packages are there
    (without importing them).

    `settings` are those of `ops.load`.  With a GPU as `device` they are shown too; where it is not to be had,
    DeviceError or ConfigError after all else has been printed.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from llmc import __version__, machine, ops

    rows = {
        "llmc": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "processor": machine.processor(),
    }
    gpu, missing = {}, None
    if device != "cpu":
        try:
            gpu = ops.load(device, **settings).info()
        except LlmcError as error:
            missing = error
    info = ops.load("cpu", **(settings if device == "cpu" else {})).info()
    rows["instruction set"] = f"{info['isa']} in use; {', '.join(info['isas'])} available"
    rows["bf16 products"] = "one instruction per pair" if info["bf16_products"] else "rounded, multiplied in fp32"
    rows["threads"] = str(info["threads"])
    rows["waiting threads"] = info["waiting"]
    rows["OpenMP"] = f"specification {info['openmp']}" if info["openmp"] else "built without: one thread"
    rows |= ops.found()
    if gpu:
        rows["in use"] = f"{device}, {gpu['dtype']}; products: {gpu['gemm']}; attention: {gpu['attention']}"
    for name in ("numpy", *OPTIONAL):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        rows[name] = f"{found} ({OPTIONAL[name]})" if name in OPTIONAL else found
    for name, value in rows.items():
        print(f"{name:<16} {value}", file=stream)
    if missing is not None:
        stream.flush()
        raise missing
