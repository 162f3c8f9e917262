"""Pseudo-random numbers as a pure function of their index: the same on every machine and in every release."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 per element: neighbouring inputs give unrelated outputs."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key64(*parts: object) -> np.uint64:
    """A 64-bit hash of these values."""
    text = "\0".join(map(str, parts)).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def uniform(count: int, *key: object) -> NDArray[np.float64]:
    """The first `count` numbers in [0, 1) of the sequence that belongs to the key: float64 [count]."""
    numbers = mix64(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key64(*key))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
