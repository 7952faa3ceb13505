"""normal: exactly Philox's integers, then Box and Muller's transform; and what comes out is normal."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import reference
from guard import UNIT, Array, blank, check

LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 100, 127, 128, 129, 1031]
LARGE = [pytest.param(n, marks=pytest.mark.heavy) for n in (16383, 16384, 16385, 70001)]
BIG = 2**64 - 1
WORDS = 2**32 - 1


def bound(seed: int, stream: int, std: float, n: int) -> Array:
    """18 units of each value, which the contract allows: 16 for the pair (simd/philox.h), 1 for std as a float32
    and 1 for the product with it.  Measured: 7."""
    exact = np.empty(n)
    reference.normal(exact, seed, stream, std)
    return 18 * UNIT * np.abs(exact)


# ---- the integers ----------------------------------------------------------------------------------

# The known answers for philox4x32, 10 rounds, that come with Random123: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORDS,) * 4, (WORDS,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_reference_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    found = reference.philox([np.uint64(word) for word in counter], key)
    assert tuple(int(word) for word in found) == words


def test_first_known_answer(ops: ModuleType) -> None:
    """Seed 0, stream 0, the first counter: four elements, written out by hand."""
    out = np.empty(64, np.float32)
    ops.normal(out, 0, 0, 1.0)
    w = KNOWN[0][2]
    expected = []
    for w0, w1 in ((w[0], w[1]), (w[2], w[3])):
        r = math.sqrt(-2 * math.log(float(np.float32(w0)) / 2**32))
        x = (w1 >> 8) / 2**23 - 1
        expected += [r * math.cos(math.pi * x), r * math.sin(math.pi * x)]
    np.testing.assert_allclose(out[[0, 16, 32, 48]], expected, rtol=18 * UNIT)


# ---- the values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS + LARGE)
def test_normal(ops: ModuleType, n: int) -> None:
    check(ops, "normal", (blank(n), 1234, 56, 0.02), {"out": bound(1234, 56, 0.02, n)})


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x299F31D0A4093822, BIG])
@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1, 2**32, 0x0370734413198A2E, BIG])
def test_seeds_and_streams(ops: ModuleType, seed: int, stream: int) -> None:
    """Every bit of both counts."""
    check(ops, "normal", (blank(3, 43), seed, stream, 1.5), {"out": bound(seed, stream, 1.5, 129).reshape(3, 43)})


@pytest.mark.heavy
def test_many_values(ops: ModuleType) -> None:
    """Two million: small radii, long tails, and angles at the axes among them."""
    n = 1 << 21
    check(ops, "normal", (blank(n), 7, 8, 1.0), {"out": bound(7, 8, 1.0, n)})


def test_no_spread(ops: ModuleType) -> None:
    out = blank(100)
    ops.normal(out, 1, 2, 0.0)
    assert not out.any()


@pytest.mark.parametrize("n", [1, 63, 100, 20000])
def test_a_beginning_is_a_beginning(ops: ModuleType, n: int) -> None:
    """The first n of many are what n alone are: to the bit, wherever a span or a vector ends."""
    whole, part = np.empty(40000, np.float32), np.empty(n, np.float32)
    ops.normal(whole, 5, 6, 0.3)
    ops.normal(part, 5, 6, 0.3)
    assert part.tobytes() == whole[:n].tobytes()


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads(each_isa: ModuleType, threads: int) -> None:
    results = []
    for count in (1, threads):
        each_isa.configure(isa=each_isa.info()["isa"], threads=count)
        out = np.empty(100_003, np.float32)
        each_isa.normal(out, 9, 10, 0.02)
        results.append(out.tobytes())
    assert results[0] == results[1]


# ---- the distribution ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> Array:
    """Sixteen streams of 2^18 numbers, from the best table here: the others agree by `test_normal`."""
    from llmc import _cpu

    out = np.empty((16, 1 << 18), np.float32)
    for stream, row in enumerate(out):
        _cpu.normal(row, 42, stream, 1.0)
    return out.astype(np.float64)


def test_moments(drawn: Array) -> None:
    """Mean, variance, skewness and kurtosis, each within 5 of its own standard errors."""
    n = drawn.size
    mean, std = drawn.mean(), drawn.std()
    z = (drawn - mean) / std
    assert abs(mean) < 5 / math.sqrt(n)
    assert abs(std**2 - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(6 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(24 / n)


def test_every_quantile(drawn: Array) -> None:
    """Kolmogorov and Smirnov: the largest distance of the distribution functions; 1.95 / sqrt(n) is exceeded by chance
    once in a thousand seeds, and this one is fixed."""
    ordered = np.sort(drawn.reshape(-1))
    n = ordered.size
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in ordered[:: n // 4096].tolist()])
    assert np.abs(cdf - np.arange(0, n, n // 4096) / n).max() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("limit", [2.0, 3.0, 4.0, 4.5])
def test_tails(drawn: Array, limit: float) -> None:
    """As many beyond the limit, on either side, as there should be: within 5 standard deviations of the count."""
    expected = drawn.size * 0.5 * math.erfc(limit / math.sqrt(2))
    for found in ((drawn > limit).sum(), (drawn < -limit).sum()):
        assert abs(found - expected) < 5 * math.sqrt(expected)


def test_streams_and_neighbours_do_not_correlate(drawn: Array) -> None:
    """Streams with one another; numbers with those 1 to 64 places on, which share counters and pairs; and squares,
    which the two of a pair would share if their radius showed."""
    rows, n = drawn.shape
    for values in (drawn, drawn**2 - 1):
        z = values / values.std()
        between = z @ z.T / n
        assert np.abs(between[~np.eye(rows, dtype=bool)]).max() < 5 / math.sqrt(n)
        for lag in (1, 2, 15, 16, 17, 32, 48, 64):
            assert abs((z[:, :-lag] * z[:, lag:]).mean()) < 5 / math.sqrt(z.size)


def test_seeds_do_not_correlate(cpu: ModuleType) -> None:
    out = np.empty((8, 1 << 16), np.float32)
    for seed, row in enumerate(out):
        cpu.normal(row, seed, 0, 1.0)
    between = out.astype(np.float64) @ out.T / out.shape[1]
    assert np.abs(between[~np.eye(8, dtype=bool)]).max() < 5 / math.sqrt(out.shape[1])
