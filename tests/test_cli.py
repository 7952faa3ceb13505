"""The command line: what it takes, what it says, how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference

from llmc import __main__, display, loading, memory, recipes, sampling, training
from llmc.__main__ import main
from llmc.arena import table_nbytes
from llmc.data import write_shard
from llmc.gpt2 import Config
from llmc.training import TrainConfig

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def on_numpy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Commands run over the NumPy reference, in an empty folder, and the embedded model is a tiny one."""
    monkeypatch.setattr("llmc.ops.load", lambda *a, **k: reference)
    monkeypatch.setitem(loading.PRESETS, "stories", Config(16, 257, 1, 1, 8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


FEW = "-b 2 -t 16 -x 4 -v 2 -m 1 -s 4 -g 8"


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line."""
    try:
        status = main(shlex.split(words))
    except SystemExit as error:  # argparse
        status = error.code if isinstance(error.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, err


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options
    )


# ---- help ------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_no_numpy() -> None:
    """Under 0.2 s of processor time, which unlike the clock does not ask what else the machine is doing."""
    program = "import sys; from llmc.__main__ import main\ntry: main(['train', '--help'])\nfinally: print(*sys.modules)"
    took = []
    for _ in range(3):
        began = os.times()
        done = python("-c", program)
        ended = os.times()
        took.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
    assert "--train-data FILES, -i FILES" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "llmc.__main__" in loaded and not loaded & {"numpy", "rich", "llmc.training", "llmc._cpu"}
    if os.environ.get("LLMC_TEST_LIGHT", "0") in ("", "0"):  # not under an emulator
        assert min(took) < 0.2


def test_every_field_is_an_option_and_its_default_is_told() -> None:
    options = {option.field: option for _, group in __main__.TRAIN_OPTIONS for option in group}
    types = TrainConfig.types()
    assert set(options) == set(types)
    defaults = TrainConfig()
    for field, option in options.items():
        assert option.kind is (int if types[field] is bool else types[field])
        value = getattr(defaults, field)
        if value != "":
            assert option.help.endswith(f"({int(value) if isinstance(value, bool) else value})"), field


def test_short_options_are_llmcs() -> None:
    shorts = {option.short: option.field for _, group in __main__.TRAIN_OPTIONS for option in group if option.short}
    assert shorts == {
        "e": "init", "i": "train_data", "j": "val_data", "o": "out", "b": "batch_size", "t": "sequence_length",
        "d": "total_batch", "x": "steps", "l": "lr", "k": "schedule", "u": "warmup", "q": "final_lr_fraction",
        "c": "weight_decay", "v": "val_every", "m": "val_batches", "s": "sample_every", "g": "sample_length",
        "a": "overfit", "r": "recompute",
    }  # fmt: skip


@pytest.mark.parametrize("words", ["", "train --no-such-flag", "train --steps ten", "train --overfit 2", "fly"])
def test_usage_errors(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(words, capsys)
    assert status == 2 and "error: " in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from llmc import __version__

    assert run("--version", capsys) == (0, f"llmc {__version__}\n", "")


# ---- where options come from -----------------------------------------------------------------------


def configured(words: str, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The configuration that a `train` command line amounts to."""
    seen: list[TrainConfig] = []

    def note(config: TrainConfig, **options: object) -> Iterator[training.Event]:
        seen.append(config)
        return iter(())

    monkeypatch.setattr(training, "train", note)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(shlex.split(words)) == 0
    return seen[0]


def test_flags_win_over_the_file_over_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('init = "d4"\nlr = 1\nval-every = 7\nbatch_size = 9\noverfit = true\n')
    config = configured(f"train --config {file} -b 3 --threads 8", monkeypatch)
    assert (config.init, config.lr, config.val_every, config.overfit) == ("d4", 1.0, 7, True)
    assert (config.batch_size, config.threads) == (3, 8)
    assert config.sequence_length == TrainConfig().sequence_length


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train", {}),
        ("train --threads 8 --steps 5", {"threads": 8, "steps": 5}),
        ("train --init stories --lr 1", {"lr": 1.0}),
    ],
)
def test_the_embedded_run(words: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(words, monkeypatch) == TrainConfig.recipe("stories", **expected)


@pytest.mark.parametrize("words", ["train -i 'x*.bin'", "train -e d12"])
def test_other_models_and_data_start_from_the_defaults(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(words, monkeypatch)
    assert config.lr == TrainConfig().lr and config.out == ""


def test_recipes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"llmc-cpu", "stories"} <= set(recipes.names())
    for name in recipes.names():
        assert configured(f"train --config {name}", monkeypatch) == TrainConfig.recipe(name)
    assert configured("train --config llmc-cpu -e d12", monkeypatch).init == "d12"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz = 3", "mine.toml: stepz: there is no such option; there are init, "),
        ('steps = "3"', "mine.toml: steps: must be a whole number, got '3'"),
        ("steps = 3.5", "mine.toml: steps: must be a whole number, got 3.5"),
        ("steps = true", "mine.toml: steps: must be a whole number, got True"),
        ("[steps]\na = 1", "mine.toml: steps: must be a whole number"),
        ("steps = ", "mine.toml is not TOML: "),
        ("\xff", "cannot read "),
    ],
)
def test_configurations_that_cannot_be_used(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content.encode("latin-1"))
    status, out, err = run(f"train --config {file}", capsys)
    assert (status, out) == (1, "")
    assert message in err and err.count("\n") == 1


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("train --config llm-cpu", capsys)
    assert status == 1
    assert "config: 'llm-cpu' is neither a file nor a recipe; recipes are " in err and "llmc-cpu" in err


