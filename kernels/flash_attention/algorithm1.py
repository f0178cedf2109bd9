"""FlashAttention's Algorithm 1 in numpy, with every element that it moves counted.

A machine with two memories: a slow one that holds the matrices, and a fast one of some M elements,
in which alone anything is computed. One head, no mask; for the traffic, not for use.

Reference: FlashAttention (arXiv 2205.14135), sections 2.2 (algorithm 0) and 3.1 (algorithm 1).
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from effjax.core.typing import Float


@dataclasses.dataclass
class Counts:
  """What was moved between the memories.

  Attributes:
    loaded, stored: elements, from slow to fast and back.
    transfers: blocks in which they went, both ways.
    held: the most elements that lay in fast memory at once.
  """

  loaded: int = 0
  stored: int = 0
  transfers: int = 0
  held: int = 0

  @property
  def moved(self) -> int:
    """Elements, both ways."""
    return self.loaded + self.stored


class Result(NamedTuple):
  """The output, the log-sum-exp of each row of scores, and what it took."""

  out: Float[np.ndarray, "N d"]
  lse: Float[np.ndarray, "N"]
  counts: Counts


class Memory:
  """Named arrays in slow memory; blocks of them, and what is computed from those, in fast memory.

  `memory[name]` is what fast memory holds under a name; setting it frees what was there.

  Example:
    >>> memory = Memory(4, X=np.arange(8.0))
    >>> memory.load(slice(2, 4), "X")
    >>> memory["X"] = 10 * memory["X"]
    >>> memory.store(slice(0, 2), "X")
    >>> memory.slow["X"][:4].tolist(), memory.counts
    ([20.0, 30.0, 2.0, 3.0], Counts(loaded=2, stored=2, transfers=2, held=2))
  """

  def __init__(self, room: int, **arrays: np.ndarray):
    """Fast memory is empty, has `room` elements and refuses more with MemoryError."""
    self.room, self.slow, self.counts = room, arrays, Counts()
    self._fast: dict[str, np.ndarray] = {}

  def __getitem__(self, name: str) -> np.ndarray:
    return self._fast[name]

  def __setitem__(self, name: str, value: np.ndarray) -> None:
    self._fast[name] = value
    held = sum(array.size for array in self._fast.values())
    if held > self.room:
      raise MemoryError(f"fast memory of {self.room} elements: {held} with {name}")
    self.counts.held = max(self.counts.held, held)

  def load(self, rows: slice, *names: str) -> None:
    """Copies rows of arrays into fast memory, under the same names."""
    for name in names:
      self[name] = self.slow[name][rows].copy()
      self.counts.loaded += self[name].size
      self.counts.transfers += 1

  def store(self, rows: slice, *names: str) -> None:
    """Writes what fast memory holds under these names to rows of the arrays."""
    for name in names:
      self.slow[name][rows] = self[name]
      self.counts.stored += self[name].size
      self.counts.transfers += 1

  def free(self, *names: str) -> None:
    """Forgets what fast memory holds under these names."""
    for name in names:
      del self._fast[name]


def block_sizes(width: int, memory: int) -> tuple[int, int]:
  """B_c = ⌈M / 4d⌉ keys and B_r = min(B_c, d) queries.

  Raises:
    ValueError: for a memory below the width.

  Example:
    >>> block_sizes(64, 50_000)
    (196, 64)
  """
  if memory < width:
    raise ValueError(f"memory={memory}; allowed: from the head width {width}")
  keys = math.ceil(memory / (4 * width))
  return keys, min(keys, width)


def room(width: int, memory: int) -> int:
  """Elements that Algorithm 1 holds at once: 2·B_c·d + 2·B_r·d + B_r·B_c + 6·B_r.

  Blocks of K, V, Q and O, the scores of a pair of blocks, and m, l, m̃, l̃, mⁿᵉʷ, lⁿᵉʷ of B_r rows.
  The paper calls this O(M): it is at most M from M of some 8·d² on, and up to about 5/4 of M below,
  where the blocks of the four matrices fill M and the scores come on top.

  Example:
    >>> room(64, 50_000) <= 50_000, room(64, 9_000) <= 9_000
    (True, False)
  """
  keys, rows = block_sizes(width, memory)
  return 2 * (keys + rows) * width + rows * keys + 6 * rows


@typing.no_type_check  # `_shape` names what is wrong
def flash_attention(
  query: Float[np.ndarray, "N d"],
  key: Float[np.ndarray, "N d"],
  value: Float[np.ndarray, "N d"],
  *,
  memory: int,
) -> Result:
  """softmax(QKᵀ/√d)V block by block: keys outside, queries inside, m and l in slow memory.

  For a block of scores S with row maxima m̃, P̃ = exp(S − m̃) and its row sums l̃:
    mⁿᵉʷ = max(m, m̃);  lⁿᵉʷ = e^(m − mⁿᵉʷ)·l + e^(m̃ − mⁿᵉʷ)·l̃
    O ← (l·e^(m − mⁿᵉʷ)·O + e^(m̃ − mⁿᵉʷ)·P̃V) / lⁿᵉʷ
  O, l and m lie in slow memory as 0, 0 and −∞ at the start, which is not counted.

  Args:
    query, key, value: one head.
    memory: M, elements, which sets the sizes of blocks (`block_sizes`); they take `room`.

  Raises:
    ValueError: for a memory below d, or matrices that differ in shape.

  Example:
    >>> x = np.eye(8)
    >>> result = flash_attention(x, x, x, memory=64)
    >>> result.counts.moved, result.counts.held <= room(8, 64)
    (1024, True)
  """
  length, width = _shape(query, key, value)
  keys, rows = block_sizes(width, memory)
  start = {"O": np.zeros_like(value), "l": np.zeros(length), "m": np.full(length, -np.inf)}
  both = Memory(room(width, memory), Q=query, K=key, V=value, **start)
  for columns in _blocks(length, keys):
    both.load(columns, "K", "V")
    for block in _blocks(length, rows):
      both.load(block, "Q", "O", "l", "m")
      _update(both)
      both.store(block, "O", "l", "m")
  return Result(both.slow["O"], both.slow["m"] + np.log(both.slow["l"]), both.counts)


def _update(both: Memory) -> None:
  """Lines 9 to 12, in place: what the keys of a block add to the queries of a block."""
  both["P"] = _scores(both)
  both["m_block"] = both["P"].max(axis=1)
  both["P"] = np.exp(both["P"] - both["m_block"][:, None])
  both["l_block"] = both["P"].sum(axis=1)
  both["m_new"] = np.maximum(both["m"], both["m_block"])
  both["l"] = np.exp(both["m"] - both["m_new"]) * both["l"]
  new = np.exp(both["m_block"] - both["m_new"])
  both["l_new"] = both["l"] + new * both["l_block"]
  total = both["l"][:, None] * both["O"] + new[:, None] * (both["P"] @ both["V"])
  both["O"] = total / both["l_new"][:, None]
  both["l"], both["m"] = both["l_new"], both["m_new"]


@typing.no_type_check  # `_shape` names what is wrong
def standard_attention(
  query: Float[np.ndarray, "N d"],
  key: Float[np.ndarray, "N d"],
  value: Float[np.ndarray, "N d"],
  *,
  rows: int = 64,
) -> Result:
  """Algorithm 0: S = QKᵀ/√d, P = softmax(S) and O = PV, each written to slow memory.

  Rows of S, P and O are made `rows` at a time. That K and V are read once each, as theorem 2 counts
  it, takes all of one of them in fast memory: N·d elements and more, which grow with N.

  Raises:
    ValueError: for fewer than one row, or matrices that differ in shape.

  Example:
    >>> x = np.eye(8)
    >>> standard_attention(x, x, x).counts.moved
    512
  """
  length, width = _shape(query, key, value)
  if rows < 1:
    raise ValueError(f"rows={rows}; allowed: from 1")
  made = {"S": np.empty((length, length)), "P": np.empty((length, length))}
  both = Memory(
    length * width + rows * (length + max(length, width)),
    **{"Q": query, "K": key, "V": value, "O": np.empty_like(value), **made},
  )
  both.load(slice(None), "K")
  _by_rows(both, rows, "Q", "S", lambda: _scores(both))
  both.free("K")
  _by_rows(both, rows, "S", "P", lambda: np.exp(both["S"] - _log_sum_exp(both["S"])[:, None]))
  both.load(slice(None), "V")
  _by_rows(both, rows, "P", "O", lambda: both["P"] @ both["V"])
  return Result(both.slow["O"], _log_sum_exp(both.slow["S"]), both.counts)


def _by_rows(
  both: Memory, rows: int, given: str, made: str, compute: Callable[[], np.ndarray]
) -> None:
  """Reads one array and writes another, `rows` rows at a time."""
  for block in _blocks(len(both.slow[given]), rows):
    both.load(block, given)
    both[made] = compute()
    both.store(block, made)
  both.free(given, made)


def _scores(both: Memory) -> np.ndarray:
  return both["Q"].shape[1] ** -0.5 * both["Q"] @ both["K"].T


def _log_sum_exp(scores: np.ndarray) -> np.ndarray:
  top = scores.max(axis=1)
  return top + np.log(np.exp(scores - top[:, None]).sum(axis=1))


def _blocks(length: int, size: int) -> Iterator[slice]:
  return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _shape(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[int, int]:
  shapes = query.shape, key.shape, value.shape
  if query.ndim != 2 or len(set(shapes)) > 1 or 0 in query.shape:
    raise ValueError(f"query, key and value have shapes {shapes}; allowed: one [N, d], none 0")
  return query.shape[0], query.shape[1]
