"""Documents, one at a time: JSON lines, parquet, a folder of such files, a dataset of the Hugging Face hub.

    for text in documents.read("stories.jsonl", field="text"):
        ...

Whatever the size of the source, one document and little more is in memory.  Nothing is printed; `progress(done,
total)` is called with bytes read, total 0 where it is unknown.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Union

from llmc.errors import ConfigError, DownloadError, FileFormatError, MissingDependencyError

PathLike = Union[str, "os.PathLike[str]"]
Progress = Callable[[int, int], None]

JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET = (".parquet",)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LONGEST_LINE = 1 << 28  # bytes; a file without line ends would otherwise be read whole
ROWS = 256  # of a parquet file at a time
TIMEOUT = 10  # seconds for the hub's first answer


def is_source(source: PathLike) -> bool:
    """Whether `source` can be read here: a file that is named so, a folder, or what may be a name on the hub."""
    name = os.fspath(source)
    return name.endswith((*JSON_LINES, *PARQUET)) or os.path.isdir(name) or _on_hub(name)


def short_name(source: PathLike) -> str:
    """What to call what is made of a source: the last part of its name, without suffixes."""
    name = os.path.basename(os.path.abspath(source))
    suffix = next((suffix for suffix in (*JSON_LINES, *PARQUET) if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def read(
    source: PathLike, *, field: str = "text", split: str | None = None, config_name: str | None = None,
    progress: Progress | None = None,
) -> Iterator[str]:
    """The texts in `field` of every document, in the order of the source; a folder's files in the order of their names.

    `source` is a file in .jsonl or .ndjson (also .gz) or .parquet, a folder that holds such files, or "owner/name"
    on the hub, of which `split` ("train") and the configuration `config_name` are read.

    Raises, when it comes to it: FileFormatError for a line or a row that is damaged or has no text in `field`, naming
    file, number and field; ConfigError for a source that is none; DownloadError for what the hub or the network does;
    MissingDependencyError without pyarrow or datasets, where they are needed.
    """
    name = os.fspath(source)
    if _on_hub(name):
        yield from _hub(name, field, split or "train", config_name, progress)
        return
    for option, value in (("split", split), ("config_name", config_name)):
        if value is not None:
            raise ConfigError(option, f"{value!r} is for a dataset of the hub; {name} is a file or folder")
    files = _files(Path(name))
    sizes = [_size(path) for path in files]
    for n, path in enumerate(files):
        so_far = _Share(progress, sum(sizes[:n]), sizes[n], sum(sizes))
        yield from (_parquet if path.name.endswith(PARQUET) else _json_lines)(path, field, so_far)


class _Share:
    """Progress within one file of several."""

    def __init__(self, progress: Progress | None, before: int, size: int, total: int) -> None:
        self._progress, self._before, self.size, self._total = progress, before, size, total

    def __call__(self, done: int) -> None:
        if self._progress:
            self._progress(self._before + done, self._total)


def _on_hub(name: str) -> bool:
    """A name on the hub; what is there, or looks like a file that should be, is a path."""
    return not os.path.exists(name) and not name.endswith((*JSON_LINES, *PARQUET)) and bool(HUB_NAME.fullmatch(name))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.name.endswith((*JSON_LINES, *PARQUET)) and file.is_file())
    if not found:
        raise ConfigError("source", f"the folder {path} holds no file in {', '.join((*JSON_LINES, *PARQUET))}")
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError("source", f"cannot read {path}: {error.strerror}") from error


def _text(item: Any, field: str, path: PathLike, where: str) -> str:
    """The text of one document, given as an object."""
    if not isinstance(item, dict):
        raise FileFormatError(path, where, f"is a {type(item).__name__}, not an object with the field {field!r}")
    if field not in item:
        raise FileFormatError(path, where, f"has no field {field!r}; {_there(item)}")
    text = item[field]
    if not isinstance(text, str):
        raise FileFormatError(path, f"{where}, {field!r}", f"is a {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FileFormatError(path, f"{where}, {field!r}", f"character {error.start} is half a character") from None
    return text


def _there(fields: Iterable[str]) -> str:
    names = ", ".join(fields)
    return f"the fields there are {names}" if names else "there are none"


# ---- JSON lines ------------------------------------------------------------------------------------


def _json_lines(path: Path, field: str, progress: _Share) -> Iterator[str]:
    try:
        raw = open(path, "rb")
    except OSError as error:
        raise ConfigError("source", f"cannot read {path}: {error.strerror}") from error
    with raw:
        number = 0
        for number, line in enumerate(_lines(raw, path), 1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                item = json.loads(line)  # which passes over a byte order mark
            except UnicodeDecodeError:
                raise FileFormatError(path, where, "is not UTF-8 text") from None
            except (ValueError, RecursionError) as error:
                raise FileFormatError(path, where, f"is not JSON: {error}") from None
            yield _text(item, field, path, where)
            progress(raw.tell())
        progress(raw.tell())


def _lines(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    try:
        file: Any = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise FileFormatError(path, f"line {number}", f"is longer than {LONGEST_LINE} bytes")
            yield line
    except (EOFError, zlib.error, OSError) as error:  # gzip's BadGzipFile is an OSError
        raise FileFormatError(path, f"line {number + 1}", f"cannot be read: {error}") from error


# ---- parquet ---------------------------------------------------------------------------------------


def _parquet(path: Path, field: str, progress: _Share) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise FileFormatError(path, "columns", f"none is called {field!r}; {_there(names)}")
            total = max(file.metadata.num_rows, 1)
            # Row group by row group, and of each this column alone.
            for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _text({field: text}, field, path, f"row {number}")
                    number += 1
                progress(progress.size * number // total)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FileFormatError(path, f"row {number}", f"cannot be read: {_first_line(error)}") from error
    progress(progress.size)


# ---- the hub ---------------------------------------------------------------------------------------


def _hub(name: str, field: str, split: str, config_name: str | None, progress: Progress | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{name}: datasets of the hub need datasets: pip install datasets") from error
    _ask(name)
    try:
        rows = _quietly(datasets, lambda: datasets.load_dataset(name, config_name, split=split, streaming=True))
    except ValueError as error:  # a split or a configuration that there is not, with those that there are
        raise ConfigError("dataset", f"{name}: {_first_line(error)}") from error
    except Exception as error:  # of the libraries below, whose errors have no base class in common
        raise DownloadError(f"{name}: {_first_line(error)}") from error
    yield from _rows(rows, name, field, progress)


def _ask(name: str) -> None:
    """Whether the hub has the dataset: asked once, without the library's attempts, which take half a minute."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).dataset_info(name, timeout=TIMEOUT)
    except errors.GatedRepoError as error:
        raise DownloadError(f"{name}: the hub asks for permission to use this dataset, and HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(f"{name}: no such dataset on the hub (or private: set HF_TOKEN)") from error
    except Exception as error:  # as above
        raise DownloadError(f"{name}: the hub cannot be reached ({_first_line(error)})") from error


def _rows(rows: Any, name: str, field: str, progress: Progress | None) -> Iterator[str]:
    """The texts of a streamed dataset."""
    columns = rows.column_names  # None where nobody knows before the first row
    if columns is not None:
        if field not in columns:
            raise ConfigError("field", f"{name} has no column {field!r}; {_there(columns)}")
        rows = rows.select_columns([field])
    number = done = 0
    try:
        for item in rows:
            text = _text(item, field, name, f"row {number}")
            yield text
            number += 1
            done += len(text)
            if progress:
                progress(done, 0)
    except (FileFormatError, GeneratorExit):
        raise
    except Exception as error:  # as above
        raise DownloadError(f"{name}: row {number}: {_first_line(error)}") from error


def _quietly(datasets: Any, call: Callable[[], Any]) -> Any:
    """`call` without the library's own bars on the screen."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return call()
    finally:
        if shown:
            datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
