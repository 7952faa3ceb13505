"""Text to ids and back, and llm.c's tokenizer file, whose every field is checked."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc import tokenizer
from llmc.errors import ConfigError, DownloadError, FileFormatError, LlmcError, MissingDependencyError

DATA = os.environ.get("LLMC_TEST_DATA", "")
ODD_TEXTS = ["", "plain", "naïve café", "日本語", "🙂🙃", "tab\tand\r\nnewline", "a\x00b", "<|endoftext|>"]
GPT2_MAGIC = 20240328


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Iterator[tokenizer.TiktokenTokenizer]:
    if not DATA:
        pytest.skip("LLMC_TEST_DATA is not set: no vocabulary for gpt2")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(DATA, "tiktoken_cache"))
    yield tokenizer.TiktokenTokenizer()


def header(*fields: int) -> bytes:
    return struct.pack(f"<{len(fields)}i", *fields).ljust(1024, b"\0")


# ---- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_bytes_round_trip(text: str) -> None:
    t = tokenizer.load("bytes")
    ids = t.encode(text)
    assert ids == list(text.encode())
    assert t.decode(ids) == text
    assert t.decode_bytes(ids) == text.encode()


def test_bytes_has_one_id_between_texts() -> None:
    t = tokenizer.ByteTokenizer()
    assert (t.name, t.vocab_size, t.eot) == ("bytes", 257, 256)
    assert t.decode([97, t.eot, 98]) == "ab"


def test_bytes_that_are_no_utf8_are_replaced_not_refused() -> None:
    assert tokenizer.ByteTokenizer().decode([0xFF, 0x41]) == "\ufffdA"


def test_undecodable_command_line_bytes_survive() -> None:
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert tokenizer.ByteTokenizer().encode(text) == list(b"caf\xe9")
    with pytest.raises(ConfigError, match="character 1"):
        tokenizer.ByteTokenizer().encode("a\ud800")


@pytest.mark.parametrize("wrong", [-1, 257, 2**40])
def test_bytes_refuses_ids_out_of_range(wrong: int) -> None:
    with pytest.raises(ConfigError, match=rf"id {wrong} at position 1"):
        tokenizer.ByteTokenizer().decode([0, wrong])


# ---- gpt2 ------------------------------------------------------------------------------------------


def test_gpt2_known_ids(gpt2: tokenizer.TiktokenTokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot) == ("gpt2", 50257, 50256)
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_gpt2_round_trip(gpt2: tokenizer.TiktokenTokenizer, text: str) -> None:
    ids = gpt2.encode(text)
    assert gpt2.eot not in ids  # ordinary text, even where it spells the special token
    assert gpt2.decode(ids) == text
    assert gpt2.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("wrong", [-1, 50257, 2**40])
def test_gpt2_refuses_ids_out_of_range(gpt2: tokenizer.TiktokenTokenizer, wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"id {wrong} at position 0"):
        gpt2.decode([wrong])


def no_network(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let tiktoken find nothing: neither in a cache nor in its own memory."""
    import tiktoken

    def get_encoding(name: str) -> None:
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), ValueError("Hash mismatch"), TimeoutError()]
)
def test_gpt2_without_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    no_network(monkeypatch, error)
    with pytest.raises(DownloadError, match="TIKTOKEN_CACHE_DIR") as caught:
        tokenizer.load("gpt2")
    assert "network" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gpt2_in_an_empty_cache_with_no_network(tmp_path: Path) -> None:
    """The real thing: requests through a proxy that nobody listens at."""
    environment = {
        **os.environ,
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"),
        **dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9"),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), ""),
    }
    code = (
        "from llmc import tokenizer, errors\n"
        "try:\n    tokenizer.load('gpt2')\n"
        "except errors.DownloadError as error:\n    print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "TIKTOKEN_CACHE_DIR" in out.stdout, out.stderr


def test_gpt2_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(MissingDependencyError, match="pip install tiktoken"):
        tokenizer.load("gpt2")


# ---- the tokenizer file ----------------------------------------------------------------------------


def test_gpt2_file_is_llm_c_s_to_the_byte_count(gpt2: tokenizer.TiktokenTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "gpt2_tokenizer.bin"
    tokenizer.write_tokenizer_file(path, gpt2.tokens(), gpt2.eot)
    assert path.stat().st_size == 372_108
    assert struct.unpack_from("<4i", path.read_bytes()) == (GPT2_MAGIC, 2, 50257, 50256)
    read = tokenizer.load(path)
    assert (read.vocab_size, read.eot) == (50257, 50256)
    ids = [*gpt2.encode("First Citizen:\nBefore we proceed — 日本"), gpt2.eot]
    assert read.decode(ids) == gpt2.decode(ids)


def test_version_1_round_trip(tmp_path: Path) -> None:
    tokens = [bytes([i % 255 + 1] * (i % 7 + 1)) for i in range(50257)]
    path = tmp_path / "v1.bin"
    tokenizer.write_tokenizer_file(path, tokens, 50256, version=1)
    assert struct.unpack_from("<4i", path.read_bytes()) == (GPT2_MAGIC, 1, 50257, 0)
    assert tokenizer.read_tokenizer_file(path) == (tokens, 50256)


def test_file_by_hand(tmp_path: Path) -> None:
    """The layout, spelled out: written and read."""
    data = header(GPT2_MAGIC, 2, 3, 1) + b"\x01a" + b"\x03eot" + b"\x02\xff\x00"
    path = tmp_path / "t.bin"
    tokenizer.write_tokenizer_file(path, [b"a", b"eot", b"\xff\x00"], 1)
    assert path.read_bytes() == data
    t = tokenizer.load(str(path))
    assert (t.name, t.vocab_size, t.eot) == (str(path), 3, 1)
    assert t.decode_bytes([2, 0]) == b"\xff\x00a"
    with pytest.raises(ConfigError, match="id 3"):
        t.decode([3])


def test_a_file_decodes_but_does_not_encode(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    tokenizer.write_tokenizer_file(path, [b"a"], 0)
    with pytest.raises(ConfigError, match=r"t\.bin can decode but not encode"):
        tokenizer.load(path).encode("a")


BODY = b"\x01a\x03eot\x02bc"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "header"),
        (header(GPT2_MAGIC, 2, 3, 1)[:1023], "header"),
        (header(20240326, 2, 3, 1) + BODY, "magic"),
        (header(GPT2_MAGIC, 3, 3, 1) + BODY, "version"),
        (header(GPT2_MAGIC, 0, 3, 1) + BODY, "version"),
        (header(GPT2_MAGIC, 2, 0, 0) + BODY, "token count"),
        (header(GPT2_MAGIC, 2, -1, 0) + BODY, "token count"),
        (header(GPT2_MAGIC, 2, 2**31 - 1, 0) + BODY, "token count"),
        (header(GPT2_MAGIC, 1, 3, 0) + BODY, "token count"),
        (header(GPT2_MAGIC, 2, 3, 3) + BODY, "end-of-text id"),
        (header(GPT2_MAGIC, 2, 3, -1) + BODY, "end-of-text id"),
        (header(GPT2_MAGIC, 2, 3, 1) + BODY[:-1], "token 2"),
        (header(GPT2_MAGIC, 2, 3, 1) + BODY[:-3], "token 2"),
        (header(GPT2_MAGIC, 2, 3, 1) + b"\x01a\x00\x03eot\x02bc", "token 1"),
        (header(GPT2_MAGIC, 2, 3, 1) + BODY + b"x", "size"),
    ],
)
def test_bad_files_are_refused_by_name_and_field(tmp_path: Path, data: bytes, field: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as caught:
        tokenizer.load(path)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{path}: {field}: ")


def test_any_single_byte_changed_gives_an_answer_or_a_typed_error(tmp_path: Path) -> None:
    good = header(GPT2_MAGIC, 2, 3, 1) + BODY
    path = tmp_path / "fuzzed.bin"
    for place in [*range(16), *range(1024, len(good))]:
        for value in (0, 1, 127, 128, 255):
            data = bytearray(good)
            data[place] = value
            path.write_bytes(data)
            try:
                assert len(tokenizer.TokenizerFile(path).tokens()) in (1, 2, 3)
            except LlmcError:
                pass


@pytest.mark.parametrize(
    ("tokens", "eot", "version", "message"),
    [
        ([b""], 0, 2, "token 0 has 0 bytes"),
        ([b"a", b"x" * 256], 0, 2, "token 1 has 256 bytes"),
        ([b"a"], 1, 2, "eot"),
        ([b"a"], 0, 1, "version: 1 is for GPT-2"),
        ([b"a"], 0, 3, "version: 3"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, tokens: list[bytes], eot: int, version: int, message: str
) -> None:
    path = tmp_path / "t.bin"
    with pytest.raises(ConfigError, match=message):
        tokenizer.write_tokenizer_file(path, tokens, eot, version=version)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        tokenizer.write_tokenizer_file(path, [b"a"], 0)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_folder_and_missing_file_and_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        tokenizer.write_tokenizer_file(tmp_path / "file" / "t.bin", [b"a"], 0)
    with pytest.raises(ConfigError, match="cannot write"):
        tokenizer.write_tokenizer_file(tmp_path / "none" / "t.bin", [b"a"], 0)
    with pytest.raises(ConfigError, match="cannot read"):
        tokenizer.read_tokenizer_file(tmp_path / "none.bin")
    with pytest.raises(ConfigError, match="neither bytes, gpt2 nor a tokenizer file"):
        tokenizer.load("gpt3")
