"""Text to token shards: the three datasets, from local files and from a server on this machine."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmc import datasets, download, tokenizer
from llmc.data import read_header
from llmc.errors import ConfigError, DownloadError, FileFormatError

DATA = os.environ.get("LLMC_TEST_DATA", "")
EOT = 256


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> tokenizer.Tokenizer:
    if not DATA:
        pytest.skip("LLMC_TEST_DATA is not set: no vocabulary for gpt2")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(DATA, "tiktoken_cache"))
    return tokenizer.load("gpt2")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the folder `tmp_path`/served; its address."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.0)
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def tokens(*paths: Path) -> list[int]:
    found = []
    for path in paths:
        shard = read_header(path)
        found += np.fromfile(path, shard.format.dtype, offset=shard.format.header_bytes).tolist()
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- tinyshakespeare -------------------------------------------------------------------------------


def fake_shakespeare(monkeypatch: pytest.MonkeyPatch, url: str = "http://127.0.0.1:9/") -> bytes:
    """A text of our own in the place of the fixed one, long enough for its validation part."""
    text = ("First: Speak.\n\nAll: Speak,\nspeak!\n\n\n" * 1500).encode()
    source = download.Source(url, len(text), hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(datasets, "TINYSHAKESPEARE", source)
    return text


def test_tinyshakespeare_has_the_known_number_of_tokens(gpt2: tokenizer.Tokenizer, tmp_path: Path) -> None:
    path = Path(DATA) / "tinyshakespeare.txt"
    made = datasets.prepare_tinyshakespeare(tmp_path, path)
    assert (made.val_tokens, made.train_tokens, made.tokenizer) == (32768, 305260, "gpt2")
    assert names(tmp_path) == ["tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"]
    assert (made.train, made.val) == (
        (tmp_path / "tiny_shakespeare_train.bin",), (tmp_path / "tiny_shakespeare_val.bin",)
    )  # fmt: skip
    ids = tokens(*made.val, *made.train)
    assert len(ids) == 32768 + 305260
    assert ids[0] == gpt2.eot
    marked = "<|endoftext|>" + path.read_text().replace("\n\n", "\n\n<|endoftext|>")
    assert gpt2.decode(ids) == marked


def test_tinyshakespeare_s_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """End-of-text in front and after every blank line; three newlines hold one blank line."""
    text = fake_shakespeare(monkeypatch)
    (tmp_path / "in.txt").write_bytes(text)
    made = datasets.prepare_tinyshakespeare(tmp_path / "out", tmp_path / "in.txt", tokenizer="bytes")
    ids = tokens(*made.val, *made.train)
    one = [*b"First: Speak.\n\n", EOT, *b"All: Speak,\nspeak!\n\n", EOT, *b"\n"]
    assert ids == [EOT, *one * 1500]
    assert made.val_tokens == 32768


def test_tinyshakespeare_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, served: str) -> None:
    text = fake_shakespeare(monkeypatch, f"{served}/input.txt")
    (tmp_path / "served" / "input.txt").write_bytes(text)
    out = tmp_path / "deep" / "out"
    stages: list[str] = []
    seen: list[tuple[int, int]] = []
    made = datasets.prepare_tinyshakespeare(
        out, tokenizer="bytes", stage=stages.append, progress=lambda *counts: seen.append(counts)
    )
    assert stages == [f"downloading {served}/input.txt", f"tokenising {out / 'tiny_shakespeare.txt'}"]
    assert seen[-1] == (len(text), len(text))
    assert names(out) == ["tiny_shakespeare.txt", "tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"]
    (tmp_path / "served" / "input.txt").unlink()  # the second time there is nothing to fetch
    assert datasets.prepare_tinyshakespeare(out, tokenizer="bytes") == made


def test_tinyshakespeare_from_elsewhere_must_be_tinyshakespeare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, served: str
) -> None:
    text = fake_shakespeare(monkeypatch, f"{served}/input.txt")
    out = tmp_path / "out"
    for wrong, field in ((text[:-1], "size"), (text.replace(b"All", b"ALL"), "SHA-256")):
        (tmp_path / "in.txt").write_bytes(wrong)
        with pytest.raises(FileFormatError) as caught:
            datasets.prepare_tinyshakespeare(out, tmp_path / "in.txt", tokenizer="bytes")
        assert caught.value.field == field
        (tmp_path / "served" / "input.txt").write_bytes(wrong)
        with pytest.raises(DownloadError, match=field):
            datasets.prepare_tinyshakespeare(out, tokenizer="bytes")
        assert names(out) == []
    with pytest.raises(ConfigError, match=r"none\.txt"):
        datasets.prepare_tinyshakespeare(out, tmp_path / "none.txt", tokenizer="bytes")


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot make the folder"):
        datasets.prepare_tinyshakespeare(tmp_path / "file" / "out", tokenizer="bytes")


# ---- TinyStories -----------------------------------------------------------------------------------

STORIES = {
    "data01.json": [" One day.\n", 'Tim said: "Hi" [and] {so} on, \\ 🙂.'],
    "data00.json": ["Held out."],
    "data02.json": ["", "The end"],
}


def json_of(stories: list[str], indent: int | None = None) -> bytes:
    items = [{"summary": "s", "story": story, "n": [1, {"a": 2}]} for story in stories]
    return json.dumps(items, indent=indent).encode()


def archive(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def stories_ids(*files: str) -> list[int]:
    return [i for file in files for story in STORIES[file] for i in (EOT, *story.strip().encode())]


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "folder"])
@pytest.mark.parametrize("indent", [None, 2])
def test_tinystories(tmp_path: Path, kind: str, indent: int | None) -> None:
    """Validation is data00.json, wherever it lies; other files and macOS's ._ files are passed over."""
    files = {name: json_of(stories, indent) for name, stories in STORIES.items()}
    if kind == "folder":
        (tmp_path / "in").mkdir()
        for name, content in files.items():
            (tmp_path / "in" / name).write_bytes(content)
        source = tmp_path / "in"
    else:
        members = {"sub/._data01.json": b"rubbish", "README.md": b"[]", **files}
        source = archive(tmp_path / f"in.{kind}", members, "w:gz" if kind == "tar.gz" else "w")
    seen: list[tuple[int, int]] = []
    made = datasets.prepare_tinystories(
        tmp_path / "out", source, tokenizer="bytes", threads=2, progress=lambda *counts: seen.append(counts)
    )
    assert tokens(*made.val) == stories_ids("data00.json")
    assert tokens(*made.train) == stories_ids("data01.json", "data02.json")
    assert names(tmp_path / "out") == ["TinyStories_train.bin", "TinyStories_val.bin"]
    size = sum(map(len, files.values())) if kind == "folder" else source.stat().st_size
    assert seen[-1] == (size, size)


