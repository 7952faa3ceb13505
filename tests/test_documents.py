"""Documents in JSON lines, parquet files, folders and datasets of the hub, and the token files made of them."""

from __future__ import annotations

import gzip
import http.server
import itertools
import json
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import __main__, datasets, documents
from llmc import tokenizer as tokenizers
from llmc.data import Shards, read_header
from llmc.errors import ConfigError, DownloadError, FileFormatError, LlmcError, MissingDependencyError

EOT = 256
TEXTS = ["One day.\n", "", "日本語 🙂", " two  spaces\tand \"quotes\" \\ ", "<|endoftext|> is text here", "last"]


def lines(texts: list[str], field: str = "text", **more: Any) -> bytes:
    return b"".join(json.dumps({"id": n, field: text, **more}).encode() + b"\n" for n, text in enumerate(texts))


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def tokens(*paths: Path) -> list[int]:
    found = []
    for path in paths:
        shard = read_header(path)
        found += np.fromfile(path, shard.format.dtype, offset=shard.format.header_bytes).tolist()
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- JSON lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    """In the order of the file; empty lines are none, and a byte order mark is no text."""
    content = b"\xef\xbb\xbf" + lines(TEXTS[:3], "body") + b"\n \r\n" + lines(TEXTS[3:], "body")[:-1]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    seen: list[tuple[int, int]] = []
    found = documents.read(path, field="body", progress=lambda *counts: seen.append(counts))
    assert list(found) == TEXTS
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        (b"{", "line 3", "is not JSON: "),
        (b'{"text": "a"} {"text": "b"}', "line 3", "is not JSON: Extra data"),
        (b'{"text": "\xff"}', "line 3", "is not UTF-8 text"),
        (b"[" * 100_000, "line 3", "is not JSON: "),
        (b'["a"]', "line 3", "is a list, not an object with the field 'text'"),
        (b'{"body": "a", "id": 1}', "line 3", "has no field 'text'; the fields there are body, id"),
        (b"{}", "line 3", "has no field 'text'; there are none"),
        (b'{"text": null}', "line 3, 'text'", "is a NoneType, not text"),
        (b'{"text": 1}', "line 3, 'text'", "is a int, not text"),
        (b'{"text": "ab\\ud83d"}', "line 3, 'text'", "character 2 is half a character"),
        (b'{"text": "' + b"x" * 200 + b'"}', "line 3", "is longer than 150 bytes"),
    ],
)
def test_bad_lines_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, field: str, message: str
) -> None:
    if b"x" in line:
        monkeypatch.setattr(documents, "LONGEST_LINE", 150)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:2]) + line + b"\n" + lines(TEXTS))
    with pytest.raises(FileFormatError) as caught:
        datasets.prepare_documents(path, tmp_path / "out", tokenizer="bytes")
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{path}: {field}: {message}")
    assert names(tmp_path / "out") == []


