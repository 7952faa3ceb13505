"""Names on the Hugging Face hub to local folders.

`fetch("openai-community/gpt2")` downloads the files that matter (config.json, safetensors, the tokenizer's)
through the optional package huggingface_hub, into its cache, and gives the folder.  A model fetched before
is found there without a network.  HF_ENDPOINT names another server, HF_HOME another cache, HF_TOKEN a
token, as everywhere in that package's world.  Weights kept as pickles are never downloaded.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from llmc.errors import ConfigError, DownloadError, MissingDependencyError
from llmc.tokenizer_config import COMPANIONS

NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
TIMEOUT = 10  # seconds for the hub's first answer
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class _Absent(DownloadError):
    """The hub says that it has no such file."""


class _Unreachable(DownloadError):
    """The hub cannot be asked, and there is no copy."""


def fetch(
    name: str, *, revision: str = "main", cache_dir: str | os.PathLike[str] | None = None, weights: bool = True
) -> Path:
    """The local folder of the model `name` ("owner/model"), downloaded unless it is in the cache; without
    `weights` only its config.json.

    Every file comes from the one commit that `revision` names when the download begins.  Raises
    ConfigError for what cannot be a name, MissingDependencyError without huggingface_hub, DownloadError
    where the hub has no such model, the model has no safetensors, or there is no network and no copy.
    """
    if not NAME.fullmatch(name):
        raise ConfigError("name", f"{name!r} is not a model name on the hub (owner/model)")
    cache = None if cache_dir is None else Path(cache_dir)
    unreachable = _unreachable(name, revision)

    def get(file: str, revision: str) -> Path:
        return _get(name, file, revision, cache, unreachable)

    config = get(CONFIG, revision)
    folder, commit = config.parent, config.parent.name  # .../snapshots/<commit>/config.json
    if not weights:
        return folder
    try:
        get(WEIGHTS, commit)
    except _Absent as error:
        try:
            index = get(INDEX, commit)
        except _Absent:
            raise error from None
        for shard in _shards(name, index):
            get(shard, commit)
    for file in COMPANIONS:
        try:
            get(file, commit)
        except _Absent:
            continue
        except _Unreachable:
            break
    return folder


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now: huggingface_hub reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _unreachable(name: str, revision: str) -> str | None:
    """Why the hub cannot be asked, or None if it answers.

    Asked once and without the library's own five attempts, so that a machine without a network learns it
    at once and from one line.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: fetching from the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    url = huggingface_hub.hf_hub_url(name, CONFIG, revision=revision, endpoint=_endpoint())
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=_endpoint())
    except (errors.HfHubHTTPError, errors.EntryNotFoundError):
        return None  # an answer, which the download will meet again
    except Exception as error:  # the HTTP library's errors have no base class in common, nor always the same
        return _cause(error)
    return None


def _get(name: str, file: str, revision: str, cache: Path | None, unreachable: str | None) -> Path:
    """The local path of one file, from the cache or the hub; what went wrong otherwise, in one line."""
    import huggingface_hub
    from huggingface_hub import errors

    # What the cache knows of a commit holds for ever, that it lacks a file included: no need to ask.
    if COMMIT.fullmatch(revision):
        known = huggingface_hub.try_to_load_from_cache(name, file, cache, revision)
        if isinstance(known, str):
            return Path(known)
        if known is not None:
            raise _Absent(f"{name}: {file}: the model on the hub has no such file")
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                name, file, revision=revision, cache_dir=cache, endpoint=_endpoint(),
                local_files_only=unreachable is not None,
            )
        )  # fmt: skip
    except errors.LocalEntryNotFoundError as error:
        why = "the hub cannot be reached, and there is no copy in the cache"
        raise _Unreachable(f"{name}: {file}: {why}{unreachable or _cause(error)}") from error
    except errors.EntryNotFoundError as error:
        raise _Absent(f"{name}: {file}: the model on the hub has no such file") from error
    except errors.GatedRepoError as error:
        raise DownloadError(f"{name}: the hub asks for permission to use this model, and HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(f"{name}: not found on the hub (or private: set HF_TOKEN)") from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{name}: the model has no revision {revision!r}") from error
    except Exception as error:  # as above
        raise DownloadError(f"{name}: {file}: the download failed{_cause(error)}") from error


def _shards(name: str, index: Path) -> list[str]:
    """The plain names of the safetensors files that an index lists."""
    try:
        places = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(f"{name}: {INDEX}: is not an index of safetensors") from error
    for place in places:
        if not isinstance(place, str) or not re.fullmatch(r"[\w.-]+\.safetensors", place, re.ASCII):
            raise DownloadError(f"{name}: {INDEX}: {place!r} is not the plain name of a safetensors file")
    return sorted(places)


def _cause(error: BaseException) -> str:
    """The innermost reason, on one line: " (ConnectError: ...)"."""
    seen: Any = error
    while seen.__cause__ is not None:
        seen = seen.__cause__
    text = str(seen).strip().splitlines()
    return f" ({type(seen).__name__}: {text[0][:160]})" if text else f" ({type(seen).__name__})"
