"""How busy a GPU's multiprocessors are, simulated: programs start in the order of their launch."""

import heapq
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.programs import by_columns, by_rows, longest_first
from effjax.kernels.flash_attention.tile_map.blocks import TileList
from scripts.checks.alone import MASKS, Case, program

LENGTHS = (4096, 8192, 16384)
_PLACES = {"forward": by_rows, "queries": by_rows, "keys": by_columns}
_ROWS = {"forward": 2, "queries": 2, "keys": 1}  # the grid's axis of tiles


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
  (_, T, _, _), S, place = job.query.shape, job.key.shape[1], _PLACES[kernel](job)
  blocks = [
    mask.blocks(T, S, job.size.queries, job.size.keys, head=head) for head in range(mask.heads)
  ]
  by_head = [each.columns if kernel == "keys" else each.rows for each in blocks]
  offset, partial = (
    np.stack([getattr(each, name) for each in by_head])[None] for name in ("offset", "partial")
  )
  per = job.group if kernel == "keys" else 1
  order = longest_first(TileList(offset, partial, offset), per)
  ids = np.indices(place.grid).reshape(len(place.grid), -1, order="F")
  first = np.asarray(jax.vmap(place.axes["n"][1])(*ids)) * per
  row = ids[_ROWS[kernel]]
  found = np.zeros((2, len(row)))
  for head in (first + g for g in range(per)):
    h = head if mask.heads > 1 else 0 * head
    i = row if order is None else order[0, h, row]
    full = partial[0, h, i] - offset[0, h, i]
    found += full, offset[0, h, i + 1] - offset[0, h, i] - full
  return found[0], found[1]


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
