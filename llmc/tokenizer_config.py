"""What a Hugging Face folder says about its tokenizer, beside the vocabulary itself.

`read(folder)` gathers it from tokenizer_config.json, special_tokens_map.json, added_tokens.json,
generation_config.json, config.json and the files of chat templates.  All of them are optional; what is there and is
not as it should be is a FileFormatError naming the file and the field.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmc import files
from llmc.errors import FileFormatError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# What belongs to a tokenizer and is copied with it; generation_config.json has the ids that end a text.
COMPANIONS = (
    TOKENIZER_JSON, TOKENIZER_MODEL, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, GENERATION_CONFIG, CHAT_TEMPLATE,
    "vocab.json", "merges.txt",
)  # fmt: skip


class Added(NamedTuple):
    """A token that was added to a vocabulary."""

    content: str
    special: bool


@dataclass(frozen=True)
class TokenizerConfig:
    """A folder's files, read.

    names         special tokens by role: {"bos_token": "<s>", "eos_token": "</s>", ...}
    add_bos       whether ordinary text is led by bos; None where the files do not say
    legacy        whether sentencepiece puts a space behind every special token too, as Llama 2 was trained with
    bos, eos      ids, as generation_config.json or else config.json has them
    added         tokens by id, of tokenizer_config.json and added_tokens.json
    templates     chat templates by name: the text, and the file and field it comes from
    """

    folder: Path
    names: dict[str, str]
    add_bos: bool | None
    legacy: bool
    bos: int | None
    eos: tuple[int, ...]
    added: dict[int, Added]
    templates: dict[str, tuple[str, Path, str]]

    def companions(self) -> list[Path]:
        """The files that belong to the tokenizer, as far as they are there."""
        return [self.folder / name for name in COMPANIONS if (self.folder / name).is_file()]

    def where(self, role: str) -> Path:
        """The file that names the special token `role`."""
        named = role in read_json(self.folder / TOKENIZER_CONFIG)
        return self.folder / (TOKENIZER_CONFIG if named else SPECIAL_TOKENS)


def read(folder: Path) -> TokenizerConfig:
    """What the folder's files say; FileFormatError."""
    path = folder / TOKENIZER_CONFIG
    config = read_json(path)
    names = _names(config, path)
    for role, content in _names(read_json(folder / SPECIAL_TOKENS), folder / SPECIAL_TOKENS).items():
        names.setdefault(role, content)
    extra = config.get("extra_special_tokens")  # a list of them is without roles
    if isinstance(extra, dict):
        names |= {role: content for role, content in extra.items() if isinstance(content, str)}
    add_bos, legacy = (_flag(config, key, path) for key in ("add_bos_token", "legacy"))
    bos, eos = _ids(folder)
    return TokenizerConfig(
        folder, names, add_bos, legacy is not False, bos, eos, _added(folder, config), _templates(folder, config)
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file."""
    return files.read_json(str(path)) if os.path.lexists(path) else {}


def _names(config: dict[str, Any], path: Path) -> dict[str, str]:
    """The special tokens: each a string, or an object with the string as its content, or null."""
    found = {}
    for role, value in config.items():
        if not role.endswith("_token") or isinstance(value, bool) or value is None:  # add_bos_token is no token
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str):
            raise FileFormatError(path, role, "is neither a string nor an object with a string `content`")
        found[role] = content
    return found


def _flag(config: dict[str, Any], key: str, path: Path) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise FileFormatError(path, key, f"{value!r} is neither true nor false")
    return value


def _ids(folder: Path) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos as generation goes by them: generation_config.json, else config.json."""
    path = folder / GENERATION_CONFIG
    config = read_json(path)
    if not config:
        path = folder / MODEL_CONFIG
        config = read_json(path)
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    many = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for key, value in (("bos_token_id", bos), *(("eos_token_id", value) for value in many)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise FileFormatError(path, key, f"{value!r} is no id")
    return bos, tuple(many)


def _added(folder: Path, config: dict[str, Any]) -> dict[int, Added]:
    found: dict[int, Added] = {}
    for content, i in read_json(folder / ADDED_TOKENS).items():
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise FileFormatError(folder / ADDED_TOKENS, content, f"{i!r} is no id")
        found[i] = Added(content, special=True)
    path, listed = folder / TOKENIZER_CONFIG, config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise FileFormatError(path, "added_tokens_decoder", "is not an object")
    for key, value in listed.items():
        text = value.get("content") if isinstance(value, dict) else None
        if not key.isdecimal() or not isinstance(text, str):
            raise FileFormatError(path, f"added_tokens_decoder: {key}", "is not an id with a `content`")
        found[int(key)] = Added(text, bool(value.get("special", False)))
    return found


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, tuple[str, Path, str]]:
    """Chat templates: a file of their own goes before the field."""
    path, field = folder / TOKENIZER_CONFIG, "chat_template"
    found, listed = {}, config.get(field)
    if isinstance(listed, str):
        found["default"] = (listed, path, field)
    elif isinstance(listed, list):
        for n, item in enumerate(listed):
            name, text = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(text, str):
                raise FileFormatError(path, f"{field} {n}", "is no object with a `name` and a `template`")
            found[name] = (text, path, f"{field} {name!r}")
    elif listed is not None:
        raise FileFormatError(path, field, "is neither a string nor a list")
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        try:
            found["default"] = (file.read_text("utf-8"), file, "template")
        except UnicodeDecodeError as error:
            raise FileFormatError(file, f"byte {error.start}", "is not UTF-8 text") from None
        except OSError as error:
            raise FileFormatError(file, "file", f"cannot be read: {error.strerror}") from error
    return found