def test_toml_is_read_back_as_it_was(tmp_path: Path) -> None:
    """Also text that is awkward in TOML."""
    values = {"a": 'C:\\x "y"\n\t\x01\x7f é 🙂', "b": True, "c": -1, "d": 1e-08, "e": 3.0, "f": ""}
    recipes.write(tmp_path / "x.toml", values)
    assert recipes.load(tmp_path / "x.toml") == values
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


# ---- train, then sample ----------------------------------------------------------------------------


def test_from_an_empty_folder_to_a_sample(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(f"train {FEW}", capsys)
    assert (status, err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if re.match(r"(num_|max_|vocab)\w+ ", line))
    assert facts["num_layers"] == "1" and facts["num_parameters"] == "3,072" and "num_activations" in facts
    steps = re.findall(r"^step (\d+): train loss (\d+\.\d{6}) \(took \d+\.\d ms\)$", out, re.M)
    assert [int(step) for step, _ in steps] == [0, 1, 2, 3]
    found = re.findall(r"^val loss (\S+) nats per byte; a perfect model would get (\S+); gap (\S+)$", out, re.M)
    assert len(found) == 3
    for loss, floor, gap in found:
        assert float(loss) - float(floor) == pytest.approx(float(gap), abs=2e-4)
    assert out.count("generated text:") == 1
    assert "llmc sample --model runs/stories" in out
    rows = [json.loads(line) for line in Path("runs/stories/metrics.jsonl").read_text().splitlines()]
    assert [f"{row['loss']:.6f}" for row in rows if "loss" in row] == [loss for _, loss in steps]

    status, first, err = run("sample --prompt 'Once upon' -n 12 --seed 3", capsys)
    assert (status, err) == (0, "") and first.startswith("Once upon")
    assert run("sample --prompt 'Once upon' -n 12 --seed 3", capsys)[1] == first
    assert run("sample --prompt 'Once upon' -n 12 --seed 4", capsys)[1] != first

    again = run(f"train {FEW} --config runs/stories/run.toml", capsys)
    assert "holds a model already" in again[1]
    repeated = re.findall(r"^step (\d+): train loss (\d+\.\d{6}) ", again[1], re.M)
    assert repeated == steps


def test_a_run_that_is_not_saved_says_so(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(f"train {FEW} --out ''", capsys)
    assert status == 0 and "not saved" in out and list(on_numpy.iterdir()) == []


def test_several_prompts(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another, each as if it were alone; greedy, so that the place in the batch does not matter."""
    words = "sample -e stories -n 5 --temperature 0 --stop never"
    alone = [run(f"{words} -p {prompt}", capsys)[1].rstrip("\n") for prompt in ("abc", "d")]
    status, out, err = run(f"{words} -p abc --prompt d", capsys)
    assert (status, err) == (0, "")
    assert out == f"--- 1 of 2 ---\n{alone[0]}\n\n--- 2 of 2 ---\n{alone[1]}\n"


def test_what_is_chosen_from(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option arrives; one token to choose from is the greedy one."""
    greedy = run("sample -e stories -n 9 --temperature 0", capsys)[1]
    for option in ("--top-k 1", "--top-p 1e-9", "--min-p 1", "--temperature 1e-9"):
        assert run(f"sample -e stories -n 9 {option}", capsys)[1] == greedy
    assert run("sample -e stories -n 9", capsys)[1] != greedy
    assert run("sample -e stories -n 40 --temperature 0 --repetition-penalty 99", capsys)[1] != greedy
    first = greedy.strip("\n")[0]
    assert run(f"sample -e stories -n 9 --temperature 0 --stop x --stop '{first}'", capsys)[1] == "\n"


def test_speed(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run("sample -e stories -n 5 -p ab --stats", capsys)
    assert status == 0 and out.startswith("ab")
    assert re.fullmatch(r"prompt 3 tokens in \d+\.\d\d s; 5 tokens, \d+\.\d tokens/s, \d+\.\d GB/s\n", err)
    speed = sampling.Speed(12, 0.049, 64, 63, 63 / 92.1, round(23e9 * 63 / 92.1))
    told = "prompt 12 tokens in 0.05 s; 64 tokens, 92.1 tokens/s, 23.0 GB/s of 33.5 (69 %)"
    assert display.speed_line(speed, 33.5e9) == told
    assert display.speed_line(sampling.Speed(1, 0.1, 1), 1e9) == "prompt 1 token in 0.10 s; 1 token"


def test_bf16_on_a_cpu_keeps_the_matrices_in_bf16(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda *a, **k: seen.append(load(*a, **k)) or seen[-1])
    for words in ("sample -e tiny -n 1", "sample -e tiny -n 1 --dtype bf16"):
        assert main([*shlex.split(words), "--threads", "1"]) == 0
    assert [model.weights.wte.dtype.name for model in seen] == ["float32", "bfloat16"]


# ---- chat ------------------------------------------------------------------------------------------


def test_chat_through_a_pipe(
    on_numpy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message a line; the same after a reset has the same answer if nothing is random; /exit leaves the rest."""
    monkeypatch.setitem(loading.PRESETS, "stories", Config(200, 257, 1, 1, 8))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n  /reset \nhi\nagain\n/exit\nnever\n"))
    status, out, err = run("chat -e stories -n 9 --temperature 0 --system kind --length 100", capsys)
    assert status == 0
    answers = out.encode().split(b"\n")
    assert len(answers) == 4 and answers[0] == answers[1] != b""
    assert err == "llmc: the conversation is too long: its oldest turn was forgotten\n" * err.count("\n")


def test_a_long_chat_says_what_it_forgets(
    on_numpy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(loading.PRESETS, "stories", Config(200, 257, 1, 1, 8))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'a' * 30}\n{'b' * 30}\n{'c' * 100}\n"))
    status, _, err = run("chat -e stories -n 9 --temperature 0 --length 90", capsys)
    forgotten, error = err.splitlines()
    assert status == 1 and forgotten == "llmc: the conversation is too long: its oldest turn was forgotten"
    assert error.startswith("llmc: error: message: with 118 tokens it does not fit into a conversation of 90")


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_chat_at_a_terminal(
    on_numpy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C takes a line back or ends an answer, an error ends nothing, Ctrl-D does."""
    from llmc.chat import Chat

    said: list[str] = []

    def answer(self: Chat, text: str) -> Iterator[str]:
        if text == "long":
            raise training.ConfigError("message", "too long")
        said.append(text)
        return pieces()

    def pieces() -> Iterator[str]:
        yield "so"
        os.kill(os.getpid(), signal.SIGINT)
        yield " not shown"

    lines: list[str | type[BaseException]] = ["one", KeyboardInterrupt, "long", "two", EOFError]

    def typed(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(Chat, "answer", answer)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", Keyboard())
    status, out, err = run("chat -e stories", capsys)
    assert (status, said, lines) == (0, ["one", "two"], [])
    assert out == "so\n\nso\n\n" and "not shown" not in out
    assert err.splitlines()[1:] == ["llmc: error: message: too long"] and "no chat template" in err


def test_sample_without_a_model(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("sample", capsys)
    assert status == 1 and err.startswith("llmc: error: model: runs/stories is not there; `llmc train` makes it")


def test_prepared_text(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data text`, then the command it recommends."""
    Path("my text.txt").write_text("What a day.\n" * 200)
    status, out, err = run("data text 'my text.txt' --tokenizer bytes --val-fraction 0.2", capsys)
    assert (status, err) == (0, "")
    assert re.search(r"train +1,9\d\d tokens  data/my text_train\.bin\nval +4\d\d tokens  data/my text_val\.bin", out)
    command = out.split("to train on it: llmc ")[1]
    status, out, _ = run(f"{command.strip()} {FEW}", capsys)
    assert status == 0 and "val loss" in out and "perfect" not in out


# ---- memory ----------------------------------------------------------------------------------------


def test_dry_run(on_numpy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part in bytes and MiB, their sum, and the machine; nothing is allocated or written."""
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(memory, "machine", lambda: memory.Machine(1 << 30, 1 << 28, 1 << 29))
    status, out, err = run(f"train {FEW} --dry-run", capsys)
    assert (status, err) == (0, "") and list(on_numpy.iterdir()) == []
    rows = re.findall(r"^(\S.*?)  +([\d,]+) +([\d,.]+) MiB(?:  .*)?$", out, re.M)
    sizes = {name: int(size.replace(",", "")) for name, size, _ in rows}
    names = list(sizes)
    assert names[:4] == ["parameters", "gradients", "AdamW m", "AdamW v"]
    assert names[-4:] == ["total", "machine", "control group", "available now"]
    assert sizes["parameters"] == table_nbytes(Config(16, 257, 1, 1, 8).parameter_rows())
    assert sum(sizes[name] for name in names[:-4]) == sizes["total"]
    assert [sizes[name] for name in names[-3:]] == [1 << 30, 1 << 29, 1 << 28]
    assert all(mib.replace(",", "") == f"{sizes[name] / 2**20:.1f}" for name, _, mib in rows)


def test_a_machine_that_is_too_small(
    on_numpy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dry run shows why, the run refuses; both say what would fit, which then runs."""
    monkeypatch.setattr(memory, "machine", lambda: memory.Machine(1 << 30, 200_000))
    status, out, err = run(f"train {FEW} -b 24 --dry-run", capsys)
    message = r"llmc: error: memory: the run needs 0\.\d MiB and 0\.2 MiB are available .* batch_size (\d+)\n"
    assert status == 1 and "total " in out and re.fullmatch(message, err)
    again = run(f"train {FEW} -b 24", capsys)
    assert again == (1, "", err) and list(on_numpy.iterdir()) == []
    found = re.fullmatch(message, err)
    assert found is not None
    assert run(f"train {FEW} -b {found[1]}", capsys)[0] == 0
    assert run(f"train {FEW} -b {int(found[1]) + 1}", capsys)[0] == 1


# ---- errors ----------------------------------------------------------------------------------------


def test_errors_are_one_line(on_numpy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard("gpt2.bin", [50256] * 100, vocab_size=50257)
    Path("broken.bin").write_bytes(b"\0\1\2\3" * 300)
    for words, message in (
        ("train -e d0", "preset: 'd0' is unknown"),
        ("train -e nonsense -i gpt2.bin", "init: 'nonsense' is no file, no folder and no known name"),
        ("train -e stories -i gpt2.bin -t 8", "gpt2.bin: token 0: id 50256 is not in a vocabulary of 257"),
        ("train -e stories -i broken.bin -t 8", "broken.bin: magic: 50462976"),
        ("train -e stories -i none.bin", "train_data: no file matches 'none.bin'; `llmc data tinyshakespeare`"),
        ("train -t 17", "sequence length: 17 exceeds the model's 16"),
        ("train --out gpt2.bin", "out: gpt2.bin: "),
        ("train --dtype fp16", "dtype: 'fp16' is unknown; choose from fp32, tf32, bf16"),
        ("train --recompute 1", "recompute: '1' is unknown; choose from none, gelu, gelu+norm, block"),
        ("train --schedule x", "schedule: 'x' is unknown; choose from constant, cosine, linear, wsd"),
        ("sample -e stories --temperature -1", "temperature: must be a number from 0 up"),
        ("sample -e stories --top-p 2", "top_p: must be above 0 and at most 1, got 2.0"),
        ("sample -e stories --stop ''", "stop: an empty string would end every text"),
        ("chat -e stories --length 17", "length: must be from 2 to the model's 16, got 17"),
        ("data text", "file: which text?"),
        ("data tinyshakespeare x.txt", "file: 'x.txt' is one too many"),
        ("data text none.txt --tokenizer bytes", "source: cannot read none.txt: No such file or directory"),
        ("convert none.bin x.bin", "none.bin: file: does not exist"),
        ("verify none.bin none.bin", "none.bin"),
    ):
        status, out, err = run(words, capsys)
        assert (status, out) == (1, ""), words
        assert err.startswith("llmc: error: ") and message in err and err.count("\n") == 1, (words, err)
        assert "Traceback" not in err and "internal" not in err


def test_device(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("tpu", "cpu:1", "cuda:x", "cuda:-1", "cuda:"):
        status, _, err = run(f"train --device {device}", capsys)
        told = f"llmc: error: device: '{device}' is not available; choose from cpu, cuda, cuda:1 ...\n"
        assert (status, err) == (1, told)
    status, _, err = run("train --device cpu --gemm own", capsys)
    assert (status, err) == (1, "llmc: error: gemm: 'own' means nothing on the device 'cpu': leave it out\n")
    status, _, err = run("train --masters 0 --dtype bf16", capsys)
    assert status == 1 and err.startswith("llmc: error: masters: 0 is for bf16 on a GPU")


def test_debug_shows_where(on_numpy: Path) -> None:
    with pytest.raises(training.ConfigError):
        main(["--debug", "train", "-t", "17"])
    with pytest.raises(training.ConfigError):
        main(["train", "-t", "17", "--debug"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "x/metrics.jsonl"), "x/metrics.jsonl: No space left on device"),
        (MemoryError("cannot allocate 5 bytes"), "out of memory: cannot allocate 5 bytes"),
        (ValueError("x:\n wrong \x1b[2J"), "internal error: ValueError: x: wrong \\x1b[2J (--debug shows where)"),
    ],
)
def test_unexpected_errors(
    error: Exception, message: str, on_numpy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(training, "train", fail)
    assert run("train", capsys) == (1, "", f"llmc: error: {message}\n")


# ---- interruptions ---------------------------------------------------------------------------------


def interrupt_at(step: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, `times` times, during update number `step`."""
    real = training._update

    def update(*arguments: Any) -> training.Step:
        done = real(*arguments)
        if done.step == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(training, "_update", update)


def test_the_first_interrupt_saves(
    on_numpy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(2, 1, monkeypatch)
    status, out, _ = run(f"train {FEW} -x 9", capsys)
    assert status == 130
    assert "stopped after 3 of 9 updates" in out and "saved in runs/stories" in out
    assert Path("runs/stories/model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("step", "times"), [(0, 1), (2, 2)])
def test_other_interrupts_end_at_once(
    step: int, times: int, on_numpy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before there is anything to save, and when asked twice; what was measured by then is on disk."""
    interrupt_at(step, times, monkeypatch)
    status, _, err = run(f"train {FEW} -x 9", capsys)
    assert (status, err.strip()) == (130, "llmc: interrupted")
    assert not Path("runs/stories/model.safetensors").exists()
    rows = [json.loads(line) for line in Path("runs/stories/metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "loss" in row]) == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_goes_away() -> None:
    """`llmc train --help | head -1` and the like: no complaint."""
    program = "import sys; from llmc.__main__ import main; sys.exit(main(['convert', 'a', 'b']))"
    patch = "import llmc.convert; llmc.convert.convert = lambda *a, **k: 'x' * 10**6\n"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", patch + program], env=ENVIRONMENT, stdout=closed, stderr=subprocess.PIPE,
            text=True, timeout=120,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


# ---- what is shown ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Enough of a terminal for rich."""

    def isatty(self) -> bool:
        return True


def test_one_status_line_on_a_terminal(on_numpy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.0)
    assert main(shlex.split(f"train {FEW}")) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"step 3/4 +75% \S* *loss \d\.\d{4} +\d\S* tok/s +ETA 0:00", shown)
    assert "step 3: train loss" in shown and "val loss" in shown
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor was hidden and must come back"


def test_a_dumb_terminal_gets_plain_lines(on_numpy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert main(shlex.split(f"train {FEW}")) == 0
    assert "\x1b" not in terminal.getvalue() and "step 3: train loss" in terminal.getvalue()


def test_long_runs_are_thinned(capsys: pytest.CaptureFixture[str]) -> None:
    shown = display.Display(TrainConfig(), sys.stdout)
    shown.steps = 1000
    for step in range(1000):
        shown.show(training.Step(step, 1.0, 1.0, 1.0, 0.1, 10.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 52 and lines[0].startswith("step 0:") and lines[-1].startswith("step 999:")
    assert re.fullmatch(r"first step done \d+\.\d\d s after the process started", lines[1])


def test_age_of_a_process() -> None:
    """From outside: no more than between start and end here, and no less than what it slept before it asked."""
    program = "import time; time.sleep(0.2); from llmc import display; print(display.process_age())"
    began = time.monotonic()
    age = float(subprocess.check_output([sys.executable, "-c", program]))
    tick = 0.01  # in which the kernel counts the start
    assert 0.2 - tick <= age <= time.monotonic() - began + tick


def test_age_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then since the import, which was later than the start."""
    exact = display.process_age()
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert 0 < display.process_age() <= exact + 1


def test_control_characters_are_shown_and_not_obeyed() -> None:
    text = "a\x1b[2Jb\tc\nd\x9b\u202e\x7f é🙂\r"
    assert display.printable(text) == "a\\x1b[2Jb\tc\nd\\x9b\\u202e\\x7f é🙂\\x0d"
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        display.write_stream(stream, ["\x1b", "x"])
    assert terminal.getvalue() == "\\x1bx\n"
    assert file.getvalue() == "\x1bx\n"


def test_texts_written_together_are_shown_in_order() -> None:
    """The second's pieces wait until the first is done; then it goes on as they come."""
    given = [(1, 7, "x"), (0, 7, "a"), (2, 7, "!"), (2, None, "?"), (0, None, "b"), (1, 7, "y"), (1, None, "")]
    pieces = iter([sampling.Piece(*piece) for piece in given])
    shown = display.in_order(["A", "X", "Z"], pieces)
    found = [next(shown) for _ in range(4)]
    assert found == ["--- 1 of 3 ---\nA", "a", "b", "\n\n--- 2 of 3 ---\nXx"]
    assert list(shown) == ["y", "", "\n\n--- 3 of 3 ---\nZ!?"]
    assert list(display.in_order(["A"], iter([sampling.Piece(0, 7, "a"), sampling.Piece(0, None, "")]))) == [*"Aa", ""]


@pytest.mark.parametrize(("seconds", "shown"), [(4.2, "0:04"), (65, "1:05"), (3725, "1:02:05"), (-1, "0:00")])
def test_durations(seconds: float, shown: str) -> None:
    assert display.duration(seconds) == shown


def test_info(cpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("info --threads 1", capsys)
    assert status == 0
    for what in ("llmc", "Python", "processor", "instruction set", "threads", "OpenMP", "torch", "huggingface_hub"):
        assert re.search(rf"^{what} +\S", out, re.M), what
    assert f"{cpu.info()['isa']} in use" in out


def test_as_a_module() -> None:
    assert python("-m", "llmc", "--version").stdout.startswith("llmc ")