def test_tinystories_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, served: str) -> None:
    monkeypatch.setattr(datasets, "TINYSTORIES", download.Source(f"{served}/all.tar.gz"))
    archive(tmp_path / "served" / "all.tar.gz", {name: json_of(stories) for name, stories in STORIES.items()})
    out = tmp_path / "out"
    made = datasets.prepare_tinystories(out, tokenizer="bytes")
    assert made.val_tokens == len(stories_ids("data00.json"))
    assert names(out) == ["TinyStories_all_data.tar.gz", "TinyStories_train.bin", "TinyStories_val.bin"]
    (tmp_path / "served" / "all.tar.gz").unlink()
    assert datasets.prepare_tinystories(out, tokenizer="bytes") == made


def test_tinystories_with_gpt2(gpt2: tokenizer.Tokenizer, tmp_path: Path) -> None:
    source = archive(tmp_path / "in.tar.gz", {name: json_of(stories) for name, stories in STORIES.items()})
    made = datasets.prepare_tinystories(tmp_path, source)
    expected = [i for story in STORIES["data01.json"] + STORIES["data02.json"]
                for i in (gpt2.eot, *gpt2.encode(story.strip()))]  # fmt: skip
    assert tokens(*made.train) == expected


def test_tinystories_in_shards(tmp_path: Path) -> None:
    source = archive(tmp_path / "in.tar.gz", {name: json_of(stories) for name, stories in STORIES.items()})
    made = datasets.prepare_tinystories(tmp_path / "out", source, tokenizer="bytes", shard_tokens=7)
    assert [path.name for path in made.train[:2]] == [
        "TinyStories_train_000000.bin",
        "TinyStories_train_000001.bin",
    ]
    assert tokens(*made.train) == stories_ids("data01.json", "data02.json")
    assert tokens(*made.val) == stories_ids("data00.json")


