"""What people call a model - a file, a folder, a name - to a model with weights; and a model to a folder.

`load("d12")` is random, `load("model.bin")` reads llm.c's file, `load("folder")` a Hugging Face folder,
`load("gpt2")` and `load("owner/model")` fetch from the hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llmc import checkpoint, files, gemma, gpt2, hfconfig, hub, llama, lora, peft, safetensors_folder, tokenizer_config
from llmc import ops as contract
from llmc import tokenizer as tokenizers
from llmc.arena import Row
from llmc.checkpoint import Dimensions
from llmc.errors import ConfigError, DownloadError, FileFormatError, MissingDependencyError
from llmc.files import PathLike
from llmc.model import Config, Model
from llmc.ops import Ops

PRESETS: dict[str, Config] = {**gpt2.PRESETS, **llama.PRESETS, **gemma.PRESETS}
# As a source, a published model's name means its weights.
HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
SAME_ARCHITECTURE = {"gpt2": "d12", "gpt2-medium": "d24", "gpt2-large": "d36", "gpt2-xl": "d48"}
TOKENIZERS = {257: "bytes", 50257: "gpt2"}  # by vocabulary, where a file does not say
TOKENIZER_FILE = "tokenizer.bin"


def load(
    source: PathLike, *, device: str = "cpu", isa: str | None = None, threads: int | None = None,
    dtype: str | None = None, gemm: str | None = None, attention: str | None = None, masters: bool = True,
    narrow: bool = False, seed: int = 0, vocab_size: int | None = None, max_seq_len: int | None = None,
    ops: Ops | None = None,
) -> Model:
    """A model with weights and, in `.tokenizer`, its tokenizer (None where none is known or to be had).

    `source`, in this order:

    * a name of our own ("stories", "tiny", "d12"): random weights from `seed`.  `vocab_size` and
      `max_seq_len` replace the preset's.
    * a path to llm.c's model `.bin`, or to a Hugging Face folder (write "./stories" for a folder that is
      called like a preset).  Of a folder with adapters (PEFT's layout) the model they belong to, with them.
    * "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", or "owner/model": the weights from the hub.

    Of weights that are read, `vocab_size` must be the one asked for and `max_seq_len` at least that.
    `device`, `isa`, `threads`, `dtype`, `gemm` and `attention` are those of `ops.load`, which sets them for the whole
    process; or `ops` is a backend already set up, and they are not given.  `masters` and `narrow` are those of
    `Model`.  Raises ConfigError, FileFormatError, DownloadError, MissingDependencyError or DeviceError.
    """
    given = {"isa": isa, "threads": threads, "dtype": dtype, "gemm": gemm, "attention": attention}
    for field, value in given.items():
        if ops is not None and value is not None:
            raise ConfigError(field, f"{value!r} is given beside a backend that is set up already")
    name = os.fspath(source)
    backend = contract.load(device, **given) if ops is None else ops  # type: ignore[arg-type]
    if narrow and backend.info()["storage"] == "bfloat16":
        masters = narrow = False  # it keeps all of them so
    if is_preset(name):
        config = preset(name)
        changes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len}
        config = replace(cast(Any, config), **{field: value for field, value in changes.items() if value is not None})
        model = config.build(backend, masters=masters, narrow=narrow)
        model.initialise(seed)
        _promise_tokenizer(model, TOKENIZERS.get(config.vocab_size))
        return model
    path = locate(name)
    if path.is_dir() and peft.is_adapter(path):
        wanted, base = _read_adapters(path)
        model = load(base, masters=False, narrow=narrow, ops=backend)
        peft.read(path, lora.attach(model, wanted))
    else:
        read = _from_folder if path.is_dir() else _from_file
        model = read(path, backend, masters, narrow)
        model.source = str(path.absolute()) if Path(name).expanduser().exists() else name
        model.refresh()
    if vocab_size is not None and vocab_size != model.config.vocab_size:
        raise ConfigError("vocab_size", f"{vocab_size} asked for, {name} has {model.config.vocab_size}")
    if max_seq_len is not None and max_seq_len > model.config.max_seq_len:
        raise ConfigError("max_seq_len", f"{max_seq_len} asked for, {name} has {model.config.max_seq_len}")
    return model


def preset(name: str) -> Config:
    """The configuration called `name`, of any architecture; ConfigError lists the names otherwise."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        return gpt2.preset(name)
    except ConfigError:
        known = ", ".join(PRESETS)
        raise ConfigError("preset", f"{name!r} is unknown; choose from {known}, d1 to d12, d24, d36, d48") from None


def is_preset(name: str) -> bool:
    """Whether `name` as a source means random weights."""
    return (name in PRESETS and name not in HUB_NAMES) or re.fullmatch(r"d[0-9]+", name) is not None


def read_config(source: PathLike) -> Config:
    """The configuration of the model that `load` would give, without its weights: from the name, a `.bin`'s header
    or a folder's config.json.

    GPT-2's four published sizes need no network; of another "owner/model" the config.json alone is fetched.
    Errors as those of `load`.
    """
    name = os.fspath(source)
    if is_preset(name) or (name in HUB_NAMES and not Path(name).exists()):
        return preset(name)
    path = locate(name, weights=False)
    if path.is_dir() and peft.is_adapter(path):
        return read_config(_read_adapters(path)[1])
    if path.is_dir():
        return hfconfig.read(path)[0]
    return config_of(_read_header(path))


def read_adapters(source: PathLike) -> lora.LoRA | None:
    """The numbers of the adapters that `load` would attach, or None."""
    path = Path(source).expanduser()
    return _read_adapters(path)[0] if os.fspath(source) and path.is_dir() and peft.is_adapter(path) else None


def _read_adapters(folder: Path) -> tuple[lora.LoRA, str]:
    """Adapters' numbers and the model they belong to, which has none itself."""
    wanted, base = peft.read_config(folder)
    if os.path.isabs(base) and not os.path.exists(base):
        detail = f"{base} does not exist: it is the model that the adapters belong to; write there where it is now"
        raise FileFormatError(folder / peft.CONFIG_FILE, "base_model_name_or_path", detail)
    if peft.is_adapter(Path(base).expanduser()):
        detail = f"{base} holds adapters, not a model"
        raise FileFormatError(folder / peft.CONFIG_FILE, "base_model_name_or_path", detail)
    return wanted, base


def text_folder(source: PathLike) -> Path | None:
    """The local folder that a model's tokenizer and chat template lie in, or None; of adapters that of the model they
    belong to."""
    if is_preset(os.fspath(source)):
        return None
    path = locate(os.fspath(source))
    if path.is_dir() and peft.is_adapter(path):
        return text_folder(_read_adapters(path)[1])
    return path if path.is_dir() else None


def locate(name: str, weights: bool = True) -> Path:
    """The local file or folder that a source other than a preset stands for, fetched if need be; without `weights`
    only the config.json of an "owner/model"."""
    path = Path(name).expanduser()
    if name and path.exists():  # Path("") would be the current folder
        return path
    if name in HUB_NAMES:
        try:
            return hub.fetch(HUB_NAMES[name])
        except (DownloadError, MissingDependencyError) as error:
            random = SAME_ARCHITECTURE[name]
            raise type(error)(f"{error}; {random!r} is the same architecture with random weights") from error
    if re.fullmatch(r"[^/\\.~][^/\\]*/[^/\\]+", name) and not name.endswith((".bin", ".safetensors")):
        if not Path(name).parent.is_dir():  # else it is rather a slip in a path
            return hub.fetch(name, weights=weights)
    if re.search(r"[/\\.]", name):
        raise FileFormatError(name, "file", "does not exist")
    ours = ", ".join(known for known in PRESETS if known not in HUB_NAMES)
    raise ConfigError(
        "init",
        f"{name!r} is no file, no folder and no known name; known are {', '.join(HUB_NAMES)} (from the hub), "
        f"{ours}, d1 to d12, d24, d36, d48 (random), and owner/model on the hub",
    )


def _read_header(path: Path) -> Dimensions:
    if path.suffix == ".safetensors":
        raise FileFormatError(path, "file", "give the folder that holds it and config.json")
    return checkpoint.read_model_header(path, rows_for)[1]


def _from_file(path: Path, ops: Ops, masters: bool, narrow: bool) -> Model:
    dimensions = _read_header(path)
    model = config_of(dimensions).build(ops, masters=masters, narrow=narrow)
    checkpoint.read_model(path, dimensions, model.params)
    _promise_tokenizer(model, TOKENIZERS.get(model.config.vocab_size))
    return model


def _from_folder(folder: Path, ops: Ops, masters: bool, narrow: bool) -> Model:
    config, ids = hfconfig.read(folder)
    V = config.vocab_size
    safetensors_folder.check(folder, config.parameter_rows(), V)  # before a wrong config.json allocates terabytes
    source = _tokenizer_in(folder, ids.get(hfconfig.TOKENIZER_FIELD), config)
    model = config.build(ops, masters=masters, narrow=narrow)
    safetensors_folder.read(folder, model.params, V)
    model.folder, model.ids = str(folder), ids
    _promise_tokenizer(model, source)
    return model


def config_of(dimensions: Dimensions) -> gpt2.Config:
    """The configuration a file's numbers describe."""
    return gpt2.Config(
        dimensions.max_seq_len, dimensions.vocab_size, dimensions.num_layers, dimensions.num_heads,
        dimensions.channels,
    )  # fmt: skip


def dimensions_of(config: Config) -> Dimensions:
    """A configuration's numbers as files carry them."""
    return Dimensions(
        config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads, config.channels
    )  # fmt: skip


def rows_for(dimensions: Dimensions) -> list[Row]:
    """The parameter table of a file's model."""
    return config_of(dimensions).parameter_rows()


# ---- tokenizers ------------------------------------------------------------------------------------


def require_tokenizer(model: Model) -> tokenizers.Tokenizer:
    """The model's tokenizer; where it has none, the error that says why."""
    if model.tokenizer is None:
        name = model.folder if model.folder and _has_tokenizer(Path(model.folder)) else None
        name = name or TOKENIZERS.get(model.config.vocab_size)
        if name is None:
            where = f"{model.folder} has none, and " if model.folder else ""
            raise ConfigError("tokenizer", f"{where}none is known for a vocabulary of {model.config.vocab_size}")
        model.tokenizer = tokenizers.load(name, vocab_size=model.config.vocab_size)
    return cast(tokenizers.Tokenizer, model.tokenizer)


def _has_tokenizer(folder: Path) -> bool:
    names = (tokenizer_config.TOKENIZER_JSON, tokenizer_config.TOKENIZER_MODEL)
    return any((folder / name).is_file() for name in names)


def _is_gpt2(folder: Path) -> bool:
    """Whether a folder's tokenizer.json has GPT-2's vocabulary, by some of its entries."""
    if not (folder / tokenizer_config.TOKENIZER_JSON).is_file():
        return False
    model = files.read_json(str(folder / tokenizer_config.TOKENIZER_JSON)).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known = {"\u0120the": 262, "\u0120language": 3303, "\u0120gazed": 50255, "<|endoftext|>": 50256}
    return isinstance(vocabulary, dict) and all(vocabulary.get(token) == i for token, i in known.items())


def _tokenizer_in(folder: Path, name: str | None, config: Config) -> str | None:
    """A folder's tokenizer as `tokenizer.load` takes it: what llmc has noted there, a name or a file of this folder and
    no other; else the folder, where it has one.  GPT-2's own needs no package beyond those that are always there."""
    V = config.vocab_size
    if name and name not in TOKENIZERS.values():
        if os.path.basename(name) != name or not (folder / name).is_file():
            detail = f"{name!r} is neither {', '.join(TOKENIZERS.values())} nor a file in this folder"
            raise FileFormatError(folder / hfconfig.CONFIG_FILE, hfconfig.TOKENIZER_FIELD, detail)
        size = tokenizers.load(folder / name).vocab_size
        name_or_file: str | None = str(folder / name)
    else:
        size = {known: size for size, known in TOKENIZERS.items()}.get(name or "", 0)
        name_or_file = name
    if size > V:
        detail = f"{name!r} has {size} entries, the model {V}"
        raise FileFormatError(folder / hfconfig.CONFIG_FILE, hfconfig.TOKENIZER_FIELD, detail)
    if name_or_file is None and _has_tokenizer(folder) and not _is_gpt2(folder):
        return str(folder)
    return name_or_file or TOKENIZERS.get(V)


def _promise_tokenizer(model: Model, name: str | None) -> None:
    """The tokenizer `name`, when it is asked for; a model is of use without one that cannot be fetched then."""

    def load() -> Any:
        try:
            return tokenizers.load(cast(str, name), vocab_size=model.config.vocab_size)
        except (DownloadError, MissingDependencyError):
            return None

    if name is not None:
        model.tokenizer_later(load)


# ---- saving ----------------------------------------------------------------------------------------


def save(
    model: Model, folder: PathLike, tokenizer_name: str | None = None, *, dtype: str = "fp32",
    max_shard_bytes: int = safetensors_folder.MAX_SHARD_BYTES,
) -> None:
    """Write `model` as a Hugging Face folder, created if need be: config.json, and safetensors in `dtype` (fp32, bf16,
    fp16), of at most `max_shard_bytes` each.  Of a model with adapters these alone, in PEFT's layout.

    `tokenizer_name` ("bytes", "gpt2" or a tokenizer .bin, which is copied along) is what `load` will
    give the model; by default the model's own.  What else belongs to the text of a model that came from a folder
    (tokenizer, chat template, ids) goes along, and adapters that the folder held before go.  Each file is replaced
    whole or not at all; the weights come first, so a folder with a config.json is complete.  ConfigError where it
    cannot be written.
    """
    files.make_folder(folder)
    if model.adapters is not None:
        if not model.source:
            raise ConfigError("out", "adapters belong to a model that can be loaded again; this one has random weights")
        peft.write(folder, model, model.source)
        if model.folder:
            safetensors_folder.copy_text_files(model.folder, folder)
        return
    ids = dict(model.ids)
    own = tokenizers.load(tokenizer_name) if tokenizer_name else model.tokenizer
    V = model.config.vocab_size
    if own is not None and (own.name in TOKENIZERS.values() or hasattr(own, "tokens")):
        name = own.name
        if name not in TOKENIZERS.values():
            name = TOKENIZER_FILE
            tokenizers.write_tokenizer_file(os.path.join(folder, name), cast(Any, own).tokens(), own.eot)
        ids = {"bos_token_id": own.eot, "eos_token_id": own.eot, **ids, hfconfig.TOKENIZER_FIELD: name}
    safetensors_folder.write(folder, model.params, V, dtype=dtype, max_shard_bytes=max_shard_bytes)
    if model.folder:
        safetensors_folder.copy_text_files(model.folder, folder)
    hfconfig.write(folder, model.config, ids, dtype=dtype)
    peft.remove(folder)
    if dtype == "fp32":
        model.source = str(Path(folder).absolute())


def save_bin(model: Model, path: PathLike, version: int = 3) -> None:
    """Write `model` as llm.c's model file: version 1 (fp32, unpadded), 3 (fp32) or 5 (bf16).  ConfigError for a model
    that is no GPT-2."""
    if not isinstance(model.config, gpt2.Config):
        raise ConfigError("destination", f"{os.fspath(path)}: llm.c's files hold a GPT-2 alone; name a folder")
    checkpoint.write_model(path, version, dimensions_of(model.config), model.params)
