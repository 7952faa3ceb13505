"""The command line: words in, dataclasses down, lines out.

Nothing here imports NumPy before a command needs it, so `--help` answers at once.  Exit status: 0 done, 1 an
error (one line on stderr), 2 a command line that cannot be read, 130 interrupted; `verify` gives 1 for
"does not agree".
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from llmc import __version__, display
from llmc.errors import ConfigError, LlmcError

if TYPE_CHECKING:
    from llmc.chat import Chat
    from llmc.choice import Sampling
    from llmc.datasets import Prepared
    from llmc.sampling import Speed
    from llmc.training import TrainConfig

STORIES_FOLDER = "runs/stories"  # where the recipe `stories` leaves its model


# ---- options ---------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option of `train`: its name is a field of TrainConfig, its short form llm.c's."""

    field: str
    short: str
    kind: type
    metavar: str
    help: str
    choices: tuple[Any, ...] = ()


MODEL_AND_DATA = (
    Option("init", "e", str, "MODEL", "model .bin, Hugging Face folder or name, preset, d12 (stories)"),
    Option("train_data", "i", str, "FILES", "token files to train on: a name or a quoted pattern"),
    Option("val_data", "j", str, "FILES", "token files to validate on"),
    Option("shuffle", "", int, "0|1", "take the training data in an order drawn from the seed (0)", (0, 1)),
    Option("out", "o", str, "DIR", "folder for the model, run.toml and metrics.jsonl (nothing is written)"),
)
BATCHES = (
    Option("batch_size", "b", int, "N", "sequences per forward pass (4)"),
    Option("sequence_length", "t", int, "N", "tokens per sequence (64)"),
    Option("total_batch", "d", int, "N", "tokens per update, by accumulation; 0: batch size times sequence length (0)"),
    Option("steps", "x", int, "N", "updates; -1: once through the training data (100)"),
    Option("overfit", "a", int, "0|1", "the first batch again and again (0)", (0, 1)),
    Option("recompute", "r", str, "NAME", "less memory, more time: none, gelu, gelu+norm or block (none)"),
)
OPTIMISER = (
    Option("lr", "l", float, "X", "largest learning rate (0.0003)"),
    Option("schedule", "k", str, "NAME", "constant, cosine, linear or wsd (constant)"),
    Option("warmup", "u", int, "N", "updates over which the learning rate rises (0)"),
    Option("final_lr_fraction", "q", float, "X", "of lr, where the schedule ends (0.0)"),
    Option("weight_decay", "c", float, "X", "on matrices alone (0.0)"),
    Option("grad_clip", "", float, "X", "largest norm of the gradient; 0: off (1.0)"),
    Option("beta1", "", float, "X", "AdamW's (0.9)"),
    Option("beta2", "", float, "X", "AdamW's (0.95)"),
    Option("eps", "", float, "X", "AdamW's (1e-08)"),
)
ADAPTERS = (
    Option("lora_rank", "", int, "N", "train low-rank adapters, and leave the weights; 0: train the weights (0)"),
    Option("lora_alpha", "", float, "X", "alpha / rank multiplies what an adapter adds (16.0)"),
    Option("lora_targets", "", str, "A,B", "modules that get one: q_proj,v_proj; all: every matrix (all)"),
)
WATCHING = (
    Option("val_every", "v", int, "N", "updates between validations; 0: never (20)"),
    Option("val_batches", "m", int, "N", "batches per validation (20)"),
    Option("sample_every", "s", int, "N", "updates between samples; 0: never (20)"),
    Option("sample_length", "g", int, "N", "tokens per sample (64)"),
)
MACHINE = (
    Option("device", "", str, "NAME", "cpu, cuda (an NVIDIA GPU), cuda:1 the second of several (cpu)"),
    Option("dtype", "", str, "NAME", "of products: fp32, bf16, on a GPU also tf32; a GPU stores bf16, too (fp32)"),
    Option("threads", "", int, "N", "CPU: 0: OMP_NUM_THREADS, else the physical cores (0)"),
    Option("isa", "", str, "NAME", "CPU: scalar, avx2, avx512, avx512bf16, amx, neon, neonbf16 (the best here)"),
    Option("gemm", "", str, "NAME", "GPU: who multiplies matrices: cublaslt, or own in fp32 and bf16 (cublaslt)"),
    Option("attention", "", str, "NAME", "GPU: own or cudnn (cudnn where it is installed)"),
    Option("seed", "", int, "N", "of initial weights, samples and shuffling (0)"),
)
MASTERS = Option(
    "masters", "", int, "0|1", "GPU, bf16: keep the weights in fp32 too; 0: round them stochastically (1)", (0, 1)
)
TRAIN_OPTIONS = (
    ("model and data", MODEL_AND_DATA),
    ("batches", BATCHES),
    ("optimiser", OPTIMISER),
    ("adapters (LoRA)", ADAPTERS),
    ("watching it", WATCHING),
    ("machine", (*MACHINE, MASTERS)),
)