@pytest.mark.parametrize("threads", [1, 3])
def test_many_stories_keep_their_order_in_bounded_memory(tmp_path: Path, threads: int) -> None:
    """20 MB of JSON, in groups over threads, never in memory together."""
    (tmp_path / "in").mkdir()
    stories = [f"Story {i}. " + "word " * (i % 500) for i in range(16000)]
    (tmp_path / "in" / "data00.json").write_bytes(json_of(["held out"]))
    (tmp_path / "in" / "data01.json").write_bytes(json_of(stories))
    assert (tmp_path / "in" / "data01.json").stat().st_size > 2e7
    tracemalloc.start()
    made = datasets.prepare_tinystories(tmp_path / "out", tmp_path / "in", tokenizer="bytes", threads=threads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6
    expected = b"".join(b"\xff" + story.strip().encode() for story in stories)
    written = np.fromfile(made.train[0], "<u2", offset=1024)
    assert (np.minimum(written, 255).astype(np.uint8) == np.frombuffer(expected, np.uint8)).all()


GOOD = json_of(["a", "b"])


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"", "item 0"),
        (b"{}", "item 0"),
        (b"[", "item 0"),
        (b"[1]", "item 0"),
        (b'["a"]', "item 0"),
        (b'[{"stories": "a"}]', "item 0"),
        (b'[{"story": 1}]', "item 0"),
        (b'[{"story": "a"} {"story": "b"}]', "item 1"),
        (b'[{"story": "a"},]', "item 1"),
        (b'[{"story": "a"}, nonsense]', "item 1"),
        (GOOD[:-1], "item 2"),
        (GOOD[:-5], "item 1"),
        (GOOD + b"x", "item 2"),
        (b'[{"story": "a"}, {"story": "\xff"}]', "item 0"),
        (b'[{"story": "a"}, {"story": "\xc3', "item 1"),
    ],
)
def test_files_that_are_no_lists_of_stories(tmp_path: Path, content: bytes, field: str) -> None:
    source = archive(tmp_path / "in.tar.gz", {"data00.json": GOOD, "data01.json": content})
    with pytest.raises(FileFormatError, match=r"in\.tar\.gz: data01\.json: ") as caught:
        datasets.prepare_tinystories(tmp_path / "out", source, tokenizer="bytes")
    assert caught.value.field == field
    assert names(tmp_path / "out") == []


def test_an_item_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "LONGEST_STORY", 1000)
    monkeypatch.setattr(datasets, "TEXT_CHUNK", 100)
    content = b'[{"story": "' + b"x" * 5000
    source = archive(tmp_path / "in.tar.gz", {"data00.json": GOOD, "data01.json": content})
    with pytest.raises(FileFormatError, match="item 0: is not JSON"):
        datasets.prepare_tinystories(tmp_path / "out", source, tokenizer="bytes")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_json_may_be_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(datasets, "TEXT_CHUNK", chunk)
    content = json_of(STORIES["data01.json"], indent=1)
    found = list(datasets._stories(io.BytesIO(content), "x"))
    assert found == [story.strip() for story in STORIES["data01.json"]]
    raw = json.dumps([{"story": story} for story in STORIES["data01.json"]], ensure_ascii=False).encode()
    assert list(datasets._stories(io.BytesIO(raw), "x")) == found


@pytest.mark.parametrize("missing", ["data00.json", "data01.json"])
def test_a_split_without_stories(tmp_path: Path, missing: str) -> None:
    files = {name: GOOD for name in ("data00.json", "data01.json") if name != missing}
    with pytest.raises(FileFormatError, match=missing):
        datasets.prepare_tinystories(
            tmp_path / "out", archive(tmp_path / "in.tar.gz", files), tokenizer="bytes"
        )
    assert names(tmp_path / "out") == []


