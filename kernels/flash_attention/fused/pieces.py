"""Lists of tiles cut into pieces, so that no program of a GPU works much longer than the others.

A row that is much longer than most, as that of a query which sees all keys, is worked on by several
programs. What they give lies in slots of its own until it is joined (`joins.py`); rows that are one
piece are written where they belong, as if nothing were cut.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.kernels.flash_attention.tile_map.blocks import Index, TileList

PROGRAMS = 256  # about as many as fill a device
_LEAST = 4  # tiles that are worth a program


@dataclasses.dataclass(frozen=True)
class Pieces:
  """The programs of each batch row and head, a piece of a row's list each.

  Attributes:
    lists: the tiles of each piece; those of a row follow each other.
    order: [b, h, pieces], the pieces in the order in which they start; as they lie if None.
    row, slot: [b, h, pieces], the row of each piece and the slot that takes what it gives, −1 for a
      row that is not cut; None where none is.
    slots: number of slots of a batch row and head.
    joined, ends: [b, h, n], the rows that are cut, and [b, h, n + 1], where the slots of each
      begin, up to where the next one's do; a row without slots is none.
  """

  lists: TileList
  order: Index | None = None
  row: np.ndarray | None = None
  slot: np.ndarray | None = None
  slots: int = 0
  joined: np.ndarray | None = None
  ends: np.ndarray | None = None

  @classmethod
  def of(cls, lists: TileList, programs: int, group: int = 1, splits: int = 1) -> "Pieces":
    """Lists that are known while tracing are cut where they are long, and all into `splits`.

    Args:
      programs: how many there are of a row, over all batch rows and heads.
      group: heads that are worked on by one program, whose lists are cut alike.
    """
    lengths = lengths_of(lists, group)
    if isinstance(lengths, np.ndarray):
      counts = np.clip(_long(lengths, programs), splits, None)
      counts = np.maximum(np.minimum(counts, lengths), 1)
    else:
      counts = np.full(lengths.shape, splits)
    if counts.max() == 1:
      return cls(lists, longest_first(lengths))
    row, part, slot, joined, ends = _cut(counts)
    joined, ends = joined[:, ::group], ends[:, ::group]  # heads of a group have the same
    cut = _of_pieces(lists, row, part, np.take_along_axis(counts, row, -1))
    # Traced ones are as even as `splits` makes them.
    order = longest_first(lengths_of(cut, group)) if isinstance(cut.offset, np.ndarray) else None
    return cls(cut, order, row, slot, int(slot.max()) + 1, joined, ends)

  @property
  def count(self) -> int:
    """Pieces of a batch row and head."""
    return self.lists.offset.shape[-1] - 1


def lengths_of(lists: TileList, group: int = 1) -> Index:
  """[b, h, rows], tiles that a program goes through; lists of a group's heads count together."""
  xp = np if isinstance(lists.offset, np.ndarray) else jnp
  lengths = xp.diff(lists.offset, axis=-1)
  b, h, rows = lengths.shape
  if h > 1:
    lengths = lengths.reshape(b, h // group, group, rows)
    lengths = xp.broadcast_to(lengths.sum(2, keepdims=True), lengths.shape).reshape(b, h, rows)
  return lengths


def longest_first(lengths: Index) -> Index | None:
  """[b, h, rows], the rows by falling length of their lists; None if they all have one length."""
  known = isinstance(lengths, np.ndarray)
  if lengths.shape[-1] == 1 or (known and not np.ptp(lengths)):
    return None
  xp = np if known else jnp
  return xp.argsort(-lengths, axis=-1, stable=True).astype(xp.int32)


def _long(lengths: np.ndarray, programs: int) -> np.ndarray:
  """In how many pieces lists are worth working on [b, h, rows].

  A list is long that would keep a program busy for half the time that a device takes for all of
  them, and for more than twice the mean: lists that grow steadily need no more than an order. Its
  pieces are half as long as it may be.
  """
  most = lengths.mean() * max(2, programs * lengths.shape[-1] / (2 * PROGRAMS))
  pieces = np.ceil(lengths / max(most / 2, _LEAST)).astype(np.int64)
  return np.where(lengths > most, pieces, 1)


def _cut(counts: np.ndarray) -> tuple[np.ndarray, ...]:
  """Row, part and slot of each piece, the rows that are cut, and the ends of their slots.

  Where a head has fewer pieces than others, nothing of its last row follows, with a slot that no
  row has.
  """
  b, h, _ = counts.shape
  several = np.where(counts > 1, counts, 0)
  pieces, slots = (int(x.sum(-1).max()) for x in (counts, several))
  most = int((several > 0).sum(-1).max())

  def of_head(counts, several):
    at, used = np.arange(pieces), counts.sum()
    row = np.pad(np.repeat(np.arange(len(counts)), counts), (0, pieces - used), mode="edge")
    part = np.minimum(at - (np.cumsum(counts) - counts)[row], counts[row])
    first = np.cumsum(several) - several
    slot = np.where(at < used, np.where(several[row] > 0, first[row] + part, -1), slots)
    joined = np.flatnonzero(several)
    short = most - len(joined)
    ends = np.pad(np.append(first[joined], several.sum()), (0, short), mode="edge")
    return row, part, slot, np.pad(joined, (0, short)), ends

  heads = zip(*(x.reshape(b * h, -1) for x in (counts, several)), strict=True)
  found = zip(*itertools.starmap(of_head, heads), strict=True)
  return tuple(np.stack(each).reshape(b, h, -1).astype(np.int32) for each in found)


def _of_pieces(lists: TileList, row: np.ndarray, part: np.ndarray, count: np.ndarray) -> TileList:
  """The lists with a row for each piece: `part` of the `count` equal ones of a row."""
  xp: Any = np if isinstance(lists.offset, np.ndarray) else jnp
  of = lambda x: xp.take_along_axis(x, row, axis=-1)
  begin, end = of(lists.offset), of(lists.offset[..., 1:])
  begin = begin + (end - begin) * part // count
  offset = xp.concatenate([begin, lists.offset[..., -1:]], axis=-1)
  partial = xp.clip(of(lists.partial), offset[..., :-1], offset[..., 1:])
  return TileList(offset.astype(np.int32), partial.astype(np.int32), lists.index)
