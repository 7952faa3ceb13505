"""Downloads, from a server on this machine that can be told to misbehave."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc import download
from llmc.download import Source, fetch
from llmc.errors import ConfigError, DownloadError

CONTENT = bytes(i * i % 251 for i in range(300_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` with ranges; the rest says what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag = '"v1"'
        self.statuses: list[int] = []  # answers to give before proper ones
        self.cuts: list[int] = []  # numbers of bytes after which to hang up
        self.ranges = True
        self.length = True
        self.offset_error = 0
        self.asked: list[str | None] = []  # the Range of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        self.close_connection = True
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        same = self.headers.get("If-Range") in (None, server.etag)
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        start = 0
        if match and server.ranges and same:
            start = int(match[1])
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            size = len(server.content)
            first = start + server.offset_error
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 10.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pinned(server: Server, size: int = len(CONTENT), sha256: str = SHA256) -> Source:
    return Source(server.url, size, sha256)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fixed", [True, False])
def test_a_download_arrives_whole_and_leaves_nothing_else(
    server: Server, tmp_path: Path, fixed: bool
) -> None:
    seen: list[tuple[int, int]] = []
    source = pinned(server) if fixed else Source(server.url)
    path = fetch(source, tmp_path / "f", progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "f"
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["f"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert server.asked == [None]
    assert fetch(source, path) == path  # there already: nobody is asked
    assert len(server.asked) == 1


def test_redirections_are_followed(server: Server, tmp_path: Path) -> None:
    source = Source(server.url.replace("/file", "/moved"), len(CONTENT), SHA256)
    assert fetch(source, tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("fixed", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_ended(
    server: Server, tmp_path: Path, fixed: bool
) -> None:
    server.cuts = [1000, 50_000]
    source = pinned(server) if fixed else Source(server.url)
    assert fetch(source, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", "bytes=51000-"]
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("fixed", [True, False])
def test_a_later_call_goes_on_from_where_the_last_gave_up(
    server: Server, tmp_path: Path, fixed: bool
) -> None:
    source = pinned(server) if fixed else Source(server.url)
    server.cuts = [1000, 0, 0, 0]
    with pytest.raises(DownloadError, match="1000 of 300000 bytes; 1000 bytes have come and are kept"):
        fetch(source, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    server.asked.clear()
    assert fetch(source, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]
    assert names(tmp_path) == ["f"]


def test_a_file_that_changed_on_the_server_is_not_stitched_together(server: Server, tmp_path: Path) -> None:
    server.content, server.etag, server.cuts = b"x" * 2000, '"v0"', [1000, 0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(Source(server.url), tmp_path / "f")
    server.content, server.etag = CONTENT, '"v1"'
    assert fetch(Source(server.url), tmp_path / "f").read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=1000-"


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_mark_or_hash_everything_comes_anew(
    server: Server, tmp_path: Path, etag: str
) -> None:
    server.etag = etag
    server.cuts = [1000]
    assert fetch(Source(server.url), tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [None, None]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [1000]
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-"]


def test_a_server_that_sends_another_part_is_not_believed(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000]
    server.offset_error = 7
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", None]


def test_a_server_that_does_not_say_how_much_there_is(server: Server, tmp_path: Path) -> None:
    server.length = False
    seen: list[int] = []
    assert fetch(Source(server.url), tmp_path / "f", progress=lambda d, total: seen.append(total))
    assert set(seen) == {0}
    server.cuts = [1000]  # with the size known from the source, an early end is still noticed
    assert fetch(pinned(server), tmp_path / "g").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("size", "sha256", "message"),
    [
        (len(CONTENT), "0" * 64, f"SHA-256: {SHA256}, expected 0000"),
        (len(CONTENT) - 1, SHA256, "size: 300000 bytes, expected 299999"),
        (len(CONTENT) + 1, SHA256, "size: 300000 bytes, expected 300001"),
    ],
)
def test_the_wrong_content_is_thrown_away(
    server: Server, tmp_path: Path, size: int, sha256: str, message: str
) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(pinned(server, size, sha256), tmp_path / "f")
    assert server.url in str(caught.value)
    assert names(tmp_path) == []


def test_more_than_expected_is_stopped_where_no_length_is_told(server: Server, tmp_path: Path) -> None:
    server.length = False
    with pytest.raises(DownloadError, match="more than the expected 1000 bytes"):
        fetch(pinned(server, 1000), tmp_path / "f")
    assert names(tmp_path) == []


def test_a_bad_beginning_of_an_earlier_run_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"rubbish")
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == ["bytes=7-", None]
    assert names(tmp_path) == ["f"]


def test_wrong_content_behind_a_bad_beginning_is_asked_for_once_more_only(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "f.part").write_bytes(b"rubbish")
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(pinned(server, sha256="0" * 64), tmp_path / "f")
    assert server.asked == ["bytes=7-", None]
    assert names(tmp_path) == []


def test_a_complete_beginning_needs_no_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == []


def test_a_beginning_that_is_too_long_or_complete_by_mark(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT + b"more")
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT
    (tmp_path / "g.part").write_bytes(CONTENT)
    (tmp_path / "g.part.tag").write_text(server.etag)
    assert fetch(Source(server.url), tmp_path / "g").read_bytes() == CONTENT
    assert names(tmp_path) == ["f", "g"]


def test_a_wrong_file_under_the_real_name_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"something else")
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_refusal_is_final(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(DownloadError, match=f"{server.url}: the server answered {status}"):
        fetch(pinned(server), tmp_path / "f")
    assert len(server.asked) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_trouble_that_may_pass_is_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status, status]
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT
    server.statuses = [status] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=str(status)):
        fetch(pinned(server), tmp_path / "g")
    assert names(tmp_path) == ["f"]


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    with pytest.raises(DownloadError, match="refused"):
        fetch(Source("http://127.0.0.1:9/f"), tmp_path / "f")
    assert names(tmp_path) == []


def test_a_server_that_falls_silent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    silent = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: silent.wait(5))
    with pytest.raises(DownloadError, match="timed out"):
        fetch(pinned(server), tmp_path / "f")
    silent.set()
    assert names(tmp_path) == []


def test_a_second_download_to_the_same_file_is_refused(server: Server, tmp_path: Path) -> None:
    with open(tmp_path / "f.part", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="under way"):
            fetch(pinned(server), tmp_path / "f")


def test_what_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        fetch(pinned(server), tmp_path / "none" / "f")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        fetch(pinned(server), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_an_interrupted_download_keeps_what_came(server: Server, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(pinned(server), tmp_path / "f", progress=stop)
    have = (tmp_path / "f.part").stat().st_size
    assert have > 0
    assert fetch(pinned(server), tmp_path / "f").read_bytes() == CONTENT
    assert names(tmp_path) == ["f"]