TRAIN_HELP = """\
Train a model.  With no options at all it trains a small one on stories that the package writes itself,
in two to four minutes on two cores, and leaves it in runs/stories.

Options come from the command line, else from --config, else from the defaults in brackets.  The embedded
stories (no --config, no --train-data, and the model `stories`) start from the recipe of that name instead.
An interval of N means: whenever the number of updates done is a multiple of N."""


DATA_HELP = """\
Make token files of a text.

  llmc data tinyshakespeare              Shakespeare's, a megabyte, from the network
  llmc data tinystories                  two million stories, from the network
  llmc data text FILE                    a UTF-8 text; <|endoftext|> in it divides texts
  llmc data FILE.jsonl                   documents: an object per line (also .jsonl.gz), FILE.parquet, a folder of
                                         such files
  llmc data owner/name                   documents of a dataset on the Hugging Face hub, as they stream in"""


SAMPLE_HELP = """\
Let a model write.  Several prompts are continued together, which takes hardly longer than one, and shown one after
another.  On a CPU --dtype bf16 keeps the matrices in bfloat16: half the memory, and up to twice the speed."""

CHAT_HELP = """\
Talk to a model, in the form of its folder's chat template, if there is one.  Ctrl-C ends an answer, /reset the
conversation, Ctrl-D or /exit both.  Without a terminal each line of standard input is a message."""

