"""Sums in a TPU's main memory, of programs that come back to a tile after others."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.core.typing import Array

LANES = 128


def width(columns: int) -> int:
  """Of the rows of a sum, which travel as whole registers."""
  return -(-columns // LANES) * LANES


def scratch(rows: int, columns: int) -> list[Any]:
  """What a total of tiles of that size needs: two of them in VMEM, and a semaphore each way."""
  return [pltpu.VMEM((2, rows, width(columns)), jnp.float32), pltpu.SemaphoreType.DMA((2,))]


class Total:
  """The sum of a program's tile: loaded, added to and stored while programs work.

  No more than one store is under way at a time; and what the program before stores is taken from
  its buffer, so that nothing is read from memory before it is there.

  Args:
    tile: the program's in memory; buffers, semaphores: those of `scratch`.
    count: of programs in this sequence before this one; each sequence has tiles of its own.
    again: whether the program before had this tile; None if none ever does.
    last: whether no program of the sequence follows.
  """

  def __init__(self, tile: Any, buffers: Any, semaphores: Any, count: Any, again: Any, last: Any):
    slot = count % 2
    self._here, self._before = buffers.at[slot], buffers.at[1 - slot]
    self._load = pltpu.make_async_copy(tile, self._here, semaphores.at[0])
    self._store = pltpu.make_async_copy(self._here, tile, semaphores.at[1])
    self._count, self._again, self._last = count, again, last

  def load(self) -> None:
    """Begins to."""
    if self._again is None:
      self._load.start()
      return

    @pl.when(self._again)
    def _():
      self._here[...] = self._before[...]

    pl.when(~self._again)(self._load.start)

  def arrive(self) -> None:
    """Waits until it is loaded; once."""
    if self._again is None:
      self._load.wait()
    else:
      pl.when(~self._again)(self._load.wait)

  def add(self, x: Array) -> None:
    """To what has been loaded."""
    self.arrive()
    self._here[:, : x.shape[1]] += x

  def store(self) -> None:
    """Begins to, and for the last program ends."""
    pl.when(self._count > 0)(self._store.wait)  # any store is as long as the one before
    self._store.start()
    pl.when(self._last)(self._store.wait)
