"""Named configurations: the TOML files of this folder, and TOML files of the user's own.

A file is a flat list of `key = value` lines.  The keys are the fields of `training.TrainConfig`, which are
the long options of `llmc train` too; hyphens and underscores are the same.  Which keys and types there
are is the caller's to say, so this module knows TOML and no more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name_or_path: str | os.PathLike[str], types: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The keys and values of a recipe, by its name, or of a TOML file, by its path.

    With `types` (key -> bool, int, float or str) every key must be among them and every value of that
    type; a whole number will do for a float.  ConfigError names the file and the key.
    """
    name = os.fspath(name_or_path)
    path = FOLDER / f"{name}.toml"
    if name not in names():
        path = Path(name)
        if not path.exists():
            known = ", ".join(names())
            raise ConfigError("config", f"{name!r} is neither a file nor a recipe; recipes are {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("config", f"cannot read {path}: {reason}") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("config", f"{path} is not TOML: {error}") from error
    values: dict[str, Any] = {}
    for key, value in raw.items():
        field = key.replace("-", "_")
        if types is not None and field not in types:
            raise ConfigError(f"{path}: {key}", f"there is no such option; there are {', '.join(types)}")
        values[field] = value if types is None else typed(f"{path}: {key}", value, types[field])
    return values


def typed(field: str, value: Any, kind: type) -> Any:
    """`value` as a `kind`; ConfigError naming `field` where it is something else.

    A whole number passes for a float, 0 or 1 for a bool, a path object for text.  Nothing else is
    converted, and a bool is no number.
    """
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if type(value) is not kind:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ConfigError(field, f"must be {wanted}, got {value!r}")
    return value


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write booleans, numbers and text as a TOML file that `load` reads back.

    Whole or not at all: to a temporary file beside it first.  OSError where that fails.
    """
    lines = ["# A configuration of llmc; `llmc train --config` takes it back.", ""]
    lines += [f"{key} = {_literal(value)}" for key, value in values.items()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a new name is on disk only when its folder is
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _literal(value: bool | int | float | str) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, and surrogates, which TOML has no way to write.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
