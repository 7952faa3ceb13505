"""Downloads that are resumed, checked, and never left half done.

`fetch` puts bytes into a temporary file beside the real one.  A transfer that breaks off is taken up where
it ended, at once or in a later run; the real file appears when everything has come and, where the source
is fixed for good, has the right size and SHA-256.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Union

from llmc.errors import ConfigError, DownloadError

PathLike = Union[str, "os.PathLike[str]"]
Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0: unknown)

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4
RETRY_SECONDS = 1.0
CHUNK = 1 << 18


@dataclass(frozen=True)
class Source:
    """Something to download.  `size` (bytes) and `sha256` are 0 and "" where it is not fixed for good."""

    url: str
    size: int = 0
    sha256: str = ""


class _Interrupted(Exception):
    """A transfer that may go on in another attempt."""


def fetch(source: Source, path: PathLike, *, progress: Progress | None = None) -> Path:
    """Download `source` to `path`, unless it is there already, and return the path.

    Bytes go to `path`.part; `path`.part.tag holds the server's mark of the version they belong to.  What has
    come when the last attempt fails stays for a later call; what has come and is wrong is thrown away.

    Raises DownloadError for what the network or the server does, ConfigError where nothing can be written.
    """
    path = Path(path)
    if path.exists() and not mismatch(source, path):
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DownloadError(f"{part}: another download to this file is under way") from None
            try:
                _complete(source, file, part, progress)
                os.fsync(file.fileno())
                os.replace(part, path)
                _tag_file(part).unlink(missing_ok=True)
            except BaseException:
                if not os.fstat(file.fileno()).st_size:
                    part.unlink(missing_ok=True)
                    _tag_file(part).unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except DownloadError:
        raise
    except OSError as error:
        raise ConfigError("out", f"cannot write {path}: {error.strerror or error}") from error
    return path


def _complete(source: Source, file: BinaryIO, part: Path, progress: Progress | None) -> None:
    """Make the open .part file complete and right."""
    attempts = ATTEMPTS
    resumed = file.seek(0, os.SEEK_END) > 0
    while True:
        attempts -= 1
        try:
            _transfer(source, file, part, progress)
        except _Interrupted as error:
            if attempts > 0:
                time.sleep(RETRY_SECONDS)
                continue
            have = file.seek(0, os.SEEK_END)
            kept = f"; {have} bytes have come and are kept: the next try goes on from there" if have else ""
            raise DownloadError(f"{source.url}: {error}{kept}") from error
        problem = mismatch(source, part)
        if not problem:
            return
        file.truncate(0)
        if not resumed:
            raise DownloadError(f"{source.url}: {problem[0]}: {problem[1]}")
        resumed = False  # the old beginning may be to blame: once more, from the start


def _transfer(source: Source, file: BinaryIO, part: Path, progress: Progress | None) -> None:
    """One request: append to the file what it lacks, or write it anew; _Interrupted, DownloadError."""
    have = file.seek(0, os.SEEK_END)
    if source.size and have == source.size:
        return
    request = urllib.request.Request(source.url, headers={"User-Agent": "llmc"})
    tag = _tag_file(part)
    # Going on is safe if the server promises that the rest belongs to the same file, or a hash will tell.
    mark = tag.read_text() if tag.exists() else ""
    if 0 < have and (mark or source.sha256):
        request.add_header("Range", f"bytes={have}-")
        if mark:
            request.add_header("If-Range", mark)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the server has no bytes from there on
            if error.headers.get("Content-Range", "") == f"bytes */{have}" and mark:
                return
            file.truncate(0)
            raise _Interrupted("the file on the server has changed") from error
        if error.code >= 500 or error.code in (408, 429):
            raise _Interrupted(f"the server answered {error.code} {error.reason}") from error
        raise DownloadError(f"{source.url}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error)) from error
    with response:
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != have:
                file.truncate(0)
                raise _Interrupted("the server sent another part than was asked for")
            total = int(match[2])
        else:
            file.truncate(0)
            have = file.seek(0)
            total = int(response.headers.get("Content-Length") or 0)
            # A weak tag does not promise the same bytes.
            mark = response.headers.get("ETag", "")
            mark = response.headers.get("Last-Modified", "") if mark[:2] in ("", "W/") else mark
            tag.write_text(mark)
        if source.size and total and total != source.size:
            file.truncate(0)
            raise DownloadError(f"{source.url}: size: {total} bytes, expected {source.size}")
        _copy(source, response, file, have, total or source.size, progress)


def _copy(
    source: Source, response: Any, file: BinaryIO, have: int, total: int, progress: Progress | None
) -> None:
    """Write what the server sends behind the `have` bytes that are there."""
    while True:
        try:
            data = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            file.flush()
            raise _Interrupted(_reason(error)) from error
        if not data:
            break
        have += len(data)
        if source.size and have > source.size:
            file.truncate(0)
            raise DownloadError(f"{source.url}: size: more than the expected {source.size} bytes")
        file.write(data)
        if progress:
            progress(have, total)
    file.flush()
    if have < total:
        raise _Interrupted(f"the connection ended at {have} of {total} bytes")


def mismatch(source: Source, path: Path) -> tuple[str, str] | None:
    """The field and what is wrong with it, where a file is not the fixed source."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ConfigError("source", f"cannot read {path}: {error.strerror}") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if source.size and size != source.size:
            return "size", f"{size} bytes, expected {source.size}"
        if source.sha256:
            digest = hashlib.sha256()
            while data := file.read(CHUNK):
                digest.update(data)
            if digest.hexdigest() != source.sha256:
                return "SHA-256", f"{digest.hexdigest()}, expected {source.sha256}"
    return None


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return str(inner or error) or type(error).__name__


def _tag_file(part: Path) -> Path:
    """Where the server's mark of the version is kept whose beginning `part` is."""
    return part.with_name(f"{part.name}.tag")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # a new name is on disk only when its folder is
    finally:
        os.close(descriptor)