BENCH_HELP = """\
Measure each op, or whole training steps, on this machine.  What is compared takes turns; figures are medians with
quartiles; fractions are of a peak measured right beside each turn.  Leave the machine alone meanwhile."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="llmc", description="Train language models without PyTorch.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"llmc {__version__}")
    top.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int], summary: str, about: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=about or summary[0].upper() + summary[1:] + ".", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error came from"
        )
        return sub

    train = command("train", _train, "train a model", TRAIN_HELP)
    train.add_argument("--config", metavar="NAME|FILE", help="a recipe's name or a TOML file of these options")
    train.add_argument(
        "--profile", action="store_true", help="at the end, show where the time went, op by op, against measured peaks"
    )
    train.add_argument("--dry-run", action="store_true", help="show what memory the run would take, and do nothing")
    for title, options in TRAIN_OPTIONS:
        _add_options(train.add_argument_group(title), options)

    source = f"model .bin, Hugging Face folder or name, preset ({STORIES_FOLDER}, which `llmc train` writes)"
    sample = command("sample", _sample, "let a model write", SAMPLE_HELP)
    sample.add_argument("--model", "-e", metavar="MODEL", default=STORIES_FOLDER, help=source)
    sample.add_argument(
        "--prompt", "-p", action="append", metavar="TEXT", help="text to continue; several are read together (none)"
    )
    _add_sampling(sample, max_new_tokens=256, temperature=1.0)
    _add_options(sample, MACHINE)

    chat = command("chat", _chat, "talk to a model", CHAT_HELP)
    chat.add_argument("--model", "-e", metavar="MODEL", default=STORIES_FOLDER, help=source)
    chat.add_argument("--system", default="", metavar="TEXT", help="what the model is told first (nothing)")
    chat.add_argument(
        "--length", type=int, metavar="N", help="tokens of the conversation, for which memory is taken (up to 4096)"
    )
    _add_sampling(chat, max_new_tokens=512, temperature=0.7)
    _add_options(chat, MACHINE)

    data = command("data", _data, "prepare text for training", DATA_HELP)
    data.add_argument("dataset", metavar="DATASET", help="tinyshakespeare, tinystories, text, or documents: see above")
    data.add_argument("file", nargs="?", metavar="FILE", help="for `text`: a UTF-8 text")
    data.add_argument("--from", dest="source", metavar="FILE", help="a local copy, instead of the network")
    data.add_argument("--out", "-o", default="data", metavar="DIR", help="folder for the token files (data)")
    data.add_argument(
        "--tokenizer", default="gpt2", metavar="NAME",
        help="gpt2, bytes, a model's folder, a tokenizer.json or tokenizer.model (gpt2)",
    )  # fmt: skip
    data.add_argument(
        "--val-fraction", type=float, metavar="X", help="for text and documents: the part for validation (0.1)"
    )
    data.add_argument("--field", metavar="NAME", help="for documents: the field or column with the text (text)")
    data.add_argument("--max-documents", type=int, metavar="N", help="for documents: at most so many")
    data.add_argument("--split", metavar="NAME", help="of a dataset on the hub (train)")
    data.add_argument("--config-name", metavar="NAME", help="of a dataset on the hub: which configuration of several")
    data.add_argument("--shard-tokens", type=int, metavar="N", help="cut the output into files of N tokens")
    data.add_argument("--threads", type=int, metavar="N", help="that tokenise (as many as there are CPUs)")

    convert = command("convert", _convert, "convert between llm.c's model files and Hugging Face folders")
    convert.add_argument("source", metavar="SOURCE", help="model .bin, Hugging Face folder or name, preset")
    convert.add_argument("destination", metavar="DESTINATION", help="a name in .bin, or a folder")
    convert.add_argument(
        "--version", type=int, default=3, metavar="N", help="of the .bin: 1, 3 (fp32) or 5 (bf16) (3)"
    )
    convert.add_argument("--dtype", default="fp32", metavar="NAME", help="of a folder: fp32, bf16 or fp16 (fp32)")
    convert.add_argument(
        "--max-shard-bytes", type=int, default=5_000_000_000, metavar="N",
        help="of a folder: several files of at most N bytes, if need be (5 GB)",
    )  # fmt: skip
    convert.add_argument("--force", action="store_true", help="replace what is there")

    verify = command("verify", _verify, "compare llmc with a reference's logits, loss, gradients and updates")
    verify.add_argument("model", metavar="MODEL", help="model .bin")
    verify.add_argument("debug_state", metavar="DEBUG_STATE", help="its debug state .bin")
    verify.add_argument(
        "--json", metavar="FILE", help="the updates' recipe and losses (the debug state's name in .json)"
    )
    _add_options(verify, MACHINE[:-1])

    about = (
        "Let PyTorch overfit one batch, and write the model, its debug state (logits, loss, gradients) and the\n"
        "losses with their recipe: what `llmc verify` compares with.  Needs torch."
    )
    reference = command("reference", _reference, "let PyTorch make what verify compares with", about)
    init = MODEL_AND_DATA[0]._replace(help="model .bin, Hugging Face folder or name, preset, d12 (d12)")
    _add_options(reference, (init, MACHINE[-1]._replace(help="of random weights and ids (0)")))
    reference.add_argument("--out", "-o", required=True, metavar="DIR", help="folder for the three files")
    reference.add_argument("--tokens", "-i", metavar="FILES", help="token files for the batch (random ids)")
    for name, short, field, kind, text in (
        ("--batch-size", "-b", "B", int, "sequences (4)"),
        ("--sequence-length", "-t", "T", int, "tokens per sequence (64)"),
        ("--steps", "-x", "steps", int, "losses to record (10)"),
        ("--lr", "-l", "lr", float, "AdamW's (0.0001)"),
        ("--weight-decay", "-c", "weight_decay", float, "AdamW's (0.0)"),
        ("--beta1", "", "beta1", float, "AdamW's (0.9)"),
        ("--beta2", "", "beta2", float, "AdamW's (0.999)"),
        ("--eps", "", "eps", float, "AdamW's (1e-08)"),
        ("--decay-on", "", "decay_on", str, "2d: matrices alone; all: every tensor (2d)"),
        ("--dtype", "", "dtype", str, "float32 or float64 (float32)"),
        ("--name", "", "name", str, "the files' name (the model's)"),
        ("--version", "", "version", int, "of the .bin: 1 or 3 (3)"),
    ):
        reference.add_argument(
            *([name, short] if short else [name]), dest=field, type=kind, default=argparse.SUPPRESS, help=text,
            metavar={int: "N", float: "X", str: "NAME"}[kind],
        )  # fmt: skip
    reference.add_argument(
        "--perturbed", action="store_true", help="first give the weights large biases and outliers: a harder test"
    )

    bench = command("bench", _bench, "measure this machine's speed", BENCH_HELP)
    kinds = bench.add_subparsers(dest="kind", metavar="WHAT", required=True)
    for what, summary, warmup, repeats, seconds in (
        ("kernels", "every op on every instruction set, beside the machine's measured peaks", 1, 15, 2.0),
        ("training", "training steps: forward, backward, update, memory", 2, 15, 60.0),
    ):
        about = summary[0].upper() + summary[1:] + "."
        sub = kinds.add_parser(what, help=summary, description=about, allow_abbrev=False)
        _add_bench_options(sub, what, warmup, repeats, seconds)

    info = command("info", _info, "show version, processor, threads and optional parts")
    _add_options(info, MACHINE[:-1])

    return top


def _add_options(parser: argparse._ActionsContainer, options: Sequence[Option]) -> None:
    for option in options:
        names = [f"--{option.field.replace('_', '-')}"] + ([f"-{option.short}"] if option.short else [])
        # Options that were not given stay absent, so that a configuration file can speak.
        parser.add_argument(
            *names, dest=option.field, type=option.kind, metavar=option.metavar, help=option.help,
            choices=option.choices or None, default=argparse.SUPPRESS,
        )  # fmt: skip


def _add_sampling(sub: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """The fields of Sampling, but for the seed, and --stats."""
    for name, short, kind, value, text in (
        ("--max-new-tokens", "-n", int, max_new_tokens, "at most so many, fewer where the text ends"),
        ("--temperature", "", float, temperature, "0: always the likeliest"),
        ("--top-k", "", int, 0, "choose among the N likeliest; 0: among all"),
        ("--top-p", "", float, 1.0, "among the likeliest that have this probability together; 1: all"),
        ("--min-p", "", float, 0.0, "among those that have this part of the likeliest's probability; 0: all"),
        ("--repetition-penalty", "", float, 1.0, "logits of what was there already are divided by it; 1: none"),
    ):
        sub.add_argument(
            *([name, short] if short else [name]), type=kind, default=value, help=f"{text} ({value})",
            metavar={int: "N", float: "X"}[kind],
        )  # fmt: skip
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    sub.add_argument(
        "--stats", action="store_true", help="tokens per second on stderr, and the part of the memory's bandwidth"
    )


def _add_bench_options(sub: argparse.ArgumentParser, kind: str, warmup: int, repeats: int, seconds: float) -> None:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    what = "an op on an instruction set" if kind == "kernels" else "a configuration"
    first = "calls before each turn" if kind == "kernels" else "steps before those that count"
    sub.add_argument("--init", "-e", default="d12", metavar="MODEL", help="the preset that gives the shapes (d12)")
    sub.add_argument("--batch-size", "-B", "-b", type=numbers, default=(4,), metavar="N,N", help="sequences (4)")
    sub.add_argument(
        "--sequence-length", "-T", "-t", type=numbers, default=(64,), metavar="N,N", help="tokens each (64)"
    )
    sub.add_argument(
        "--device", default="cpu", metavar="NAME",
        help=f"cuda, cuda:1 ...: {'measure a GPU beside the CPU' if kind == 'kernels' else 'train on a GPU'} (cpu)",
    )  # fmt: skip
    sub.add_argument(
        "--dtype", type=names, default=("fp32",), metavar="A,B", help="fp32, bf16, on a GPU also tf32 (fp32)"
    )
    sub.add_argument(
        "--isas", type=names, default=(), metavar="A,B",
        help="instruction sets, with --device cuda also `cuda`: alone, without the CPU (all that there are)"
        if kind == "kernels"
        else "instruction sets of the CPU (LLMC_ISA, else the best here)",
    )  # fmt: skip
    if kind == "kernels":
        sub.add_argument("--only", default="", metavar="A,B", help="ops whose name holds A or B")
    sub.add_argument("--threads", type=int, metavar="N", help="(OMP_NUM_THREADS, else the physical cores)")
    sub.add_argument("--warmup", type=int, default=warmup, metavar="N", help=f"{first} ({warmup})")
    sub.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"turns ({repeats})")
    sub.add_argument(
        "--seconds", type=float, default=seconds, metavar="X",
        help=f"after which {what} has no more turns; one at least ({seconds:g})",
    )  # fmt: skip
    sub.add_argument("--output", "-o", choices=("md", "csv", "json"), default="md", help="format (md)")
    sub.add_argument("--plot", metavar="FILE.png", help="a picture too (needs matplotlib)")
    sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error came from")


# ---- train -----------------------------------------------------------------------------------------


class _Interrupt:
    """The first Ctrl-C asks the run to end after its step and save; a second one ends it at once.

    Until `arm` is called there is nothing worth saving, and Ctrl-C works as ever.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def requested(self) -> bool:
        return self.asked

    def arm(self) -> None:
        here = threading.current_thread() is threading.main_thread()
        # A process that was told to ignore Ctrl-C (nohup, a shell's background job) goes on doing so.
        if self._before is None and here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._before)
        self.asked = True
        os.write(2, b"\nllmc: stopping after this step (Ctrl-C again: at once, without saving)\n")

    def __enter__(self) -> _Interrupt:
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _train(args: argparse.Namespace) -> int:
    from llmc import recipes, training

    types = training.TrainConfig.types()
    flags = {name: value for name, value in vars(args).items() if name in types}
    base: dict[str, Any] = {}
    if args.config is not None:
        base = recipes.load(args.config, types)
    elif "train_data" not in flags and flags.get("init", "stories") == "stories":
        base = recipes.load("stories", types)
    config = training.TrainConfig(**{**base, **flags})
    if args.dry_run:
        return _dry_run(config, args.profile)

    with display.Display(config, sys.stdout) as shown, _Interrupt() as interrupt:
        held = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
        if config.out and any(os.path.exists(os.path.join(config.out, name)) for name in held):
            shown.line(f"{config.out} holds a model already, which this run's will replace when it ends\n")
        for event in training.train(config, stop=interrupt.requested, profile=args.profile):
            shown.show(event)
            if isinstance(event, training.Step):
                interrupt.arm()
        if interrupt.asked:
            shown.line(f"stopped after {shown.done} of {shown.steps} updates")
            return 130
        shown.line(f"{shown.done} updates in {shown.elapsed()}")
        if config.out:
            shown.line(f"to see it write: llmc sample --model {config.out}")
        else:
            shown.line("the model was not saved: --out DIR would")
    return 0


