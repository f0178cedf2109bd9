"""Elements that attention moves between fast and slow memory (FlashAttention, arXiv 2205.14135).

N tokens, heads of width d, fast memory of M elements. Every figure is elements of one head; times
the bytes of the type and the heads of the batch it is traffic.
"""

import math

from effjax.core.known import number
from effjax.core.typing import Size


def standard_traffic(length: Size, width: Size) -> int:
  """Elements that unfused attention moves, forward: 4·N·d + 4·N², Θ(N·d + N²) (theorem 2).

  Queries, keys and values are read and the output written; scores are written, read, and so are
  the probabilities.

  Example:
    >>> standard_traffic(1024, 64)
    4456448
  """
  length, width = _sizes(length, width=width)
  return 4 * length * width + 4 * length**2


def flash_traffic(length: Size, width: Size, memory: Size) -> int:
  """Elements that Algorithm 1 moves, forward: Θ(N²·d²/M) (theorem 2).

  B_c = ⌈M / 4d⌉ keys a block, T_c = ⌈N / B_c⌉ blocks. Keys and values are read once. Each of the
  T_c passes reads the queries, reads and writes the output, and reads and writes the running
  maximum and sum of every row: 2·N·d + T_c·(3·N·d + 4·N).

  Args:
    length: N.
    width: d, at most `memory`.
    memory: M, elements of fast memory.

  Raises:
    ValueError: for a memory below d, a width below 1 or a length below 0.

  Example:
    Four times the length costs sixteen times the traffic, once there are many blocks, and twice
    the memory halves it:

    >>> round(flash_traffic(65_536, 64, 50_176) / flash_traffic(16_384, 64, 50_176), 1)
    15.9
    >>> round(flash_traffic(65_536, 64, 50_176) / flash_traffic(65_536, 64, 100_352), 1)
    2.0
  """
  length, width = _sizes(length, width=width)
  return 2 * length * width + _passes(length, width, memory) * (3 * length * width + 4 * length)


def standard_backward_traffic(length: Size, width: Size) -> int:
  """Elements that unfused attention moves backward: 8·N·d + 7·N² (algorithm 3).

  Probabilities are read for dV; dP is written; both are read and dS written; dS is read for dQ and
  for dK. The output's gradient is read twice, queries, keys and values once, and three gradients
  written.

  Example:
    >>> standard_backward_traffic(1024, 64)
    7864320
  """
  length, width = _sizes(length, width=width)
  return 8 * length * width + 7 * length**2


def flash_backward_traffic(length: Size, width: Size, memory: Size) -> int:
  """Elements that Algorithm 4 moves backward: 4·N·d + T_c·(5·N·d + 2·N), Θ(N²·d²/M) (theorem 5).

  Keys and values are read and their gradients written once. Each of the T_c passes (as in
  `flash_traffic`) reads the queries, the output, its gradient and the running maximum and sum, and
  reads and writes the gradient of the queries.

  Raises:
    ValueError: for a memory below d, a width below 1 or a length below 0.

  Example:
    >>> flash_backward_traffic(1024, 64, 98_304)
    1251328
  """
  length, width = _sizes(length, width=width)
  return 4 * length * width + _passes(length, width, memory) * (5 * length * width + 2 * length)


def _passes(length: Size, width: Size, memory: Size) -> int:
  """T_c, the blocks of keys."""
  length, width = _sizes(length, width=width)
  memory = number("memory", memory, integer=True, least=width)
  return math.ceil(length / math.ceil(memory / (4 * width)))


def score_bytes(length: Size, heads: Size, itemsize: Size = 2) -> int:
  """Bytes of one pass over all scores: heads · N² · itemsize.

  Example:
    1024 heads (batch 64 of 16), 1024 tokens, 16 bits: 2.147 GB. The lecture's 40.3 GB for standard
    attention, forward and backward, is about 19 such passes.

    >>> round(score_bytes(1024, 1024) / 1e9, 3)
    2.147
    >>> round(40.3e9 / score_bytes(1024, 1024), 1)
    18.8
  """
  length, heads, itemsize = _sizes(length, heads=heads, itemsize=itemsize)
  return heads * length**2 * itemsize


def _sizes(length: Size, **sizes: Size) -> list[int]:
  """They all as integers of Python, which do not overflow."""
  from_one = [number(name, size, integer=True, least=1) for name, size in sizes.items()]
  return [number("length", length, integer=True, least=0), *from_one]