def test_damaged_compression_is_found(tmp_path: Path) -> None:
    good = gzip.compress(lines([str(n) * 50 for n in range(200)]))
    path = tmp_path / "a.jsonl.gz"
    for content in (good[:-1], good[: len(good) // 2], good[:-6] + b"\x55" + good[-5:], b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"a\.jsonl\.gz: line \d+: (cannot be read|is not)"):
            list(documents.read(path))


# ---- parquet ---------------------------------------------------------------------------------------


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ROWS", 2)
    path = write_parquet(tmp_path / "a.parquet", {"id": range(6), "body": TEXTS}, row_group_size=4)
    seen: list[tuple[int, int]] = []
    assert list(documents.read(path, field="body", progress=lambda *counts: seen.append(counts))) == TEXTS
    size = path.stat().st_size
    assert seen[-1] == (size, size) and (size * 2 // 6, size) in seen


def test_parquet_is_read_row_group_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before a damaged group is given."""
    monkeypatch.setattr(documents, "ROWS", 100)
    texts = [f"{n:04} " + "x" * 500 for n in range(400)]
    options = {"row_group_size": 100, "compression": "none", "use_dictionary": False}
    path = write_parquet(tmp_path / "a.parquet", {"id": range(400), "text": texts}, **options)
    data = bytearray(path.read_bytes())
    place = data.index(b"0250 x")
    data[place - 4 : place] = b"\xff\xff\xff\x7f"  # the length of the text
    path.write_bytes(data)
    found = documents.read(path)
    assert list(itertools.islice(found, 200)) == texts[:200]
    with pytest.raises(FileFormatError, match=r"a\.parquet: row 2\d\d: cannot be read: "):
        list(found)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, "columns: none is called 'text'; the fields there are body, id"),
        ({"text": ["a", None]}, "row 1, 'text': is a NoneType, not text"),
        ({"text": [1, 2]}, "row 0, 'text': is a int, not text"),
        ({"text": [["a"]]}, "row 0, 'text': is a list, not text"),
        ({"text": [b"\xff"]}, "row 0, 'text': is a bytes, not text"),
    ],
)
def test_columns_that_hold_no_text(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(FileFormatError) as caught:
        datasets.prepare_documents(path, tmp_path / "out", tokenizer="bytes", val_fraction=0)
    assert str(caught.value) == f"{path}: {message}"
    assert names(tmp_path / "out") == []


def test_damaged_parquet_gives_an_answer_or_a_typed_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS * 20}, row_group_size=50)
    good = path.read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        data[draw.integers(len(data))] = draw.integers(256)
        path.write_bytes(data[: draw.choice([len(data), draw.integers(len(data))])])
        try:
            list(documents.read(path))
        except LlmcError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 30


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"a\.parquet: .* pip install pyarrow"):
        list(documents.read(tmp_path / "a.parquet"))


# ---- folders and names -----------------------------------------------------------------------------


def test_a_folder_s_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.jsonl").write_bytes(lines(TEXTS[2:4]))
    write_parquet(folder / "a.parquet", {"text": TEXTS[:2]})
    (folder / "c.ndjson.gz").write_bytes(gzip.compress(lines(TEXTS[4:])))
    (folder / "README.md").write_text("no documents")
    seen: list[tuple[int, int]] = []
    assert list(documents.read(folder, progress=lambda *counts: seen.append(counts))) == TEXTS
    total = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".md")
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_a_folder_called_like_a_dataset_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("owner/name/a.jsonl").write_bytes(lines(TEXTS))
    assert list(documents.read("owner/name")) == TEXTS
    assert documents.short_name("owner/name/") == "name" and documents.short_name("x/a.b.jsonl.gz") == "a.b"


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "empty").mkdir()
    for source, options, message in (
        (tmp_path / "empty", {}, "source: the folder .*empty holds no file in .jsonl, "),
        (tmp_path / "none.jsonl", {}, r"source: cannot read .*none\.jsonl: No such file"),
        ("data/none.parquet", {}, r"source: cannot read data/none\.parquet: No such file"),
        (tmp_path / "a.jsonl", {"split": "test"}, "split: 'test' is for a dataset of the hub"),
        (tmp_path / "a.jsonl", {"config_name": "en"}, "config_name: 'en' is for a dataset of the hub"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(documents.read(source, **options))


# ---- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the package `datasets` takes for owner/name, and nobody to ask whether there is one."""
    library = pytest.importorskip("datasets")
    load, folder = library.load_dataset, tmp_path / "hub"
    folder.mkdir()

    def local(name: str, *args: Any, **options: Any) -> Any:
        assert name == "owner/name" and options["streaming"]
        return load(str(folder), *args, **options)

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "load_dataset", local)
    monkeypatch.setattr(documents, "_ask", lambda name: None)
    return folder


def test_a_dataset_of_the_hub(hub: Path, tmp_path: Path) -> None:
    (hub / "train.jsonl").write_bytes(lines(TEXTS))
    write_parquet(tmp_path / "x.parquet", {"body": ["other"]})
    (hub / "validation.jsonl").write_bytes(lines(TEXTS[:2]))
    seen: list[tuple[int, int]] = []
    assert list(documents.read("owner/name", progress=lambda *counts: seen.append(counts))) == TEXTS
    assert seen[-1] == (sum(map(len, TEXTS)), 0)
    assert list(documents.read("owner/name", split="validation")) == TEXTS[:2]
    made = datasets.prepare_documents("owner/name", tmp_path / "out", tokenizer="bytes", val_fraction=0)
    assert made.train == (tmp_path / "out" / "name_train.bin",)
    for options, message in (
        ({"split": "test"}, "dataset: owner/name: ValueError: Bad split: test. Available splits: "),
        ({"config_name": "en"}, "dataset: owner/name: ValueError: BuilderConfig 'en' not found"),
        ({"field": "body"}, "field: owner/name has no column 'body'; the fields there are id, text"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(documents.read("owner/name", **options))


def test_rows_of_the_hub_that_hold_no_text(hub: Path) -> None:
    (hub / "train.jsonl").write_bytes(lines(["a"]) + b'{"text": null}\n')
    with pytest.raises(FileFormatError, match="owner/name: row 1, 'text': is a NoneType, not text"):
        list(documents.read("owner/name"))
    (hub / "train.jsonl").write_bytes(lines(["a"] * 3) + b"nonsense\n")
    with pytest.raises(DownloadError, match="owner/name: "):
        list(documents.read("owner/name"))


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"X-Error-Code": "RepoNotFound"}, "no such dataset on the hub"),
        ({"X-Error-Code": "GatedRepo"}, "asks for permission"),
        ({}, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], message: str) -> None:
    pytest.importorskip("datasets")

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403 if "Gated" in str(headers) else 404)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(DownloadError, match=f"owner/none: .*{message}"):
            list(documents.read("owner/none"))
        server.shutdown()
        thread.join()
    with pytest.raises(DownloadError, match="owner/none: the hub cannot be reached") as caught:
        list(documents.read("owner/none"))
    assert "\n" not in str(caught.value)


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        list(documents.read("owner/name"))