def test_damaged_archives(tmp_path: Path) -> None:
    """Cut short anywhere, or with any byte of the compressed data changed: found out, and nothing is left."""
    rng = np.random.default_rng(0)
    noise = [{"story": rng.bytes(3000).hex()} for _ in range(20)]
    files = {"data00.json": GOOD, "data01.json": json.dumps(noise).encode()}
    path = archive(tmp_path / "in.tar.gz", files)
    good = path.read_bytes()
    damaged = [good[:n] for n in (0, 1, 5, 100, len(good) // 2, len(good) - 9, len(good) - 1)]
    for place in (0, 300, len(good) // 2, len(good) - 6):
        damaged.append(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"in\.tar\.gz"):
            datasets.prepare_tinystories(tmp_path / "out", path, tokenizer="bytes")
        assert names(tmp_path / "out") == []


# ---- any text --------------------------------------------------------------------------------------


def test_a_text_is_divided_at_the_end_of_a_line(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "my text.txt").write_text("".join(lines))
    seen: list[tuple[int, int]] = []
    made = datasets.prepare_text(
        tmp_path / "my text.txt",
        tmp_path / "out",
        tokenizer="bytes",
        progress=lambda *counts: seen.append(counts),
    )
    val, train = tokens(*made.val), tokens(*made.train)
    assert (val[0], train[0]) == (EOT, EOT)
    assert bytes(val[1:] + train[1:]).decode() == "".join(lines)
    assert val[-1] == ord("\n")
    assert abs(len(val) - 0.1 * len(train)) < 20
    assert (made.val_tokens, made.train_tokens) == (len(val), len(train))
    assert names(tmp_path / "out") == ["my text_train.bin", "my text_val.bin"]
    size = (tmp_path / "my text.txt").stat().st_size
    assert seen[-1] == (size, size)


def test_a_text_without_validation_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all of it")
    made = datasets.prepare_text(
        tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes", val_fraction=0, name="b"
    )
    assert (made.val, made.val_tokens) == ((), 0)
    assert tokens(*made.train) == [EOT, *b"all of it"]
    assert names(tmp_path / "out") == ["b_train.bin"]


@pytest.mark.parametrize("chunk", [1, 2, 5, 64, 1 << 20])
def test_pieces_do_not_change_the_tokens(
    gpt2: tokenizer.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Whatever the pieces, the ids are those of the whole text."""
    text = (
        "First,  two   spaces.\n\n\n  Then lines \t tabs\r\n\r\nwe've I'll 'tis 123 4567,"
        "don't!?\x1c!\x1d \x85x\u00a0y\u3000日本語 の テキスト 🙂 🙃\n"
        + " " * 20
        + "end"
        + "\n" * 9
        + "e\u0301 \n"
        + "x" * 50
        + " \n last \n"
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(datasets, "TEXT_CHUNK", chunk)
    monkeypatch.setattr(datasets, "GROUP", 1)
    made = datasets.prepare_text(tmp_path / "a.txt", tmp_path, val_fraction=0)
    assert tokens(*made.train) == [gpt2.eot, *gpt2.encode(text)]


def test_a_long_text_has_the_tokens_of_the_whole(
    gpt2: tokenizer.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "TEXT_CHUNK", 1000)
    text = (Path(DATA) / "tinyshakespeare.txt").read_text()[:200_000]
    (tmp_path / "a.txt").write_text(text)
    made = datasets.prepare_text(tmp_path / "a.txt", tmp_path, val_fraction=0)
    assert tokens(*made.train) == [gpt2.eot, *gpt2.encode(text)]


def test_end_of_text_written_out_divides_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>one\n<|endoftext|>two<|endoftext|>")
    made = datasets.prepare_text(tmp_path / "a.txt", tmp_path, tokenizer="bytes", val_fraction=0)
    assert tokens(*made.train) == [EOT, EOT, *b"one\n", EOT, *b"two", EOT]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    made = datasets.prepare_text(tmp_path / "a.txt", tmp_path, tokenizer="bytes", val_fraction=0)
    assert tokens(*made.train) == [EOT, *b"one"]


def test_text_without_white_space_is_cut_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "TEXT_CHUNK", 10)
    monkeypatch.setattr(datasets, "LONGEST_PIECE", 25)
    text = "日本語" * 100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with open(tmp_path / "a.txt", "rb") as file:
        pieces = list(datasets._pieces(file, tmp_path / "a.txt", 0, 900, 900, None, " \n\r\t"))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 35
    made = datasets.prepare_text(
        tmp_path / "a.txt", tmp_path, tokenizer="bytes"
    )  # one line: cut at a character
    assert bytes(tokens(*made.train)[1:]).decode() in text


@pytest.mark.parametrize("position", [0, 1, 4, 5, 99, 199])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_text_that_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int, chunk: int
) -> None:
    monkeypatch.setattr(datasets, "TEXT_CHUNK", chunk)
    content = bytearray("é".encode() * 100)
    content[position] = 0xFF
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(FileFormatError, match="not UTF-8") as caught:
        datasets.prepare_text(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes", val_fraction=0)
    assert caught.value.field == f"byte {position - position % 2}" if position % 2 else f"byte {position}"
    assert names(tmp_path / "out") == []


def test_text_that_ends_within_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc \xc3")
    with pytest.raises(FileFormatError, match="byte 4: is not UTF-8"):
        datasets.prepare_text(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes", val_fraction=0)


def test_texts_and_options_that_cannot_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text, fraction in ((b"", 0.1), (b"", 0), (b"one line\n", 0.1), (b"ab\n", 0.9)):
        (tmp_path / "a.txt").write_bytes(text)
        with pytest.raises(FileFormatError, match=r"a\.txt: size: "):
            datasets.prepare_text(tmp_path / "a.txt", out, tokenizer="bytes", val_fraction=fraction)
    for fraction in (-0.1, 1, 2, float("nan")):
        with pytest.raises(ConfigError, match="val_fraction"):
            datasets.prepare_text(tmp_path / "a.txt", out, tokenizer="bytes", val_fraction=fraction)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(ConfigError, match="threads"):
        datasets.prepare_text(tmp_path / "a.txt", out, tokenizer="bytes", threads=0)
    with pytest.raises(ConfigError, match="cannot read"):
        datasets.prepare_text(tmp_path / "none.txt", out, tokenizer="bytes")
    with pytest.raises(ConfigError, match="cannot read"):
        datasets.prepare_text(tmp_path, out, tokenizer="bytes")
    with pytest.raises(ConfigError, match="tokenizer"):
        datasets.prepare_text(tmp_path / "a.txt", out, tokenizer="gpt3")
    assert not out.exists() or names(out) == []