def _dry_run(config: TrainConfig, profile: bool) -> int:
    from llmc import training

    display.print_memory(sys.stdout, training.memory_plan(config, profile), training.memory_of(config))
    training.require_memory(config, profile=profile)
    return 0


# ---- sample ----------------------------------------------------------------------------------------


def _sample(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from llmc import sampling

    settings = _sampling(args)
    model, tokenizer = _writer(args)
    prompts = args.prompt or [""]
    bos = [tokenizer.special.bos] if tokenizer.add_bos else []
    ids = [[*bos, *tokenizer.encode(prompt)] for prompt in prompts]
    settings = replace(settings, stop_ids=tokenizer.special.eos)
    window = model.config.max_seq_len
    for tokens in ids:
        if len(tokens) > window:
            print(f"llmc: of {len(tokens)} tokens of a prompt the model sees the last {window}", file=sys.stderr)
    speed = sampling.Speed()
    pieces = sampling.write(model, ids, settings, tokenizer, speed=speed)
    display.write_stream(sys.stdout, display.in_order(prompts, pieces))
    _show_speed(args, model.ops, speed)
    return 0


def _sampling(args: argparse.Namespace) -> Sampling:
    from llmc.choice import Sampling

    return Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
        getattr(args, "seed", 0), args.stop,
    )  # fmt: skip