# ---- token files -----------------------------------------------------------------------------------


def ids_of(texts: list[str]) -> list[int]:
    return [i for text in texts for i in (EOT, *text.encode())]


@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 1 / 3])
def test_documents_held_out_are_spread_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    monkeypatch.setattr(datasets, "GROUP", 20)
    texts = [f"document {n}" for n in range(60)]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    made = datasets.prepare_documents(
        tmp_path / "a.jsonl", tmp_path / "out", tokenizer="bytes", val_fraction=fraction, threads=3
    )
    every = round(1 / fraction) if fraction else 100
    held = [text for n, text in enumerate(texts, 1) if n % every == 0]
    assert tokens(*made.val) == ids_of(held)
    assert tokens(*made.train) == ids_of([text for text in texts if text not in held])
    assert names(tmp_path / "out") == ["a_train.bin", "a_val.bin"][: 2 if fraction else 1]
    assert (made.train_tokens, made.val_tokens) == (len(tokens(*made.train)), len(tokens(*made.val)))


def test_documents_are_left_as_they_are(tmp_path: Path) -> None:
    """Whatever they hold, the name of end-of-text included."""
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    options: dict[str, Any] = {"tokenizer": "bytes", "val_fraction": 0}
    made = datasets.prepare_documents(tmp_path / "a.jsonl", tmp_path / "out", **options)
    assert tokens(*made.train) == ids_of(TEXTS)
    made = datasets.prepare_documents(
        tmp_path / "a.jsonl", tmp_path / "few", name="b", max_documents=2, shard_tokens=5, **options
    )
    assert tokens(*made.train) == ids_of(TEXTS[:2])
    assert [path.name for path in made.train] == ["b_train_000000.bin", "b_train_000001.bin", "b_train_000002.bin"]


