"""Adapters to and from folders in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The folder names the model that the adapters belong to; it holds none of that model's weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llmc import files, gpt2, safetensors_folder
from llmc.errors import ConfigError, FileFormatError
from llmc.files import PathLike
from llmc.lora import ALL, Adapters, LoRA
from llmc.model import Model

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MODEL = "config.json"  # of a folder with a model
EVERYTHING = "all-linear"  # PEFT's word for every matrix of the layers

# Fields that change the mathematics, with what llmc computes; PEFT's files leave many of them out.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_rslora": (False, None), "use_dora": (False, None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", None),  # others change the base's weights, too
}  # fmt: skip
# Fields that must be empty: each gives some modules adapters of another kind, or trains more than adapters.
EMPTY = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication",
    "exclude_modules", "target_parameters", "trainable_token_indices", "megatron_config", "alora_invocation_tokens",
    "use_qalora", "arrow_config", "loftq_config", "corda_config", "eva_config",
)  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and not a model."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: PathLike) -> tuple[LoRA, str]:
    """The adapters' numbers, and the model they belong to.

    FileFormatError naming the field for what is missing, or would make them compute something else.
    """
    path = os.path.join(folder, CONFIG_FILE)
    fields = files.read_json(path)
    for field, allowed in FIXED.items():
        if fields.get(field, allowed[-1]) not in allowed:
            raise FileFormatError(path, field, f"is {fields[field]!r}, llmc computes {allowed[0]!r} only")
    for field in EMPTY:
        if fields.get(field):
            raise FileFormatError(path, field, "is set, llmc does not read such adapters")
    rank = files.positive(path, "r", fields.get("r"))
    alpha = fields.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e30:
        raise FileFormatError(path, "lora_alpha", f"must be a number above 0, is {alpha!r}")
    targets = fields.get("target_modules")
    if targets == EVERYTHING:
        targets = [ALL]
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        raise FileFormatError(path, "target_modules", f"must be a list of modules or {EVERYTHING!r}, is {targets!r}")
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise FileFormatError(path, "base_model_name_or_path", "does not say which model the adapters belong to")
    return LoRA(rank, float(alpha), tuple(targets)), base


def check_place(folder: PathLike) -> None:
    """ConfigError where adapters cannot be written because a model lies there: they would hide it."""
    if os.path.lexists(os.path.join(folder, MODEL)) and not is_adapter(Path(folder)):
        raise ConfigError("out", f"{os.fspath(folder)} holds a model: adapters need a folder of their own")


def remove(folder: PathLike) -> None:
    """Remove adapters, which would hide a model that was written to their folder."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = Path(folder, name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise files.cannot_write(path, error.strerror or str(error)) from error


def read(folder: PathLike, adapters: Adapters) -> None:
    """Fill `adapters`; FileFormatError, before anything is written, for tensors that are missing or too many."""
    safetensors_folder.read_file(os.path.join(folder, WEIGHTS_FILE), adapters.params)
    adapters.refresh()


def write(folder: PathLike, model: Model, base: str) -> None:
    """Write the adapters of `model` in fp32 to `folder`, created if need be; `base` is what it was loaded from.  The
    weights come first, so that a folder with an adapter_config.json is complete.  ConfigError as by `check_place`."""
    adapters: Adapters = model.adapters
    check_place(folder)
    lora = adapters.lora
    targets = list(lora.targets)
    if ALL in targets:
        targets = list(dict.fromkeys(part.module.rpartition(".")[2] for part in adapters.parts))
    files.make_folder(folder)
    safetensors_folder.write_file(os.path.join(folder, WEIGHTS_FILE), adapters.params)
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": 0.0, "target_modules": targets, "bias": "none",
        "fan_in_fan_out": isinstance(model.config, gpt2.Config), "inference_mode": True,
    }  # fmt: skip
    with files.atomic_write(os.path.join(folder, CONFIG_FILE)) as file:
        file.write(json.dumps(fields, indent=2).encode() + b"\n")