def _writer(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model that --model names, not to be trained, and its tokenizer."""
    if args.model == STORIES_FOLDER and not os.path.isdir(args.model):
        raise ConfigError("model", f"{STORIES_FOLDER} is not there; `llmc train` makes it, or name another by --model")
    from llmc import loading

    machine = _machine(args)
    narrow = machine.get("dtype") == "bf16"
    model = loading.load(args.model, seed=getattr(args, "seed", 0), masters=False, narrow=narrow, **machine)
    return model, loading.require_tokenizer(model)


def _show_speed(args: argparse.Namespace, ops: Any, speed: Speed) -> None:
    if args.stats or sys.stderr.isatty():
        from llmc import profiling

        print(display.speed_line(speed, profiling.read_bandwidth(ops)), file=sys.stderr, flush=True)


# ---- chat ------------------------------------------------------------------------------------------


def _chat(args: argparse.Namespace) -> int:
    from llmc import chat, chat_template, loading

    settings = _sampling(args)
    model, tokenizer = _writer(args)
    folder = loading.text_folder(args.model)
    template = None if folder is None else chat_template.load(folder)
    talk = chat.Chat(model, tokenizer, template, system=args.system, sampling=settings, length=args.length)
    terminal = sys.stdin.isatty()
    if terminal and template is None:
        print("(the model has no chat template: it continues a dialogue between User and Assistant)", file=sys.stderr)
    for line in _lines(terminal):
        if line == "/exit":
            break
        if line == "/reset":
            talk.reset()
        elif line:
            _answer(args, talk, model.ops, line)
    return 0


def _lines(terminal: bool) -> Iterator[str]:
    """What the user says, line by line, until there is no more."""
    if not terminal:
        for line in sys.stdin:
            yield line.strip()
        return
    try:
        import readline  # noqa: F401  input() edits lines with it
    except ImportError:
        pass
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # the line is taken back
            print()


def _answer(args: argparse.Namespace, talk: Chat, ops: Any, line: str) -> None:
    """Show the answer to a line.  At a terminal Ctrl-C ends it, and an error the talk does not."""
    terminal = sys.stdin.isatty()
    try:
        pieces = talk.answer(line)
        if talk.dropped:
            turns = "turn was" if talk.dropped == 1 else f"{talk.dropped} turns were"
            print(f"llmc: the conversation is too long: its oldest {turns} forgotten", file=sys.stderr)
        with contextlib.closing(pieces):
            display.write_stream(sys.stdout, pieces)
        _show_speed(args, ops, talk.speed)
    except KeyboardInterrupt:
        if not terminal:
            raise
        print()
    except LlmcError as error:
        if not terminal:
            raise
        print(f"llmc: error: {_message(error)}", file=sys.stderr)


# ---- data, convert ---------------------------------------------------------------------------------


def _data(args: argparse.Namespace) -> int:
    from llmc import datasets, documents

    known = args.dataset in ("tinyshakespeare", "tinystories", "text")
    if not known and not documents.is_source(args.dataset):
        hint = f" (a text? llmc data text {args.dataset})" if os.path.isfile(args.dataset) else ""
        what = "tinyshakespeare, tinystories, text, .jsonl, .parquet, a folder, or owner/name on the hub"
        raise ConfigError("dataset", f"{args.dataset!r} is none of {what}{hint}")
    if args.file is not None and (args.dataset != "text" or args.source is not None):
        raise ConfigError("file", f"{args.file!r} is one too many: --from names a local copy of {args.dataset}")
    if not known and args.source is not None:
        raise ConfigError("from", f"{args.source!r} is one too many: name it in place of {args.dataset}")
    source = args.file or args.source
    of_documents = {name: getattr(args, name) for name in ("field", "max_documents", "split", "config_name")}
    of_documents = {name: value for name, value in of_documents.items() if value is not None}
    for name, value in of_documents.items():
        if known:
            raise ConfigError(name, f"{value!r} is for documents; {args.dataset} has none")
    if args.val_fraction is not None and args.dataset in ("tinyshakespeare", "tinystories"):
        raise ConfigError("val_fraction", f"{args.dataset} has a validation part of its own")
    options = {"tokenizer": args.tokenizer}
    if args.dataset != "tinyshakespeare":
        options.update(shard_tokens=args.shard_tokens, threads=args.threads)
    elif args.shard_tokens is not None:
        raise ConfigError("shard_tokens", "tinyshakespeare is too small to be cut up")
    if args.val_fraction is not None:
        options.update(val_fraction=args.val_fraction)
    with display.Transfer(sys.stdout) as shown:
        options.update(progress=shown.progress, stage=shown.stage)
        if args.dataset == "tinyshakespeare":
            made = datasets.prepare_tinyshakespeare(args.out, source, **options)
        elif args.dataset == "tinystories":
            made = datasets.prepare_tinystories(args.out, source, **options)
        elif args.dataset == "text":
            if source is None:
                raise ConfigError("file", "which text? llmc data text FILE")
            made = datasets.prepare_text(source, args.out, **options)
        else:
            made = datasets.prepare_documents(args.dataset, args.out, **of_documents, **options)
    _report(made)
    return 0


def _report(made: Prepared) -> None:
    def name(paths: Sequence[os.PathLike[str]]) -> str:
        first = os.fspath(paths[0])
        return first if len(paths) == 1 else first.replace("_000000.", "_*.")

    print(f"train  {made.train_tokens:>13,} tokens  {name(made.train)}")
    example = f"llmc train --train-data '{name(made.train)}'"
    if made.val:
        print(f"val    {made.val_tokens:>13,} tokens  {name(made.val)}")
        example += f" --val-data '{name(made.val)}'"
    init = {"gpt2": "d12", "bytes": "stories"}.get(made.tokenizer)
    if init is None and os.path.exists(os.path.join(made.tokenizer, "config.json")):
        init = f"'{made.tokenizer}'"
    rest = init or f"MODEL, of a vocabulary of {made.vocab_size:,} or more"
    print(f"to train on it: {example} --init {rest}")


def _convert(args: argparse.Namespace) -> int:
    from llmc import convert

    made = convert.convert(
        args.source, args.destination, version=args.version, dtype=args.dtype, max_shard_bytes=args.max_shard_bytes,
        force=args.force,
    )  # fmt: skip
    print(f"wrote {made}")
    return 0


# ---- verify, info ----------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    from llmc import verify

    report = verify.verify(args.model, args.debug_state, json=args.json, **_machine(args))
    verify.print_report(report, sys.stdout)
    return 0 if report.okay else 1


def _reference(args: argparse.Namespace) -> int:
    from llmc import torch_reference

    def on_step(step: int, loss: float) -> None:
        print(f"step {step}: loss {loss:.6f}", flush=True)

    chosen = {name: value for name, value in vars(args).items() if name not in REFERENCE_OWN}
    written = torch_reference.run(getattr(args, "init", "d12"), args.out, on_step=on_step, **chosen)
    for path in (written.model, written.debug_state, written.recipe):
        print(f"wrote {path}")
    print(f"to compare: llmc verify {written.model} {written.debug_state}")
    return 0


# What a `reference` command line holds besides the arguments of `torch_reference.run`.
REFERENCE_OWN = {"command", "run", "debug", "init", "out"}


def _bench(args: argparse.Namespace) -> int:
    from llmc import benchmark, machine, ops, results

    settings = benchmark.Settings(
        init=args.init, batch_sizes=args.batch_size, sequence_lengths=args.sequence_length, dtypes=args.dtype,
        device=args.device, isas=args.isas, only=getattr(args, "only", ""), threads=args.threads,
        warmup=args.warmup, repeats=args.repeats, seconds=args.seconds,
    )  # fmt: skip
    if args.plot:
        results.check_plot(args.plot)
    facts = machine.facts(ops.load("cpu", threads=settings.threads).info())
    if settings.gpu:
        facts |= benchmark.gpu_facts(settings.device, settings.dtypes)

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(text, file=sys.stderr)

    rows = benchmark.kernels(settings, progress) if args.kind == "kernels" else benchmark.training(settings, progress)
    if not rows:
        raise ConfigError("only", f"no op's name holds {args.only!r}")
    facts["instruction set"] = ", ".join(dict.fromkeys(row.isa for row in rows))
    if settings.gpu and args.kind == "kernels":
        facts["attention"] = benchmark.kernels_attention([row.isa for row in rows])
    print(results.write(rows, facts, args.output))
    if args.plot:
        results.plot(rows, facts, args.plot)
    return 0


def _info(args: argparse.Namespace) -> int:
    display.print_info(sys.stdout, **_machine(args))
    return 0


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """The options of MACHINE but for the seed, as far as they were given; 0 and "" mean the default."""
    names = [option.field for option in MACHINE if option.field != "seed"]
    return {name: vars(args)[name] for name in names if vars(args).get(name)}


# ---- main ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argparse exits by itself with 2."""
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model may write what the terminal's encoding has no sign for
            stream.reconfigure(errors="backslashreplace")
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read us has gone; so that Python does not complain at exit, stdout now leads nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("\nllmc: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if args.debug:
            raise
        print(f"llmc: error: {_message(error)}", file=sys.stderr)
        return 1


def _message(error: BaseException) -> str:
    if isinstance(error, LlmcError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = f"out of memory: {error}" if str(error) else "out of memory"
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}"
    else:
        text = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
    return display.printable(" ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
