"""Between llm.c's model files and Hugging Face folders."""

from __future__ import annotations

import os
from pathlib import Path

from llmc import checkpoint, files, hfconfig, loading, peft, safetensors_folder
from llmc.errors import ConfigError
from llmc.files import PathLike
from llmc.ops import Ops

KEEPS_OUT = (hfconfig.CONFIG_FILE, safetensors_folder.WEIGHTS_FILE, safetensors_folder.INDEX_FILE, peft.CONFIG_FILE)


def convert(
    source: PathLike, destination: PathLike, *, version: int = 3, dtype: str = "fp32",
    max_shard_bytes: int = safetensors_folder.MAX_SHARD_BYTES, force: bool = False, seed: int = 0,
    ops: Ops | None = None,
) -> Path:
    """Write the model `source` (whatever `loading.load` takes) to `destination`, and return its path.

    A destination that ends in .bin becomes llm.c's model file of `version` (1: fp32, vocabulary not
    padded; 3: fp32; 5: bf16, rounded to nearest), any other a Hugging Face folder in `dtype` (fp32, bf16, fp16), in
    files of at most `max_shard_bytes`.  Adapters are added into the weights they belong to.  What is there
    already is replaced only with `force` (ConfigError otherwise), and only once the source was read whole,
    so the two may be the same.
    """
    target = Path(destination).expanduser()
    to_file = target.suffix == ".bin"
    if target.suffix == ".safetensors":
        raise ConfigError("destination", f"{target}: give the folder that model.safetensors is to lie in")
    if to_file and version not in checkpoint.MODEL_DTYPES:
        raise ConfigError("version", f"{version} is not a model version; choose from 1, 3, 5")
    if to_file and target.is_dir():
        raise ConfigError("destination", f"{target} is a folder, a name in .bin calls for a file")
    if not to_file and target.exists() and not target.is_dir():
        raise ConfigError("destination", f"{target} is a file; end the name in .bin, or name a folder")
    if not force:
        taken = [target] if to_file else [target / name for name in KEEPS_OUT]
        for path in taken:
            if os.path.lexists(path):
                raise ConfigError("destination", f"{path} exists; it is replaced only when forced")
    model = loading.load(source, seed=seed, ops=ops)
    if model.adapters is not None:
        model.adapters.merge(model)
    if to_file:
        files.make_folder(target.parent)
        loading.save_bin(model, target, version)
    else:
        loading.save(model, target, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return target
