"""Rows of ternary numbers as 16-bit codes of a dictionary.

Frantar & Alistarh, "QMoE", arXiv 2310.16795, section 4. Let numbers be independent, 0 with
probability p₀ = 0.885 and of either sign with (1 − p₀) / 2. The codewords are the 2¹⁶ most probable
sequences of 1 … 14 pairs, the more probable first; of those that are as probable, as they would lie
in an alphabet of 0, −, +. What a codeword begins with is more probable than itself, and so is a
codeword too; all nine pairs are.

A row is encoded by itself, from the left, by the longest codeword with which what is left of it
begins. One of an odd length has another 0 at its end, which is not read.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import numerics
from effjax.core.typing import Array, Int, Integer, Size

ZERO = 0.885  # the probability of 0
PAIRS = 14  # that a codeword has at most
SIZE = 1 << 16
WORD = 8  # pairs that 32 bits hold
ROWS = 4096  # that are encoded at once


class Dictionary(NamedTuple):
  """The codewords.

  Attributes:
    words: uint32 [2¹⁶, 2], 4 bits a pair from the lowest bits up, 8 pairs a word; in the highest 8
      bits of the second word how many there are. The lower half of 4 bits is the pair's first
      number, 0 for 0, 1 for − and 2 for +.
    child: int32 [2¹⁶ + 1, 9], the code of a codeword and one more pair, which counts as
      3 · first + second, or −1 where that is no codeword; in the last row those of single pairs.
  """

  words: np.ndarray
  child: np.ndarray


@functools.cache
def dictionary() -> Dictionary:
  """The dictionary, 512 KiB of words.

  Example:
    >>> words, child = dictionary()
    >>> (words[:3, 1] >> 24).tolist(), child[-1, :3].tolist()
    ([1, 2, 3], [0, 12, 13])
  """
  length, key = _codewords()
  names = length << 48 | key
  ranks = np.argsort(names)
  parent = ranks[np.searchsorted(names[ranks], length - 1 << 48 | key // 9) % SIZE]
  child = np.full((SIZE + 1, 9), -1, np.int32)
  child[np.where(length == 1, SIZE, parent), key % 9] = np.arange(SIZE)
  words = np.zeros((SIZE, 2), np.uint32)
  words[:, 1] = length << 24
  for i in range(PAIRS):
    pair = np.where(i < length, key // 9 ** np.maximum(length - 1 - i, 0) % 9, 0)
    words[:, i // WORD] |= (pair // 3 | pair % 3 << 2).astype(np.uint32) << 4 * (i % WORD)
  return Dictionary(words, child)


def _codewords() -> tuple[np.ndarray, np.ndarray]:
  """Pairs of each codeword, and the number whose digits they are in base 9; int64 [2¹⁶] each."""
  rare = math.log((1 - ZERO) / 2)
  surprise = lambda pairs, signs: -(2 * pairs - signs) * math.log(ZERO) - signs * rare
  counts = sorted(
    (surprise(pairs, signs), math.comb(2 * pairs, signs) * 2**signs)
    for pairs in range(1, PAIRS + 1)
    for signs in range(2 * pairs + 1)
  )
  so_far = np.cumsum([count for _, count in counts])
  most = counts[np.searchsorted(so_far, SIZE)][0]
  found, key, signs = [], np.zeros(1, np.int64), np.zeros(1, np.int64)
  for pairs in range(1, PAIRS + 1):
    digit = np.arange(9)
    key = (9 * key[:, None] + digit).ravel()
    signs = (signs[:, None] + (digit // 3 > 0) + (digit % 3 > 0)).ravel()
    kept = surprise(pairs, signs) <= most
    key, signs = key[kept], signs[kept]
    found.append((surprise(pairs, signs), np.full_like(key, pairs), key))
  surprises, length, key = map(np.concatenate, zip(*found, strict=True))
  order = np.lexsort((key, surprises))[:SIZE]
  return length[order], key[order]


def encode(symbols: Integer[np.ndarray, "R I"]) -> tuple[Integer[np.ndarray, "N"], np.ndarray]:
  """Codes, uint16, row after row, and how many each row has, int32 [R].

  Args:
    symbols: 0 for 0, 1 for − and 2 for +.

  Example:
    >>> codes, counts = encode(np.array([[0] * 28 + [1], [0] * 29]))
    >>> codes.tolist(), counts.tolist()
    ([25, 14, 25, 0], [2, 2])
  """
  firsts = range(0, max(1, len(symbols)), ROWS)
  parts = [_encode(symbols[first : first + ROWS]) for first in firsts]
  codes, counts = zip(*parts, strict=True)
  return np.concatenate(codes), np.concatenate(counts)


def _encode(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  child = dictionary().child
  even = np.pad(symbols, ((0, 0), (0, symbols.shape[1] % 2)))
  pairs = (3 * even[:, ::2] + even[:, 1::2]).T
  codes, ends = np.empty(pairs.shape, np.int32), np.empty(pairs.shape, bool)
  code = np.full(len(symbols), SIZE)
  for i, pair in enumerate(pairs):
    longer = child[code, pair]
    codes[i - 1], ends[i - 1] = code, longer < 0
    code = np.where(longer < 0, child[SIZE, pair], longer)
  codes[-1:], ends[-1:] = code, True
  return codes.T[ends.T].astype(np.uint16), ends.sum(0, dtype=np.int32)


def decode(codes: Integer[Array, "R N"], inputs: Size) -> Int[Array, "R {inputs}"]:
  """The symbols of rows, as `encode` takes them.

  Args:
    codes: uint16, those of each row, and after them any others.
    inputs: I.

  Example:
    >>> decode(jnp.array([[25, 14], [25, 0]], jnp.uint16), 29)[:, -1].tolist()
    [1, 0]
  """
  pairs = -(-inputs // 2)
  words = jnp.asarray(dictionary().words).at[codes.astype(jnp.int32)].get(mode="clip")
  length = (words[..., 1] >> 24).astype(jnp.int32)
  first = jnp.cumsum(length, -1) - length
  write = functools.partial(_one_by_one, pairs=pairs), functools.partial(_at_once, pairs=pairs)
  pair = jax.lax.platform_dependent(words, first, cpu=write[0], default=write[1])
  return jnp.stack([pair & 3, pair >> 2 & 3], -1).reshape(len(codes), 2 * pairs)[:, :inputs]


def _one_by_one(
  words: Integer[Array, "R N 2"], first: Int[Array, "R N"], *, pairs: int
) -> Int[Array, "R {pairs}"]:
  """Pairs of each row: its codewords are written one after the other, and what is beyond the end
  of one is overwritten by the next."""
  rows, count, _ = words.shape
  place, room = numerics.expand(jnp.arange(PAIRS), 3), pairs + PAIRS
  word = jnp.where(place < WORD, words[..., :1], words[..., 1:])
  held = _pair(word, place).astype(jnp.uint8).reshape(rows * count, PAIRS)
  begin = (jnp.arange(rows) * room)[:, None] + jnp.minimum(first, pairs)
  begin = begin.reshape(-1)
  put = lambda i, out: jax.lax.dynamic_update_slice(out, held[i], (begin[i],))
  out = numerics.vary_alike(jnp.zeros(rows * room, jnp.uint8), held, begin)
  out = jax.lax.fori_loop(0, rows * count, put, out)
  return out.reshape(rows, room)[:, :pairs].astype(jnp.int32)


def _at_once(
  words: Integer[Array, "R N 2"], first: Int[Array, "R N"], *, pairs: int
) -> Int[Array, "R {pairs}"]:
  """Pairs of each row, for each of which its codeword is found."""
  row = jnp.arange(len(words))[:, None]
  begins = numerics.vary_alike(jnp.zeros((len(words), pairs), jnp.int32), first)
  begins = begins.at[row, first].set(1, mode="drop", unique_indices=True)
  index = jnp.cumsum(begins, -1) - 1
  of_pair = lambda x: jnp.take_along_axis(x, index, -1, mode="clip")
  place = jnp.arange(pairs)[None] - of_pair(first)
  return _pair(jnp.where(place < WORD, of_pair(words[..., 0]), of_pair(words[..., 1])), place)


def _pair(word: Integer[Array, "..."], place: Int[Array, "..."]) -> Int[Array, "..."]:
  """The pair at a place of a codeword, whose word it is in."""
  return (word >> (4 * (place % WORD)).astype(jnp.uint32)).astype(jnp.int32) & 15