def test_many_documents_keep_their_order_in_bounded_memory(tmp_path: Path) -> None:
    texts = [f"Document {n}. " + "word " * (n % 500) for n in range(8000)]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    assert (tmp_path / "a.jsonl").stat().st_size > 1e7
    tracemalloc.start()
    made = datasets.prepare_documents(
        tmp_path / "a.jsonl", tmp_path / "out", tokenizer="bytes", threads=2, val_fraction=0
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    expected = b"".join(b"\xff" + text.encode() for text in texts)
    written = np.fromfile(made.train[0], "<u2", offset=1024)
    assert (np.minimum(written, 255).astype(np.uint8) == np.frombuffer(expected, np.uint8)).all()


def test_too_few_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for texts, fraction, message in (
        ([], 0, "documents: there is none for training"),
        ([], 0.5, "documents: there is none for training, divided at 0.5"),
        (["a"] * 9, 0.1, "documents: there is none for validation, divided at 0.1"),
    ):
        path.write_bytes(lines(texts))
        with pytest.raises(FileFormatError, match=f"a.jsonl: {message}"):
            datasets.prepare_documents(path, tmp_path / "out", tokenizer="bytes", val_fraction=fraction)
        assert names(tmp_path / "out") == []
    for options, message in (
        ({"val_fraction": 1}, "val_fraction"), ({"max_documents": 0}, "max_documents"), ({"threads": 0}, "threads"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            datasets.prepare_documents(path, tmp_path / "out", tokenizer="bytes", **options)


# ---- other vocabularies ----------------------------------------------------------------------------


def byte_vocabulary(more: int = 0) -> dict[str, int]:
    from llmc._tokenizer.huggingface import ALPHABET

    names = ["<unk>", "<s>", "</s>", *ALPHABET, *(f"<more {n}>" for n in range(more))]
    return {name: n for n, name in enumerate(names)}


def large(folder: Path) -> Path:
    """A byte-level vocabulary of more than 65,536 entries."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "post_processor": None,
        "decoder": level, "model": {"type": "BPE", "vocab": byte_vocabulary(66000), "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def llama(folder: Path) -> Path:
    """As Llama 2's: a space in front of any text, bos in front of a document."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdenopsu"]
    merges = [("\u2581", "o"), ("n", "c"), ("\u2581o", "nc"), ("\u2581onc", "e"), ("\u2581", "\u2581"), ("a", "b")]
    vocabulary += ["".join(pair) for pair in merges]
    space, back = {"String": " "}, {"String": "\u2581"}
    spec = {
        "version": "1.0", "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [
            {"id": n, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for n, name in enumerate(vocabulary[:3])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": space, "content": "\u2581"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": back, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": {name: n for n, name in enumerate(vocabulary)}, "byte_fallback": True,
                  "unk_token": "<unk>", "fuse_unk": True, "merges": [" ".join(pair) for pair in merges]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama3(folder: Path) -> Path:
    """As Llama 3's, where what ends a line may stand in one token with what comes before or after."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    merges = [".\u010a", "\u010a\u0120", "\u010a\u0120\u010a", "\u0120a", "\u0120\u0120"]
    vocabulary = byte_vocabulary()
    vocabulary |= {name: len(vocabulary) + n for n, name in enumerate(merges)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    spec = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [f"{name[:-1]} {name[-1]}" for name in merges]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    return folder


@pytest.mark.parametrize("make", [large, llama])
def test_documents_in_a_folder_s_vocabulary(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """uint16 or uint32 as it needs; what stands in front of a document is what its makers have there."""
    pytest.importorskip("tokenizers")
    (tmp_path / "model").mkdir()
    t = tokenizers.load(make(tmp_path / "model"))
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    made = datasets.prepare_documents(tmp_path / "a.jsonl", tmp_path, tokenizer=t.name, val_fraction=0, threads=2)
    assert read_header(made.train[0]).format.name == ("llama3" if make is large else "gpt2")
    first = 2 if make is large else 1
    assert tokens(*made.train) == [i for text in TEXTS for i in (first, *t.encode(text))]
    assert (made.tokenizer, made.vocab_size) == (str(tmp_path / "model"), t.vocab_size)
    # And training reads them, unless its model knows fewer ids.
    assert Shards(made.train, 1, 4, vocab_size=t.vocab_size).next()[0][0, 0] == first
    with pytest.raises(FileFormatError, match="is not in a vocabulary of 1"):
        Shards(made.train, 1, 4, vocab_size=1).next()


@pytest.mark.parametrize(("make", "chunk"), [(llama, 7), (llama, 64), *((llama3, chunk) for chunk in range(2, 9))])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], chunk: int
) -> None:
    """Of a document, too.  Llama 2's tokenizer puts a space in front of a text: in front of its first piece alone."""
    pytest.importorskip("tokenizers")
    t = tokenizers.load(make(tmp_path))
    monkeypatch.setattr(datasets, "TEXT_CHUNK", chunk)
    monkeypatch.setattr(datasets, "GROUP", 1)
    texts = ["once  a   cab,\n once upon\n\n  once\n", "  once a sab\tand  a  b ", "", " once", "once a" * 20 + "\n "]
    texts += ["a.\n a. a.\n\n a\n \n a a\n \n\n  a.", "a. \n \n a.\n"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    made = datasets.prepare_text(tmp_path / "a.txt", tmp_path, tokenizer=t.name, val_fraction=0)
    expected = [i for text in texts for i in (1, *t.encode(text))]
    assert tokens(*made.train) == expected
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    sizes: list[int] = []
    encode_batch = tokenizers.HuggingFaceTokenizer.encode_batch

    def measured(t: Any, texts: list[str], continued: bool = False) -> list[list[int]]:
        sizes.extend(map(len, texts))
        return encode_batch(t, texts, continued)

    monkeypatch.setattr(tokenizers.HuggingFaceTokenizer, "encode_batch", measured)
    made = datasets.prepare_documents(tmp_path / "a.jsonl", tmp_path, tokenizer=t.name, val_fraction=0)
    assert tokens(*made.train) == expected
    assert max(sizes) <= max(chunk, 32) < max(map(len, texts))  # more than a chunk where there is no place to cut
    assert t.vocab_size - 3 in expected  # the longest token that was learnt


# ---- the command line ------------------------------------------------------------------------------


def test_data_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    for name in ("in", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(TEXTS, "body"))
    llama(tmp_path / "model")
    words = ["data", "in", "--field", "body", "--tokenizer", "model", "--val-fraction", "0.5", "--max-documents", "4"]
    assert __main__.main([*words, "--out", "out", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    t = tokenizers.load("model")
    assert tokens(Path("out/in_val.bin")) == [1, *t.encode(TEXTS[1]), 1, *t.encode(TEXTS[3])]
    assert out.startswith("tokenising in\ntrain ")
    rest = f"--init MODEL, of a vocabulary of {t.vocab_size} or more\n"
    assert out.endswith(f"llmc train --train-data 'out/in_train.bin' --val-data 'out/in_val.bin' {rest}")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert __main__.main([*words, "--out", "out"]) == 0
    assert capsys.readouterr().out.endswith("--init 'model'\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shakespeare", "dataset: 'shakespeare' is none of tinyshakespeare, tinystories, text, .jsonl, "),
        ("a.txt", "on the hub (a text? llmc data text a.txt)"),
        ("none.jsonl", "source: cannot read none.jsonl: No such file or directory"),
        ("a.jsonl x", "file: 'x' is one too many"),
        ("a.jsonl --from x", "from: 'x' is one too many: name it in place of a.jsonl"),
        ("a.jsonl --split test", "split: 'test' is for a dataset of the hub; a.jsonl is a file or folder"),
        ("a.jsonl --field body", "a.jsonl: line 1: has no field 'body'; the fields there are id, text"),
        ("text a.txt --field body", "field: 'body' is for documents; text has none"),
        ("tinystories --max-documents 5", "max_documents: 5 is for documents; tinystories has none"),
        ("tinyshakespeare --val-fraction 0.1", "val_fraction: tinyshakespeare has a validation part of its own"),
        ("a.jsonl --tokenizer nowhere", "tokenizer: 'nowhere' is neither bytes, gpt2 nor a tokenizer file or folder"),
    ],
)
def test_command_lines_that_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    assert __main__.main(["data", "--tokenizer", "bytes", *words.split()]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert names(tmp_path / "data") == []
