"""Where virtual tokens go in the rows of a batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from effjax.core.known import known

OF_ROWS = ("attributes", "memory", "memory_segment_ids")  # not of tokens, whatever their shape


class Places(NamedTuple):
  """What stands where, [B, W] each.

  Attributes:
    column: the column of a token before, of a virtual one that of its document's first token.
    nth: which virtual token it is; −1 for others.
    there: False at padding that fills up a row.
  """

  column: np.ndarray
  nth: np.ndarray
  there: np.ndarray

  @classmethod
  def of(cls, segment_ids: np.ndarray, count: int) -> "Places":
    """Those of rows where each document is preceded by `count` virtual tokens.

    Example:
      >>> Places.of(np.array([[4, 4, -1]]), 2).nth.tolist()
      [[0, 1, -1, -1, -1]]
    """
    rows = [_row(row, count) for row in segment_ids]
    width = max((len(row) for row in rows), default=0)
    filled = np.zeros((len(rows), width, 2), np.int32)
    there = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
      filled[i, : len(row)], there[i, : len(row)] = row, True
    return cls(filled[..., 0], np.where(there, filled[..., 1], -1), there)

  @property
  def virtual(self) -> np.ndarray:
    return self.nth >= 0

  def take(self, x: np.ndarray) -> np.ndarray:
    """What stands at the column of each place, [B, W, …]."""
    return x[np.arange(len(x))[:, None], self.column]


def _row(ids: np.ndarray, count: int) -> np.ndarray:
  """(column, nth) of each place of a row."""
  values, first = np.unique(ids, return_index=True)
  starts = np.sort(first[values >= 0])
  tokens = np.stack([np.arange(len(ids)), np.full(len(ids), -1)], axis=1)
  blocks = np.stack([np.repeat(starts, count), np.tile(np.arange(count), len(starts))], axis=1)
  return np.insert(tokens, np.repeat(starts, count), blocks, axis=0)


def widened(batch: Mapping[str, Any], virtual: np.ndarray) -> dict[str, Any]:
  """`batch` with the ids `virtual` [B, P] before each document, as `soft_prompt.prepend` says.

  Raises:
    ValueError: for tokens that are no integers [B, T], and for what is traced.
  """
  given = {name: _known(name, x) for name, x in batch.items()}
  tokens = given["tokens"]
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f"tokens: {tokens.dtype}{list(tokens.shape)}; allowed: integers [B, T]")
  places = Places.of(given.get("segment_ids", np.zeros_like(tokens)), virtual.shape[1])
  if "targets" in given and "weights" not in given:
    given["weights"] = np.ones(tokens.shape, np.float32)
  own = np.take_along_axis(virtual, np.maximum(places.nth, 0), axis=1)
  return {
    name: x if name in OF_ROWS else _placed(name, x, tokens, places, own)
    for name, x in given.items()
  }


def _placed(
  name: str, x: np.ndarray, tokens: np.ndarray, places: Places, own: np.ndarray
) -> np.ndarray:
  """An entry of a batch, `own` being the ids of virtual tokens."""
  if name == "global_positions":
    return _moved(x, places)
  if x.shape[:2] != tokens.shape:
    return x
  count, virtual = places.nth.max(initial=-1) + 1, places.virtual
  last, taken = virtual & (places.nth == count - 1), places.take(x)
  if name == "tokens":
    found = np.where(virtual, own, taken)
  elif name == "segment_ids":
    return np.where(places.there, taken, -1).astype(x.dtype)
  elif name == "positions":
    found = taken + np.where(virtual, places.nth, count)
  elif name == "targets":
    found = np.where(virtual, np.where(last, places.take(tokens), 0), taken)
  elif name == "weights":
    found = np.where(virtual & ~last, 0, taken)
  elif name == "previous":
    before = np.pad(own[:, :-1], ((0, 0), (1, 0)))
    after_virtual = np.pad(last[:, :-1], ((0, 0), (1, 0)))
    found = np.where((places.nth > 0) | after_virtual, before, taken)
  else:
    found = _zeros_unless(~virtual, taken)
  return _zeros_unless(places.there, found).astype(x.dtype)


def _moved(positions: np.ndarray, places: Places) -> np.ndarray:
  """Global positions, negative for none, where their tokens now stand."""
  token = ~places.virtual & places.there
  where = np.stack([np.flatnonzero(row) for row in token])
  moved = np.take_along_axis(where, np.maximum(positions, 0), axis=1)
  return np.where(positions < 0, positions, moved).astype(positions.dtype)


def _zeros_unless(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
  return np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, np.zeros((), x.dtype))


def _known(name: str, x: Any) -> np.ndarray:
  values = known(x)
  if values is None:
    raise ValueError(f"{name} is traced; allowed: arrays whose values are known")
  return values
