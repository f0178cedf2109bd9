"""Tables that need no model: by frequency, by chance, by position."""

import heapq
from collections.abc import Sequence

import numpy as np

from effjax.core.known import number
from effjax.core.typing import Array, Int, Num, Number, Size

Counts = Num[Array | np.ndarray, "V"] | Sequence[Number]
NOISE = 0.5  # standard deviation of log counts, in the order of visits of a balanced table


def balanced(counts: Counts, *, experts: Size, seed: Size | None = None) -> Int[np.ndarray, "V"]:
  """Each id, the most frequent first, to the expert with the least to do (section 3.1).

  Of experts with as little to do the one with the fewest ids is taken, and of these the first. Ids
  that were not counted follow, to the experts with the fewest ids.

  Args:
    counts: [V], how often each id occurs.
    experts: number of experts E.
    seed: for another table that is about as balanced: counts are multiplied by log-normal noise
      for the order of visits. None visits them in order.

  Raises:
    ValueError: for counts that are no vector of finite numbers from 0, or E below 1.

  Example:
    >>> balanced([9, 5, 4, 3, 0, 0], experts=2).tolist()
    [0, 1, 1, 0, 0, 1]
  """
  counts, experts = checked_counts(counts), _experts(experts)
  visited = counts
  if seed is not None:
    visited = counts * np.exp(NOISE * generator(seed).standard_normal(counts.size))
  order = np.argsort(-visited, kind="stable")
  table = np.zeros(counts.size, np.int32)
  heap = [(0.0, 0, expert) for expert in range(experts)]  # load, ids
  for index in order[counts[order] > 0]:
    load, held, table[index] = heap[0]
    heapq.heapreplace(heap, (load + counts[index], held + 1, table[index]))
  few = [(held, expert) for _, held, expert in heap]
  heapq.heapify(few)
  for index in order[counts[order] == 0]:
    held, table[index] = few[0]
    heapq.heapreplace(few, (held + 1, table[index]))
  return table


def random(entries: Size, *, experts: Size, seed: Size = 0) -> Int[np.ndarray, "V"]:
  """Each id to an expert drawn for it, uniform and independent, once for all (section 3.1).

  Args:
    entries: number of ids.
    experts: number of experts E.
    seed: of the draws.

  Example:
    >>> random(6, experts=3, seed=1).tolist()
    [1, 1, 2, 2, 0, 0]
  """
  entries = number("entries", entries, of="hash_tables", integer=True, least=1)
  return generator(seed).integers(0, _experts(experts), entries, dtype=np.int32)


def position(entries: Size, *, experts: Size) -> Int[np.ndarray, "T"]:
  """Positions in turn to the experts: position modulo E.

  Example:
    >>> position(5, experts=3).tolist()
    [0, 1, 2, 0, 1]
  """
  entries = number("entries", entries, of="hash_tables", integer=True, least=1)
  return np.arange(entries, dtype=np.int32) % np.int32(_experts(experts))


def generator(seed: Size) -> np.random.Generator:
  """Numpy's generator for a seed, which is an integer from 0."""
  return np.random.default_rng(number("seed", seed, of="hash_tables", integer=True, least=0))


def checked_counts(counts: Counts) -> np.ndarray:
  """Counts as float64; ValueError for what cannot be such."""
  found = np.asarray(counts, np.float64)
  if found.ndim != 1 or not found.size or not np.isfinite(found).all() or found.min() < 0:
    allowed = "a vector [V] of finite numbers from 0"
    raise ValueError(f"hash_tables: counts {list(found.shape)}; allowed: {allowed}")
  return found


def _experts(experts: Size) -> int:
  return number("experts", experts, of="hash_tables", integer=True, least=1)
