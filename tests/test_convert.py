"""Conversion both ways, through files of every kind, and what it refuses to overwrite."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference

from llmc import loading
from llmc.convert import convert
from llmc.errors import ConfigError, FileFormatError
from llmc.gpt2 import GPT2, Config

TINY = Config(max_seq_len=10, vocab_size=131, num_layers=2, num_heads=2, channels=32)
KINDS = ("v1.bin", "v3.bin", "v5.bin", "folder")


def version_of(kind: str) -> int:
    return int(kind[1]) if kind in KINDS[:3] else 3


@pytest.fixture
def model() -> GPT2:
    made = GPT2(TINY, reference)
    rng = np.random.default_rng(1)
    for _, array in made.params:
        array[...] = rng.standard_normal(array.shape)
    made.params.wte[TINY.vocab_size :] = 0
    return made


def write(model: GPT2, path: Path) -> Path:
    if path.suffix == ".bin":
        loading.save_bin(model, path, version_of(path.name))
    else:
        loading.save(model, path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name if path.is_dir() else "": file.read_bytes() for file in files}


@pytest.mark.parametrize(("start", "end"), list(itertools.product(KINDS, KINDS)))
def test_every_pair(tmp_path: Path, model: GPT2, start: str, end: str) -> None:
    """The result is byte for byte what saving the model itself would have given (from bf16: the rounded)."""
    source = write(model, tmp_path / start)
    if start == "v5.bin":
        for _, array in model.params:
            array[...] = array.astype(ml_dtypes.bfloat16)
    (tmp_path / "expected").mkdir()
    expected = write(model, tmp_path / "expected" / end)
    made = convert(source, tmp_path / "new" / end, version=version_of(end), ops=reference)
    assert made == tmp_path / "new" / end
    assert contents(made) == contents(expected)


def test_the_default_is_version_3(tmp_path: Path, model: GPT2) -> None:
    made = convert(write(model, tmp_path / "folder"), tmp_path / "model.bin", ops=reference)
    assert contents(made) == contents(write(model, tmp_path / "v3.bin"))


def test_random_models_convert_too(tmp_path: Path) -> None:
    convert("tiny", tmp_path / "a", seed=1, ops=reference)
    convert("tiny", tmp_path / "b", seed=2, ops=reference)
    assert contents(tmp_path / "a") != contents(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["llmc_tokenizer"] == "bytes"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_folder_in_use_is_kept(tmp_path: Path, model: GPT2, name: str) -> None:
    source = write(model, tmp_path / "v3.bin")
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_bytes(b"precious")
    (target / "notes.txt").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=f"destination: .*{name} exists"):
        convert(source, target, ops=reference)
    assert (target / name).read_bytes() == b"precious"
    convert(source, target, force=True, ops=reference)
    assert loading.load(target, ops=reference).config == TINY
    assert (target / "notes.txt").read_bytes() == b"mine"


def test_a_file_is_kept(tmp_path: Path, model: GPT2) -> None:
    source = write(model, tmp_path / "v3.bin")
    target = tmp_path / "target.bin"
    target.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="destination: .*exists"):
        convert(source, target, ops=reference)
    assert target.read_bytes() == b"precious"
    convert(source, target, force=True, ops=reference)
    assert contents(target) == contents(source)


def test_in_place(tmp_path: Path, model: GPT2) -> None:
    source = write(model, tmp_path / "model.bin")
    with pytest.raises(ConfigError, match="exists"):
        convert(source, source, version=1, ops=reference)
    convert(source, source, version=1, force=True, ops=reference)
    assert contents(source) == contents(write(model, tmp_path / "v1.bin"))


def test_an_empty_folder_is_free(tmp_path: Path, model: GPT2) -> None:
    (tmp_path / "target").mkdir()
    convert(write(model, tmp_path / "v3.bin"), tmp_path / "target", ops=reference)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("new.bin", {"version": 2}, "version: 2"),
        ("new.safetensors", {}, "give the folder"),
        ("folder.bin", {"force": True}, "is a folder"),
        ("file", {"force": True}, "is a file"),
        ("file/model.bin", {}, "cannot write"),
        ("file/folder", {}, "cannot write"),
    ],
)
def test_destinations_that_cannot_be(
    tmp_path: Path, model: GPT2, target: str, options: dict[str, int], message: str
) -> None:
    source = write(model, tmp_path / "v3.bin")
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "file").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / target, ops=reference, **options)  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bad_source_leaves_nothing(tmp_path: Path, model: GPT2) -> None:
    source = write(model, tmp_path / "v3.bin")
    source.write_bytes(source.read_bytes()[:-1])
    for target in ("new.bin", "new"):
        with pytest.raises(FileFormatError, match="truncated"):
            convert(source, tmp_path / target, ops=reference)
    assert sorted(tmp_path.iterdir()) == [source]
