"""How busy a GPU's multiprocessors are, simulated: programs start in the order of their launch."""

import heapq
import operator
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from effjax.kernels.flash_attention.fused import programs
from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.tile_map.blocks import TileList
from scripts.checks.alone import MASKS, Case, program

LENGTHS = (4096, 8192, 16384)
_PLACES = {
  "forward": programs.by_rows,
  "queries": programs.by_rows,
  "keys": programs.by_columns,
}


def busy(work: Iterable[float], slots: int) -> float:
  """Share of the time that slots work, when each takes the next program as soon as it is free.

  Example:
    >>> busy([1, 1, 2], slots=2), busy([2, 1, 1], slots=2)
    (0.6666666666666666, 1.0)
  """
  free = [0.0] * slots
  total = 0.0
  for each in work:
    heapq.heappush(free, heapq.heappop(free) + each)
    total += each
  return total / (slots * max(free)) if total else 1.0


def job_of(case: Case, kernel: str, device: str, length: int, batch: int = 1) -> Job:
  """What a kernel works on, in the tiles for a device of that name."""
  jobs: list[Job] = []
  run = program(case, kernel, "gpu", case.sizes("gpu", length, device), watch=jobs.append)
  jax.eval_shape(run, *case.arguments(kernel, length, batch))
  return jobs[-1]


def tiles(job: Job, kernel: str, mask: Any) -> tuple[np.ndarray, np.ndarray]:
  """Tiles without a predicate, and with one, of each program in the order of launch.

  Args:
    mask: of batch one, and concrete.
  """
  (_, T, N, _), S = job.query.shape, job.key.shape[1]
  place, per = _PLACES[kernel](job), job.group if kernel == "keys" else 1
  lists = [
    mask.blocks(T, S, job.size.queries, job.size.keys, head=head) for head in range(mask.heads)
  ]
  side = operator.attrgetter("columns" if kernel == "keys" else "rows")
  rows = np.stack([_of_rows(side(each)) for each in lists])  # [heads, rows, 2]
  rows = np.broadcast_to(rows, (N, *rows.shape[1:])).reshape(N // per, per, -1, 2).sum(1)
  ids = np.indices(place.grid).reshape(len(place.grid), -1, order="F")
  head = np.asarray(jax.vmap(place.axes["m" if kernel == "keys" else "n"][1])(*ids))
  offsets = np.stack([side(each).offset for each in lists])[None]
  order = programs.longest_first(TileList(offsets, None, None), per)
  row = ids[programs.ROWS]
  if order is not None:
    row = order[0, head * per % order.shape[1], row]
  full, partial = rows[head, row].T
  return full, partial


def _of_rows(lists: TileList) -> np.ndarray:
  full = lists.partial - lists.offset[:-1]
  return np.stack([full, np.diff(lists.offset) - full], axis=-1)


def simulated(case: Case, kernel: str, device: str, slots: int, weight: float) -> dict[str, float]:
  """`busy` for one batch row of each length, by "busy 4k" and so on; documents are of 1024.

  Args:
    weight: of a tile with a predicate, that of one without being one.
  """
  found = {}
  for length in LENGTHS:
    mask = MASKS[case.mask](np.arange(length)[None] // 1024)
    full, partial = tiles(job_of(case, kernel, device, length), kernel, mask)
    share = busy((full + weight * partial).tolist(), slots)
    found[f"busy {length // 1024}k"] = round(share, 3)
  return found
