"""The kernel's jhash, to say where a client's address leads.

Bob Jenkins' lookup3 as in `include/linux/jhash.h`; nft_hash (`net/netfilter/nft_hash.c`) scales its
result to the modulus with `reciprocal_scale`.
"""

from __future__ import annotations

import sys

_MASK = 0xFFFFFFFF
_INITIAL = 0xDEADBEEF  # JHASH_INITVAL


def jhash(key: bytes, seed: int) -> int:
    """32 bits of hash. The length of the key is a multiple of 4, as every address's is."""
    words = [int.from_bytes(key[i : i + 4], sys.byteorder) for i in range(0, len(key), 4)]
    a = b = c = (_INITIAL + len(key) + seed) & _MASK
    while len(words) > 3:
        a, b, c = _mix((a + words[0]) & _MASK, (b + words[1]) & _MASK, (c + words[2]) & _MASK)
        words = words[3:]
    if not words:
        return c
    first, second, third = (*words, 0, 0)[:3]
    return _final((a + first) & _MASK, (b + second) & _MASK, (c + third) & _MASK)


def scaled(number: int, modulus: int) -> int:
    """A 32-bit number scaled to 0 to `modulus - 1`."""
    return (number * modulus) >> 32


def _rotate(word: int, bits: int) -> int:
    return ((word << bits) | (word >> (32 - bits))) & _MASK


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    """__jhash_mix."""
    a = (a - c) & _MASK ^ _rotate(c, 4)
    c = (c + b) & _MASK
    b = (b - a) & _MASK ^ _rotate(a, 6)
    a = (a + c) & _MASK
    c = (c - b) & _MASK ^ _rotate(b, 8)
    b = (b + a) & _MASK
    a = (a - c) & _MASK ^ _rotate(c, 16)
    c = (c + b) & _MASK
    b = (b - a) & _MASK ^ _rotate(a, 19)
    a = (a + c) & _MASK
    c = (c - b) & _MASK ^ _rotate(b, 4)
    b = (b + a) & _MASK
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    """__jhash_final."""
    c = ((c ^ b) - _rotate(b, 14)) & _MASK
    a = ((a ^ c) - _rotate(c, 11)) & _MASK
    b = ((b ^ a) - _rotate(a, 25)) & _MASK
    c = ((c ^ b) - _rotate(b, 16)) & _MASK
    a = ((a ^ c) - _rotate(c, 4)) & _MASK
    b = ((b ^ a) - _rotate(a, 14)) & _MASK
    return ((c ^ b) - _rotate(b, 24)) & _MASK
