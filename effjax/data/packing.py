"""Documents packed into rows of fixed length.

Documents of one stream (each its tokens and then the end token) are cut into pieces, and pieces
are laid into rows of `length` positions. A piece attends to itself only, its positions start at 0,
and the target of a position is the next token of the same document, also across a cut. So every
token of the stream is a target of weight one exactly once, except the first of each document,
which nothing precedes.

Two ways to cut: `contiguous` splits the stream every `length` tokens, which cuts many documents and
pads nothing but the last row. `best_fit` cuts only documents longer than a row and lays the pieces,
longest first, into the fullest row they fit in: "best-fit packing" of Ding et al., "Fewer
Truncations Improve Language Modeling" (2024), section 3.
"""

import bisect
import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from effjax.core.known import number
from effjax.core.typing import Size

Batch = dict[str, np.ndarray]
PADDING_SEGMENT = -1


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which pieces of a stream make up which rows; P pieces, R rows.

  Invariants: row r holds the pieces `rows[r]` … `rows[r + 1] - 1` one after another; the sizes of a
  row's pieces add up to at most `length`; `last[p]` says that piece p ends its document.
  """

  length: int
  starts: Int[np.ndarray, "P"]
  sizes: Int[np.ndarray, "P"]
  last: Bool[np.ndarray, "P"]
  rows: Int[np.ndarray, "R1"]

  def __len__(self) -> int:
    return len(self.rows) - 1

  @property
  def targets(self) -> int:
    """How many positions of all rows carry a target of weight one."""
    return int(self.sizes.sum() - self.last.sum())


def _check(lengths: np.ndarray, length: Size) -> np.ndarray:
  lengths = np.asarray(lengths, np.int64)
  if number("length", length, integer=True) < 2:
    raise ValueError(f"length is {length}; a row needs at least 2 positions")
  if lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1:
    raise ValueError("lengths must be one positive number of tokens a document, and not empty")
  return lengths


def contiguous(lengths: Integer[np.ndarray, "N"], length: Size) -> Plan:
  """Rows that are consecutive slices of the concatenated documents.

  Args:
    lengths: tokens of each of the N documents, the end token included.
    length: positions of a row.

  Raises ValueError where `length` is below 2 or `lengths` has no or an empty document.

  >>> plan = contiguous(np.array([3, 4]), 5)
  >>> plan.starts, plan.sizes, plan.rows
  (array([0, 3, 5]), array([3, 2, 2]), array([0, 2, 3]))
  """
  ends = np.cumsum(_check(lengths, length))
  total = int(ends[-1])
  cuts = np.union1d(np.concatenate([[0], ends]), np.arange(0, total, length))
  starts, stops = cuts[:-1], cuts[1:]
  rows = np.append(np.searchsorted(starts, np.arange(0, total, length)), len(starts))
  return Plan(length, starts, stops - starts, np.isin(stops, ends), rows)


def _pieces(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Starts, sizes and `last` of documents cut every `length` tokens, in order.

  A final piece that would be the end token alone predicts nothing, and is left out.
  """
  counts = np.maximum(-(-(lengths - 1) // length), 1)
  document = np.repeat(np.arange(len(lengths)), counts)
  number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
  sizes = np.minimum(lengths[document] - number * length, length)
  starts = (np.cumsum(lengths) - lengths)[document] + number * length
  return starts, sizes, number * length + sizes == lengths[document]


def _fill_rows(sizes: np.ndarray, length: int) -> list[list[int]]:
  """Piece numbers row by row: each piece, longest first, goes where the least room is left."""
  rows: list[list[int]] = []
  by_room: dict[int, list[int]] = {}
  rooms: list[int] = []
  for piece in np.argsort(-sizes, kind="stable").tolist():
    size = int(sizes[piece])
    place = bisect.bisect_left(rooms, size)
    if place == len(rooms):
      row, room = len(rows), length - size
      rows.append([])
    else:
      room = rooms[place]
      row = by_room[room].pop()
      if not by_room[room]:
        rooms.pop(place)
      room -= size
    rows[row].append(piece)
    if room and not by_room.setdefault(room, []):
      bisect.insort(rooms, room)
    if room:
      by_room[room].append(row)
  return rows


def best_fit(lengths: Integer[np.ndarray, "N"], length: Size) -> Plan:
  """Rows that cut a document only where it is longer than a row.

  Args:
    lengths: tokens of each of the N documents, the end token included.
    length: positions of a row.

  Raises ValueError where `length` is below 2 or `lengths` has no or an empty document.

  >>> plan = best_fit(np.array([3, 4, 2]), 5)
  >>> plan.starts, plan.sizes, plan.rows
  (array([3, 0, 7]), array([4, 3, 2]), array([0, 1, 3]))
  """
  starts, sizes, last = _pieces(_check(lengths, length), length)
  rows = _fill_rows(sizes, length)
  order = np.array([piece for row in rows for piece in row])
  bounds = np.cumsum([0] + [len(row) for row in rows])
  return Plan(length, starts[order], sizes[order], last[order], bounds)


PACKINGS = {"contiguous": contiguous, "best_fit": best_fit}


def pack(lengths: Integer[np.ndarray, "N"], length: Size, packing: str = "contiguous") -> Plan:
  """The plan of a packing by name: "contiguous" or "best_fit".

  Raises ValueError for another name, and as the packing itself does.

  >>> len(pack(np.array([3, 4, 2]), 5, "best_fit"))
  2
  """
  if packing not in PACKINGS:
    raise ValueError(f"packing {packing!r} is unknown; allowed: {', '.join(PACKINGS)}")
  return PACKINGS[packing](lengths, number("length", length, integer=True))


def empty_rows(count: int, length: int, pad_id: int = 0) -> Batch:
  """Rows of nothing but padding: segment -1, weight 0, tokens and targets `pad_id`.

  >>> empty_rows(1, 2)["segment_ids"]
  array([[-1, -1]], dtype=int32)
  """
  shape = (count, length)
  return {
    "tokens": np.full(shape, pad_id, np.int32),
    "targets": np.full(shape, pad_id, np.int32),
    "weights": np.zeros(shape, np.float32),
    "segment_ids": np.full(shape, PADDING_SEGMENT, np.int32),
    "positions": np.zeros(shape, np.int32),
  }


def fill(
  row: Batch, stream: Integer[np.ndarray, "Z"], plan: Plan, index: int
) -> Float[np.ndarray, "T"]:
  """Writes row `index` of a plan into one padding row ([T] views); returns its weights.

  >>> row = {name: value[0] for name, value in empty_rows(1, 5).items()}
  >>> fill(row, np.arange(10, 17), contiguous(np.array([3, 4]), 5), 0)
  array([1., 1., 0., 1., 1.], dtype=float32)
  >>> row["tokens"], row["targets"], row["segment_ids"], row["positions"]
  (array([10, 11, 12, 13, 14], dtype=int32), array([11, 12,  0, 14, 15], dtype=int32),
   array([0, 0, 0, 1, 1], dtype=int32), array([0, 1, 2, 0, 1], dtype=int32))
  """
  at = 0
  for segment, piece in enumerate(range(plan.rows[index], plan.rows[index + 1])):
    start, size = int(plan.starts[piece]), int(plan.sizes[piece])
    predicted = size - int(plan.last[piece])
    row["tokens"][at : at + size] = stream[start : start + size]
    row["targets"][at : at + predicted] = stream[start + 1 : start + 1 + predicted]
    row["weights"][at : at + predicted] = 1.0
    row["segment_ids"][at : at + size] = segment
    row["positions"][at : at + size] = np.arange(size)
    at += size
  return row["weights"]
