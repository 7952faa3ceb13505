"""Token shards: what is written, what is read back, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc import data
from llmc.data import Shards, ShardWriter, find_shards, read_header, write_shard
from llmc.errors import ConfigError, FileFormatError, LlmcError

GPT2, LLAMA3 = 20240520, 20240801
FORMATS = ("gpt2", "llama3", "plain")


def header(*fields: int) -> bytes:
    return struct.pack(f"<{len(fields)}i", *fields).ljust(1024, b"\0")


def shard(path: Path, n: int, start: int = 0, format: str = "gpt2") -> Path:
    write_shard(path, np.arange(start, start + n), vocab_size=60000, format=format)
    return path


# ---- writing ---------------------------------------------------------------------------------------


def test_the_bytes_of_the_three_formats(tmp_path: Path) -> None:
    ids, path = [1, 2, 515], tmp_path / "a.bin"
    write_shard(path, ids, vocab_size=50257)
    assert path.read_bytes() == header(GPT2, 1, 3) + struct.pack("<3H", *ids)
    write_shard(path, ids, vocab_size=65537)
    assert path.read_bytes() == header(LLAMA3, 7, 3) + struct.pack("<3I", *ids)
    write_shard(path, ids, vocab_size=50257, format="plain")
    assert path.read_bytes() == struct.pack("<3i", *ids)


@pytest.mark.parametrize(("vocab_size", "expected"), [(257, "gpt2"), (65536, "gpt2"), (65537, "llama3")])
def test_the_vocabulary_decides_the_format(tmp_path: Path, vocab_size: int, expected: str) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [0, vocab_size - 1], vocab_size=vocab_size)
    assert read_header(path).format.name == expected
    x, y = Shards(path, 1, 1).next()
    assert (x[0, 0], y[0, 0]) == (0, vocab_size - 1)


@pytest.mark.parametrize("format", FORMATS)
def test_pieces_make_the_same_file_as_one_write(tmp_path: Path, format: str) -> None:
    ids = np.random.default_rng(1).integers(0, 50257, 1000)
    write_shard(tmp_path / "whole.bin", ids, vocab_size=50257, format=format)
    with ShardWriter(tmp_path / "pieces.bin", vocab_size=50257, format=format) as writer:
        for piece in (ids[:1], ids[1:1], ids[1:500].tolist(), ids[500:].astype(np.uint16)):
            writer.write(piece)
    assert writer.tokens == 1000
    assert writer.paths == (tmp_path / "pieces.bin",)
    assert (tmp_path / "pieces.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_stream_is_cut_into_numbered_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train.bin", vocab_size=100, shard_tokens=40) as writer:
        writer.write(np.arange(90))
        writer.write(np.arange(90, 100))
    assert [path.name for path in writer.paths] == [f"train_{i:06d}.bin" for i in range(3)]
    assert [read_header(path).tokens for path in writer.paths] == [40, 40, 20]
    read = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in writer.paths])
    assert (read == np.arange(100)).all()
    # Twice would leave stale shards among new ones where the second run makes fewer.
    with pytest.raises(ConfigError, match="train_000000.bin is there already"):
        ShardWriter(tmp_path / "train.bin", vocab_size=100, shard_tokens=40)


@pytest.mark.parametrize("wrong", [[-1], [0, 100], np.array([2**40])])
def test_ids_out_of_range_are_refused_and_nothing_is_left(tmp_path: Path, wrong: list[int]) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(ConfigError, match="not in a vocabulary of 100"):
        with ShardWriter(tmp_path / "a.bin", vocab_size=100) as writer:
            writer.write([1, 2, 3])
            writer.write(wrong)
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_other_arguments_that_cannot_work(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for message, options in (
        ("vocab_size: 0", {"vocab_size": 0}),
        ("vocab_size: 70000", {"vocab_size": 70000, "format": "gpt2"}),
        ("vocab_size", {"vocab_size": 2**20 + 1, "format": "plain"}),
        ("format: 'gpt3'", {"vocab_size": 9, "format": "gpt3"}),
        ("shard_tokens: 0", {"vocab_size": 9, "shard_tokens": 0}),
        ("shard_tokens", {"vocab_size": 9, "shard_tokens": 2**31}),
    ):
        with pytest.raises(ConfigError, match=message):
            ShardWriter(path, **options)
    with pytest.raises(ConfigError, match="float64"):
        write_shard(path, np.array([1.5]), vocab_size=9)
    with pytest.raises(ConfigError, match="nothing to write"):
        write_shard(path, [], vocab_size=9)
    with pytest.raises(ConfigError, match="cannot write"):
        write_shard(tmp_path / "none" / "a.bin", [1], vocab_size=9)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "a.bin", 10)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"a\.bin: No space left"):
        shard(path, 20)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_more_tokens_than_a_header_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_SHARD_TOKENS", 10)
    with pytest.raises(ConfigError, match="shard_tokens: .*would pass 10 tokens"):
        shard(tmp_path / "a.bin", 11)
    shard(tmp_path / "a.bin", 10)
    shard(tmp_path / "b.bin", 11, format="plain")  # no header, no limit


# ---- reading in order ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_batches_follow_one_another(tmp_path: Path, format: str) -> None:
    """B*T tokens each, targets one further on, the last of a batch being the first of the next."""
    reader = Shards(shard(tmp_path / "a.bin", 3 * 6 + 1, format=format), 2, 3)
    assert (reader.num_tokens, reader.num_batches) == (19, 3)
    for epoch in range(2):
        for batch in range(3):
            x, y = reader.next()
            first = batch * 6
            assert x.tolist() == [[first, first + 1, first + 2], [first + 3, first + 4, first + 5]], epoch
            assert (y == x + 1).all()
            for array in (x, y):
                assert array.dtype == np.int32
                assert array.shape == (2, 3)
                assert array.flags.c_contiguous


@pytest.mark.parametrize(("tokens", "batches"), [(7, 1), (12, 1), (13, 2), (18, 2), (19, 3)])
def test_a_batch_takes_one_token_more_than_it_has(tmp_path: Path, tokens: int, batches: int) -> None:
    assert Shards(shard(tmp_path / "a.bin", tokens), 2, 3).num_batches == batches


def test_a_batch_may_be_kept(tmp_path: Path) -> None:
    reader = Shards(shard(tmp_path / "a.bin", 100), 2, 3)
    x, y = reader.next()
    before = x.copy(), y.copy()
    reader.next()
    assert (x == before[0]).all()
    assert (y == before[1]).all()


def test_shards_follow_in_sorted_order_and_wrap(tmp_path: Path) -> None:
    shard(tmp_path / "t_000001.bin", 9, start=100)
    shard(tmp_path / "t_000000.bin", 5)
    shard(tmp_path / "t_000002.bin", 4, start=200, format="llama3")  # too short for a batch: passed over
    shard(tmp_path / "t_000010.bin", 5, start=300, format="plain")
    reader = Shards(str(tmp_path / "t_*.bin"), 1, 4)
    assert (reader.num_tokens, reader.num_batches) == (23, 4)
    firsts = [int(reader.next()[0][0, 0]) for _ in range(6)]
    assert firsts == [0, 100, 104, 300, 0, 100]
    reader.reset()
    assert int(reader.next()[0][0, 0]) == 0


def test_patterns_paths_and_lists_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = shard(tmp_path / "a.bin", 9), shard(tmp_path / "b[1].bin", 9)
    assert find_shards(a) == [str(a)]
    assert find_shards(str(b)) == [str(b)]  # the file, though its name looks like a pattern
    assert find_shards([b, str(tmp_path / "a*")]) == [str(b), str(a)]
    (tmp_path / "sub").mkdir()
    c = shard(tmp_path / "sub" / "c.bin", 9)
    assert find_shards(str(tmp_path / "**" / "c.bin")) == [str(c)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shards("~/a.bin") == [str(a)]
    for pattern in (str(tmp_path / "none"), str(tmp_path / "n*"), [a, tmp_path / "none"]):
        with pytest.raises(ConfigError, match="no file matches .*n"):
            find_shards(pattern)
    with pytest.raises(ConfigError, match="no file was named"):
        find_shards([])


@pytest.mark.parametrize(("B", "T"), [(0, 4), (4, 0), (-1, 4)])
def test_batches_without_tokens_are_refused(tmp_path: Path, B: int, T: int) -> None:
    with pytest.raises(ConfigError, match="not positive"):
        Shards(shard(tmp_path / "a.bin", 9), B, T)


def test_too_little_data_for_one_batch(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.bin", 256)
    with pytest.raises(ConfigError, match=r"a\.bin has 256 tokens, but one batch of 4 x 64 takes 257"):
        Shards(path, 4, 64)


# ---- shuffled --------------------------------------------------------------------------------------


def firsts(reader: Shards, n: int) -> list[int]:
    return [int(reader.next()[0][0, 0]) for _ in range(n)]


@pytest.fixture
def three(tmp_path: Path) -> str:
    for i in range(3):
        shard(tmp_path / f"t{i}.bin", 4 * (5 + i) + 1, start=1000 * i)
    return str(tmp_path / "t*.bin")


def test_shuffling_permutes_each_epoch_differently(three: str) -> None:
    everything = firsts(Shards(three, 2, 2), 18)
    reader = Shards(three, 2, 2, shuffle_seed=1)
    first, second = firsts(reader, 18), firsts(reader, 18)
    assert sorted(first) == sorted(second) == sorted(everything)
    assert len({tuple(everything), tuple(first), tuple(second)}) == 3
    # A shard is finished before the next is begun.
    assert len([1 for a, b in itertools.pairwise(first) if a // 1000 != b // 1000]) == 2


def test_batches_within_a_shard_are_shuffled(tmp_path: Path) -> None:
    order = firsts(Shards(shard(tmp_path / "a.bin", 4001), 2, 2, shuffle_seed=1), 1000)
    assert sorted(order) == list(range(0, 4000, 4))
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.2


def test_the_seed_decides_the_order(three: str) -> None:
    orders = [tuple(firsts(Shards(three, 2, 2, shuffle_seed=seed), 18)) for seed in (1, 1, 2, -1, 2**70)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 4


def test_reset_goes_back_to_the_first_epoch(three: str) -> None:
    reader = Shards(three, 2, 2, shuffle_seed=5)
    first = firsts(reader, 25)
    reader.reset()
    assert firsts(reader, 25) == first


def test_targets_follow_tokens_when_shuffled_too(three: str) -> None:
    reader = Shards(three, 2, 2, shuffle_seed=3)
    for _ in range(18):
        x, y = reader.next()
        assert (y == x + 1).all()


def test_permutations_are_permutations_and_do_not_change() -> None:
    for n in (0, 1, 2, 1000):
        assert sorted(data.permutation(n, 7)) == list(range(n))
    assert (data.permutation(9, 1, 2) != data.permutation(9, 2, 1)).any()
    # Written down: runs must stay repeatable over versions of llmc and NumPy.
    assert data.permutation(8, 0, 0).tolist() == [2, 1, 7, 4, 6, 5, 0, 3]


# ---- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_seed", [None, 11])
@pytest.mark.parametrize("at", [0, 1, 4, 5, 17, 18, 19, 30])
def test_a_state_resumes_exactly(three: str, shuffle_seed: int | None, at: int) -> None:
    reader = Shards(three, 2, 2, shuffle_seed=shuffle_seed)
    firsts(reader, at)
    state = json.loads(json.dumps(reader.state()))
    expected = firsts(reader, 40)
    other = Shards(three, 2, 2, shuffle_seed=shuffle_seed)
    firsts(other, 3)
    other.restore(state)
    assert firsts(other, 40) == expected


def test_a_state_of_something_else_is_refused(three: str, tmp_path: Path) -> None:
    state = Shards(three, 2, 2).state()
    for other in (
        Shards(three, 2, 3), Shards(three, 4, 2), Shards(three, 2, 2, shuffle_seed=0),
        Shards(str(tmp_path / "t[01].bin"), 2, 2),
    ):  # fmt: skip
        before = other.state()
        with pytest.raises(ConfigError, match="data state"):
            other.restore(state)
        assert other.state() == before
    reader = Shards(three, 2, 2)
    for name, wrong in (
        ("epoch", -1),
        ("epoch", None),
        ("shard", 3),
        ("shard", -1),
        ("batch", 99),
        ("batch", "x"),
    ):
        with pytest.raises(ConfigError, match=f"data state: {name}"):
            reader.restore({**state, name: wrong})  # type: ignore[dict-item]
        assert reader.state() == state


# ---- 64-bit offsets --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_offsets_beyond_four_gibibytes(tmp_path: Path, format: str) -> None:
    """A sparse file with marks at its far end; 32-bit arithmetic anywhere reads zeros, or elsewhere."""
    width = 2 if format == "gpt2" else 4
    tokens = 2**31 - 1 if format != "plain" else 2**31 + 100
    start = 0 if format == "plain" else 1024
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        if start:
            file.write(header(GPT2 if format == "gpt2" else LLAMA3, 1 if format == "gpt2" else 7, tokens))
        try:
            file.truncate(start + width * tokens)
        except OSError as error:
            pytest.skip(f"no file of this size here: {error}")
        T = 1024
        last = (tokens - 1) // T - 1  # the last window
        marks = np.arange(1, T + 2, dtype="<u2" if width == 2 else "<u4")
        file.seek(start + width * last * T)
        file.write(marks.tobytes())
    assert path.stat().st_size > 2**32 or format == "gpt2"
    reader = Shards(path, 1, T)
    assert reader.num_tokens == tokens
    assert reader.num_batches == last + 1
    reader.restore({**reader.state(), "batch": last})
    x, y = reader.next()
    assert (x[0] == marks[:-1]).all()
    assert (y[0] == marks[1:]).all()
    assert reader.next()[0].sum() == 0  # and back to the beginning


# ---- what is refused -------------------------------------------------------------------------------

TOKENS = struct.pack("<100H", *range(100))


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        (b"", "size", "0 bytes"),
        (b"abc", "size", "3 bytes"),
        (header(GPT2, 1, 100)[:1023], "header", "1023 of 1024"),
        (header(GPT2, 1, 100)[:4], "header", "4 of 1024"),
        (header(GPT2, 2, 100) + TOKENS, "version", "2"),
        (header(LLAMA3, 1, 50) + TOKENS, "version", "llama3 has 7"),
        (header(GPT2, 1, 0), "token count", "0"),
        (header(GPT2, 1, -100) + TOKENS, "token count", "-100"),
        (header(GPT2, 1, 101) + TOKENS, "size", "truncated: 1224 bytes, but 101 tokens make 1226"),
        (header(GPT2, 1, 100) + TOKENS[:-1], "size", "truncated"),
        (header(GPT2, 1, 99) + TOKENS, "size", "too long"),
        (header(LLAMA3, 7, 100) + TOKENS, "size", "truncated"),
        (header(GPT2, 1, 2**31 - 1) + TOKENS, "size", "truncated"),
        (header(20240326, 3, 0) + TOKENS, "magic", "that is a model file"),
        (header(20240328, 2, 0) + TOKENS, "magic", "that is a tokenizer file"),
        (struct.pack(">i", GPT2) + TOKENS, "magic", "llmc data text"),
        (b"Once upon a time", "magic", "llmc data text"),
        (struct.pack("<i", -1) * 100, "magic", "-1"),
        (struct.pack("<i", 1 << 20) * 100, "magic", "1048576"),
        (struct.pack("<i", 5) * 100 + b"x", "size", "401 bytes"),
    ],
)
def test_bad_files_are_refused_by_name_and_field(
    tmp_path: Path, content: bytes, field: str, message: str
) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        Shards(path, 2, 3)
    assert caught.value.field == field
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: {field}: ")


def test_folders_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a regular file"):
        Shards(tmp_path, 2, 3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        Shards(tmp_path / "pipe", 2, 3)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    with pytest.raises(ConfigError, match="dangling: No such file"):
        Shards(tmp_path / "dangling", 2, 3)


@pytest.mark.parametrize("format", FORMATS)
def test_ids_beyond_the_model_s_vocabulary_are_named(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.bin"
    ids = np.zeros(40, dtype=np.int64)
    ids[17] = 500
    write_shard(path, ids, vocab_size=1000, format=format)
    for vocab_size in (None, 501):
        firsts(Shards(path, 2, 3, vocab_size=vocab_size), 6)
    reader = Shards(path, 2, 3, vocab_size=500)
    reader.next()
    reader.next()  # tokens 6 to 12
    with pytest.raises(FileFormatError, match="id 500 is not in a vocabulary of 500") as caught:
        reader.next()
    assert caught.value.field == "token 17"


@pytest.mark.parametrize("vocab_size", [None, 50257])
def test_negative_and_huge_ids_are_refused(tmp_path: Path, vocab_size: int | None) -> None:
    path = tmp_path / "a.bin"
    for content in (
        struct.pack("<20i", *[1] * 7, -1, *[1] * 12),
        header(LLAMA3, 7, 20) + struct.pack("<20I", *[1] * 7, 2**31, *[1] * 12),
    ):
        path.write_bytes(content)
        reader = Shards(path, 1, 4, vocab_size=vocab_size)
        reader.next()
        with pytest.raises(FileFormatError) as caught:
            reader.next()
        assert caught.value.field == "token 7"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.bin", 1000)
    reader = Shards(path, 2, 30)
    reader.next()
    os.truncate(path, 1024 + 2 * 100)
    with pytest.raises(FileFormatError, match="shrank while open") as caught:
        firsts(reader, 16)
    assert caught.value.path == str(path)


def test_shards_replaced_between_two_readings(tmp_path: Path) -> None:
    a, b = shard(tmp_path / "a.bin", 9), shard(tmp_path / "b.bin", 9)
    reader = Shards([a, b], 1, 8)
    reader.next()
    shard(b, 10)
    with pytest.raises(FileFormatError, match="replaced"):
        reader.next()
    b.unlink()
    with pytest.raises(ConfigError, match=r"b\.bin"):
        reader.next()


def test_any_single_header_byte_changed_gives_an_answer_or_a_typed_error(tmp_path: Path) -> None:
    good = header(GPT2, 1, 100) + TOKENS
    path = tmp_path / "fuzzed.bin"
    for place in range(12):
        for value in (0, 1, 2, 127, 128, 255):
            content = bytearray(good)
            content[place] = value
            path.write_bytes(content)
            try:
                Shards(path, 2, 3).next()
            except LlmcError:
                pass


# ---- resources -------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc: Callable[[Callable[..., None]], Callable[..., None]] = pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="no /proc here"
)


@needs_proc
def test_one_file_is_open_at_a_time_and_none_in_the_end(three: str, tmp_path: Path) -> None:
    before = open_files()
    reader = Shards(three, 2, 2)
    assert open_files() == before
    firsts(reader, 40)
    assert open_files() == before + 1
    reader.close()
    assert open_files() == before
    assert len(firsts(reader, 5)) == 5  # reading on opens it again
    del reader
    assert open_files() == before
    (tmp_path / "bad.bin").write_bytes(b"Once upon a time")
    for _ in range(3):
        with pytest.raises(FileFormatError):
            Shards(tmp_path / "bad.bin", 2, 2)
    assert open_files() == before


def test_two_readers_in_two_threads(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.bin", 6001)
    wrong: list[int] = []

    def read() -> None:
        reader = Shards(path, 2, 30)
        wrong.extend(i for i in range(100) if firsts(reader, 1) != [i * 60])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_random_batches() -> None:
    """Of the seed and the step alone; targets are the tokens one further on."""
    x, y = data.random_batch(50, 2, 16, seed=7, step=3)
    assert x.shape == y.shape == (2, 16) and x.dtype == y.dtype == np.int32
    assert x.flags.c_contiguous and y.flags.c_contiguous and (x[:, 1:] == y[:, :-1]).all()
    assert 0 <= x.min() < x.max() < 50
    assert (data.random_batch(50, 2, 16, 7, 3)[0] == x).all()
    for other in ((7, 4), (8, 3)):
        assert (data.random_batch(50, 2, 16, *other)[0] != x).any()
